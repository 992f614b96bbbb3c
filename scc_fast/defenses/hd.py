"""HD, hedge defense: ascent on the cross-entropies of all classes at once.

Wu et al., "Attacking Adversarial Attacks as A Defense" (arXiv 2106.04938).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from scc_fast.config import MethodConfig, parse_budget
from scc_fast.defenses.scc import no_drift
from scc_fast.engine.batch import Batch, ascend, gradient_of, uniform_start
from scc_fast.engine.defense import Defense, Repaired, State, Traits
from scc_fast.engine.session import Session


@dataclass(frozen=True)
class HDConfig(MethodConfig):
    """Config of HD; None fields get numbers at construction.

    The values behind the tables of TTC, DOC and SCC are not published. The default is their common
    budget, 4/255, with the original ratio of alpha to it.

    Args:
        epsilon: max |δ|, L-infinity, pixel units in [0, 1). None: 4/255, or 0.031 with `published`.
        alpha: step, pixel units in [0, 1). None: epsilon/2, or 0.007 with `published`.
        steps: K.
        published: as in the authors' repository (burcywu/hedge_defense), for adversarially trained
            models on CIFAR-10: its budget, and the mean logits of δ¹ … δ^(K-1) instead of δ^K's,
            at KF + KB. (The repository sums them: same argmax.)
    """

    epsilon: float | None = None
    alpha: float | None = None
    steps: int = 20
    published: bool = False

    def __post_init__(self) -> None:
        default = 0.031 if self.published else 4 / 255
        epsilon = parse_budget("epsilon", default if self.epsilon is None else self.epsilon)
        object.__setattr__(self, "epsilon", epsilon)
        if self.alpha is None:
            object.__setattr__(self, "alpha", 0.007 if self.published else epsilon / 2)
        super().__post_init__()
        if self.published and self.steps < 2:
            raise ValueError(f"steps must be at least 2 where published, got {self.steps}")


def hedge(logits: Tensor) -> Tensor:
    """(1/C) Σ_c CE(l, c) = LSE(l) − mean(l): (B, C) → (B,); gradient softmax(l) − 1/C."""
    return logits.logsumexp(dim=-1) - logits.mean(dim=-1)


class HD(Defense):
    """Hedge defense: attacks all classes from a random start; predicts at the last iterate."""

    name, Config = "hd", HDConfig
    repairs: Literal["all"] = "all"

    def traits(self, session: Session) -> Traits:
        steps = self.config.steps
        return Traits(
            forward=steps + (not self.config.published),
            backward=steps,
            random=True,
            dynamic=True,
            text=True,
            gradients=True,
            source="arXiv 2106.04938; published: the released code's budget and prediction",
        )

    def first_pass(self, session: Session, batch: Batch) -> State:
        return State(no_drift(batch))

    def after_gate(self, session: Session, batch: Batch, state: State) -> Repaired:
        config, still = self.config, batch.x.detach()
        delta = uniform_start(still, batch.seeds, config.epsilon, backend=session.backend)
        path, seen = list[Tensor](), list[Tensor]()

        def objective(delta: Tensor) -> Tensor:
            features = session.encode(still + delta)
            if config.published:
                path.append(delta.detach())
                seen.append(features.detach())
            return hedge(session.logits(features))

        delta = ascend(
            still,
            delta,
            lambda delta, _: gradient_of(objective, delta),
            steps=config.steps,
            alpha=config.alpha,
            epsilon=config.epsilon,
        )
        if not config.published:
            looked = (batch.x + delta)[None]
            return Repaired(session.mean_logits(session.features(looked)), delta)
        # The code's sum omits the start; the mean has the same argmax.
        kept = torch.stack(seen[1:])
        if torch.is_grad_enabled() and batch.x.requires_grad:
            kept = session.features(batch.x + torch.stack(path[1:]))
        return Repaired(session.mean_logits(kept), path[-1])
