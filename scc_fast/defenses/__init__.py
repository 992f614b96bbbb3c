"""Every defense behind one protocol, by name: the rows of the papers' tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from scc_fast.defenses.base import Defense, Look, Repair, Traits
from scc_fast.defenses.served import SCC, TTC, RandomNoise, Undefended, Views

DEFENSES: dict[str, type[Defense]] = {
    kind.name: kind for kind in (Undefended, RandomNoise, Views, TTC, SCC)
}

__all__ = ["DEFENSES", "Defense", "Look", "Repair", "Traits", "make_defense", "parse_defense"]


def parse_defense(spec: str) -> tuple[str, dict[str, Any]]:
    """Name and config of "scc" or "scc:semantic=false:epsilon=8/255".

    Values are JSON where they can be read as such, else text.

    Raises:
        ValueError: an unknown name, or a part without "=".
    """
    name, *parts = spec.split(":")
    if name not in DEFENSES:
        raise ValueError(f"defense must be one of {', '.join(DEFENSES)}; got {spec!r}")
    config: dict[str, Any] = {}
    for part in parts:
        key, equals, text = part.partition("=")
        if not equals or not key:
            raise ValueError(f"defense {spec!r}: {part!r} must be FIELD=VALUE")
        try:
            config[key] = json.loads(text)
        except json.JSONDecodeError:
            config[key] = text
    return name, config


def make_defense(
    spec: str, model: Any, classes: Sequence[str] | None = None, **options: Any
) -> Defense:
    """The defense of a spec such as "scc" or "ttc:steps=5:tau=0.1".

    Args:
        spec: see parse_defense.
        model, classes, options: as for scc_fast.Defender.

    Raises:
        ValueError, TypeError: naming the argument, what came and what would be right.
    """
    name, config = parse_defense(spec)
    return DEFENSES[name](model, classes, config=config, **options)
