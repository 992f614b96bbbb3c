"""Defenses by name, with one interface."""

from __future__ import annotations

import json
from typing import Any

from scc_fast.config import nearest, shown
from scc_fast.defenses.agc import AGC
from scc_fast.defenses.anti_adv import AntiAdv
from scc_fast.defenses.csr import CSR
from scc_fast.defenses.dbd import DBD
from scc_fast.defenses.doc import DOC
from scc_fast.defenses.extrapolate import Extrapolate
from scc_fast.defenses.hd import HD
from scc_fast.defenses.mac import MAC
from scc_fast.defenses.r_tpt import RTPT
from scc_fast.defenses.scc import SCC, TTC, RandomNoise, SpatialViews, Undefended
from scc_fast.defenses.tte import TTE
from scc_fast.engine.defense import Defense, Repaired, State, Traits

DEFENSES: dict[str, type[Defense]] = {
    kind.name: kind
    for kind in (
        Undefended,
        RandomNoise,
        SpatialViews,
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
        AGC,
        Extrapolate,
    )
}

# Defenses with a plan of passes, supported by CUDA graphs.
PLANNED = tuple(name for name, kind in DEFENSES.items() if kind.captures)

__all__ = ["DEFENSES", "PLANNED", "Defense", "Repaired", "State", "Traits", "parse_defense"]


def parse_defense(spec: str) -> tuple[str, dict[str, Any]]:
    """Parse "scc", "scc:semantic=false:epsilon=8/255" or 'scc{"epsilon": "8/255"}'.

    Values are JSON, else text.

    Raises:
        ValueError: an unknown name, a part without "=", a repeated field, both forms at once, or
            invalid JSON after a brace.
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


def __getattr__(name: str) -> Any:
    if name != "make_defense":
        raise AttributeError(f"module 'scc_fast.defenses' has no attribute {name!r}")
    import importlib
    import warnings

    warnings.warn(
        "scc_fast.defenses.make_defense is scc_fast.api.make_defense now",
        DeprecationWarning,
        stacklevel=2,
    )
    return importlib.import_module("scc_fast.api").make_defense
