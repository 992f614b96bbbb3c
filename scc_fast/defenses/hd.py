"""HD, hedge defense: ascent on the cross-entropies of all classes at once.

Wu et al., "Attacking Adversarial Attacks as A Defense" (arXiv 2106.04938).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scc_fast import ops
from scc_fast.config import MethodConfig, parse_budget
from scc_fast.defenses.base import Defense, Repair, Traits
from scc_fast.defenses.parts import Seen, Sighted
from scc_fast.reference import philox, step


@dataclass(frozen=True)
class HDConfig(MethodConfig):
    """Steps and budget of the hedge; None is replaced by a number when it is made.

    What the tables of TTC, DOC and SCC used for CLIP is not published. The default gives every
    gradient method of such a table one budget, 4/255, with the original ratio of alpha to it.

    Args:
        epsilon: max |δ|, L-infinity, pixel units in [0, 1). None: 4/255; where published, 0.031.
        alpha: step, pixel units in [0, 1). None: half of epsilon; where published, 0.007.
        steps: K.
        published: as in the authors' repository (burcywu/hedge_defense), made for adversarially
            trained models on CIFAR-10: that budget, and the prediction is that of the logits of
            δ¹ … δ^(K-1) together instead of δ^K's, at KF + KB. (The repository sums them; here it
            is their mean, which has the same largest and does not saturate a cross-entropy.)
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


def random_start(defense: Defense, x: Tensor, seeds: Tensor, epsilon: float) -> Tensor:
    """δ⁰ = Π(uniform(−ε, ε)), the very numbers that RN, TTC and SCC start from."""
    numel = x.shape[1:].numel()
    backend = defense.bare.setting.backend
    uniform = ops.philox_uniform(seeds, philox.DELTA, 0, numel, backend=backend)
    return step.project((2 * uniform.view_as(x) - 1) * epsilon, x, epsilon)


def hedge(logits: Tensor) -> Tensor:
    """(1/C) Σ_c CE(l, c) = LSE(l) − mean(l): (B, C) → (B,); its slope is softmax(l) − 1/C."""
    return logits.logsumexp(dim=-1) - logits.mean(dim=-1)


class HD(Sighted):
    """Hedge defense: attacks all classes, from a random start, and predicts at the last iterate."""

    name, Config = "hd", HDConfig

    @property
    def traits(self) -> Traits:
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

    def repair(self, x: Tensor, seeds: Tensor) -> Repair:
        config, still = self.config, x.detach()
        delta = random_start(self, still, seeds, config.epsilon)
        path, seen = [], []
        for _ in range(config.steps):
            with torch.enable_grad():
                leaf = delta.detach().requires_grad_()
                features = self.encode(still + leaf)
                loss = hedge(self.logits(features)).sum()
            gradient = torch.autograd.grad(loss, leaf)[0]
            if config.published:
                path.append(delta)
                seen.append(features.detach())
            delta = step.pgd_step(delta, gradient, still, config.alpha, config.epsilon)
        rows = x.new_full((len(x),), torch.nan)
        if config.published:  # the code's sum leaves out the start; its mean has the same argmax
            looked = x + torch.stack(path[1:])
            found = {"delta": path[-1], "drift": rows, "flagged": torch.ones_like(rows).bool()}
            if looked.requires_grad:  # an attacker's: the features kept have no way back to x
                return Repair(looked, self.mean_logits, **found)
            kept = torch.stack(seen[1:])
            return Seen(looked, self.mean_logits, **found, of=looked, seen=kept)
        return Repair(
            (x + delta)[None], self.mean_logits, delta, rows, torch.ones_like(rows).bool()
        )
