"""Session: settings and rows of a benchmark run."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import scc_fast
from scc_fast.bench import machine, measure, rows, tables, timing

RESULTS = Path(__file__).parent / "results"
# On a CPU each suite has a file of its own; on a GPU one file holds all.
_SUITES = {"ops": "ops", "encoder": "encoder", "first call": "start", "memory": "start"}


def device_of(config: pytest.Config) -> str:
    """ "cpu" or "cuda"."""
    device: str = config.getoption("--device")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


class Session:
    """Settings of a run and its rows so far."""

    def __init__(self, config: pytest.Config) -> None:
        self.kind = device_of(config)
        self.quick: bool = config.getoption("--quick")
        self.require: bool = config.getoption("--require-reach")
        budget = config.getoption("--budget") or (2.0 if self.kind == "cpu" else 0.5)
        self.budget: float = min(budget, 0.1) if self.quick else budget
        most = config.getoption("--max-seconds")
        self.deadline = None if most is None else time.monotonic() + most
        self.cases_left = 0
        memory = "cached"
        if self.kind == "cpu":
            torch.set_num_threads(config.getoption("--threads"))
            kept = not config.getoption("--fresh-memory") and timing.keep_memory()
            memory = "kept" if kept else "fresh"
        self.machine = machine.Machine(self.kind, memory, self.quick)
        self.asked: str | None = config.getoption("--rows")
        self.rows: list[rows.Row] = []
        self._models: dict[str, Any] = {}

    def path(self, group: str) -> Path | None:
        """Path of a group's rows."""
        if self.asked != "auto":
            return Path(self.asked) if self.asked else None
        date = self.machine.environment["date"]
        suite = f"{_SUITES.get(group, 'defense')}-" if self.kind == "cpu" else ""
        return RESULTS / machine.folder(self.kind) / f"{suite}{date}.json"

    def paths(self) -> list[Path]:
        """Files of this run."""
        found = dict.fromkeys(self.path(row["group"]) for row in self.rows)
        return [path for path in found if path]

    def budget_of(self, seconds: float, fewest: int = 5, most: int = 200) -> measure.Budget:
        """Budget of a case, reduced to fit --max-seconds."""
        if self.quick:
            return measure.Budget(min(seconds, 0.1), 2, 5)
        if self.deadline is None:
            return measure.Budget(seconds, fewest, most)
        left = self.deadline - time.monotonic()
        free = max(0.0, left - self.budget * self.cases_left)
        return measure.Budget(min(seconds, free), fewest if left > 0 else 1, most)

    @property
    def late(self) -> bool:
        """Whether --max-seconds are over."""
        return self.deadline is not None and time.monotonic() > self.deadline

    def model(self, name: str) -> Any:
        """Model in float32 on the device; the previous one is freed."""
        if name not in self._models:
            self._models.clear()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*random weights.*")
                self._models[name] = scc_fast.load_model(name, device=self.kind)
        return self._models[name]

    def add(self, **values: Any) -> rows.Row:
        """Complete a row, keep it, and store all of them, so that an interruption loses none."""
        row = rows.finished(self.machine.columns() | values)
        self.rows.append(row)
        path = self.path(row["group"])
        if path:
            same = [one for one in self.rows if self.path(one["group"]) == path]
            tables.write(path, self._before(path, same) + same, self.machine.environment)
        return row

    def _before(self, path: Path, new: list[rows.Row]) -> list[rows.Row]:
        """Stored rows of groups not measured in this run."""
        if not path.exists():
            return []
        try:
            stored = json.loads(path.read_text())["rows"]
        except (ValueError, KeyError):
            return []
        groups, now = {row["group"] for row in new}, self.machine
        return [
            row
            for row in stored
            if row["group"] not in groups
            and set(row) == set(rows.KEYS)
            and (row["device"], row["quick"]) == (now.environment["device"], now.quick)
        ]

    def run(
        self,
        benchmark: Any,
        group: str,
        sides: list[measure.Side],
        budget: measure.Budget,
        *,
        baseline_known: bool = False,
    ) -> list[rows.Row]:
        """Measure the sides in turns, the last by pytest-benchmark's clock; add their rows.

        With `baseline_known` the first side has its row already.
        """
        first = sides[0]
        benchmark.group = f"{group}: {first.model}, batch {first.images}"

        def drive(before: measure.Call, call: measure.Call, rounds: int) -> list[float] | None:
            benchmark.pedantic(call, setup=before, rounds=rounds)
            stats = benchmark.stats
            return None if stats is None else [1e3 * seconds for seconds in stats.stats.data]

        found = measure.measure(sides, group, self.machine, budget, drive)
        added = [self.add(**row) for row in found[baseline_known:]]
        if added:
            row = added[-1]
            said = {k: v for k, v in row.items() if k not in ("versions", "shape")}
            benchmark.extra_info.update(said)
        self.hold(added)
        return added

    def hold(self, added: list[rows.Row]) -> None:
        """With --require-reach, fail on a missed target."""
        for row in added:
            if self.require and row["reached"] is False:
                where = f"{row['group']}: {row['name']}, {row['model']}, batch {row['batch']}"
                pytest.fail(f"{where}: missed {', '.join(rows.misses(row))}")
