"""MAC: its augmentation against torchvision's, and its steps, weights and gate by hand."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from torch import Tensor

from defense_toys import (
    CLASSES,
    SHAPE,
    Toy,
    check_costs,
    check_own_result,
    confined,
    dots,
    exact_logits,
    looked_at,
    ran,
    toyed,
)
from scc_fast import image_seeds, tiny
from scc_fast.defenses import augment, mac
from scc_fast.defenses.mac import MAC, MACConfig
from scc_fast.reference import philox
from toys import defender_of

VIEW, FRESH, START = 120, 122, 124


def torchvision_s(x: Tensor, u: Tensor, noise: Tensor) -> Tensor:
    """The card's augmentation of one picture with the draws u (16,), by torchvision."""
    height, width = x.shape[-2:]
    s = (2 * u - 1).tolist()
    shift = [round(0.04 * width * s[1]), round(0.04 * height * s[2])]
    x = TF.affine(x, 5 * s[0], shift, 1 + 0.08 * s[3], [0.0, 0.0], TF.InterpolationMode.BILINEAR)
    if u[9] < 0.5:
        order = list(itertools.permutations(range(4)))[int(24 * u[8])]
        changes = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
        factors = (1 + 0.08 * s[4], 1 + 0.08 * s[5], 1 + 0.08 * s[6], 0.02 * s[7])
        for which in order:
            x = changes[which](x, factors[which])
    if u[10] < 0.5:
        x = TF.gaussian_blur(x, [5, 5], [0.5 + 0.7 * float(u[11])] * 2)
    return (x + 0.02 * u[13] * noise).clamp(0, 1) if u[12] < 0.5 else x


def test_the_augmentation_is_torchvision_s() -> None:
    x, seeds = tiny.generate("test", range(12))[0], image_seeds(3, 12)
    got = augment.mild(x, seeds, 900, 2)
    u = philox.uniform(seeds, 900, 2, 16)
    noise = philox.normal(seeds, 901, 2, x[0].numel()).view_as(x)
    assert set((u[:, [9, 10, 12]] < 0.5).flatten().tolist()) == {True, False}
    for i in range(12):
        want = torchvision_s(x[i], u[i], noise[i])
        assert (got[i] - want).abs()[..., 8:-8, 8:-8].max() < 2e-3  # borders count in contrast
        assert (got[i] - x[i]).abs().mean() > 1e-3
    assert 0 <= got.min() <= got.max() <= 1
    other = augment.mild(x, seeds, 900, 3)
    assert (other - got).abs().amax(dim=(1, 2, 3)).min() > 0.01


def test_colors_blur_and_affine_of_each_picture_are_torchvision_s() -> None:
    x = tiny.generate("test", range(3))[0]
    factor, sigma = torch.tensor([0.93, 1.0, 1.3]), torch.tensor([0.5, 0.8, 1.2])
    for ours, theirs in (
        (augment.brightness, TF.adjust_brightness),
        (augment.contrast, TF.adjust_contrast),
        (augment.saturation, TF.adjust_saturation),
        (lambda p, f: augment.hue(p, f - 1), lambda p, f: TF.adjust_hue(p, f - 1)),
    ):
        want = torch.stack([theirs(p, float(f)) for p, f in zip(x, factor, strict=True)])
        torch.testing.assert_close(ours(x, factor), want, atol=1e-6, rtol=0)
    want = torch.stack([TF.gaussian_blur(p, 5, float(s)) for p, s in zip(x, sigma, strict=True)])
    torch.testing.assert_close(augment.gaussian_blur(x, sigma), want, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="larger than 2x2 to be blurred over 5 pixels, got 2x9"):
        augment.gaussian_blur(torch.zeros(len(sigma), 3, 2, 9), sigma)
    angle, shift = (
        torch.tensor([5.0, -3.0, 0.0]),
        torch.tensor([[2.0, -1.0], [0.0, 3.0], [1.0, 1.0]]),
    )
    got = augment.warp(x, augment.rotation(torch.deg2rad(angle), factor, shift))
    for i in range(3):
        to = [int(v) for v in shift[i]]
        want = TF.affine(
            x[i], float(angle[i]), to, float(factor[i]), [0.0], TF.InterpolationMode.BILINEAR
        )
        torch.testing.assert_close(got[i], want, atol=2e-5, rtol=0)


def darker(x: Tensor, seeds: Tensor, purpose: int, view: int, _: Any = None) -> Tensor:
    """In place of the augmentation: linear, and other for each purpose and view."""
    assert len(seeds) == len(x)
    return x.flip(-1) * (0.9 if purpose == VIEW else 0.35) / (1 + 0.1 * view)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mac, "mild", darker)


def by_hand(defense: Any, x: Tensor, seeds: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Views (V, B, ...), c (V, B) and the last unweighted δ of each, in float64."""
    config, toy = defense.config, defense.session.encode
    views, degrees, deltas = [], [], []
    for at in range(config.view_count):
        view = x if at == 0 else darker(x, seeds, VIEW, at)
        pixels = np.float64(view.numpy())
        anchor = toy.exact(pixels)
        moved = toy.exact(np.float64(darker(view, seeds, FRESH, at).numpy()))
        degrees.append(np.linalg.norm(moved - anchor, axis=1) / np.linalg.norm(anchor, axis=1))
        noise = philox.uniform(seeds, START, at, x[0].numel()).view_as(x).double().numpy()
        delta = confined((2 * noise - 1) * config.epsilon, pixels, config.epsilon)
        for _ in range(config.steps):
            slope = toy.pull(2 * (toy.exact(pixels + delta) - anchor), pixels)
            moved = delta + config.alpha * np.sign(slope)
            delta = confined(moved, pixels, config.epsilon)
        views.append(pixels)
        deltas.append(delta)
    return np.stack(views), np.stack(degrees), np.stack(deltas)


def last_seen(defense: Any) -> Tensor:
    """The pictures (V, B, 3, H, W) that were predicted from."""
    return defense.session.encode.seen[-1].unflatten(0, (defense.config.view_count, -1))


@pytest.mark.parametrize("config", [{}, {"view_count": 1}, {"view_count": 3, "steps": 2}])
@pytest.mark.usefixtures("plain")
def test_steps_and_weights_by_hand(config: dict[str, Any]) -> None:
    x, seeds = dots(5), image_seeds(2, 5)
    degree = by_hand(toyed(MAC, **config), x, seeds)[1]
    tau = float(np.median(degree))
    defense = toyed(MAC, tau=tau, temperature=0.05, **config)
    views, degree, delta = by_hand(defense, x, seeds)
    weight = 1 / (1 + np.exp(-(degree - tau) / 0.05))
    assert weight.min() < 0.45 < 0.55 < weight.max()
    want = weight[..., None, None, None] * delta
    outcome = ran(defense, x, seeds)
    np.testing.assert_allclose(last_seen(defense).numpy(), views + want, atol=2e-6)
    np.testing.assert_allclose(outcome.delta.numpy(), want[0], atol=2e-6)
    np.testing.assert_allclose(outcome.drift.numpy(), degree.max(axis=0), rtol=1e-5)
    each = [exact_logits(defense, view) for view in views + want]
    np.testing.assert_allclose(outcome.logits.numpy(), np.mean(each, axis=0), atol=2e-4)


@pytest.mark.usefixtures("plain")
def test_the_gate_and_its_tie() -> None:
    x, seeds = dots(3), image_seeds(2, 3)
    drift = ran(toyed(MAC), x, seeds).drift
    tie = float(drift.median())
    defense = toyed(MAC, tau=tie)
    outcome = ran(defense, x, seeds)
    assert torch.equal(outcome.flagged, drift > tie)
    assert outcome.flagged.sum() == 1
    margin = defense.live(x, seeds).margin
    torch.testing.assert_close(margin, drift - tie, atol=1e-6, rtol=1e-5)
    below = toyed(MAC, tau=float(np.nextafter(np.float32(tie), np.float32(0))))
    assert ran(below, x, seeds).flagged.sum() == 2
    # half the weight at the tie, none far below it, all far above
    one = toyed(MAC, tau=tie, view_count=1)
    at = ran(one, x, seeds).drift
    full = ran(toyed(MAC, tau=0.0, view_count=1), x, seeds).delta
    none = ran(toyed(MAC, tau=50.0, view_count=1), x, seeds).delta
    assert not none.any()
    i = int((at - tie).abs().argmin())
    share = 1 / (1 + np.exp(-float(at[i] - tie) / 0.01))
    torch.testing.assert_close(ran(one, x, seeds).delta[i], share * full[i], atol=1e-6, rtol=1e-3)


def test_views_are_counterattacked_from_their_own_start() -> None:
    x, seeds = dots(2), image_seeds(2, 2)
    defense = toyed(MAC, tau=0.0, steps=0, view_count=3)
    views = looked_at(defense, x, seeds)
    assert torch.equal(views[0], x)
    ran(defense, x, seeds)
    noise = last_seen(defense) - views
    assert (noise.abs().amax(dim=(2, 3, 4)) > 4 / 255).all()
    assert (noise[1] - noise[0]).abs().max() > 4 / 255
    assert (noise[2] - noise[1]).abs().max() > 4 / 255


@pytest.mark.parametrize("config", [{}, {"view_count": 1}, {"view_count": 3, "steps": 1}])
def test_cost(config: dict[str, Any]) -> None:
    check_costs(toyed(MAC, **config))
    traits = toyed(MAC).traits
    assert (traits.forward, traits.backward) == (14, 8)
    defense = toyed(MAC, **config)
    assert defense.defense.width(defense.session, SHAPE[1:]) == defense.config.view_count


def test_config() -> None:
    assert dataclasses.astuple(MACConfig()) == (8 / 255, 2 / 255, 4, 0.7, 0.01, 2)
    assert MACConfig.from_json(MACConfig(view_count=4).to_json()).view_count == 4
    for wrong, told in [
        ({"view_count": 0}, r"view_count must be a whole number in \[1, 64\], got 0"),
        ({"view_count": 2.0}, "view_count must be a whole number"),
        ({"temperature": 0.0}, "temperature must be a number"),
        ({"tau": -1}, "tau must be a number"),
        ({"alpha": "2"}, "alpha must be in"),
    ]:
        with pytest.raises(ValueError, match=told):
            MACConfig(**wrong)  # type: ignore[arg-type]


@pytest.mark.usefixtures("plain")
def test_what_an_attacker_differentiates() -> None:
    """Through the views, with δ held: against differences in float64."""
    defense, x, seeds = toyed(MAC, tau=0.1), dots(2), image_seeds(1, 2)
    out = np.random.default_rng(0).normal(size=(2, CLASSES))
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        total = (defense.live(leaf, seeds).logits * torch.from_numpy(out).float()).sum()
        (got,) = torch.autograd.grad(total, leaf)
    held = np.float64((last_seen(defense) - looked_at(defense, x, seeds)).numpy())

    def value(pixels: np.ndarray) -> float:
        views = np.stack([pixels, pixels[..., ::-1] * 0.9 / 1.1]) + held
        return float((np.mean([exact_logits(defense, v) for v in views], axis=0) * out).sum())

    for at in ((0, 0, 1, 1), (0, 2, 3, 0), (1, 1, 0, 4)):
        step = np.zeros(x.shape)
        step[at] = 1e-4
        pixels = np.float64(x.numpy())
        want = (value(pixels + step) - value(pixels - step)) / 2e-4
        assert got[at].item() == pytest.approx(want, rel=1e-3, abs=1e-4)


def test_attackers_gradients_are_finite_through_the_real_augmentation() -> None:
    x, seeds = tiny.generate("test", range(4))[0], image_seeds(1, 4)
    defense = defender_of(method="mac", config={"steps": 1, "view_count": 3})
    for look in ("logits", "margin"):
        with torch.enable_grad():
            leaf = x.clone().requires_grad_()
            answer = getattr(defense.live(leaf, seeds), look)
            (slope,) = torch.autograd.grad(answer[..., None].flatten(1)[:, 0].sum(), leaf)
        assert slope.isfinite().all()
        assert (slope.abs().amax(dim=(1, 2, 3)) > 0).all()


def test_a_result_is_the_image_s_own() -> None:
    check_own_result(MAC, tau=0.4)
    assert isinstance(toyed(MAC).session.encode, Toy)


def test_on_the_bundled_model() -> None:
    x, labels = tiny.generate("test", range(20))
    defense = defender_of(method="mac")
    result = defense(x, 0)
    assert (result.labels == labels).float().mean() >= 0.9
    assert not torch.equal(result.drift, defense(x, 1).drift)
