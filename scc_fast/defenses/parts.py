"""What several of the defenses share: checks of their fields, and features that are kept."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from scc_fast.defenses.base import Defense, Look, Repair


def within(name: str, value: object, low: float, high: float) -> None:
    """Refuses what is not a number in [low, high].

    Raises:
        ValueError: naming the field and the range.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high:  # type: ignore[operator]
        raise ValueError(f"{name} must be a number in [{low:g}, {high:g}], got {value!r}")


def whole(name: str, value: object, low: int, high: int) -> None:
    """Refuses what is not a whole number in [low, high].

    Raises:
        ValueError: naming the field and the range.
    """
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number in [{low}, {high}], got {value!r}")


@dataclass(frozen=True, eq=False)
class Seen(Repair):
    """A repair whose pictures have been through the encoder already.

    Args:
        of: the pictures that were encoded.
        seen: their features (L, B, D), live where gradients were on.
    """

    of: Tensor
    seen: Tensor


class Sighted(Defense):
    """A defense that must see the features of its pictures to know what it repairs.

    They are encoded once: by `repair`, not again for the prediction.
    """

    def features(self, look: Look) -> Tensor:
        if isinstance(look, Seen) and look.pictures is look.of:
            return look.seen
        return super().features(look)
