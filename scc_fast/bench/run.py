"""`scc-fast bench`: timing of a defense on the user's model, into a resumable file.

The file holds {"environment", "rows", "waterfalls"}. A case (all sides of
a batch size) is written when it is done, and read from the file if it was measured before.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scc_fast import tiny
from scc_fast._files import write_json
from scc_fast.api import Defender
from scc_fast.bench import measure, timing
from scc_fast.bench.machine import Machine
from scc_fast.bench.measure import Budget, Side
from scc_fast.bench.rows import KEYS, Row, finished, same_setting
from scc_fast.models import load_model

GROUP = "end to end"
FEWEST = 3  # rounds
MOST_WATERFALLS = 5
CLASSES = 1000
# Every picture is repaired: a gate's share would depend on the pictures.
UNGATED: dict[str, dict[str, Any]] = {"scc": {"gate": False}, "ttc": {"tau": math.inf}}

Tick = Callable[[float], None]


@dataclass(frozen=True)
class Options:
    """Options of the command line; None leaves a choice to the device or the model.

    Args:
        seconds: of rounds per batch size.
        classes: number of random text embeddings.
        reference: also measure the eager reference loop.
        json: the file of rows; `fresh`: ignore its content.
    """

    model: str = "tiny"
    pretrained: str | None = None
    method: str = "scc"
    batches: tuple[int, ...] | None = None
    classes: int | None = None
    precision: str = "auto"
    engine: str = "auto"
    device: str | None = None
    seconds: float = 3.0
    reference: bool = True
    json: Path | None = None
    fresh: bool = False


class Bench:
    """A model and its Defenders, ready to measure."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.stored = _stored(options)
        kind = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        kept = kind == "cpu" and timing.keep_memory()
        memory = "cached" if kind == "cuda" else "kept" if kept else "fresh"
        self.machine = Machine(kind, memory)
        self.model = load_model(options.model, options.pretrained, device=kind)
        self.batches = options.batches or ((1, 8) if kind == "cpu" else (1, 8, 64))
        alike: dict[str, Any] = {"precision": options.precision, "engine": options.engine}
        self.defender = self._defender(**alike)
        self._sides = {
            "undefended": self._defender(method="none", **alike),
            options.method: self.defender,
        }
        if options.reference:
            plain = self._defender(backend="reference", engine="eager", precision="fp32")
            self._sides = {"reference": plain, **self._sides}

    @property
    def baseline(self) -> str:
        """Name of the baseline's row."""
        return next(iter(self._sides))

    @property
    def ticks(self) -> int:
        """Total of run()'s ticks: batch sizes and the waterfall."""
        return len(self.batches) + 1

    def _defender(self, **options: Any) -> Defender:
        asked = self.options
        method = options.setdefault("method", asked.method)
        if method in UNGATED:
            options["config"] = UNGATED[method]
        if asked.classes is None and asked.model == "tiny":
            return Defender(self.model, tiny.prompts(), **options)
        text = measure.unit_features(
            asked.classes or CLASSES, self.model.embed_dim, self.model.device
        )
        return Defender(self.model, text_features=text, **options)

    def run(self, tick: Tick) -> tuple[list[Row], Row]:
        """Measure; returns the rows, and a row of the defense with its `stages`."""
        rows: list[Row] = []
        for batch in self.batches:
            rows += self._case(batch, tick)
        waterfall = self._waterfall()
        tick(1.0)
        return rows, waterfall

    def _case(self, batch: int, tick: Tick) -> list[Row]:
        images, ours = measure.pictures(batch, self.model), self.defender
        sides = [
            measure.defense(
                name, defender, images, self.machine, work=ours if name == "reference" else None
            )
            for name, defender in self._sides.items()
        ]
        known = {same_setting(row): row for row in self.stored["rows"]}
        asked = [self._setting(side) for side in sides]
        if all(setting in known for setting in asked):
            tick(1.0)
            return [known[setting] for setting in asked]

        def drive(before: measure.Call, call: measure.Call, rounds: int) -> list[float]:
            def each() -> None:
                before()
                tick(1 / rounds)

            return measure.loop(each, call, rounds)

        budget = Budget(self.options.seconds, FEWEST)
        found = measure.measure(sides, GROUP, self.machine, budget, drive)
        if self.options.reference:
            measure.check(sides[0].result, sides[-1].result, self.defender.precision)
        new = [finished(self.machine.columns() | row) for row in found]
        old = [row for row in self.stored["rows"] if same_setting(row) not in asked]
        self._store(rows=[*old, *new])
        return new

    def _setting(self, side: Side) -> tuple[Any, ...]:
        return same_setting(self.machine.columns() | measure.described(side, GROUP, self.baseline))

    def _waterfall(self) -> Row:
        """Waterfall at the first batch size: medians of a few calls."""
        images = measure.pictures(self.batches[0], self.model)
        side = measure.defense(self.options.method, self.defender, images, self.machine)
        described = self.machine.columns() | measure.described(side, GROUP, self.baseline)
        for row in self.stored["waterfalls"]:
            if same_setting(row) == same_setting(described):
                return dict(row)
        self.defender.waterfall(images)
        started = time.perf_counter()
        calls: list[Any] = []
        while not calls or time.perf_counter() - started < self.options.seconds:
            calls.append(self.defender.waterfall(images))
            if len(calls) == MOST_WATERFALLS:
                break
        stages = [
            {
                "step": same[0].step,
                "part": same[0].part,
                "ms": statistics.median(one.ms for one in same),
            }
            for same in zip(*calls, strict=True)
        ]
        new = {**described, "stages": stages}
        self._store(waterfalls=[*self.stored["waterfalls"], new])
        return new

    def _store(self, **changed: list[Row]) -> None:
        self.stored = {
            "environment": self.stored["environment"] | self.machine.environment,
            "rows": self.stored["rows"],
            "waterfalls": self.stored["waterfalls"],
            **changed,
        }
        if self.options.json is not None:
            write_json(self.options.json, self.stored)


def _stored(options: Options) -> dict[str, Any]:
    """Content of the --json file, to continue from."""
    nothing: dict[str, Any] = {"environment": {}, "rows": [], "waterfalls": []}
    path = options.json
    if path is None or options.fresh or not path.exists():
        return nothing
    try:
        found = json.loads(path.read_text())
        if any(set(row) != set(KEYS) for row in found["rows"]):
            raise ValueError("other keys")
        return {**nothing, **found}
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"--json: {path} exists and holds no rows of scc-fast bench; name another file, or "
            "overwrite it with --fresh"
        ) from None
