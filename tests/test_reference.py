"""TTC and SCC against METHOD.md read naively: one image at a time, loops, autograd.

`Naive` shares nothing with the reference but the random numbers, which have tests of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reference_toys import GEOMETRIC, HEIGHT, PAPER, ROUNDING, WIDTH, images, middle, setting
from scc_fast.config import IDENTITY, SCCConfig, TTCConfig, View, resolve_views
from scc_fast.reference import philox, step
from scc_fast.reference.heads import Classes
from scc_fast.reference.scc import scc
from scc_fast.reference.ttc import Setting, ttc


@dataclass
class Naive:
    """METHOD.md for one image x (3, H, W) with one seed."""

    setting: Setting
    x: Tensor
    seed: Tensor  # (1,)
    epsilon: float
    alpha: float

    def __post_init__(self) -> None:
        self.least = torch.full_like(self.x, math.inf)  # |gradient|, relative, over all steps

    def f(self, pixels: Tensor) -> Tensor:
        return self.setting.encode(pixels[None])[0]

    def pi(self, delta: Tensor) -> Tensor:
        in_ball = torch.clamp(delta, -self.epsilon, self.epsilon)
        return torch.clamp(self.x + in_ball, 0, 1) - self.x

    def start(self) -> Tensor:
        u = philox.uniform(self.seed, philox.DELTA, 0, self.x.numel()).view_as(self.x)
        return self.pi((u * 2 - 1) * self.epsilon)

    def ascend(self, objective: Callable[[Tensor], Tensor], delta: Tensor) -> Tensor:
        leaf = delta.clone().requires_grad_()
        (g,) = torch.autograd.grad(objective(leaf), leaf)
        self.least = torch.minimum(self.least, g.abs() / g.abs().max())
        return self.pi(delta + self.alpha * torch.sign(g))

    def view(self, pixels: Tensor, index: int, view: View) -> Tensor:
        """Every output pixel looks up where it comes from; H·W stands for the fill."""
        source = []
        for i in range(HEIGHT):
            for j in range(WIDTH):
                row = i - view.shift[0]
                column = (WIDTH - 1 - j if view.flip else j) - view.shift[1]
                inside = 0 <= row < HEIGHT and 0 <= column < WIDTH
                source.append(row * WIDTH + column if inside else HEIGHT * WIDTH)
        flat = torch.cat([pixels.reshape(3, -1), self.setting.fill[:, None]], dim=1)
        seen = flat[:, source].view(3, HEIGHT, WIDTH)
        if view.noise:
            noise = philox.normal(self.seed, philox.VIEW_NOISE, index, pixels.numel())
            seen = torch.clamp(seen + view.noise * noise.view_as(pixels), 0, 1)
        return seen

    def features(self, pixels: Tensor, views: tuple[View, ...]) -> list[Tensor]:
        return [self.f(self.view(pixels, index, view)) for index, view in enumerate(views)]

    def logits(self, feature: Tensor) -> Tensor:
        classes = self.setting.classes
        return torch.stack(
            [classes.scale * F.cosine_similarity(feature, t, dim=0) for t in classes.text]
        ).add(classes.bias)

    def mean_logits(self, pixels: Tensor, views: tuple[View, ...]) -> Tensor:
        return torch.stack([self.logits(v) for v in self.features(pixels, views)]).mean(0)

    def ttc(self, config: TTCConfig) -> tuple[Tensor, Tensor, float]:
        """Logits, δ and τ."""
        deltas = [self.start()]
        anchor = self.f(self.x)
        tau = (torch.dist(self.f(self.x + deltas[0]), anchor) / anchor.norm()).item()
        for _ in range(config.steps):
            deltas.append(
                self.ascend(lambda d: ((self.f(self.x + d) - anchor) ** 2).sum(), deltas[-1])
            )
        delta = self.weighted(deltas, config.beta) if tau < config.tau else deltas[0]
        return self.logits(self.f(self.x + delta)), delta, tau

    def scc(self, views: tuple[View, ...], config: SCCConfig) -> tuple[Tensor, Tensor, float]:
        """Logits, δ and τ."""
        views = views if config.spatial else (IDENTITY,)
        classes = self.setting.classes
        deltas = [self.start()]
        anchor = self.f(self.x)
        tau = (torch.dist(self.f(self.x + deltas[0]), anchor) / anchor.norm()).item()
        if config.gate and tau >= config.tau:
            return self.mean_logits(self.x + deltas[0], views), deltas[0], tau

        def drift(delta: Tensor) -> Tensor:
            seen = self.features(self.x + delta, views)
            return sum(((feature - anchor) ** 2).sum() for feature in seen) / len(views)

        for _ in range(config.warmup_steps):
            deltas.append(self.ascend(drift, deltas[-1]))
        delta = self.weighted(deltas, config.beta)

        if config.semantic:
            seen = self.features(self.x + delta, views)
            q_mean = sum(torch.softmax(self.logits(feature), 0) for feature in seen) / len(views)
            power = [value.item() ** (1 / config.temperature) for value in q_mean]
            q = [value / sum(power) for value in power]
            label = q.index(max(q))
            t_soft = sum(value * t for value, t in zip(q, classes.text, strict=True))
            rivals = [t for t in classes.text if not torch.equal(t, classes.text[label])]

            def margin(delta: Tensor) -> Tensor:
                total = torch.zeros(())
                for feature in self.features(self.x + delta, views):
                    rival = max(F.cosine_similarity(feature, t, dim=0) for t in rivals)
                    total = total + F.cosine_similarity(feature, t_soft, dim=0) - rival
                return total / len(views)

            for _ in range(config.semantic_steps):
                delta = self.ascend(margin, delta)
        return self.mean_logits(self.x + delta, views), delta, tau

    def weighted(self, deltas: list[Tensor], beta: float) -> Tensor:
        total = sum(math.exp(beta * t) for t in range(len(deltas)))
        return sum(math.exp(beta * t) / total * delta for t, delta in enumerate(deltas))


def check(outcome, naive: list[Naive], results: list[tuple[Tensor, Tensor, float]], gate) -> None:
    """The reference's outcome for a batch against the naive one of every image."""
    for i, (one, (logits, delta, tau)) in enumerate(zip(naive, results, strict=True)):
        assert outcome.drift[i].item() == pytest.approx(tau, rel=1e-5)
        assert outcome.flagged[i].item() == gate(tau)
        # Where a gradient is rounding noise beside the image's largest, its sign is free.
        clear = one.least > 1e-4
        assert clear.float().mean() > 0.95
        assert (outcome.delta[i] - delta)[clear].abs().max() <= ROUNDING
        torch.testing.assert_close(outcome.logits[i], logits, rtol=0, atol=1e-4)


def test_weights_of_the_published_ttc() -> None:
    weights = step.iterate_weights(2, 2.0)
    assert weights.tolist() == pytest.approx([0.0159, 0.1173, 0.8668], abs=5e-5)
    assert step.iterate_weights(0, 2.0).tolist() == [1.0]
    assert step.iterate_weights(3, 0.0).tolist() == [0.25] * 4
    assert step.iterate_weights(1000, 100.0)[-1] == 1.0  # no overflow


@pytest.mark.parametrize("changes", [{}, {"steps": 1}, {"steps": 3, "beta": -1.0}, {"steps": 0}])
def test_ttc_is_method_md(changes: dict[str, float]) -> None:
    toy, x, seeds = setting(bias=-0.5), images(8), philox.image_seeds(3, 8)
    with torch.no_grad():
        tau = middle(ttc(toy, x, seeds, TTCConfig()).drift)
        config = TTCConfig(epsilon="6/255", alpha="2/255", tau=tau, **changes)
        config = TTCConfig(**{**vars(config), "tau": middle(ttc(toy, x, seeds, config).drift)})
        outcome = ttc(toy, x, seeds, config)
    assert outcome.flagged.sum() == 4
    naive = [Naive(toy, x[i], seeds[i : i + 1], config.epsilon, config.alpha) for i in range(8)]
    check(outcome, naive, [n.ttc(config) for n in naive], lambda tau: tau < config.tau)


@pytest.mark.parametrize(
    ("views", "changes"),
    [
        (GEOMETRIC, {}),
        (GEOMETRIC, {"gate": False}),
        (GEOMETRIC, {"semantic_steps": 3, "temperature": 0.1, "warmup_steps": 1}),
        (GEOMETRIC, {"warmup_steps": 0, "temperature": 1.0}),
        (GEOMETRIC, {"semantic": False, "warmup_steps": 3, "beta": 0.5}),
        (GEOMETRIC, {"spatial": False}),
        (PAPER, {}),
        (resolve_views("geometric", 64, flip=False), {"gate": False}),
        ((IDENTITY, View(flip=True, shift=(-3, 2), noise=0.1)), {}),
    ],
)
def test_scc_is_method_md(views: tuple[View, ...], changes: dict[str, float]) -> None:
    toy, x, seeds = setting(bias=-0.5), images(6), philox.image_seeds(4, 6)
    config = {"epsilon": 6 / 255, "alpha": 2 / 255, **changes}
    with torch.no_grad():
        tau = middle(scc(toy, x, seeds, views, SCCConfig(**config)).drift)
        config = SCCConfig(**config, tau=tau)
        outcome = scc(toy, x, seeds, views, config)
    assert outcome.flagged.sum() == (3 if config.gate else 6)
    naive = [Naive(toy, x[i], seeds[i : i + 1], config.epsilon, config.alpha) for i in range(6)]
    results = [n.scc(views, config) for n in naive]
    check(outcome, naive, results, lambda tau: tau < config.tau or not config.gate)
    assert outcome.delta[outcome.flagged].abs().amax() <= config.epsilon + ROUNDING


def test_duplicate_prompts_are_no_negatives_of_each_other() -> None:
    """An image whose ŷ has a twin; were the twin a negative, δ would be another."""
    toy, x, seeds = setting(), images(1), philox.image_seeds(4, 1)
    config = SCCConfig(gate=False, spatial=False)
    nearly = toy.classes.text.clone()
    nearly[5] = F.normalize(nearly[5] + 1e-4 * nearly[0], dim=0)
    rivals = Setting(toy.encode, Classes(nearly, 8.0), toy.fill)
    with torch.no_grad():
        outcome = scc(toy, x, seeds, GEOMETRIC, config)
        other = scc(rivals, x, seeds, GEOMETRIC, config)
    naive = Naive(toy, x[0], seeds, config.epsilon, config.alpha)
    check(outcome, [naive], [naive.scc(GEOMETRIC, config)], lambda _: True)
    torch.testing.assert_close(outcome.logits[:, 2], outcome.logits[:, 5])
    assert outcome.logits.argmax() in (2, 5)
    assert (outcome.delta - other.delta).abs().gt(ROUNDING).float().mean() > 0.1
