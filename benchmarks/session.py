"""One run of the benchmarks: its settings, and its rows so far."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import rows
import timing


def device_of(config: pytest.Config) -> str:
    """ "cpu" or "cuda"."""
    device: str = config.getoption("--device")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


class Session:
    """The settings of a run and its rows so far."""

    def __init__(self, config: pytest.Config) -> None:
        self.kind = device_of(config)
        self.quick: bool = config.getoption("--quick")
        self.require: bool = config.getoption("--require-reach")
        budget = config.getoption("--budget") or (2.0 if self.kind == "cpu" else 0.5)
        self.budget: float = min(budget, 0.1) if self.quick else budget
        if self.kind == "cpu":
            torch.set_num_threads(config.getoption("--threads"))
            kept = not config.getoption("--fresh-memory") and timing.keep_memory()
            self.memory = "kept" if kept else "fresh"
        else:
            self.memory = "cached"
        path = config.getoption("--rows")
        self.path = rows.default_path(self.kind) if path == "auto" else path and Path(path)
        self.environment = rows.environment(self.kind, self.memory)
        self.rows: list[rows.Row] = []
        self._rate: float | None = None

    @property
    def flops_per_s(self) -> float:
        """The matmul rate of this run, measured when first asked for."""
        if self._rate is None:
            self._rate = timing.matmul_rate(self.kind, self.quick)
            self.environment["matmul_fp32_gflop_per_s"] = round(self._rate / 1e9, 1)
        return self._rate

    def add(self, **values: Any) -> rows.Row:
        """Complete a row, keep it, and store all of them, so that an interruption loses none."""
        environment = self.environment
        row = rows.finished(
            {
                "group": "ops",
                "device": environment["device"],
                "model": None,
                "memory": self.memory,
                "quick": self.quick,
                "threads": environment["threads"],
                "versions": environment["versions"],
                "commit": environment["commit"],
                **values,
            }
        )
        self.rows.append(row)
        if self.path:
            rows.write(self.path, self.rows, environment)
        return row
