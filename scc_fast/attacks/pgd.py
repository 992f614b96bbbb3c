"""PGD on the undefended model, the field's usual attack.

Protocol of TTC and SCC: random start in the ball, sum of cross-entropies, steps of 1/255, no
restarts, last iterate (arXiv 1706.06083, 2503.03613).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from scc_fast._plain import plain
from scc_fast.api import Defender
from scc_fast.attacks.base import Attack, Loss, bare_slope, pgd_ascent, prepared


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

    def run(self, target: Defender, x: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
        x, labels, seeds = prepared(target, x, labels, seeds)
        if len(x) == 0:
            return x.clone()
        with plain(x.device):
            loss = self._loss(target, x, labels, seeds)

            def gradient(point: Tensor, _: int) -> Tensor:
                return bare_slope(target, point, loss)[1]

            return pgd_ascent(
                gradient, x, seeds, epsilon=self.epsilon, steps=self.steps, alpha=self.alpha
            )

    def _loss(self, target: Defender, x: Tensor, labels: Tensor, seeds: Tensor) -> Loss:
        """Loss to ascend on these images."""
        return lambda logits: cross_entropy(logits, labels)
