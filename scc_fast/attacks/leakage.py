"""Controls for label leakage: PGD without the true label.

An oblivious attack moves away from the true class, which reveals it to a defense even on images
that the model gets wrong; robust accuracy above clean accuracy is a sign of it. A gain under PGD
that is lost under these controls was due to the label.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from scc_fast.api import Defender
from scc_fast.attacks.base import Loss, bare_logits
from scc_fast.attacks.margin import Distinct
from scc_fast.attacks.pgd import PGD, cross_entropy
from scc_fast.reference import philox

GOAL = 161  # Philox purpose: the wrong class of pgd-random


@dataclass(frozen=True)
class PGDOwn(PGD):
    """PGD away from the undefended model's prediction on the clean image.

    Args:
        steps, alpha: as for PGD.
    """

    name: ClassVar[str] = "pgd-own"
    conclusive: ClassVar[bool] = False

    @property
    def title(self) -> str:
        return f"PGD-{self.steps} (own prediction)"

    def _loss(self, target: Defender, x: Tensor, labels: Tensor, seeds: Tensor) -> Loss:
        own = bare_logits(target, x).argmax(dim=1)
        return lambda logits: cross_entropy(logits, own)


@dataclass(frozen=True)
class PGDRandom(PGD):
    """PGD towards a wrong class drawn uniformly from the image's seed.

    Args:
        steps, alpha: as for PGD.
    """

    name: ClassVar[str] = "pgd-random"
    conclusive: ClassVar[bool] = False

    @property
    def title(self) -> str:
        return f"PGD-{self.steps} (random target)"

    def suits(self, target: Defender) -> bool:
        return len(target.table.distinct) > 1

    def _loss(self, target: Defender, x: Tensor, labels: Tensor, seeds: Tensor) -> Loss:
        goals = wrong_classes(Distinct.of(target, labels), seeds)
        return lambda logits: -cross_entropy(logits, goals)


def wrong_classes(classes: Distinct, seeds: Tensor) -> Tensor:
    """Classes (B,) int64 drawn from those with another embedding than the label's."""
    rivals = len(classes) - 1
    if rivals < 1:
        raise ValueError("pgd-random needs two classes with different embeddings, got one")
    drawn = philox.uniform(seeds, GOAL, 0, 1)[:, 0].double() * rivals
    place = drawn.long()  # uniform() stays below 1
    place = place + (place >= classes.labels).long()
    return classes.columns[place]
