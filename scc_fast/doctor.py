"""Report of scc-fast doctor: versions, build, engines and backends, with reasons."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable
from typing import Any

import torch

from scc_fast import _extension, ops
from scc_fast._version import __version__
from scc_fast.api import Defender
from scc_fast.defenses import DEFENSES
from scc_fast.engine.vit_from import tower_of
from scc_fast.models import VisionLanguage

_PACKAGES = (
    "torch",
    "triton",
    "open_clip_torch",
    "transformers",
    "torchvision",
    "safetensors",
    "numpy",
    "pillow",
)


def report() -> dict[str, Any]:
    """Report on this installation, as plain values."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {
        "versions": {
            "scc_fast": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
        "machine": {
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
            "torch cuda": torch.version.cuda or "none",
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none visible",
        },
        "extension": {
            "built for": _extension.BUILT,
            "loaded": _extension.available(),
            "why not": _extension.WHY,
        },
        "methods": [_method(name) for name in DEFENSES],
        "ops": [row for device in devices for row in _ops(device)],
    }


def encoder(model: VisionLanguage) -> str:
    """Engine of a model's encoder, and the reason if it is not the runner."""
    text = torch.eye(2, model.embed_dim, device=model.device)
    served = Defender(model, text_features=text).engine
    if served != "eager":
        return served
    found = tower_of(model, getattr(model, "dtype", torch.float32))
    return f"eager, its own modules: {found if isinstance(found, str) else 'no op is compiled'}"


def plan(
    model: VisionLanguage, method: str, batch: int, precision: str, machine: Callable[..., Any]
) -> str:
    """Plan of a method for a model, its cost, and its floor on this device.

    Args:
        machine: scc_fast.bench.machine.Machine.
    """
    text = torch.eye(2, model.embed_dim, device=model.device)
    defender = Defender(model, text_features=text, method=method, precision=precision)
    kind = model.device.type
    rates = machine(kind, "cached" if kind == "cuda" else "fresh")
    made, cost = defender.plan(), defender.cost()
    limits = rates.limits(cost, defender.precision)
    head = f"{model.name}, {defender.precision}, {defender.engine} on {kind}"
    size = defender.memory_estimate(batch) / 2**20
    return f"{head}\n{made.describe(cost, batch, *limits)}\nmemory about {size:.0f} MiB"


def _method(name: str) -> dict[str, Any]:
    """Gate and engines of a method with its default config."""
    defense = DEFENSES[name](DEFENSES[name].Config())
    engines = ("eager", "compile", "runner", *(("graph",) if defense.captures else ()))
    return {
        "method": name,
        "repairs": defense.repairs,
        "gate": defense.has_gate,
        "engines": list(engines),
        "why no graph": defense.uncaptured,
    }


def _ops(device: str) -> list[dict[str, Any]]:
    rows = []
    for op in ops.names():
        why_not = ops.backends_of(op, device)
        served = ops.choose(op, device, None)
        rows.append({"op": op, "device": device, "served by": served, "why not": why_not})
    return rows


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def show(console: Any, found: dict[str, Any]) -> None:
    """Print a report as tables."""
    from rich.table import Table

    for section in ("versions", "machine", "extension", "model"):
        if section in found:
            table = Table(title=section, show_header=False, title_justify="left")
            for name, value in found[section].items():
                table.add_row(str(name), str(value))
            console.print(table)
    if "plan" in found:
        console.print(found["plan"], markup=False, highlight=False)
    table = Table(title="methods", title_justify="left")
    for name in ("method", "repairs", "gate", "engines", "why no graph"):
        table.add_column(name)
    for row in found["methods"]:
        engines, gate = ", ".join(row["engines"]), "yes" if row["gate"] else "no"
        table.add_row(row["method"], row["repairs"], gate, engines, row["why no graph"])
    console.print(table)
    table = Table(title="ops", title_justify="left")
    for name in ("op", "device", "served by", "why not the others"):
        table.add_column(name)
    for row in found["ops"]:
        because: dict[str, list[str]] = {}
        for name, why in row["why not"].items():
            if why:
                because.setdefault(why, []).append(name)
        reasons = [f"{', '.join(names)}: {why}" for why, names in because.items()]
        table.add_row(row["op"], row["device"], row["served by"], "\n".join(reasons))
    console.print(table)
