"""DBD: each of its pictures against an independent making, and its direction by hand."""

from __future__ import annotations

import dataclasses
import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from defense_toys import (
    CLASSES,
    WIDTH,
    check_costs,
    check_own_result,
    dots,
    looked_at,
    ran,
    softmax,
    toyed,
)
from scc_fast import image_seeds, tiny
from scc_fast.defenses import augment, dbd
from scc_fast.defenses.dbd import DBD, DBDConfig
from scc_fast.engine.batch import Batch
from scc_fast.reference import philox
from toys import defender_of


def pictures_of(n: int = 3, **config: Any) -> tuple[Tensor, Tensor]:
    """(32, n, 3, 64, 64), and what they are made from."""
    x = (tiny.generate("test", range(n))[0] * 255).round() / 255
    return looked_at(defender_of(method="dbd", config=config), x, image_seeds(5, n)), x


def test_pixel_changes() -> None:
    pictures, x = pictures_of()
    assert torch.equal(pictures[0], x)
    for at, rounding in zip((17, 18, 19), (np.floor, np.round, np.ceil), strict=True):
        np.testing.assert_allclose(pictures[at], rounding(x.numpy() * 7) / 7, atol=1e-7)
    # by hand: 100/255 lies between 2/7 and 3/7, nearer to 3/7
    gray = torch.full((1, 3, 2, 2), 100 / 255)
    three = [
        dbd.bit_depth(gray, f).mean().item() * 7 for f in (torch.floor, torch.round, torch.ceil)
    ]
    assert three == pytest.approx([2, 3, 3], abs=1e-5)
    for at, quality in zip((20, 21, 22), (50, 60, 75), strict=True):
        for i in range(len(x)):
            file = io.BytesIO()
            picture = Image.fromarray((x[i] * 255).round().byte().permute(1, 2, 0).numpy())
            picture.save(file, "JPEG", quality=quality)
            want = np.asarray(Image.open(file)).transpose(2, 0, 1) / 255
            np.testing.assert_allclose(pictures[at, i], want, atol=1e-6)
    noise = (pictures[23:29] - x)[:, (x > 0.4) & (x < 0.6)]
    assert noise.std().item() == pytest.approx(0.1, rel=0.05)
    assert noise.mean().abs() < 0.01
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.1


def test_frequency_changes() -> None:
    pictures, x = pictures_of()
    pixels = np.float64(x.numpy())
    repeated = np.pad(pixels, ((0, 0), (0, 0), (2, 2), (2, 2)), mode="edge")
    mirrored = np.pad(pixels, ((0, 0), (0, 0), (2, 2), (2, 2)), mode="reflect")
    binomial = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256
    for i, j in ((0, 0), (1, 63), (30, 31), (63, 5)):
        square = np.s_[:, :, i : i + 5, j : j + 5]
        want = np.median(repeated[square].reshape(3, 3, 25), axis=-1)
        np.testing.assert_allclose(pictures[29, :, :, i, j], want, atol=1e-7)
        mean = mirrored[square].mean(axis=(2, 3))
        np.testing.assert_allclose(pictures[30, :, :, i, j], mean, atol=1e-6)
        want = (mirrored[square] * binomial).sum(axis=(2, 3))
        np.testing.assert_allclose(pictures[31, :, :, i, j], want, atol=1e-6)


def test_crops_are_bilinear_and_mirrored_half_the_time() -> None:
    pictures, x = pictures_of(8)
    draws = philox.uniform(image_seeds(5, 8), 130, 0, 16 * 23).view(8, 16, 23)
    boxes = augment.random_boxes(draws[..., 1:], (64, 64), (0.5, 1.0)).long()
    mirrored = draws[..., 0] < 0.5
    assert 0.3 < mirrored.float().mean() < 0.7
    for image, view in np.ndindex(8, 16):
        top, left, tall, wide = boxes[image, view].tolist()
        part = x[image : image + 1, :, top : top + tall, left : left + wide]
        want = F.interpolate(part, (64, 64), mode="bilinear", align_corners=False)[0]
        want = want.flip(-1) if mirrored[image, view] else want
        torch.testing.assert_close(pictures[1 + view, image], want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(64, 64), (48, 96), (20, 90)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.5, 1.0)])
def test_random_boxes(size: tuple[int, int], scale: tuple[float, float]) -> None:
    draws = torch.rand(4000, 22, generator=torch.Generator().manual_seed(0))
    boxes = augment.random_boxes(draws, size, scale)
    top, left, tall, wide = boxes.T
    assert torch.equal(boxes, boxes.round())
    assert min(top.min(), left.min()) >= 0
    assert min(tall.min(), wide.min()) >= 1
    assert (top + tall).max() == size[0]
    assert (left + wide).max() <= size[1]
    ratio = wide / tall
    assert 0.6 < ratio.min() <= ratio.max() < 1.6  # rounded sides
    area = tall * wide / (size[0] * size[1])
    assert area.max() <= scale[1]
    if size == (64, 64):
        assert ratio.min() < 0.8 < 1.2 < ratio.max()
        assert scale[0] * 0.95 < area.min() < scale[0] * 1.1
        assert area.mean().item() == pytest.approx(sum(scale) / 2, abs=0.06)
        assert (top / (64 - tall).clamp_min(1)).mean().item() == pytest.approx(0.5, abs=0.05)
    # where nothing fits, the largest box of an allowed shape in the middle
    never = augment.random_boxes(torch.zeros(1, 22), (20, 90), (1.0, 1.0))
    assert never.tolist() == [[0, 31, 20, 27]]


def test_truncation_to_8_bits_as_published() -> None:
    x = torch.tensor([100.0, 100.9, 254.7, 255.0, 0.3]).expand(1, 3, 5, 5) / 255
    seeds = image_seeds(0, 1)
    kept = looked_at(toyed(DBD), x, seeds)[0]
    cut = looked_at(toyed(DBD, published=True), x, seeds)[0]
    assert torch.equal(kept, x)
    np.testing.assert_allclose(cut[0, 0, 0] * 255, [100, 100, 254, 255, 0], atol=1e-4)
    whole = (torch.arange(256) / 255).expand(1, 3, 16, 256)
    assert torch.equal(looked_at(toyed(DBD, published=True), whole, seeds)[0], whole)


def direction(defense: Any, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """z* without and with the score's say: (score (B,), logits (B, K)) in float64."""
    config, text = defense.config, np.float64(defense.table.text.numpy())
    scale, bias = defense.table.scale, defense.table.bias
    scores, answers = [], []
    for f in np.float64(features).transpose(1, 0, 2):
        z = f / np.linalg.norm(f, axis=1, keepdims=True)
        p = softmax(scale * z[1:] @ text.T + bias)
        entropy = -(p * np.log(p)).sum(axis=1)
        d = z[1:][np.argsort(entropy)[: config.keep]] - z[0]
        mean = d.mean(axis=0)
        norm = np.linalg.norm(d, axis=1)
        cosine = np.where(norm > 1e-5, d @ mean / norm.clip(1e-9) / np.linalg.norm(mean), 0)
        factor = config.strength if cosine.mean() > config.threshold else 1.0
        star = z[0] + factor * mean
        scores.append(cosine.mean())
        answers.append(scale * (star / np.linalg.norm(star)) @ text.T + bias)
    return np.array(scores), np.stack(answers)


@pytest.mark.parametrize("config", [{}, {"keep": 5}, {"strength": 1.0}, {"published": True}])
def test_direction_by_hand(config: dict[str, Any]) -> None:
    x, seeds = dots(6, (3, 8, 8)), image_seeds(1, 6)
    first = toyed(DBD, **config)
    first.session = replace(first.session, encoded=encoder())
    scores = direction(first, features_of(first, x, seeds))[0]
    threshold = float(np.sort(scores)[2:4].mean())
    defense = toyed(DBD, threshold=threshold, **config)
    defense.session = replace(defense.session, encoded=encoder())
    outcome = ran(defense, x, seeds)
    scores, logits = direction(defense, features_of(defense, x, seeds))
    np.testing.assert_allclose(outcome.drift.numpy(), scores, atol=1e-5)
    np.testing.assert_allclose(outcome.logits.numpy(), logits, atol=2e-4)
    assert outcome.flagged.sum() == 3
    assert np.array_equal(outcome.flagged.numpy(), scores > threshold)
    assert not outcome.delta.any()


def encoder() -> Any:
    weight = torch.randn(192, WIDTH, generator=torch.Generator().manual_seed(9))
    return lambda pixels: (pixels.flatten(1) - 0.5) @ weight


def features_of(defense: Any, x: Tensor, seeds: Tensor) -> np.ndarray:
    return defense.session.features(looked_at(defense, x, seeds)).numpy()


def read(defense: Any, features: Tensor) -> Tensor:
    """The answer from features (32, B, D), whatever the pictures are."""
    session = replace(defense.session, encoded=lambda pixels: features.flatten(0, 1))
    batch = Batch(dots(features.shape[1]), image_seeds(0, features.shape[1]))
    return defense.defense.first_pass(session, batch).logits


def test_the_threshold_itself_is_clean() -> None:
    x, seeds = dots(3), image_seeds(1, 3)
    drift = ran(toyed(DBD), x, seeds).drift
    tie = float(drift.median())
    defense = toyed(DBD, threshold=tie)
    outcome = ran(defense, x, seeds)
    assert torch.equal(outcome.flagged, drift > tie)
    assert outcome.flagged.sum() == 1
    margin = defense.live(x, seeds).margin
    torch.testing.assert_close(margin, drift - tie, atol=1e-6, rtol=0)
    below = toyed(DBD, threshold=float(np.nextafter(np.float32(tie), np.float32(-1))))
    assert ran(below, x, seeds).flagged.sum() == 2
    # c = 1 is the mean of the kept unit features: a score's image far below the threshold
    unit = torch.randn(32, 1, WIDTH, generator=torch.Generator().manual_seed(2))
    every = toyed(DBD, keep=31, threshold=1.0)
    torch.testing.assert_close(
        read(every, unit), every.session.logits(F.normalize(unit[1:], dim=-1).mean(dim=0))
    )


def test_what_an_attacker_differentiates() -> None:
    """The answer's slope in the features, by differences; pixels through every picture."""
    defense = toyed(DBD, threshold=-1.0)
    features = torch.randn(32, 2, WIDTH, generator=torch.Generator().manual_seed(4))
    out = torch.randn(2, CLASSES, generator=torch.Generator().manual_seed(5))
    leaf = features.clone().requires_grad_()
    (slope,) = torch.autograd.grad((read(defense, leaf) * out).sum(), leaf)
    for at in np.ndindex(32, 2):
        step = np.zeros(features.shape)
        step[(*at, 3)] = 1e-5
        up, down = (direction(defense, features.numpy() + s)[1] for s in (step, -step))
        want = float(((up - down) * out.numpy()).sum() / 2e-5)
        assert slope[(*at, 3)].item() == pytest.approx(want, rel=1e-2, abs=1e-3)
    x, seeds = dots(2, (3, 8, 8)), image_seeds(0, 2)
    leaf = x.clone().requires_grad_()
    pictures = looked_at(defense, leaf, seeds)
    for at in range(32):
        (each,) = torch.autograd.grad(pictures[at].sum(), leaf, retain_graph=True)
        assert each.isfinite().all()
        assert each.mean().item() == pytest.approx(1.0, abs=0.5)  # straight, or nearly a mean


def test_cost() -> None:
    check_costs(toyed(DBD))
    assert (toyed(DBD).traits.forward, toyed(DBD).traits.backward) == (32, 0)
    # an attacker's look is encoded once as well
    defense, x = toyed(DBD), dots(2)
    toy, first = defense.session.encode, defense.live(x.requires_grad_(), image_seeds(0, 2))
    first.logits.sum().backward()
    assert (toy.forward, toy.backward) == (64, 64)
    other = defense.live(x.flip(0), image_seeds(0, 2))  # and others are not taken for it
    assert (toy.forward, toy.backward) == (128, 64)
    assert not torch.equal(other.logits, first.logits)


def test_config() -> None:
    assert dataclasses.astuple(DBDConfig()) == (16, 0.8, 2.5, False)
    for wrong, told in [
        ({"keep": 0}, r"keep must be a whole number in \[1, 31\], got 0"),
        ({"threshold": 2}, "threshold must be a number"),
        ({"strength": "much"}, "strength must be a number"),
    ]:
        with pytest.raises(ValueError, match=told):
            DBDConfig(**wrong)  # type: ignore[arg-type]


def test_on_the_bundled_model() -> None:
    check_own_result(DBD)
    x, labels = tiny.generate("test", range(20))
    result = defender_of(method="dbd")(x, 0)
    assert (result.labels == labels).float().mean() >= 0.9
