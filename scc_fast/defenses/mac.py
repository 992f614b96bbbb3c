"""MAC, multi-view guided adaptive counterattack: views weighted by their instability."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from scc_fast.config import MethodConfig, whole
from scc_fast.defenses.augment import mild
from scc_fast.engine.batch import Batch, ascend, gradient_of, uniform_start
from scc_fast.engine.defense import Defense, Repaired, State, Traits
from scc_fast.engine.session import Session
from scc_fast.reference import heads

# Philox purposes; an augmentation takes two.
VIEW, FRESH, START = 120, 122, 124


@dataclass(frozen=True)
class MACConfig(MethodConfig):
    """MAC (CVPR 2026, arXiv 2606.06938); the defaults are the published ones.

    Args:
        epsilon, alpha: budget and step, L-infinity, pixel units in [0, 1); the budget is twice
            that of other counterattacks.
        steps: N, counterattack steps; the last iterate is used.
        tau: corruption degree with weight 1/2.
        temperature: of the sigmoid from corruption degree to weight.
        view_count: V, the picture and V − 1 mild augmentations.
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

    Per view v: corruption degree c = ‖f(aug(v)) − f(v)‖ / ‖f(v)‖ with a new augmentation, a
    counterattack as in TTC with its own start and anchor f(v), and δ_v weighted by
    sigmoid((c − τ)/T). The logits of the views v + δ_v are averaged. Unlike in TTC, a large c means
    attacked. `delta` is that of the picture itself, the first view; `drift` is the largest c of the
    views, and an image is flagged above τ.
    """

    name, Config = "mac", MACConfig
    config: MACConfig
    has_gate = True
    repairs: Literal["all"] = "all"

    def width(self, session: Session, size: tuple[int, int]) -> int:
        """Pictures per image in the encoder at once."""
        return self.config.view_count

    def traits(self, session: Session) -> Traits:
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

    def first_pass(self, session: Session, batch: Batch) -> State:
        views = self.pictures(session, batch)
        fresh = torch.stack(
            [mild(v, batch.seeds, FRESH, at, session.backend) for at, v in enumerate(views)]
        )
        anchor, moved = session.features(torch.cat([views, fresh])).chunk(2)
        degree = heads.relative_drift(moved, anchor)  # (V, B)
        drift = degree.amax(dim=0)
        kept = {"anchor": anchor, "degree": degree}
        return State(drift, margin=drift - self.config.tau, views=kept)

    def after_gate(self, session: Session, batch: Batch, state: State) -> Repaired:
        config, views = self.config, self.pictures(session, batch)
        degree, anchor = state.views["degree"], state.views["anchor"]
        weight = torch.sigmoid((degree - config.tau) / config.temperature)
        delta = self._counterattack(session, views.detach(), anchor, batch.seeds)
        delta = delta * weight[..., None, None, None]
        return Repaired(session.mean_logits(session.features(views + delta)), delta[0])

    def pictures(self, session: Session, batch: Batch) -> Tensor:
        """(V, B, 3, H, W): x and its augmentations."""
        more = range(1, self.config.view_count)
        x, seeds = batch.x, batch.seeds
        return torch.stack([x, *(mild(x, seeds, VIEW, view, session.backend) for view in more)])

    def _counterattack(
        self, session: Session, views: Tensor, anchor: Tensor, seeds: Tensor
    ) -> Tensor:
        """δ (V, B, 3, H, W) after N ascent steps on ‖f(v + δ) − f(v)‖²."""
        config, x = self.config, views.flatten(0, 1)
        target, epsilon = anchor.flatten(0, 1), config.epsilon
        starts = [
            uniform_start(v, seeds, epsilon, START, at, session.backend)
            for at, v in enumerate(views)
        ]

        def away(delta: Tensor) -> Tensor:
            return (session.encode(x + delta) - target).square()

        delta = ascend(
            x,
            torch.cat(starts),
            lambda delta, _: gradient_of(away, delta),
            steps=config.steps,
            alpha=config.alpha,
            epsilon=epsilon,
        )
        return delta.view_as(views)
