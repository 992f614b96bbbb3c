"""The unrolled gradient: the defense's own values, and derivatives worked out without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import scc_fast
from attack_toys import Toy, images, weights
from scc_fast import Defender, tiny
from scc_fast.api import make_defense
from scc_fast.attacks import Unrolled
from scc_fast.attacks.unrolled import UnrolledViews, step_count, straight_sign, unrolled
from scc_fast.config import IDENTITY, SCCConfig, TTCConfig, View
from scc_fast.defenses import SCC, TTC
from scc_fast.engine.batch import Batch
from scc_fast.engine.session import Session
from scc_fast.reference import heads, philox
from scc_fast.reference.step import initial_delta
from scc_fast.reference.ttc import Setting

pytestmark = pytest.mark.slow  # together more than a minute

VIEWS = (IDENTITY, View(flip=True))
SCALE, CLASSES = 5.0, 4


def toy(kind: type[TTC] | type[SCC], config: Any, encode: Callable[[Tensor], Tensor]) -> Any:
    """TTC or SCC without a gate on another encoder, pixels (n, 3, 2, 2) to features (n, D)."""
    method: Any = kind(config)
    method.has_gate = False
    if kind is SCC:
        method.views = lambda session, size: VIEWS
    classes = heads.Classes(F.normalize(weights(CLASSES, seed=5)[:, :6], dim=1), SCALE)
    mean = (0.4, 0.5, 0.6)
    found: Any = Toy(weights(CLASSES))
    found.defense, found.config = method, config
    kept = {field.name: getattr(found.session, field.name) for field in fields(Session)}
    found.session = Session(**{**kept, "classes": classes, "mean": mean})
    vars(found.session)["reference"] = Setting(encode, classes, torch.tensor(mean))
    return found


def derivative(target: Any, x: Tensor, keys: Tensor, slope: float, label: int) -> Tensor:
    """Of the cross-entropy of one image."""
    leaf = x.clone().requires_grad_()
    logits = unrolled(target, leaf, keys, slope)
    loss = F.cross_entropy(logits, torch.tensor([label]))
    return torch.autograd.grad(loss, leaf)[0]


# ------------------------------------------------------------------------------------------ by hand


def test_the_straight_through_sign_by_hand() -> None:
    gradient = torch.tensor([[3.0, -1.0, 2.0], [0.0, 0.0, 0.0], [1e-9, 0.0, -2e-9]])
    leaf = gradient.view(3, 3, 1, 1).clone().requires_grad_()
    found = straight_sign(leaf, 0.5)
    assert found.flatten(1).tolist() == [[1, -1, 1], [0, 0, 0], [1, 0, -1]]
    (back,) = torch.autograd.grad(found.sum(), leaf)
    # c / mean|g|: the means are 2, 0 and 1e-9
    expected = torch.tensor([[0.25] * 3, [0.0] * 3, [0.5e9] * 3])
    torch.testing.assert_close(back.flatten(1), expected)


def test_a_pixel_that_the_box_holds_passes_the_steps_gradient() -> None:
    batch = Batch(torch.ones(1, 3, 2, 2), torch.arange(1))
    views = UnrolledViews(None, batch, (IDENTITY,), slope=0.0)
    config = SimpleNamespace(epsilon=8 / 255, alpha=1 / 255)
    delta = torch.zeros_like(batch.x, requires_grad=True)
    moved, _ = views.step(delta, torch.ones_like(delta), config)
    assert not moved.any()
    (slope,) = torch.autograd.grad(moved.sum(), delta)
    assert torch.equal(slope, torch.ones_like(slope))


def test_one_step_of_ttc_by_hand() -> None:
    """f = x², elementwise (of the first six pixels), so that every Jacobian is diagonal."""
    config = TTCConfig(steps=1, epsilon=16 / 255, alpha=2 / 255)
    target = toy(TTC, config, lambda pixels: pixels.flatten(1)[:, :6] ** 2)
    x, keys, c, label = images(1), torch.tensor([9]), 0.7, 2
    found = derivative(target, x, keys, c, label).flatten().double().numpy()

    p = x.flatten().double().numpy()
    d0 = initial_delta(x, keys, config.epsilon).flatten().double().numpy()
    seen = np.arange(12) < 6
    # J = Σ ((p + d)² − p²)²; g = ∂J/∂d; d0 does not move with p inside the box.
    away = (p + d0) ** 2 - p**2
    g = np.where(seen, 4 * away * (p + d0), 0)
    of_p = np.where(seen, 4 * (2 * d0 * (p + d0) + away), 0)
    moved = d0 + config.alpha * np.sign(g)
    inside = np.abs(moved) < config.epsilon
    w1 = np.exp(config.beta) / (1 + np.exp(config.beta))
    d = (1 - w1) * d0 + w1 * np.clip(moved, -config.epsilon, config.epsilon)
    d_of_p = w1 * config.alpha * inside * c * of_p / np.abs(g).mean()
    text = target.table.text.double().numpy()

    def loss(features: np.ndarray) -> float:
        logits = SCALE * text @ features / np.linalg.norm(features)
        return float(np.log(np.exp(logits).sum()) - logits[label])

    f, h = (p + d)[:6] ** 2, 1e-6
    of_f = np.array([(loss(f + h * e) - loss(f - h * e)) / (2 * h) for e in np.eye(6)])
    expected = np.zeros(12)
    expected[:6] = of_f * (2 * (p + d) * (1 + d_of_p))[:6]
    assert np.abs(expected[:6] / (of_f * 2 * (p + d)[:6]) - 1).max() > 0.02  # not BPDA's
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-5)


# ---------------------------------------------------------------------------- finite differences

FIRST = weights(6, seed=7)


def smooth(pixels: Tensor) -> Tensor:
    return torch.tanh(pixels.flatten(1) @ FIRST.T.to(pixels.dtype)) + 0.3


class Surrogate:
    """SCC written anew in float64, its signs linear around those of a base point.

    sign(g) counts as sign(g₀) + c·(g − g₀)/mean|g₀|, with g₀ from the base point: the function
    whose derivative there is the straight-through one.
    """

    def __init__(self, config: SCCConfig, text: Tensor, noise: Tensor, slope: float) -> None:
        self.config, self.text, self.noise, self.slope = config, text.double(), noise, slope
        self.base: list[Tensor] = []
        self.chosen: list[Any] = []  # ŷ and the hardest negatives of the base point

    def clip(self, delta: Tensor) -> Tensor:
        return delta.clamp(-self.config.epsilon, self.config.epsilon)

    def features(self, x: Tensor) -> Tensor:
        return smooth(torch.cat([x, x.flip(-1)]))

    def cosines(self, features: Tensor) -> Tensor:
        return features @ self.text.T / features.norm(dim=1, keepdim=True)

    def sign(self, g: Tensor, at: int) -> Tensor:
        if at == len(self.base):
            self.base.append(g)
        g0 = self.base[at]
        return g0.sign() + self.slope * (g - g0) / g0.abs().mean()

    def gradient(self, objective: Callable[[Tensor], Tensor], delta: Tensor) -> Tensor:
        leaf = delta.detach().requires_grad_()
        return torch.autograd.grad(objective(leaf), leaf)[0]

    def logits(self, x: Tensor) -> Tensor:
        config = self.config
        delta, anchor = self.clip(self.noise), smooth(x)
        powers = np.exp(config.beta * np.arange(config.warmup_steps + 1))
        weighted = powers[0] * delta
        for t in range(config.warmup_steps):
            g = self.gradient(
                lambda d: (self.features(x + d) - anchor).square().sum(dim=1).mean(), delta
            )
            delta = self.clip(delta + config.alpha * self.sign(g, t))
            weighted = weighted + powers[t + 1] * delta
        delta = weighted / powers.sum()
        q = (SCALE * self.cosines(self.features(x + delta))).softmax(dim=1).mean(dim=0)
        q = q ** (1 / config.temperature) / (q ** (1 / config.temperature)).sum()
        soft = F.normalize(q @ self.text, dim=0)
        guess = int(q.argmax())
        for s in range(config.semantic_steps):

            def margin(d: Tensor) -> Tensor:
                f = self.features(x + d)
                others = self.cosines(f).clone()
                others[:, guess] = -torch.inf
                own = f @ soft / f.norm(dim=1)
                return SCALE * (own - others.amax(dim=1)).mean()

            g = self.gradient(margin, delta)
            delta = self.clip(delta + config.alpha * self.sign(g, config.warmup_steps + s))
        return (SCALE * self.cosines(self.features(x + delta))).mean(dim=0)


@pytest.mark.parametrize("slope", [1.0, 0.1])
def test_scc_against_finite_differences_of_its_surrogate(slope: float) -> None:
    config = SCCConfig(gate=False, warmup_steps=2, semantic_steps=1, epsilon=9 / 255)
    target = toy(SCC, config, smooth)
    for seed in (1, 2, 3):
        x, keys, label = images(1, seed), torch.tensor([seed]), seed % CLASSES
        noise = (2 * philox.uniform_like(x, keys, philox.DELTA).double() - 1) * config.epsilon
        other = Surrogate(config, target.table.text, noise, slope)
        point = x.double()
        values = other.logits(point)  # the base
        torch.testing.assert_close(
            unrolled(target, x.clone().requires_grad_(), keys, slope)[0].detach(),
            values.float(),
            atol=1e-4,
            rtol=0,
        )

        def loss(p: Tensor, other: Surrogate = other, label: int = label) -> float:
            return float(F.cross_entropy(other.logits(p)[None], torch.tensor([label])))

        h, expected = 1e-6, torch.zeros(12, dtype=torch.float64)
        for i in range(12):
            shift = torch.zeros(12, dtype=torch.float64)
            shift[i] = h
            shift = shift.view_as(point)
            expected[i] = (loss(point + shift) - loss(point - shift)) / (2 * h)
        found = derivative(target, x, keys, slope, label).flatten()
        torch.testing.assert_close(found.double(), expected, atol=2e-3, rtol=5e-3)


# ------------------------------------------------------------------------------ the bundled model


def defense(spec: str, **options: Any) -> Defender:
    return make_defense(spec, scc_fast.load_model("tiny", device="cpu"), tiny.prompts(), **options)


def drawn(n: int) -> tuple[Tensor, Tensor, Tensor]:
    return *tiny.generate("test", range(n)), torch.arange(70, 70 + n)


@pytest.mark.parametrize(
    "spec",
    ["ttc", "ttc:tau=0.035", "scc", "scc:tau=0.035", "scc:warmup_steps=1:views=paper", "scc:tau=0"],
)
def test_its_values_are_the_defenses(spec: str) -> None:
    x, _, keys = drawn(3)
    target = defense(spec, backend="reference")
    with sdpa_kernel(SDPBackend.MATH):  # a gradient near zero may turn its sign with the kernel
        expected = target.run(x, keys)
    flagged = int(expected.flagged.sum())
    assert (0 < flagged < 3) if "0.035" in spec else flagged == (0 if "tau=0" in spec else 3)
    found = unrolled(target, x.clone().requires_grad_(), keys)
    # A pixel whose gradient is 0 but for rounding may turn its sign: 7e-4 seen on AVX2.
    torch.testing.assert_close(found.detach(), expected.logits, atol=2e-3, rtol=0)


@pytest.mark.parametrize("spec", ["ttc", "scc"])
def test_its_values_are_the_engines(spec: str) -> None:
    x, _, keys = drawn(2)
    target = defense(spec)
    found = unrolled(target, x.clone().requires_grad_(), keys).detach()
    torch.testing.assert_close(found, target.run(x, keys).logits, atol=2e-3, rtol=0)


def test_at_slope_zero_its_gradient_is_bpdas() -> None:
    x, y, keys = drawn(2)
    target = defense("ttc", backend="reference")
    _, found = Unrolled(slope=0).through(target, x, y, keys)
    leaf = (x + target.run(x, keys).delta).requires_grad_()
    loss = F.cross_entropy(
        target.session.mean_logits(target.encode(leaf)[None]), y, reduction="sum"
    )
    (expected,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-3)
    _, steeper = Unrolled(slope=0.1).through(target, x, y, keys)
    assert (steeper - expected).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize("spec", ["ttc", "scc:views=paper:warmup_steps=1:semantic_steps=1"])
def test_it_stays_in_the_ball_and_climbs(spec: str) -> None:
    x, y, keys = drawn(2)
    target = defense(spec)
    found = Unrolled(4 / 255, steps=3, warmup=0).run(target, x, y, keys)
    assert (found - x).abs().max() <= 4 / 255 + 1e-6
    assert 0 <= found.min() <= found.max() <= 1
    assert not found.requires_grad

    def loss(p: Tensor) -> float:
        return float(F.cross_entropy(target(p, 3).logits, y))

    assert loss(found) > loss(x)
    module = target.model.module
    assert all(p.grad is None and not p.requires_grad for p in module.parameters())


def test_pictures_of_another_size_are_resized_on_the_way() -> None:
    x, y, keys = drawn(1)
    larger = F.interpolate(x, (80, 72), mode="bilinear").clamp(0, 1)
    target = defense("ttc")
    logits, gradient = Unrolled().through(target, larger, y, keys)
    assert gradient.shape == larger.shape
    assert gradient.abs().mean() > 0
    torch.testing.assert_close(logits, target.run(larger, keys).logits, atol=1e-3, rtol=0)


def test_whom_it_suits() -> None:
    steps = {"ttc": 2, "ttc:steps=8": 8, "ttc:steps=9": 9, "scc": 4, "scc:semantic=false": 2}
    for spec, count in {**steps, "scc:warmup_steps=7": 9, "none": 0, "views": 0, "rn": 0}.items():
        target = defense(spec)
        assert step_count(target) == count
        assert Unrolled().suits(target) == (0 < count <= 8)
    x, y, keys = drawn(1)
    with pytest.raises(ValueError, match="only ttc and scc can be unrolled, got 'none'"):
        Unrolled(steps=1, warmup=0).run(defense("none"), x, y, keys)
    with pytest.raises(ValueError, match=r"slope.*got 2"):
        Unrolled(slope=2)
