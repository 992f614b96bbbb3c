"""Attacks by name: made on the undefended model, or knowing the defense."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

from scc_fast.attacks.base import Attack
from scc_fast.attacks.pgd import PGD

ATTACKS: dict[str, type[Attack]] = {kind.name: kind for kind in (PGD,)}

__all__ = ["ATTACKS", "PGD", "Attack", "parse_attack"]


def parse_attack(spec: str, epsilon: float) -> Attack:
    """The attack of "pgd10", "pgd:steps=20:alpha=2/255", …; digits at the end are its steps.

    Raises:
        ValueError: an unknown name or field.
    """
    head, *parts = spec.split(":")
    match = re.fullmatch(r"(.*?)(\d*)", head)
    assert match is not None
    name, digits = match.groups()
    if name not in ATTACKS:
        raise ValueError(f"attack must be one of {', '.join(ATTACKS)}; got {spec!r}")
    kind = ATTACKS[name]
    known = [field.name for field in dataclasses.fields(kind)]
    given: dict[str, Any] = {"epsilon": epsilon}
    for part in [f"steps={int(digits)}"] * bool(digits) + parts:
        key, equals, text = part.partition("=")
        if not equals or key not in known:
            raise ValueError(
                f"attack {spec!r}: {part!r} must be FIELD=VALUE with one of {', '.join(known)}"
            )
        try:
            given[key] = json.loads(text)
        except json.JSONDecodeError:
            given[key] = text
    return kind(**given)
