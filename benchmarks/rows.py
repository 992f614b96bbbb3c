"""Rows of a benchmark: their keys, whether they reached what was asked, JSON and Markdown.

A row is a plain dict with all of KEYS. `ratio` is baseline over ours: above 1 we are faster.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import scc_fast
from scc_fast.evaluate.report import atomic, write_json

Row = dict[str, Any]

RESULTS = Path(__file__).parent / "results"

KEYS = (
    "group",
    "name",
    "device",
    "model",
    "batch",
    "classes",
    "precision",
    "shape",
    "backend",
    "engine",
    "p50_ms",
    "p99_ms",
    "images_per_s",
    "baseline",
    "baseline_ms",
    "ratio",
    "bytes_moved",
    "gb_per_s",
    "copy_gb_per_s",
    "share_of_copy",
    "floor_ms",
    "share_of_floor",
    "peak_mib",
    "spread",  # the larger interquartile range over median of the two sides
    "others",  # cores that other processes kept busy meanwhile; None where that cannot be told
    "loaded",  # spread > TOO_WIDE, or on a CPU others > TOO_BUSY: conclude nothing
    "rounds",
    "memory",  # "kept" or "fresh", see timing.keep_memory; on CUDA "cached"
    "quick",  # small sizes and few rounds: proves that the suite runs, no more
    "threads",
    "versions",
    "commit",
    "reach",  # what is asked: {key: value}, or None
    "reached",
)

TOO_WIDE, TOO_BUSY = 0.25, 0.15
# Of these, less is better.
_CEILINGS = frozenset({"p50_ms", "p99_ms", "peak_mib"})


def quantile(values: Sequence[float], share: float) -> float:
    """Linear between the sorted values."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def spread(values: Sequence[float]) -> float:
    """Interquartile range over median."""
    return (quantile(values, 0.75) - quantile(values, 0.25)) / statistics.median(values)


def timings(
    ours: Sequence[float],
    theirs: Sequence[float],
    copies: Sequence[float],
    *,
    images: int,
    bytes_moved: int,
    copied: int,
    flops: int,
    flops_per_s: float | None,
    others: float | None,
) -> Row:
    """The measured part of a row, from times in ms taken in turns.

    Args:
        ours, theirs, copies: ms of each round; `theirs` may be empty.
        bytes_moved: what the op must move; `copied`: what a copy reads and writes.
        flops, flops_per_s: what the op must compute, and the matmul rate measured here.
        others: cores that other processes kept busy; None where that is unknown or no matter.
    """
    p50, copy = statistics.median(ours), statistics.median(copies)
    baseline = statistics.median(theirs) if theirs else None
    floor = bytes_moved / copied * copy
    if flops and flops_per_s:
        floor = max(floor, flops / flops_per_s * 1e3)
    wide = max(spread(ours), spread(theirs) if theirs else 0.0)
    return {
        "p50_ms": p50,
        "p99_ms": quantile(ours, 0.99),
        "images_per_s": images / p50 * 1e3,
        "baseline_ms": baseline,
        "ratio": None if baseline is None else baseline / p50,
        "bytes_moved": bytes_moved,
        "gb_per_s": bytes_moved / p50 / 1e6,
        "copy_gb_per_s": copied / copy / 1e6,
        "share_of_copy": bytes_moved / copied * copy / p50,
        "floor_ms": floor,
        "share_of_floor": floor / p50,
        "spread": wide,
        "others": others,
        "loaded": wide > TOO_WIDE or (others or 0.0) > TOO_BUSY,
        "rounds": len(ours),
    }


def finished(row: Row) -> Row:
    """The row in the order of KEYS, with `reached` filled in.

    Raises:
        KeyError: a key is missing or unknown.
    """
    row = {**row, "reached": None}
    if row["reach"]:
        row["reached"] = not misses(row)
    if set(row) != set(KEYS):
        raise KeyError(f"row: keys must be KEYS, differing in {sorted(set(row) ^ set(KEYS))}")
    return {key: row[key] for key in KEYS}


def misses(row: Row) -> list[str]:
    """What the row fails to reach, as "ratio 2.10 of 4"."""
    missed = []
    for key, asked in (row["reach"] or {}).items():
        got = row[key]
        if got is None or (got > asked if key in _CEILINGS else got < asked):
            missed.append(f"{key} {'not measured' if got is None else f'{got:.3g}'} of {asked:g}")
    return missed


def summary(rows: Sequence[Row]) -> str:
    """One line that counts what was reached."""
    asked = [row for row in rows if row["reach"]]
    missed = [row for row in asked if not row["reached"]]
    unsure, noisy = (sum(row["loaded"] for row in some) for some in (asked, rows))
    text = f"{len(rows)} rows, {noisy} too noisy to conclude from; {len(asked)} are asked to reach "
    text += f"something: {len(asked) - len(missed)} reached it, {len(missed)} missed it"
    text += f", {unsure} of these noisy" if unsure else ""
    return text + ("; QUICK: sizes too small to mean anything" if _is_quick(rows) else "")


def _is_quick(rows: Sequence[Row]) -> bool:
    return any(row["quick"] for row in rows)


# ---------------------------------------------------------------------------------------- tables


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}g}" if value < 1000 else f"{value:.0f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def _verdict(row: Row) -> str:
    text = "–" if row["reached"] is None else "reached"
    if row["reached"] is False:
        text = "**missed**: " + ", ".join(misses(row))
    return text + (" (noisy)" if row["loaded"] else "")


_COLUMNS: dict[str, tuple[Callable[[Row], str], bool]] = {  # what it shows, whether it is text
    "op": (lambda row: row["name"], True),
    "shape": (lambda row: row["shape"], True),
    "precision": (lambda row: row["precision"], True),
    "backend": (lambda row: row["backend"], True),
    "engine": (lambda row: row["engine"], True),
    "p50 ms": (lambda row: _number(row["p50_ms"]), False),
    "p99 ms": (lambda row: _number(row["p99_ms"]), False),
    "baseline": (lambda row: row["baseline"] or "–", True),
    "baseline ms": (lambda row: _number(row["baseline_ms"]), False),
    "ratio": (lambda row: _number(row["ratio"]), False),
    "GB/s": (lambda row: _number(row["gb_per_s"]), False),
    "of copy": (lambda row: _percent(row["share_of_copy"]), False),
    "floor ms": (lambda row: _number(row["floor_ms"]), False),
    "of floor": (lambda row: _percent(row["share_of_floor"]), False),
    "extra MiB": (lambda row: _number(row["peak_mib"]), False),
    "spread": (lambda row: _percent(row["spread"]), False),
    "asked": (lambda row: _asked(row), True),
    "reach": (lambda row: _verdict(row), True),
}
_BRIEF = ("op", "shape", "precision", "backend", "p50 ms", "baseline", "baseline ms", "ratio")
_BRIEF += ("of copy", "extra MiB", "asked", "reach")


def _asked(row: Row) -> str:
    limits = ((key, "≤" if key in _CEILINGS else "≥", value) for key, value in row["reach"].items())
    return ", ".join(f"{key} {sign} {value:g}" for key, sign, value in limits)


def _table(rows: Sequence[Row], names: Sequence[str]) -> str:
    body = [[_COLUMNS[name][0](row) for name in names] for row in rows]
    rule = ["---" if _COLUMNS[name][1] else "--:" for name in names]
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(names), rule, *body])


def markdown(rows: Sequence[Row]) -> str:
    """The table of a run."""
    return _table(rows, [name for name in _COLUMNS if name != "asked"])


def brief(rows: Sequence[Row]) -> str:
    """The table of what was asked for."""
    return _table([row for row in rows if row["reach"]], _BRIEF)


LEGEND = (
    "Times are medians of rounds in which both sides and the copy took turns; ratio = baseline / "
    "ours. GB/s counts the bytes the op must move, beside a copy of as many bytes; extra MiB is "
    "the peak beyond inputs and results, of torch's allocator; spread is the larger interquartile "
    f"range over median of the two sides. Noisy: the spread is above {100 * TOO_WIDE:.0f} %, or "
    f"other processes kept more than {TOO_BUSY:g} cores busy; conclude nothing from it."
)


def page(rows: Sequence[Row], environment: Row) -> str:
    """The Markdown page of a run."""
    quick = (
        "**Quick run: the sizes are too small to mean anything.**\n\n" if _is_quick(rows) else ""
    )
    asked = f"{brief(rows)}\n\n{summary(rows)}\n\n" if any(row["reach"] for row in rows) else ""
    facts = "".join(f"- {name}: {value}\n" for name, value in environment.items())
    return (
        f"# Ops on {environment['device']}, {environment['date']}\n\n{quick}{facts}\n"
        f"{asked}## All rows\n\n{markdown(rows)}\n\n{LEGEND}\n"
    )


def write(path: Path, rows: Sequence[Row], environment: Row) -> None:
    """JSON at `path` and the table beside it, each whole or not at all."""
    write_json(path, {"environment": environment, "rows": list(rows)})
    with atomic(path.with_suffix(".md")) as partial:
        partial.write_text(page(rows, environment))


# ----------------------------------------------------------------------------------- environment


def device_name(kind: str) -> str:
    """What the hardware calls itself."""
    if kind == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration, IndexError):
        model = platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores"


def folder(kind: str) -> Path:
    """Where results of this machine are stored: results/cpu, results/nvidia-h200, …"""
    name = "cpu" if kind == "cpu" else "-".join(device_name(kind).lower().split())
    return RESULTS / name


def default_path(kind: str) -> Path:
    """benchmarks/results/<device>/ops-<date>.json."""
    return folder(kind) / f"ops-{datetime.date.today().isoformat()}.json"


def versions() -> dict[str, str]:
    """Of what the times depend on."""
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
    """The checkout's commit, "-dirty" where files differ from it; $COMMIT where git is not."""

    def git(*arguments: str) -> str:
        command = ["git", "-c", "safe.directory=*", "-C", str(RESULTS.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # Results are written by the run itself: they do not make it dirty.
        changed = git("status", "--porcelain", "--", ":/", ":(exclude,top)benchmarks/results")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT") or "unknown"


def environment(kind: str, memory: str) -> Row:
    """What a page of results begins with."""
    return {
        "kind": kind,
        "device": device_name(kind),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "memory": memory,
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "versions": versions(),
    }
