"""Attacks by name: oblivious, adaptive, and ordinary damage."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

from scc_fast.api import Defender
from scc_fast.attacks.adaptive import BPDA, GateEvasion, PseudoLabel, Surrogate, ViewAware
from scc_fast.attacks.apgd import APGDCE, APGDDLR, APGDT
from scc_fast.attacks.autoattack import AutoAttack, PaperAA, Square, ThroughAutoAttack
from scc_fast.attacks.base import Attack
from scc_fast.attacks.damage import Damaged
from scc_fast.attacks.leakage import PGDOwn, PGDRandom
from scc_fast.attacks.margin import CW
from scc_fast.attacks.module import BareLogits
from scc_fast.attacks.pgd import PGD
from scc_fast.attacks.transfer import Transfer
from scc_fast.attacks.unrolled import Unrolled
from scc_fast.config import nearest, shown

ATTACKS: dict[str, type[Attack]] = {
    kind.name: kind
    for kind in (
        PGD,
        CW,
        APGDCE,
        APGDDLR,
        APGDT,
        PaperAA,
        AutoAttack,
        ThroughAutoAttack,
        Square,
        Transfer,
        PGDOwn,
        PGDRandom,
        Damaged,
        ViewAware,
        BPDA,
        GateEvasion,
        Surrogate,
        PseudoLabel,
        Unrolled,
    )
}

__all__ = [
    "APGDCE",
    "APGDDLR",
    "APGDT",
    "ATTACKS",
    "BPDA",
    "CW",
    "PGD",
    "Attack",
    "AutoAttack",
    "BareLogits",
    "Damaged",
    "GateEvasion",
    "PGDOwn",
    "PGDRandom",
    "PaperAA",
    "PseudoLabel",
    "Square",
    "Surrogate",
    "ThroughAutoAttack",
    "Transfer",
    "Unrolled",
    "ViewAware",
    "adaptive_suite",
    "parse_attack",
]


def parse_attack(spec: str, epsilon: float) -> Attack:
    """Parse "pgd10", "apgd-ce50", "square:queries=1000", "pgd:steps=20:alpha=2/255", …

    Digits after a name are its steps. Fields follow as :FIELD=VALUE; values are JSON, else text,
    which may contain colons ("transfer:source=hf-hub:org/repo").

    Args:
        spec: name and non-default fields, without the budget.
        epsilon: the budget, pixel units in [0, 1); ignored by attacks without one ("damaged").

    Raises:
        ValueError: an unknown or repeated name or field, or an invalid value.
    """
    head, *parts = re.split(r":(?=\w+=)", spec)
    head, colon, stray = head.partition(":")
    name, digits = _named(head)
    if name not in ATTACKS:
        raise ValueError(
            f"attack must be one of {', '.join(ATTACKS)}; got {shown(spec)}{nearest(name, ATTACKS)}"
        )
    kind = ATTACKS[name]
    fields = {field.name: field for field in dataclasses.fields(kind)}
    known = [field for field in fields if field != "epsilon"]
    if colon:
        raise ValueError(f"attack {shown(spec)}: {shown(stray)} must be FIELD=VALUE")
    if digits and "steps" not in known:
        raise ValueError(f"attack {shown(spec)}: {name} has no steps; it has {', '.join(known)}")
    given: dict[str, Any] = {"steps": int(digits)} if digits else {}
    for part in parts:
        key, _, text = part.partition("=")
        if key not in known:
            hint = "the budget is given apart; " if key == "epsilon" and kind.budgeted else ""
            raise ValueError(
                f"attack {shown(spec)}: {hint}{shown(key)} must be one of {', '.join(known)}"
                f"{nearest(key, known)}"
            )
        if key in given:
            raise ValueError(f"attack {shown(spec)}: {key} is given twice")
        given[key] = text if isinstance(fields[key].default, str) else _value(text)
    if kind.budgeted:
        given["epsilon"] = epsilon
    try:
        return kind(**given)
    except ValueError as error:
        raise ValueError(f"attack {shown(spec)}: {error}") from None


def _named(head: str) -> tuple[str, str]:
    """Split a name and trailing digits, unless the whole is a name."""
    name = head if head in ATTACKS else head.rstrip("0123456789")
    return name, head[len(name) :]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


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
