"""Anti-adv: descent on the cross-entropy of the model's own prediction.

Alfarra et al., "Combating Adversaries with Anti-Adversaries", AAAI 2022 (arXiv 2103.14347), and
the authors' repository MotasemAlfarra/Combating-Adversaries-with-Anti-Adversaries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from scc_fast.config import MethodConfig, NoneConfig, format_epsilon, parse_budget, shown
from scc_fast.defenses.scc import Undefended, no_drift
from scc_fast.engine.batch import Batch, ascend, gradient_of
from scc_fast.engine.defense import Defense, Repaired, State, Traits
from scc_fast.engine.session import Session


@dataclass(frozen=True)
class AntiAdvConfig(MethodConfig):
    """Config of Anti-adv; None fields get numbers at construction.

    The values behind the tables of TTC, DOC and SCC are not published. The default is their common
    budget, 4/255, just reached by K steps, as in the published config: alpha = epsilon/steps.

    Args:
        epsilon: max |γ|, L-infinity, pixel units in [0, 1). None: 4/255. With
            `published` there is no projection, and this is steps·alpha.
        alpha: step, pixel units in [0, 1). None: epsilon/steps, or 0.15 with `published`.
        steps: K.
        published: as in the authors' code: alpha 0.15, no projection, no clamp to [0, 1].
    """

    epsilon: float | None = None
    alpha: float | None = None
    steps: int = 2
    published: bool = False

    def __post_init__(self) -> None:
        given, epsilon, alpha = self.epsilon, self.epsilon, self.alpha
        epsilon = parse_budget("epsilon", 4 / 255 if epsilon is None else epsilon)
        object.__setattr__(self, "epsilon", epsilon)
        object.__setattr__(self, "alpha", 0.15 if alpha is None else alpha)
        super().__post_init__()
        if alpha is None and not self.published:
            object.__setattr__(self, "alpha", epsilon / max(1, self.steps))
        if self.published:
            step_size = parse_budget("alpha", self.alpha)
            reach = parse_budget("steps * alpha, where published,", self.steps * step_size)
            if given is not None and epsilon != reach:
                raise ValueError(
                    f"epsilon must be None where published: nothing is projected, and the steps "
                    f"reach {format_epsilon(reach)}; got {shown(given)}"
                )
            object.__setattr__(self, "epsilon", reach)


class AntiAdv(Defense):
    """Anti-adversary: increases the model's confidence in its prediction.

    The pseudo-label shares the first gradient's pass, which the authors' code makes twice: K + 1
    forward passes instead of K + 2, with the same result.
    """

    name, Config = "anti_adv", AntiAdvConfig
    repairs: Literal["all"] = "all"

    def traits(self, session: Session) -> Traits:
        steps = self.config.steps
        return Traits(
            forward=steps + 1,
            backward=steps,
            random=False,
            dynamic=True,
            text=True,
            gradients=True,
            source="arXiv 2103.14347; published: alpha 0.15, no projection, no clamp",
        )

    def first_pass(self, session: Session, batch: Batch) -> State:
        return State(no_drift(batch))

    def after_gate(self, session: Session, batch: Batch, state: State) -> Repaired:
        config, still = self.config, batch.x.detach()
        label: Tensor | None = None

        def certainty(delta: Tensor) -> Tensor:
            nonlocal label
            logits = session.logits(session.encode(still + delta))
            label = logits.detach().argmax(dim=-1) if label is None else label
            # 1 - p underflows in float32 for a certain model
            return -F.cross_entropy(logits.double(), label, reduction="none")

        def gradient(delta: Tensor, _: int) -> Tensor:
            return gradient_of(certainty, delta)

        delta = torch.zeros_like(still)
        if config.published:
            for t in range(config.steps):
                delta = delta + config.alpha * gradient(delta, t).sign()
        else:
            alpha, epsilon = config.alpha, config.epsilon
            delta = ascend(still, delta, gradient, steps=config.steps, alpha=alpha, epsilon=epsilon)
        looked = (batch.x + delta)[None]
        return Repaired(session.mean_logits(session.features(looked)), delta)

    @property
    def guess(self) -> Defense:
        return Undefended(NoneConfig())
