"""Machine of a benchmark: name, versions, and measured rates."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

import scc_fast
from scc_fast.bench import timing
from scc_fast.bench.rows import Row
from scc_fast.engine.choose import PRECISIONS
from scc_fast.engine.cost import Cost
from scc_fast.engine.plan import Plan


class Machine:
    """A device, its rates (measured on first use), and its columns in rows.

    Args:
        kind: "cpu" or "cuda".
        memory: "kept" or "fresh" on a CPU (timing.keep_memory), "cached" on CUDA.
        quick: rates from small sizes, not meaningful.
    """

    def __init__(self, kind: str, memory: str, quick: bool = False) -> None:
        self.kind, self.memory, self.quick = kind, memory, quick
        self.environment: Row = {
            "kind": kind,
            "device": device_name(kind),
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
            "memory": memory,
            "date": datetime.date.today().isoformat(),
            "commit": commit(),
            "versions": versions(),
        }
        self._matmul: dict[str, float] = {}
        self._copy: float | None = None

    def flops_per_s(self, precision: str = "fp32") -> float:
        """The matmul rate in a precision."""
        if precision not in self._matmul:
            rate = timing.matmul_rate(self.kind, self.quick, PRECISIONS[precision])
            self._matmul[precision] = rate
            self.environment[f"matmul_{precision}_gflop_per_s"] = round(rate / 1e9, 1)
        return self._matmul[precision]

    def bytes_per_s(self) -> float:
        """The copy rate."""
        if self._copy is None:
            self._copy = timing.copy_rate(self.kind, self.quick)
            self.environment["copy_gb_per_s"] = round(self._copy / 1e9, 1)
        return self._copy

    def floor_ms(self, plan: Plan, cost: Cost, batch: int, precision: str) -> float:
        """Floor of a plan on this machine; cached weights cost no bandwidth."""
        return plan.floor_ms(cost, batch, *self.limits(cost, precision))

    def limits(self, cost: Cost, precision: str) -> tuple[float, float | None]:
        """FLOP/s, and bytes/s if the weights exceed the last cache."""
        read = cost.weights > timing.last_cache(self.kind)
        return self.flops_per_s(precision), self.bytes_per_s() if read else None

    def columns(self) -> Row:
        """Columns common to all rows of this run."""
        same = ("device", "threads", "memory", "versions", "commit")
        return {"quick": self.quick, **{key: self.environment[key] for key in same}}


def device_name(kind: str) -> str:
    """Name of the processor."""
    if kind == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration, IndexError):
        model = platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores"


def folder(kind: str) -> str:
    """Folder name of this machine's results: cpu, nvidia-h200, …"""
    return "cpu" if kind == "cpu" else "-".join(device_name(kind).lower().split())


def versions() -> dict[str, str]:
    """Versions of the packages that affect the times."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return {
        "scc_fast": scc_fast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda or "none",
    }


def commit() -> str:
    """Commit of the checkout, "-dirty" with local changes; $COMMIT without git.

    An installed package has no commit, even inside a checkout.
    """
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-c", "safe.directory=*", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        # The run's own results do not make it dirty.
        changed = git("status", "--porcelain", "--", ":/", ":(exclude,top)benchmarks/results")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT") or "unknown"
