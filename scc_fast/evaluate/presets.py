"""Which defense to take for a latency budget: measured presets, timed on your machine."""

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
    """A method with a config, and what it costs.

    Args:
        name: how it is asked for.
        method, config: as Defender takes them, over the model's own defaults.
        passes: forward and backward passes of an image that is repaired, F + B.
    """

    name: str
    method: str
    config: dict[str, Any]
    passes: int


# From the most to the least accurate under PGD-10 at 4/255 on the bundled model's validation
# pictures, none that another beats at no more cost: docs/results.md, "What to take".
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
    """The strongest preset whose call takes no longer than a budget here and now.

    Presets are tried from the strongest on; each is warmed up and timed on grey pictures of the
    model's size. Which is the strongest was measured on the bundled model against an attacker who
    does not know the defense (docs/results.md); on another model it is a guess to be checked with
    `scc-fast evaluate`.

    Args:
        model, classes, options: as for Defender.
        budget_ms: for a call with `batch` images, milliseconds; the median of `rounds` calls
            counts.

    Raises:
        ValueError: not even the cheapest preset is within the budget; says what it takes.
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
