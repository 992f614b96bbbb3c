"""Every defense behind one protocol, by name: the rows of the papers' tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from scc_fast import api
from scc_fast.config import METHODS, nearest, shown
from scc_fast.defenses.anti_adv import AntiAdv
from scc_fast.defenses.base import Defense, Look, Repair, Traits
from scc_fast.defenses.csr import CSR
from scc_fast.defenses.dbd import DBD
from scc_fast.defenses.doc import DOC
from scc_fast.defenses.hd import HD
from scc_fast.defenses.mac import MAC
from scc_fast.defenses.r_tpt import RTPT
from scc_fast.defenses.served import SCC, TTC, RandomNoise, Undefended, Views
from scc_fast.defenses.tte import TTE

DEFENSES: dict[str, type[Defense]] = {
    kind.name: kind
    for kind in (
        Undefended,
        RandomNoise,
        Views,
        TTE,
        AntiAdv,
        HD,
        TTC,
        DOC,
        RTPT,
        SCC,
        CSR,
        DBD,
        MAC,
    )
}

# Defender serves its own five, and offers the others from here.
api.DEFENSES.update({n: kind for n, kind in DEFENSES.items() if n not in METHODS})

__all__ = ["DEFENSES", "Defense", "Look", "Repair", "Traits", "make_defense", "parse_defense"]


def parse_defense(spec: str) -> tuple[str, dict[str, Any]]:
    """Name and config of "scc", "scc:semantic=false:epsilon=8/255" or 'scc{"epsilon": "8/255"}'.

    Values are JSON where they can be read as such, else text.

    Raises:
        ValueError: an unknown name, a part without "=", a field given twice, both ways at once, or
            what follows a brace is no JSON.
    """
    head, brace, rest = spec.partition("{")
    name, *parts = head.split(":")
    if name not in DEFENSES:
        raise ValueError(
            f"defense must be one of {', '.join(DEFENSES)}; got {shown(spec)}"
            f"{nearest(name, DEFENSES)}"
        )
    if brace:
        if parts:
            raise ValueError(
                f"defense {shown(spec)}: fields must be either :FIELD=VALUE or in {{…}}, got both"
            )
        try:
            return name, json.loads(brace + rest)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"defense {shown(spec)}: {shown(brace + rest)} is not JSON: {error}"
            ) from None
    config: dict[str, Any] = {}
    for part in parts:
        key, equals, text = part.partition("=")
        if not equals or not key:
            raise ValueError(f"defense {shown(spec)}: {shown(part)} must be FIELD=VALUE")
        if key in config:
            raise ValueError(f"defense {shown(spec)}: {key} is given twice")
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
