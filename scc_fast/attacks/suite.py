"""The suite "adaptive": all adaptive attacks that apply to a defense."""

from __future__ import annotations

from scc_fast.api import Defender
from scc_fast.attacks.adaptive import BPDA, GateEvasion, PseudoLabel, Surrogate, ViewAware
from scc_fast.attacks.base import Attack
from scc_fast.attacks.unrolled import Unrolled


def adaptive_suite(target: Defender, epsilon: float) -> list[Attack]:
    """Adaptive attacks on a defense, cheapest first; report the worst per image.

    The strongest depends on the defense and the image.

    Args:
        target: the defense.
        epsilon: budget, pixel units in [0, 1).
    """
    every = (
        ViewAware(epsilon, steps=30),
        PseudoLabel(epsilon),
        BPDA(epsilon),
        GateEvasion(epsilon),
        Surrogate(epsilon),
        Unrolled(epsilon),
    )
    return [attack for attack in every if attack.suits(target)]
