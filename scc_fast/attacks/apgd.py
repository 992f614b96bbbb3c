"""Auto-PGD (Croce and Hein, arXiv 2003.01690, algorithm 1): PGD with adaptive step sizes.

Each image has its own step, 2ε at first. At checkpoints, at shrinking distances, it is halved if
the loss rose in too few steps or a stretch brought no new best; the image then restarts from its
best iterate.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from scc_fast._plain import plain
from scc_fast.api import Defender
from scc_fast.attacks.base import Attack, bare_logits, bare_slope, prepared
from scc_fast.attacks.margin import Distinct, dlr, targeted_dlr
from scc_fast.attacks.pgd import cross_entropy
from scc_fast.config import whole
from scc_fast.reference import philox

START = 160  # Philox purpose: the random start, one view per restart

# Iterates (B, 3, H, W) -> loss (B,), whether misclassified (B,) bool, gradient.
Evaluate = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Climb:
    """Result of one run.

    Args:
        images: (B, 3, H, W), the misclassified iterate of highest loss, else the iterate of
            highest loss.
        loss: (B,) of `images`.
        fooled: (B,) bool, whether any iterate is misclassified.
        highest: (B,) highest loss of all iterates.
    """

    images: Tensor
    loss: Tensor
    fooled: Tensor
    highest: Tensor


def climb(
    evaluate: Evaluate,
    x: Tensor,
    start: Tensor,
    *,
    epsilon: float,
    steps: int,
    momentum: float = 0.75,
    rho: float = 0.75,
) -> Climb:
    """Run from `start`, the first iterate; `steps` + 1 evaluations.

    The step after x_k is x_k + a (z − x_k) + (1 − a)(x_k − x_{k−1}) with z the plain signed step,
    each clamped to ball and box. Checkpoints are 0.22 of the steps apart at first, then 0.03 less
    each time, at least 0.06.

    Args:
        evaluate: the loss to ascend.
        x: (B, 3, H, W) float32 in [0, 1], the center of the ball.
        start: like x, in the ball.
        momentum: a, from the second step on.
        rho: the step is halved if the loss rose in at most this share of a stretch.
    """
    low, high = (x - epsilon).clamp(0, 1), (x + epsilon).clamp(0, 1)
    point = start.clamp(low, high)
    loss, wrong, gradient = evaluate(point)
    best, highest, uphill = point, loss, gradient
    images, shown, fooled = point, loss, wrong
    size = torch.full_like(loss, 2 * epsilon)
    before, last, risen = point, loss, torch.zeros_like(loss)
    halved, at_check = torch.ones_like(wrong), loss
    stretch = left = max(int(0.22 * steps), 1)
    for at in range(steps):
        plainly = (point + _wide(size) * gradient.sign()).clamp(low, high)
        a = momentum if at else 1.0
        before, point = (
            point,
            (point + (plainly - point) * a + (point - before) * (1 - a)).clamp(low, high),
        )
        loss, wrong, gradient = evaluate(point)
        better = loss > highest
        best = torch.where(_wide(better), point, best)
        uphill = torch.where(_wide(better), gradient, uphill)
        highest = torch.where(better, loss, highest)
        show = (wrong & ~fooled) | ((wrong == fooled) & (loss > shown))
        images = torch.where(_wide(show), point, images)
        shown, fooled = torch.where(show, loss, shown), fooled | wrong
        risen, last = risen + (loss > last), loss
        left -= 1
        if left == 0:
            halved = (risen <= rho * stretch) | (~halved & (highest <= at_check))
            size = torch.where(halved, size / 2, size)
            point = torch.where(_wide(halved), best, point)
            gradient = torch.where(_wide(halved), uphill, gradient)
            at_check, risen = highest, torch.zeros_like(risen)
            stretch = max(stretch - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
            left = stretch
    return Climb(images, shown, fooled, highest)


def _wide(rows: Tensor) -> Tensor:
    """(B,) → (B, 1, 1, 1)."""
    return rows[:, None, None, None]


@dataclass(frozen=True)
class APGD(Attack):
    """Base of the three Auto-PGD attacks.

    Returns per image the misclassified iterate of highest loss, else the iterate of highest loss;
    images misclassified when clean are attacked, too. Restarts run on the remaining images.

    Args:
        steps: iterations per run.
        restarts: runs per goal, from different random starts.
    """

    steps: int = 100
    restarts: int = 1

    least: ClassVar[int] = 2  # classes with different embeddings
    label: ClassVar[str]

    @property
    def title(self) -> str:
        steps = "" if self.steps == 100 else f"-{self.steps}"
        restarts = "" if self.restarts == 1 else f" ({self.restarts} restarts)"
        return f"{self.label}{steps}{restarts}"

    def suits(self, target: Defender) -> bool:
        return len(target.table.distinct) >= self.least

    def run(self, target: Defender, x: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
        x, labels, seeds = prepared(target, x, labels, seeds)
        if not self.suits(target):
            raise ValueError(
                f"{self.name} needs at least {self.least} classes with different embeddings, got "
                f"{len(target.table.distinct)}"
            )
        if len(x) == 0:
            return x.clone()
        with plain(x.device):
            return self._runs(target, x, Distinct.of(target, labels), seeds)

    def _runs(self, target: Defender, x: Tensor, classes: Distinct, seeds: Tensor) -> Tensor:
        goals = self._goals(target, x, classes)
        images, rows = x.clone(), torch.arange(len(x), device=x.device)
        loss = torch.full_like(x[:, 0, 0, 0], -torch.inf)
        for number in range(goals.shape[1] * self.restarts):
            evaluate = self._evaluate(target, classes[rows], goals[rows, number // self.restarts])
            noise = 2 * philox.uniform_like(x[rows], seeds[rows], START, number) - 1
            start = x[rows] + self.epsilon * noise
            found = climb(evaluate, x[rows], start, epsilon=self.epsilon, steps=self.steps)
            better = found.fooled | (found.loss > loss[rows])
            images[rows[better]] = found.images[better]
            loss[rows[better]] = found.loss[better]
            rows = rows[~found.fooled]
            if len(rows) == 0:
                break
        return images

    def _evaluate(self, target: Defender, classes: Distinct, goals: Tensor) -> Evaluate:
        def loss(logits: Tensor) -> Tensor:
            return self._loss(classes.logits(logits), classes.labels, goals)

        def evaluate(point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits, gradient = bare_slope(target, point, loss)
            wrong = classes.logits(logits).argmax(dim=1) != classes.labels
            return loss(logits), wrong, gradient

        return evaluate

    def _goals(self, target: Defender, x: Tensor, classes: Distinct) -> Tensor:
        """Goals (B, n), attacked in order; one unused column for untargeted attacks."""
        return classes.labels[:, None]

    @staticmethod
    @abstractmethod
    def _loss(logits: Tensor, labels: Tensor, goals: Tensor) -> Tensor:
        """(B, U), (B,), (B,) → (B,)."""


@dataclass(frozen=True)
class APGDCE(APGD):
    """Auto-PGD on the cross-entropy of the true label.

    Args:
        steps, restarts: see APGD.
    """

    name: ClassVar[str] = "apgd-ce"
    label: ClassVar[str] = "APGD-CE"

    @staticmethod
    def _loss(logits: Tensor, labels: Tensor, goals: Tensor) -> Tensor:
        return cross_entropy(logits, labels)


@dataclass(frozen=True)
class APGDDLR(APGD):
    """Auto-PGD on the difference of logits ratio; needs three classes.

    Args:
        steps, restarts: see APGD.
    """

    name: ClassVar[str] = "apgd-dlr"
    label: ClassVar[str] = "APGD-DLR"
    least: ClassVar[int] = 3

    @staticmethod
    def _loss(logits: Tensor, labels: Tensor, goals: Tensor) -> Tensor:
        return dlr(logits, labels)


@dataclass(frozen=True)
class APGDT(APGD):
    """Auto-PGD on the targeted DLR loss, one goal at a time; needs four classes.

    Goals are the wrong classes by falling logits on the clean image.

    Args:
        steps, restarts: see APGD.
        targets: number of goals, at most the number of wrong classes.
    """

    targets: int = 9

    name: ClassVar[str] = "apgd-t"
    label: ClassVar[str] = "APGD-T"
    least: ClassVar[int] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("targets", self.targets, 1)

    @property
    def title(self) -> str:
        return super().title + ("" if self.targets == 9 else f" ({self.targets} targets)")

    def _goals(self, target: Defender, x: Tensor, classes: Distinct) -> Tensor:
        logits = classes.logits(bare_logits(target, x))
        logits = logits.scatter(1, classes.labels[:, None], -torch.inf)
        return logits.topk(min(self.targets, len(classes) - 1), dim=1).indices

    @staticmethod
    def _loss(logits: Tensor, labels: Tensor, goals: Tensor) -> Tensor:
        return targeted_dlr(logits, labels, goals)
