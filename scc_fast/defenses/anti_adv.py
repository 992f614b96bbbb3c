"""Anti-adv: descent on the cross-entropy of the model's own prediction.

Alfarra et al., "Combating Adversaries with Anti-Adversaries", AAAI 2022 (arXiv 2103.14347), and
the authors' repository MotasemAlfarra/Combating-Adversaries-with-Anti-Adversaries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from scc_fast.config import MethodConfig, format_epsilon, parse_budget, shown
from scc_fast.defenses.base import Defense, Look, Repair, Traits
from scc_fast.reference import step


@dataclass(frozen=True)
class AntiAdvConfig(MethodConfig):
    """Steps and budget of the anti-adversary; None is replaced by a number when it is made.

    What the tables of TTC, DOC and SCC used for CLIP is not published. The default gives every
    gradient method of such a table one budget, 4/255, and as the published one does, K steps
    that reach together just as far as they may: alpha is epsilon/steps, 2/255.

    Args:
        epsilon: max |γ|, L-infinity, pixel units in [0, 1). None: 4/255. Where published, there
            is no projection, and this is how far the steps reach, steps·alpha.
        alpha: step, pixel units in [0, 1). None: epsilon/steps; where published, 0.15.
        steps: K.
        published: as in the authors' code, alpha 0.15 and neither projection nor clamp, so that
            the encoder is shown pixels outside [0, 1].
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
    """Anti-adversary: makes the model more certain of what it says of the picture it was given.

    The pseudo-label is read off the pass that the first gradient needs, which the authors' code
    makes twice: K + 1 passes forward, not K + 2, for the same result.
    """

    name, Config = "anti_adv", AntiAdvConfig

    @property
    def traits(self) -> Traits:
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

    def repair(self, x: Tensor, seeds: Tensor) -> Repair:
        config, still = self.config, x.detach()
        delta, label = torch.zeros_like(still), None
        for _ in range(config.steps):
            with torch.enable_grad():
                leaf = delta.detach().requires_grad_()
                logits = self.logits(self.encode(still + leaf))
                label = logits.detach().argmax(dim=-1) if label is None else label
                # 1 - p vanishes in float32 where the model is certain
                loss = F.cross_entropy(logits.double(), label, reduction="sum")
            descent = -torch.autograd.grad(loss, leaf)[0]
            if config.published:
                delta = delta + config.alpha * descent.sign()
            else:
                delta = step.pgd_step(delta, descent, still, config.alpha, config.epsilon)
        rows = x.new_full((len(x),), torch.nan)
        return Repair(
            (x + delta)[None], self.mean_logits, delta, rows, torch.ones_like(rows).bool()
        )

    def guess(self, x: Tensor, seeds: Tensor) -> Look:
        return Look(x[None], self.mean_logits)
