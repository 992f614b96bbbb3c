"""Multi-view guided adaptive counterattack: each view counterattacked as far as it is unstable."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scc_fast.config import MethodConfig, whole
from scc_fast.defenses.augment import mild
from scc_fast.defenses.base import Defense, Look, Repair, Traits
from scc_fast.reference import heads, philox, step

# Purposes of random numbers; an augmentation takes two.
VIEW, FRESH, START = 120, 122, 124


@dataclass(frozen=True)
class MACConfig(MethodConfig):
    """MAC (CVPR 2026, arXiv 2606.06938); the defaults are the published ones.

    Args:
        epsilon, alpha: budget and step, L-infinity, pixel units in [0, 1); the budget is twice
            that of the other counterattacks.
        steps: N, counterattack steps; the last iterate counts.
        tau: corruption degree at which a view's counterattack has half its weight.
        temperature: of the sigmoid that turns the corruption degree into that weight.
        view_count: V, the picture and V − 1 mild augmentations of it.
    """

    epsilon: float = 8 / 255
    alpha: float = 2 / 255
    steps: int = 4
    tau: float = 0.7
    temperature: float = 0.01
    view_count: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("view_count", self.view_count, 1, 64)


class MAC(Defense):
    """Multi-view guided adaptive counterattack.

    For each view v: c = ‖f(aug(v)) − f(v)‖ / ‖f(v)‖ with one fresh augmentation, a counterattack
    as TTC's with its own start and anchor f(v), and δ_v weighted by sigmoid((c − τ)/T). The
    logits of the views v + δ_v are averaged. Unlike TTC it takes a picture whose feature moves
    *much* as attacked. `delta` of a result is that of the picture itself, the first view;
    `drift` is the largest c of an image's views, and it is flagged where that is above τ.
    """

    name, Config = "mac", MACConfig
    config: MACConfig

    @property
    def width(self) -> int:  # type: ignore[override]
        """Pictures of one image that are held together."""
        return self.config.view_count

    @property
    def traits(self) -> Traits:
        views, steps = self.config.view_count, self.config.steps
        return Traits(
            forward=views * (steps + 3),
            backward=views * steps,
            random=True,
            dynamic=True,
            text=False,
            gradients=True,
            source="arXiv 2606.06938",
        )

    def repair(self, x: Tensor, seeds: Tensor) -> Repair:
        config, views = self.config, self._views(x, seeds)
        plain = views.detach()
        with torch.no_grad():
            both = self.features(Look(torch.cat([plain, self._fresh(plain, seeds)]), self.logits))
            anchor, moved = both.chunk(2)
            degree = heads.relative_drift(moved, anchor)  # (V, B)
            weight = torch.sigmoid((degree - config.tau) / config.temperature)
        delta = self._counterattack(plain, anchor, seeds) * weight[..., None, None, None]
        drift = degree.amax(dim=0)
        return Repair(views + delta, self.mean_logits, delta[0], drift, drift > config.tau)

    def views(self, x: Tensor, seeds: Tensor) -> Look:
        return Look(self._views(x, seeds), self.mean_logits)

    def gate(self, x: Tensor, seeds: Tensor) -> Look:
        views, tau = self._views(x, seeds), self.config.tau

        def read(features: Tensor) -> Tensor:
            anchor, moved = features.chunk(2)
            return heads.relative_drift(moved, anchor).amax(dim=0) - tau

        return Look(torch.cat([views, self._fresh(views, seeds)]), read)

    def _views(self, x: Tensor, seeds: Tensor) -> Tensor:
        """(V, B, 3, H, W): x and its augmentations."""
        more = range(1, self.config.view_count)
        return torch.stack([x, *(mild(x, seeds, VIEW, view) for view in more)])

    def _fresh(self, views: Tensor, seeds: Tensor) -> Tensor:
        """One more augmentation of each view."""
        return torch.stack([mild(v, seeds, FRESH, at) for at, v in enumerate(views)])

    def _counterattack(self, views: Tensor, anchor: Tensor, seeds: Tensor) -> Tensor:
        """δ (V, B, 3, H, W) after N ascent steps on ‖f(v + δ) − f(v)‖²."""
        config, x = self.config, views.flatten(0, 1)
        target = anchor.flatten(0, 1)
        noise = torch.cat([philox.uniform_like(v, seeds, START, at) for at, v in enumerate(views)])
        delta = step.project((2 * noise - 1) * config.epsilon, x, config.epsilon)
        for _ in range(config.steps):
            with torch.enable_grad():
                leaf = (x + delta).requires_grad_()
                distance = (self.encode(leaf) - target).square().sum()
                (slope,) = torch.autograd.grad(distance, leaf)
            delta = step.pgd_step(delta, slope, x, config.alpha, config.epsilon)
        return delta.view_as(views)
