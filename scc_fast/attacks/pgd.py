"""PGD on the undefended model: what the literature calls robust accuracy is measured on this.

The protocol of TTC and SCC: random start in the ball, sum of cross-entropies, steps of 1/255, no
restarts, the last iterate is the answer (METHODS: arXiv 1706.06083, 2503.03613).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from scc_fast.attacks.base import Attack, ascend, slope
from scc_fast.defenses.base import Defense, Look


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, K), (B,) → (B,)."""
    return F.cross_entropy(logits, labels, reduction="none")


@dataclass(frozen=True)
class PGD(Attack):
    """Projected gradient descent on the cross-entropy of the true label.

    Args:
        steps: at least 1.
        alpha: step, pixel units.
    """

    steps: int = 10
    alpha: float = 1 / 255

    name: ClassVar[str] = "pgd"

    @property
    def title(self) -> str:
        return f"PGD-{self.steps}"

    def run(self, target: Defense, x: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
        def look(point: Tensor) -> Look:
            return Look(point[None], target.mean_logits)

        def gradient(point: Tensor, _: int) -> Tensor:
            return slope(target, look, point, lambda found: self._loss(found, labels))[1]

        return ascend(gradient, x, seeds, epsilon=self.epsilon, steps=self.steps, alpha=self.alpha)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits, labels)
