"""Presets of defenses for a latency budget, timed on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from scc_fast._arguments import explained
from scc_fast._progress import with_progress
from scc_fast.api import Defender
from scc_fast.config import python_number, shown, whole
from scc_fast.models import VisionLanguage


@dataclass(frozen=True)
class Preset:
    """A method with a config, and its cost.

    Args:
        name: of the preset.
        method, config: arguments of Defender, over the model's defaults.
        passes: forward and backward passes of a repaired image, F + B.
    """

    name: str
    method: str
    config: dict[str, Any]
    passes: int


# By falling accuracy under PGD-10 at 4/255 on the bundled model's validation pictures; none is
# dominated (docs/results.md, "What to take").
PRESETS = (
    Preset("full", "scc", {"gate": False}, 37),
    Preset("most", "scc", {"gate": False, "semantic_steps": 1}, 29),
    Preset("half", "scc", {"gate": False, "semantic": False}, 21),
    Preset("quick", "scc", {"gate": False, "warmup_steps": 1, "semantic": False}, 13),
    Preset("views", "views", {}, 4),
)


@explained
def recommended(
    model: Any,
    classes: Sequence[str] | None = None,
    *,
    budget_ms: float,
    batch: int = 1,
    rounds: int = 5,
    **options: Any,
) -> Defender:
    """Strongest preset within a latency budget on this machine.

    Presets are tried from the strongest on; each is warmed up and timed on grey pictures of the
    model's size. The order was measured on the bundled model under an oblivious attack
    (docs/results.md); check it on another model with `scc-fast evaluate`.

    Args:
        model, classes, options: as for Defender.
        budget_ms: median time of `rounds` calls with `batch` images, milliseconds.

    Raises:
        ValueError: the cheapest preset exceeds the budget; says its time.
    """
    budget_ms = python_number(budget_ms)
    if not isinstance(budget_ms, int | float) or isinstance(budget_ms, bool) or not budget_ms > 0:
        raise ValueError(f"budget_ms must be milliseconds > 0, got {shown(budget_ms)}")
    batch, rounds = whole("batch", batch, 1), whole("rounds", rounds, 1)
    took = 0.0
    for preset in with_progress(PRESETS, "timing presets"):
        defender = Defender(
            model, classes, method=preset.method, config=dict(preset.config), **options
        )
        took = _median_ms(defender, batch, rounds)
        if took <= budget_ms:
            return defender
    raise ValueError(
        f"budget_ms={budget_ms:g} is too little: the cheapest preset, {PRESETS[-1].name!r}, takes "
        f"{took:.3g} ms for {batch} images here"
    )


def _median_ms(defender: Defender, batch: int, rounds: int) -> float:
    model: VisionLanguage = defender.model
    defender.warmup(batch)
    x = torch.full((batch, 3, *model.image_size), 0.5, device=model.device)
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        defender(x, 0)
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)
