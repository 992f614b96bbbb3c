"""AGC: its perspectives against torchvision's, its score and its arc by hand."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from defense_toys import (
    CLASSES,
    WIDTH,
    check_costs,
    check_own_result,
    dots,
    exact_logits,
    looked_at,
    ran,
    toyed,
)
from scc_fast import image_seeds, tiny
from scc_fast.defenses import augment
from scc_fast.defenses.agc import AGC, CORNERS, AGCConfig
from scc_fast.engine.batch import warped
from scc_fast.reference import philox
from toys import defender_of


def corners_of(u: np.ndarray, height: int, width: int) -> list[list[int]]:
    """RandomPerspective.get_params of distortion 0.5 from eight uniforms."""
    right, down = int(0.5 * (width // 2)), int(0.5 * (height // 2))
    inwards = [[int(x * (right + 1)), int(y * (down + 1))] for x, y in u.reshape(4, 2)]
    (a, b), (c, d), (e, f), (g, h) = inwards
    far, low = width - 1, height - 1
    return [[a, b], [far - c, d], [far - e, low - f], [g, low - h]]


@pytest.mark.parametrize("size", [(40, 56), (33, 21)])
def test_perspectives_are_torchvision_s(size: tuple[int, int]) -> None:
    height, width = size
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    u = torch.rand(2, 5, 8, generator=torch.Generator().manual_seed(1))
    maps = augment.perspectives(u, size, 0.5).transpose(0, 1)
    got = warped(x, maps, fill=(0.0, 0.0, 0.0))
    start = [[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]]
    for view, image in np.ndindex(5, 2):
        ends = corners_of(u[image, view].numpy(), height, width)
        want = TF.perspective(x[image], start, ends)
        torch.testing.assert_close(got[view, image], want, atol=2e-4, rtol=0)
    still = augment.perspectives(torch.zeros(1, 8), size, 0.5)[0]
    torch.testing.assert_close(still / still[2, 2], torch.eye(3), atol=1e-6, rtol=0)


def test_the_pictures_are_the_card_s() -> None:
    """Bicubic by Pillow, from the middle of each perspective; black around it."""
    x, seeds = tiny.generate("test", range(3))[0], image_seeds(5, 3)
    pictures = looked_at(defender_of(method="agc"), x, seeds)
    assert pictures.shape == (33, *x.shape)
    assert torch.equal(pictures[0], x)
    draws = philox.uniform(seeds, CORNERS, 0, 256).view(3, 32, 8)
    start = [[0, 0], [63, 0], [63, 63], [0, 63]]
    for image, view in np.ndindex(3, 32):
        ends = corners_of(draws[image, view].numpy(), 64, 64)
        for colour in range(3):
            flat = Image.fromarray(x[image, colour].numpy(), mode="F")
            cubic = TF.InterpolationMode.BICUBIC
            want = np.array(TF.perspective(flat, start, ends, interpolation=cubic, fill=0))
            inner = np.s_[24:40, 24:40]  # where corners cannot come
            got = pictures[1 + view, image, colour].numpy()
            np.testing.assert_allclose(got[inner], want[inner].clip(0, 1), atol=2e-4)
    assert (pictures[1:, :, :, 0, 0] == 0).float().mean() > 0.5


def by_hand(defense: Any, f: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean cosine (B,) and logits (B, K) from features (33, B, D), in float64."""
    config, text = defense.config, np.float64(defense.table.text.numpy())
    cosines, answers = [], []
    for rows in np.float64(f).transpose(1, 0, 2):
        x, *views = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        a = np.stack(views)
        n = len(a)
        o = np.clip(np.mean([1 - v @ x for v in a]), 0, 1)
        r = np.mean([a[i] @ a[j] for i in range(n) for j in range(n) if i != j])
        score = np.clip(o**0.9 * np.clip((r + 1) / 2, 0, 1), 0, 1)
        beta = config.least + (config.most - config.least) * score
        anchor = a.mean(axis=0) / np.linalg.norm(a.mean(axis=0))
        theta = np.arccos(x @ anchor)
        u = anchor - (x @ anchor) * x
        z = np.cos(beta * theta) * x + np.sin(beta * theta) * u / np.linalg.norm(u)
        cosines.append(np.mean(a @ x))
        answers.append(defense.table.scale * z @ text.T + defense.table.bias)
    return np.array(cosines), np.stack(answers)


@pytest.mark.parametrize("config", [{}, {"view_count": 3}, {"least": 1.0, "most": 1.0}])
def test_score_and_arc_by_hand(config: dict[str, Any]) -> None:
    x, seeds = dots(4, (3, 8, 8)), image_seeds(1, 4)
    weight = torch.randn(192, WIDTH, generator=torch.Generator().manual_seed(9))
    defense = toyed(AGC, **config)
    defense.session = replace(defense.session, encoded=lambda p: (p.flatten(1) - 0.3) @ weight)
    features = defense.session.features(looked_at(defense, x, seeds))
    outcome = ran(defense, x, seeds)
    cosines, logits = by_hand(defense, features.numpy())
    np.testing.assert_allclose(outcome.drift.numpy(), cosines, atol=1e-5)
    np.testing.assert_allclose(outcome.logits.numpy(), logits, atol=2e-4)
    assert cosines.std() > 0.001
    assert not outcome.flagged.any()
    assert not outcome.delta.any()


def test_what_an_attacker_differentiates() -> None:
    """The answer's slope by differences, through every perspective."""
    defense, x, seeds = toyed(AGC), dots(2), image_seeds(0, 2)
    out = torch.randn(2, CLASSES, generator=torch.Generator().manual_seed(5))
    leaf = (0.4 + 0.2 * x).requires_grad_()  # no overshoot meets the clamp, nearly
    logits = defense.live(leaf, seeds).logits
    torch.testing.assert_close(logits, ran(defense, leaf.detach(), seeds).logits)
    (slope,) = torch.autograd.grad((logits * out).sum(), leaf)
    step = 1e-2 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(1))
    up, down = (
        by_hand(defense, np.stack([defense.session.encode.exact(v) for v in
                                   looked_at(defense, leaf.detach() + s, seeds).numpy()]))[1]
        for s in (step, -step)
    )  # fmt: skip
    want = ((up - down) / 2 * out.numpy()).sum()
    assert (slope * step).sum().item() == pytest.approx(want, rel=5e-2)
    assert exact_logits(defense, x.numpy()).shape == (2, CLASSES)


def test_one_pixel_and_one_colour() -> None:
    """Views without a picture are black; nothing becomes NaN, for an attacker neither."""
    one = torch.rand(2, 3, 1, 1)
    assert not looked_at(defender_of(method="agc"), one, image_seeds(0, 2))[1:].any()
    defense, x = defender_of(method="agc"), torch.zeros(2, 3, 64, 64).requires_grad_()
    logits = defense.live(x, image_seeds(0, 2)).logits
    (slope,) = torch.autograd.grad(logits.sum(), x)
    assert slope.isfinite().all()


def test_fused_and_not_are_the_same() -> None:
    """Views written for the encoder at once, and pictures that it prepares itself."""
    x, seeds = tiny.generate("test", range(3))[0], image_seeds(2, 3)
    defense = defender_of(method="agc")
    session = defense.session
    fused = ran(defense, x, seeds)
    defense.session = replace(session, encoded=session.encode)
    apart = ran(defense, x, seeds)
    torch.testing.assert_close(fused.logits, apart.logits, atol=1e-4, rtol=1e-4)
    large = torch.nn.functional.interpolate(x, (90, 80), mode="bilinear")
    assert ran(defender_of(method="agc"), large, seeds).logits.isfinite().all()


def test_cost_and_config() -> None:
    check_costs(toyed(AGC))
    assert (toyed(AGC).traits.forward, toyed(AGC).traits.backward) == (33, 0)
    assert dataclasses.astuple(AGCConfig()) == (32, 0.5, 0.45, 2.25)
    for wrong, told in [
        ({"view_count": 1}, r"view_count must be a whole number in \[2, 1024\], got 1"),
        ({"distortion": 2}, "distortion must be a number"),
        ({"most": 0.1}, "most must be a number"),
    ]:
        with pytest.raises(ValueError, match=told):
            AGCConfig(**wrong)  # type: ignore[arg-type]


def test_on_the_bundled_model() -> None:
    """A model of 64 pixels knows little of what is turned away from it: β stays small here."""
    check_own_result(AGC)
    x, labels = tiny.generate("test", range(20))
    for config in ({"most": 0.45}, {"distortion": 0.1}):
        result = defender_of(method="agc", config=config)(x, 0)
        assert (result.labels == labels).float().mean() >= 0.8
