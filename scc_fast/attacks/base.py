"""What every attack is: its settings, whom it is made against, and the ascent they share.

An attack is told the true labels, and seeds of its own: never those a defense is judged with.
"""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from scc_fast._plain import plain
from scc_fast.api import Defender
from scc_fast.config import format_epsilon, parse_budget, python_number, whole
from scc_fast.engine.batch import ascend, uniform_start
from scc_fast.reference import philox

# (x, step) -> gradient of the loss to ascend, the shape of x.
Gradient = Callable[[Tensor, int], Tensor]
# logits (B, K) -> the loss to ascend, (B,).
Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Attack(ABC):
    """One attack with its settings; subclasses add theirs as fields.

    Args:
        epsilon: budget, L-infinity, pixel units in [0, 1).

    Attributes:
        name: as a command line spells it.
        aware: it knows the defense, and is made against each; else once, on the undefended model,
            and shown to all.
        conclusive: a working one must bring the undefended model down; one that need not
            (black boxes, controls) says so.
        budgeted: it has a budget; else its epsilon is 0, and pixels may move anywhere in [0, 1].
    """

    epsilon: float = 4 / 255

    name: ClassVar[str]
    aware: ClassVar[bool] = False
    conclusive: ClassVar[bool] = True
    budgeted: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = python_number(getattr(self, field.name))
            if value is None and field.default is None:
                continue
            if field.name in ("epsilon", "alpha"):
                value = parse_budget(field.name, value)
            elif field.name in ("steps", "eot", "queries", "restarts"):
                value = whole(field.name, value, 1)
            object.__setattr__(self, field.name, value)

    @property
    def title(self) -> str:
        """As a table shows it, without the budget: "PGD-10"."""
        return self.name

    @property
    def spec(self) -> str:
        """What parse_attack() makes this attack of, budget apart: "pgd:steps=20"."""
        parts = [self.name]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "epsilon" and value != field.default:
                parts.append(
                    f"{field.name}={value if isinstance(value, str) else json.dumps(value)}"
                )
        return ":".join(parts)

    @property
    def reach(self) -> float:
        """How far a pixel may move."""
        return self.epsilon if self.budgeted else 1.0

    def suits(self, target: Defender) -> bool:
        """Whether it can be made against this defense (a gate attack needs a gate)."""
        return True

    @abstractmethod
    def run(self, target: Defender, x: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
        """The attacked images.

        Args:
            target: the defense; one that is not `aware` uses no more than its session.
            x: (B, 3, H, W) float32 in [0, 1] on the model's device.
            labels: (B,) int64 true classes.
            seeds: (B,) int64, the attacker's own.

        Returns:
            (B, 3, H, W) float32 in [0, 1], within `reach` of x.
        """

    def settings(self) -> dict[str, Any]:
        """Name and fields, the budget, if it has one, as "4/255"."""
        found = {"attack": self.name, **dataclasses.asdict(self)}
        if self.budgeted:
            return found | {"epsilon": format_epsilon(self.epsilon)}
        return {name: value for name, value in found.items() if name != "epsilon"}


def prepared(
    target: Defender, x: Tensor, labels: Tensor, seeds: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What run() was given, checked, as tensors on one device that autograd may keep.

    Raises:
        TypeError, ValueError: naming the argument, what came and what would be right.
    """
    for name, value in (("x", x), ("labels", labels), ("seeds", seeds)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if x.dtype != torch.float32 or x.ndim != 4 or x.shape[1] != 3:
        raise ValueError(
            f"x must be float32 of shape (B, 3, H, W), got {x.dtype} of shape {tuple(x.shape)}"
        )
    home = target.model.device
    if x.device.type != home.type or home.index not in (None, x.device.index):
        raise ValueError(f"x must be on the model's device {home}, got {x.device}")
    for name, value in (("labels", labels), ("seeds", seeds)):
        if value.dtype != torch.int64 or value.shape != (len(x),):
            raise ValueError(
                f"{name} must be int64 of shape ({len(x)},), one per image, got {value.dtype} of "
                f"shape {tuple(value.shape)}"
            )
    if len(x) and not bool(((x >= 0) & (x <= 1)).all()):  # NaN is not
        raise ValueError(f"x must be in [0, 1], got {float(x.min()):.9g} to {float(x.max()):.9g}")
    classes = len(target.text_features)
    if len(x) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"labels must be in [0, {classes}), got {int(labels.min())} to {int(labels.max())}"
        )
    with torch.inference_mode(False):
        x, labels, seeds = (
            value.clone() if value.is_inference() else value.detach()
            for value in (x, labels, seeds)
        )
        return x, labels.to(x.device), seeds.to(x.device)


def slope(point: Tensor, answer: Callable[[Tensor], Tensor], loss: Loss) -> tuple[Tensor, Tensor]:
    """answer(point), and the gradient of the summed loss of it: like point.

    What `answer` does not pass a gradient through counts as constant.
    """
    with torch.enable_grad():
        leaf = point.detach().requires_grad_()
        found = answer(leaf)
        value = loss(found).sum()
    return found.detach(), torch.autograd.grad(value, leaf)[0]


def bare_logits(target: Defender, x: Tensor) -> Tensor:
    """Logits (B, K) of the undefended model, whatever the defense makes of x."""
    return target.session.logits(target.session.encode(x))


def bare_slope(target: Defender, point: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """As slope(), of the undefended model: its logits (B, K), and the gradient of the loss."""
    return slope(point, lambda x: bare_logits(target, x), loss)


def pgd_ascent(
    gradient: Gradient,
    x: Tensor,
    seeds: Tensor,
    *,
    epsilon: float,
    steps: int,
    alpha: float = 1 / 255,
) -> Tensor:
    """Signed gradient ascent in the ball and the box: random start, last iterate.

    The protocol of TTC and SCC (Madry et al., arXiv 1706.06083).
    """
    if len(x) == 0:
        return x.clone()
    with plain(x.device):
        x = x.detach().clone()
        start = uniform_start(x, seeds, epsilon, philox.ATTACK_START)

        def at(delta: Tensor, t: int) -> Tensor:
            return gradient(x + delta, t)

        delta = ascend(x, start, at, steps=steps, alpha=alpha, epsilon=epsilon)
        return (x + delta).clamp(0, 1)
