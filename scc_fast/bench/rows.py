"""Rows of a benchmark: keys, statistics, and targets.

A row is a plain dict with all of KEYS. `ratio` is baseline over ours: above 1 we are faster.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

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
    "baseline",  # name of a row of the group, or described in `shape`
    "baseline_ms",
    "ratio",  # of times; in the group "memory", of peaks
    "bytes_moved",
    "gb_per_s",
    "copy_gb_per_s",
    "share_of_copy",
    "floor_ms",
    "share_of_floor",
    "peak_mib",
    "spread",  # the larger interquartile range over median of the two sides
    "others",  # cores kept busy by other processes; None: unknown
    "loaded",  # spread > TOO_WIDE, others > TOO_BUSY, or rounds < TOO_FEW: conclude nothing
    "rounds",
    "memory",  # "kept" or "fresh", see timing.keep_memory; on CUDA "cached"
    "quick",  # small sizes and few rounds: a smoke test
    "threads",
    "versions",
    "commit",
    "reach",  # targets {key: value}, or None
    "reached",
)

# Columns of a row that is not of an op.
NO_TRAFFIC: Row = dict.fromkeys(("bytes_moved", "gb_per_s", "copy_gb_per_s", "share_of_copy"))
# Columns of a row without times.
NO_TIME: Row = dict.fromkeys(
    ("p50_ms", "p99_ms", "images_per_s", "baseline_ms", "floor_ms", "share_of_floor")
)

TOO_WIDE, TOO_BUSY, TOO_FEW = 0.25, 0.15, 3
# Columns where less is better.
CEILINGS = frozenset({"p50_ms", "p99_ms", "peak_mib"})


def quantile(values: Sequence[float], share: float) -> float:
    """Quantile with linear interpolation."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def spread(values: Sequence[float]) -> float:
    """Interquartile range over median."""
    return (quantile(values, 0.75) - quantile(values, 0.25)) / statistics.median(values)


def timings(
    ours: Sequence[float], theirs: Sequence[float], *, images: int, others: float | None
) -> Row:
    """Time columns of a row, from interleaved rounds.

    Args:
        ours, theirs: ms of each round; `theirs` may be empty.
        images: pictures per call.
        others: cores kept busy by other processes; None: unknown or irrelevant.
    """
    p50 = statistics.median(ours)
    baseline = statistics.median(theirs) if theirs else None
    wide = max(spread(ours), spread(theirs) if theirs else 0.0)
    return {
        "p50_ms": p50,
        "p99_ms": quantile(ours, 0.99),
        "images_per_s": images / p50 * 1e3,
        "baseline_ms": baseline,
        "ratio": None if baseline is None else baseline / p50,
        "spread": wide,
        "others": others,
        "loaded": wide > TOO_WIDE or (others or 0.0) > TOO_BUSY or len(ours) < TOO_FEW,
        "rounds": len(ours),
    }


def traffic(
    p50_ms: float,
    copies: Sequence[float],
    *,
    bytes_moved: int,
    copied: int,
    flops: int,
    flops_per_s: float | None,
) -> Row:
    """Traffic columns of an op, beside an interleaved copy, and its floor.

    Args:
        p50_ms: time of the op; `copies`: ms of the copies.
        bytes_moved: least traffic of the op; `copied`: traffic of a copy.
        flops, flops_per_s: least work of the op, and the measured matmul rate.
    """
    copy = statistics.median(copies)
    floor = bytes_moved / copied * copy
    if flops and flops_per_s:
        floor = max(floor, flops / flops_per_s * 1e3)
    return {
        "bytes_moved": bytes_moved,
        "gb_per_s": bytes_moved / p50_ms / 1e6,
        "copy_gb_per_s": copied / copy / 1e6,
        "share_of_copy": bytes_moved / copied * copy / p50_ms,
        **floored(p50_ms, floor),
    }


def floored(p50_ms: float, floor_ms: float | None) -> Row:
    """Floor columns of a row."""
    share = None if floor_ms is None else floor_ms / p50_ms
    return {"floor_ms": floor_ms, "share_of_floor": share}


def finished(row: Row) -> Row:
    """Complete a row: `reached` filled in, keys in the order of KEYS.

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
    """Missed targets of a row, as "ratio 2.10 of 4"."""
    missed = []
    for key, asked in (row["reach"] or {}).items():
        got = row[key]
        if got is None or (got > asked if key in CEILINGS else got < asked):
            missed.append(f"{key} {'not measured' if got is None else f'{got:.3g}'} of {asked:g}")
    return missed


def summary(rows: Sequence[Row]) -> str:
    """One-line count of reached targets."""
    asked = [row for row in rows if row["reach"]]
    missed = [row for row in asked if not row["reached"]]
    unsure, noisy = (sum(row["loaded"] for row in some) for some in (asked, rows))
    text = f"{len(rows)} rows, {noisy} too noisy to conclude from; {len(asked)} are asked to reach "
    text += f"something: {len(asked) - len(missed)} reached it, {len(missed)} missed it"
    text += f", {unsure} of these noisy" if unsure else ""
    return text + ("; QUICK: sizes too small to mean anything" if is_quick(rows) else "")


def is_quick(rows: Sequence[Row]) -> bool:
    """Whether any row is of a quick run."""
    return any(row["quick"] for row in rows)


def warnings(rows: Sequence[Row]) -> list[str]:
    """Warnings about rows too noisy to conclude from."""
    wide = [row for row in rows if (row["spread"] or 0.0) > TOO_WIDE]
    busy = [row for row in rows if (row["others"] or 0.0) > TOO_BUSY]
    few = [row for row in rows if row["rounds"] < TOO_FEW and row["loaded"]]
    lines = []
    if few:
        lines.append(
            f"{len(few)} of {len(rows)} rows have fewer than {TOO_FEW} rounds: conclude nothing "
            "from them."
        )
    if wide:
        worst = max(row["spread"] for row in wide)
        lines.append(
            f"The spread of {len(wide)} of {len(rows)} rows is too wide to conclude anything from "
            f"them: up to {100 * worst:.0f} % of the median, where {100 * TOO_WIDE:.0f} % is the "
            "most that counts as calm."
        )
    if busy:
        worst = max(row["others"] for row in busy)
        lines.append(
            f"The machine was loaded: other processes kept up to {worst:.2f} cores busy during "
            f"{len(busy)} of {len(rows)} rows. Conclude nothing from these; measure again when it "
            "is idle."
        )
    return lines


def same_setting(row: Row) -> tuple[Any, ...]:
    """Key of a measurement: what, with which code, on which machine."""
    keys: tuple[str, ...] = ("group", "name", "device", "model", "batch", "classes", "precision")
    keys += ("shape", "backend", "engine", "baseline", "memory", "quick", "threads", "commit")
    return (*(row[key] for key in keys), *sorted(row["versions"].items()))
