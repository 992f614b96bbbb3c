"""Margin losses, and the CW attack of TTC and SCC."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from scc_fast.api import Defender
from scc_fast.attacks.base import Loss
from scc_fast.attacks.pgd import PGD

_SLACK = 50.0  # the relu of the CW loss is open for margins > -50


@dataclass(frozen=True, eq=False)
class Distinct:
    """Classes with duplicate text embeddings merged: the margin between equal ones is always 0.

    Args:
        columns: (U,) int64, first class of each different embedding.
        labels: (B,) int64, index of each image's class in `columns`.
    """

    columns: Tensor
    labels: Tensor

    @classmethod
    def of(cls, target: Defender, labels: Tensor) -> Distinct:
        """Distinct classes of a defense, for labels (B,) among its K classes."""
        group, kinds = target.table.group, len(target.table.distinct)
        order = torch.arange(len(group), device=group.device)
        if kinds == len(group):
            return cls(order, labels)
        first = torch.full_like(order[:kinds], len(group))
        return cls(first.scatter_reduce(0, group, order, "amin"), group[labels])

    def __len__(self) -> int:
        return len(self.columns)

    def __getitem__(self, rows: Tensor) -> Distinct:
        """Select images."""
        return Distinct(self.columns, self.labels[rows])

    def logits(self, logits: Tensor) -> Tensor:
        """(B, K) → (B, U)."""
        return logits[:, self.columns]


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """l_y − max_{k≠y} l_k: (B, K), (B,) → (B,), negative where another class wins."""
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return logits.gather(1, labels[:, None])[:, 0] - others.amax(dim=1)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio (arXiv 2003.01690, equation 6): (B, K ≥ 3), (B,) → (B,).

    −(l_y − max_{k≠y} l_k) / (l_π1 − l_π3), with π the classes by falling logits: invariant to
    scale and shift, positive where another class wins.
    """
    ranked = logits.sort(dim=1)
    own = logits.gather(1, labels[:, None])[:, 0]
    wins = ranked.indices[:, -1] == labels
    rival = torch.where(wins, ranked.values[:, -2], ranked.values[:, -1])
    return -(own - rival) / (ranked.values[:, -1] - ranked.values[:, -3] + 1e-12)


def targeted_dlr(logits: Tensor, labels: Tensor, goals: Tensor) -> Tensor:
    """DLR towards a class t (arXiv 2003.01690, equation 7): (B, K ≥ 4), (B,), (B,) → (B,).

    −(l_y − l_t) / (l_π1 − (l_π3 + l_π4) / 2).
    """
    ranked = logits.sort(dim=1).values
    gap = logits.gather(1, labels[:, None]) - logits.gather(1, goals[:, None])
    return -gap[:, 0] / (ranked[:, -1] - 0.5 * (ranked[:, -3] + ranked[:, -4]) + 1e-12)


@dataclass(frozen=True)
class CW(PGD):
    """The margin attack of the papers: PGD's loop on −relu(l_y − max_{k≠y} l_k + 50).

    After Carlini and Wagner's loss (arXiv 1608.04644), in the form of TTC (arXiv 2503.03613).
    Classes with the true one's embedding are not rivals.

    Args:
        steps, alpha: as for PGD.
    """

    name: ClassVar[str] = "cw"

    @property
    def title(self) -> str:
        return f"CW-{self.steps} (margin)"

    def _loss(self, target: Defender, x: Tensor, labels: Tensor, seeds: Tensor) -> Loss:
        classes = Distinct.of(target, labels)
        return lambda logits: -torch.relu(margin(classes.logits(logits), classes.labels) + _SLACK)
