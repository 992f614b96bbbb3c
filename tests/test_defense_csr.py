"""CSR: its filter, its gate, its steps and its choice of an iterate, by hand."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from defense_toys import (
    SHAPE,
    Toy,
    check_bpda,
    check_costs,
    check_own_result,
    confined,
    dots,
    exact_logits,
    ran,
    toyed,
)
from scc_fast import image_seeds, tiny
from scc_fast.defenses.csr import CSR, CSRConfig, low_pass
from toys import defender_of


def filtered(x: np.ndarray, radius: float) -> np.ndarray:
    """The card's filter on shifted spectra, bins counted for a side of 224."""
    height, width = x.shape[-2:]
    down = (np.arange(height) - height // 2) * 224 / height
    right = (np.arange(width) - width // 2) * 224 / width
    mask = np.exp(-(down[:, None] ** 2 + right[None] ** 2) / (2 * radius**2))
    spectrum = np.fft.fftshift(np.fft.fft2(x), axes=(-2, -1))
    return np.clip(np.fft.ifft2(np.fft.ifftshift(spectrum * mask, axes=(-2, -1))).real, 0, 1)


def unit(f: np.ndarray) -> np.ndarray:
    return f / np.linalg.norm(f, axis=1, keepdims=True)


def rectified(defense: Any, x: Tensor, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The card in float64: C (B,), the iterates x_0 to x_N and their R (N + 1, B, ...)."""
    config, toy = defense.config, defense.session.encode
    start = np.float64(x.numpy())
    came = unit(toy.exact(start))
    low = unit(toy.exact(filtered(start, config.radius)))
    point, points, scores = start, [], []
    for at in range(steps + 1):
        f = toy.exact(point)
        u = unit(f)
        points.append(point)
        scores.append((u * low).sum(axis=1) - config.repulsion * (u * came).sum(axis=1))
        if at < steps:
            target = low - config.repulsion * came
            across = target - (u * target).sum(axis=1, keepdims=True) * u
            slope = toy.pull(across / np.linalg.norm(f, axis=1, keepdims=True), start)
            moved = point + config.alpha * np.sign(slope) - start
            point = start + confined(moved, start, config.epsilon)
    return (came * low).sum(axis=1), np.stack(points), np.stack(scores)


@pytest.mark.parametrize("shape", [SHAPE, (3, 32, 32), (3, 31, 20)])
@pytest.mark.parametrize("radius", [40.0, 8.0])
def test_the_filter(shape: tuple[int, ...], radius: float) -> None:
    x = dots(2, shape)
    got = low_pass(x, radius)
    np.testing.assert_allclose(got.numpy(), filtered(np.float64(x.numpy()), radius), atol=2e-6)
    assert (got - x).abs().max() > 0.05
    gray = torch.full((1, *shape), 0.25)
    torch.testing.assert_close(low_pass(gray, radius), gray)


def test_the_filter_s_factor_of_one_frequency() -> None:
    """A cosine of 28 periods in 224 pixels keeps exp(−28²/3200), and so does 7 periods in 56."""
    for side, periods in ((224, 28), (56, 7)):
        wave = torch.cos(2 * torch.pi * periods * torch.arange(side) / side)
        x = (0.5 + 0.4 * wave).expand(1, 3, side, side)
        kept = (low_pass(x, 40.0) - 0.5) / 0.4
        torch.testing.assert_close(kept[0, 0, 0], 0.782705 * wave, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "config",
    [{}, {"steps": 1}, {"steps": 5, "alpha": 1 / 255}, {"repulsion": 0.5, "epsilon": "6/255"}],
)
@pytest.mark.parametrize("published", [False, True])
def test_steps_by_hand(config: dict[str, Any], published: bool) -> None:
    defense, x = toyed(CSR, threshold=1.0, published=published, **config), dots(6)
    similarity, points, scores = rectified(defense, x, defense.config.steps)
    first = 0 if published else 1
    best = first + scores[first:].argmax(axis=0)
    want = points[best, np.arange(6)]
    outcome = ran(defense, x, image_seeds(0, 6))
    np.testing.assert_allclose((x + outcome.delta).numpy(), want, atol=1e-6)
    np.testing.assert_allclose(outcome.drift.numpy(), similarity, atol=1e-6)
    np.testing.assert_allclose(outcome.logits.numpy(), exact_logits(defense, want), atol=1e-4)
    assert outcome.flagged.all()
    assert outcome.delta.abs().amax(dim=(1, 2, 3)).min() > 0


class Misleading(Toy):
    """The toy with a gradient of the wrong sign: each step makes R worse."""

    def __call__(self, pixels: Tensor) -> Tensor:
        found = super().__call__(pixels)
        return 2 * found.detach() - found


def test_the_picture_itself_competes_only_as_published() -> None:
    x, seeds = dots(4), image_seeds(0, 4)
    deltas = []
    for published in (False, True):
        defense = toyed(CSR, threshold=1.0, published=published)
        defense.session = replace(defense.session, encoded=Misleading())
        deltas.append(ran(defense, x, seeds).delta)
    assert (deltas[0].abs().amax(dim=(1, 2, 3)) > 1 / 255).all()
    assert not deltas[1].any()


def test_the_best_iterate_need_not_be_the_last() -> None:
    """An encoder that changes its mind: the second pass scores best."""
    defense, x = toyed(CSR, threshold=1.0), dots(2)
    toy, calls = defense.session.encode, []
    low = low_pass(x, 40.0)

    def encode(pixels: Tensor) -> Tensor:
        calls.append(pixels.detach().clone())
        found = toy(pixels)  # of the gate, x, x_1, x_2, x_3 and the prediction
        return found - found.detach() + toy(low) if len(calls) == 3 else found

    defense.session = replace(defense.session, encoded=encode)
    outcome = ran(defense, x, image_seeds(0, 2))
    assert len(calls) == 6
    assert torch.equal(x + outcome.delta, calls[2])
    assert not torch.equal(calls[2], calls[3])


def test_the_gate_passes_its_own_threshold() -> None:
    x, seeds = dots(3), image_seeds(0, 3)
    drift = ran(toyed(CSR), x, seeds).drift
    assert len(drift.unique()) == 3
    tie = float(drift.median())
    defense = toyed(CSR, threshold=tie)
    outcome = ran(defense, x, seeds)
    assert torch.equal(outcome.flagged, drift < tie)
    assert outcome.flagged.sum() == 1
    touched = outcome.delta.abs().amax(dim=(1, 2, 3)) > 0
    assert torch.equal(touched, outcome.flagged)  # a picture that passes stays as it is
    kept = ~outcome.flagged.numpy()
    np.testing.assert_allclose(
        outcome.logits.numpy()[kept], exact_logits(defense, x.numpy())[kept], atol=1e-4
    )
    margin = defense.live(x, seeds).margin
    torch.testing.assert_close(margin, tie - drift)
    assert torch.equal(margin > 0, outcome.flagged)
    above = toyed(CSR, threshold=float(np.nextafter(np.float32(tie), np.float32(1))))
    assert ran(above, x, seeds).flagged.sum() == 2


def test_the_gate_can_be_attacked() -> None:
    defense, x = toyed(CSR), dots(3)

    def margin(point: Tensor) -> Tensor:
        return defense.live(point, image_seeds(0, 3)).margin.sum()

    inside = 0.2 + 0.6 * x  # where the filter does not clip
    leaf = inside.clone().requires_grad_()
    (slope,) = torch.autograd.grad(margin(leaf), leaf)
    for at in ((0, 0, 1, 1), (2, 2, 3, 4)):
        moved = torch.zeros_like(x)
        moved[at] = 1e-2
        found = (margin(inside + moved) - margin(inside - moved)) / 2e-2
        assert found.item() == pytest.approx(slope[at].item(), rel=0.05, abs=2e-4)


def test_fast_is_one_step_less() -> None:
    x, seeds = dots(5), image_seeds(0, 5)
    for published in (False, True):
        fast = toyed(CSR, threshold=1.0, fast=True, published=published)
        two = toyed(CSR, threshold=1.0, steps=2, published=published)
        assert torch.equal(ran(fast, x, seeds).delta, ran(two, x, seeds).delta)
        assert (fast.traits.forward, fast.traits.backward) == (6, 2)  # as the card counts it


@pytest.mark.parametrize("config", [{}, {"fast": True}, {"steps": 1}, {"steps": 0}, {"steps": 5}])
def test_cost(config: dict[str, Any]) -> None:
    check_costs(toyed(CSR, threshold=1.0, **config))
    passing = toyed(CSR, threshold=-1.0, **config)
    ran(passing, dots(), image_seeds(0, 3))
    assert (passing.session.encode.forward, passing.session.encode.backward) == (6, 0)
    assert (toyed(CSR).traits.forward, toyed(CSR).traits.backward) == (7, 3)


def test_config() -> None:
    assert dataclasses.astuple(CSRConfig()) == (4 / 255, 2 / 255, 3, 0.85, 40.0, 1.0, False, False)
    assert CSRConfig.from_json(CSRConfig(fast=True).to_json()) == CSRConfig(fast=True)
    for wrong, told in [
        ({"threshold": 1.5}, r"threshold must be a number in \[-1, 1\], got 1.5"),
        ({"radius": 0}, "radius must be a number"),
        ({"repulsion": float("nan")}, "repulsion must be a number"),
        ({"fast": 1}, "fast must be True or False"),
        ({"steps": -1}, "steps must be a whole number"),
        ({"epsilon": 4}, "epsilon must be in"),
    ]:
        with pytest.raises(ValueError, match=told):
            CSRConfig(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(("threshold", "flagged"), [(1.0, 3), (0.98, 1), (-1.0, 0)])
def test_what_an_attacker_differentiates(threshold: float, flagged: int) -> None:
    defense, x, seeds = toyed(CSR, threshold=threshold), dots(), image_seeds(0, 3)
    assert ran(defense, x, seeds).flagged.sum() == flagged
    check_bpda(defense, x, seeds)


@pytest.mark.parametrize("threshold", [0.85, 1.0])
def test_a_result_is_the_image_s_own(threshold: float) -> None:
    check_own_result(CSR, threshold=threshold)


def test_on_the_bundled_model() -> None:
    x, labels = tiny.generate("test", range(20))
    result = defender_of(method="csr")(x, 0)
    assert (result.labels == labels).float().mean() >= 0.9
    forced = defender_of(method="csr", config={"threshold": 1.0})(x, 0)
    assert forced.flagged.all()
    assert forced.delta.abs().max() <= 4 / 255 + 1e-6
    assert -1e-6 <= (x + forced.delta).min() <= (x + forced.delta).max() <= 1 + 1e-6
