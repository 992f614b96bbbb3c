"""Attack: base class, gradients of the undefended model, and PGD's ascent.

An attack gets the true labels, and its own seeds, which differ from the defense's.
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
    """Attack with its settings; subclasses add fields.

    Args:
        epsilon: budget, L-infinity, pixel units in [0, 1).

    Attributes:
        name: in a spec.
        aware: made against each defense; else once, against the undefended model.
        conclusive: must break the undefended model; False for black boxes and controls.
        budgeted: has a budget; else epsilon is 0, and pixels may take any value in [0, 1].
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
        """Title in tables, without the budget: "PGD-10"."""
        return self.name

    @property
    def spec(self) -> str:
        """Spec for parse_attack(), without the budget: "pgd:steps=20"."""
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
        """Largest change of a pixel."""
        return self.epsilon if self.budgeted else 1.0

    def suits(self, target: Defender) -> bool:
        """Whether the attack applies to this defense (a gate attack needs a gate)."""
        return True

    @abstractmethod
    def run(self, target: Defender, x: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
        """Attack images.

        Args:
            target: the defense; only its session unless `aware`.
            x: (B, 3, H, W) float32 in [0, 1] on the model's device.
            labels: (B,) int64 true classes.
            seeds: (B,) int64, the attacker's own.

        Returns:
            (B, 3, H, W) float32 in [0, 1], within `reach` of x.
        """

    def settings(self) -> dict[str, Any]:
        """Name and fields, with a budget as "4/255"."""
        found = {"attack": self.name, **dataclasses.asdict(self)}
        if self.budgeted:
            return found | {"epsilon": format_epsilon(self.epsilon)}
        return {name: value for name, value in found.items() if name != "epsilon"}


def prepared(
    target: Defender, x: Tensor, labels: Tensor, seeds: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Checked arguments of run(), on one device and usable by autograd.

    Raises:
        TypeError, ValueError: an invalid argument.
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
    """answer(point), and the gradient of its summed loss with respect to point."""
    with torch.enable_grad():
        leaf = point.detach().requires_grad_()
        found = answer(leaf)
        value = loss(found).sum()
    return found.detach(), torch.autograd.grad(value, leaf)[0]


def bare_logits(target: Defender, x: Tensor) -> Tensor:
    """Logits (B, K) of the undefended model."""
    return target.session.logits(target.session.encode(x))


def bare_slope(target: Defender, point: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """slope() of the undefended model: its logits (B, K), and the gradient of the loss."""
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
    """Signed gradient ascent in ball and box, from a random start to the last iterate.

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
