"""TTE: every transform by hand, the bug of the published code, what is averaged, what it costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from defense_toys import (
    CLASSES,
    Toy,
    check_bpda,
    check_costs,
    check_own_result,
    dots,
    exact_logits,
    looked_at,
    ran,
    softmax,
    toyed,
)
from scc_fast import Defender, image_seeds, tiny
from scc_fast.defenses.tte import TTE, EnsembleConfig, crop_origins
from toys import defender_of, model_of

SEEDS = image_seeds(0, 2)


def tte(**config: Any) -> Defender:
    return defender_of(method="tte", config=config)


def width(defense: Any) -> int:
    return defense.defense.width(defense.session, defense.session.size)


def crop_by_hand(x: np.ndarray, top: int, left: int, pad: int) -> np.ndarray:
    """(3, H, W) with what lies outside the picture at the model's mean."""
    out = np.zeros_like(x)
    _, height, width = x.shape
    for i in range(height):
        for j in range(width):
            row, column = i + top - pad, j + left - pad
            inside = 0 <= row < height and 0 <= column < width
            out[:, i, j] = x[:, row, column] if inside else model_of("tiny").mean
    return out


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize(("size", "pad"), [((16, 24), 2), ((32, 32), 4), ((5, 9), 1)])
def test_the_ten_pictures(size: tuple[int, int], pad: int, published: bool) -> None:
    x = dots(2, (3, *size))
    pictures = looked_at(tte(published=published), x, SEEDS).numpy()
    assert pictures.shape == (10, 2, 3, *size)
    image = x.numpy()
    np.testing.assert_array_equal(pictures[0], image)
    np.testing.assert_array_equal(pictures[1], image[..., ::-1])
    origins = crop_origins(0, 4, pad)
    for at in range(4):
        top, left = origins[3 if published else at]
        for b in range(2):
            straight = crop_by_hand(image[b], top, left, pad)
            mirrored = crop_by_hand(image[b, ..., ::-1], top, left, pad)
            np.testing.assert_array_equal(pictures[2 + at, b], straight.astype(np.float32))
            np.testing.assert_array_equal(pictures[6 + at, b], mirrored.astype(np.float32))
    different = {pictures[view, 0].tobytes() for view in range(10)}
    used = set(origins[3:] if published else origins)  # at its center a crop is the picture
    assert len(different) == 2 + 2 * len(used - {(pad, pad)})


@pytest.mark.parametrize("pad", [1, 4, 28])
def test_crops_differ_and_keep_to_the_frame(pad: int) -> None:
    seen = set()
    for seed in range(60):
        origins = crop_origins(seed, 4, pad)
        assert len(set(origins)) == 4
        assert all(0 <= corner < 2 * pad for origin in origins for corner in origin)
        assert crop_origins(seed, 2, pad) == origins[:2]
        seen.update(origins)
    corners = {corner for origin in seen for corner in origin}
    assert corners >= {0, 2 * pad - 1}  # both ends are drawn
    assert len(seen) > 0.9 * min(240, (2 * pad) ** 2)


def test_an_eighth_is_four_of_32_and_28_of_224(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        "scc_fast.defenses.tte.crop_origins", lambda *given: asked.append(given[2]) or ((0, 0),)
    )
    for size in ((32, 32), (224, 224), (224, 300), (1, 1)):
        looked_at(tte(crops=1), torch.zeros(1, 3, *size), SEEDS[:1])
    assert asked == [4, 28, 28, 1]


def test_the_blur_is_scipy_s() -> None:
    x = dots(2, (3, 6, 7))
    picture = looked_at(tte(crops=0, flip=False, blur=True), x, SEEDS)[1]
    impulse = np.zeros((5, 5))
    impulse[2, 2] = 1
    kernel = ndimage.gaussian_filter(impulse, sigma=1)
    assert kernel.sum() == pytest.approx(1)
    for b in range(2):
        for c in range(3):
            # "mirror" does not repeat the border pixel, as a reflection pad does not
            want = ndimage.correlate(np.float64(x[b, c].numpy()), kernel, mode="mirror")
            np.testing.assert_allclose(picture[b, c].numpy(), want, atol=1e-6)
    with pytest.raises(ValueError, match="blur must be False for pictures smaller than 3x3"):
        looked_at(tte(blur=True), torch.zeros(1, 3, 2, 9), SEEDS[:1])


@pytest.mark.parametrize("config", [{}, {"published": True}, {"blur": True}, {"flip": False}])
def test_logits_not_probabilities_are_averaged(config: dict[str, Any]) -> None:
    defense, x = toyed(TTE, **config), dots(2)
    pictures = looked_at(defense, x, SEEDS).numpy()
    each = np.stack([exact_logits(defense, view) for view in np.float64(pictures)])
    outcome = ran(defense, x, SEEDS)
    np.testing.assert_allclose(outcome.logits.numpy(), each.mean(axis=0), atol=1e-4)
    probabilities = np.stack([softmax(logits) for logits in each]).mean(axis=0)
    assert np.abs(softmax(outcome.logits.numpy()) - probabilities).max() > 1e-3
    assert not outcome.delta.any()
    assert not outcome.flagged.any()
    assert outcome.drift.isnan().all()


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({}, 10),
        ({"published": True}, 10),
        ({"blur": True}, 11),
        ({"flip": False}, 5),
        ({"crops": 0}, 2),
        ({"crops": 0, "flip": False}, 1),
    ],
)
def test_cost(config: dict[str, Any], count: int) -> None:
    defense = toyed(TTE, **config)
    assert width(defense) == defense.traits.forward == count
    assert defense.traits.backward == 0
    check_costs(defense)


def test_a_model_may_forbid_mirrors() -> None:
    class OneWay:
        def __getattr__(self, name: str) -> Any:
            return getattr(model_of("tiny"), name)

        flip = False

    for config, count in (({}, 5), ({"flip": True}, 10)):
        defense = Defender(OneWay(), ["a six", "a nine"], method="tte", config=config)
        assert width(defense) == count


def test_the_gradient_is_the_transforms_adjoint() -> None:
    """The transforms are affine: ⟨V(x) − V(0), w⟩ = ⟨x, Vᵀ w⟩, with Vᵀ w from autograd."""
    defense, x = tte(blur=True), dots(2, (3, 8, 9))

    def seen(pixels: Tensor) -> Tensor:
        return looked_at(defense, pixels, SEEDS)

    leaf = x.clone().requires_grad_()
    pictures = seen(leaf)
    w = torch.randn(pictures.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((pictures * w).sum(), leaf)
    moved = ((seen(x) - seen(torch.zeros_like(x))) * w).sum()
    torch.testing.assert_close((gradient * x).sum(), moved, rtol=1e-4, atol=1e-3)
    assert gradient.abs().min() > 0


def test_what_an_attacker_differentiates() -> None:
    """One transform, of which the gradient is known; then all ten."""
    check_bpda(toyed(TTE, crops=0, flip=False), dots(2), SEEDS)
    defense, leaf = toyed(TTE), dots(2).requires_grad_()
    logits = defense.live(leaf, SEEDS).logits
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), leaf)
    step = 1e-3 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(1))
    ahead, behind = (
        np.stack([exact_logits(defense, view) for view in looked_at(defense, at, SEEDS)])
        for at in (leaf.detach() + step, leaf.detach() - step)
    )
    slope = (ahead - behind).mean(axis=0)[:, 0].sum() / 2
    assert (gradient * step).sum().item() == pytest.approx(slope, rel=1e-3)
    assert logits.shape == (2, CLASSES)
    assert isinstance(defense.session.encode, Toy)


def test_config() -> None:
    assert EnsembleConfig() == EnsembleConfig(
        crops=4, flip=None, seed=0, blur=False, published=False
    )
    config = EnsembleConfig(crops=2, seed=-3, published=True)
    assert EnsembleConfig.from_json(config.to_json()) == config
    for wrong, told in [
        ({"crops": -1}, r"crops must be a whole number in \[0, 64\], got -1"),
        ({"crops": 2.0}, "crops must be a whole number"),
        ({"seed": 2**63}, "seed must be a whole number"),
        ({"seed": True}, "seed must be a whole number"),
        ({"blur": 5}, "blur must be True or False, got 5"),
        ({"flip": "no"}, "flip must be True, False or None"),
    ]:
        with pytest.raises(ValueError, match=told):
            EnsembleConfig(**wrong)
    with pytest.raises(ValueError, match=r"crops must be at most 4 for pictures.*padded by 1"):
        looked_at(tte(crops=5), torch.zeros(1, 3, 8, 8), SEEDS[:1])


def test_a_result_is_the_image_s_own() -> None:
    check_own_result(TTE)
    x = dots(2, (3, 64, 64))
    same = tte()(x, 1).logits
    assert torch.equal(tte()(x, 2).logits, same)  # no image's seed is used
    assert not torch.equal(tte(seed=1)(x, 1).logits, same)


def test_on_the_bundled_model() -> None:
    x, labels = tiny.generate("test", range(20))
    for config in ({}, {"published": True}):
        assert (tte(**config)(x, 0).labels == labels).float().mean() >= 0.9
