"""Tables of rows: terminal, Markdown page, and targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from scc_fast._files import atomic, write_json
from scc_fast.bench.rows import (
    CEILINGS,
    TOO_BUSY,
    TOO_FEW,
    TOO_WIDE,
    Row,
    is_quick,
    misses,
    summary,
)

if TYPE_CHECKING:
    from rich.table import Table


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}g}" if value < 1000 else f"{value:.0f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def _verdict(row: Row) -> str:
    text = "–" if row["reached"] is None else "reached"
    if row["reached"] is False:
        text = "**missed**: " + ", ".join(misses(row))
    return text + (" (noisy)" if row["loaded"] else "")


def _asked(row: Row) -> str:
    limits = ((key, "≤" if key in CEILINGS else "≥", value) for key, value in row["reach"].items())
    return ", ".join(f"{key} {sign} {value:g}" for key, sign, value in limits)


_Column = tuple[Callable[[Row], str], bool]  # cell text, whether it is left-aligned
_COLUMNS: dict[str, _Column] = {
    "op": (lambda row: row["name"], True),
    "name": (lambda row: row["name"], True),
    "model": (lambda row: row["model"] or "–", True),
    "batch": (lambda row: str(row["batch"]), False),
    "classes": (lambda row: "–" if row["classes"] is None else str(row["classes"]), False),
    "shape": (lambda row: row["shape"], True),
    "precision": (lambda row: row["precision"], True),
    "backend": (lambda row: row["backend"], True),
    "engine": (lambda row: row["engine"], True),
    "p50 ms": (lambda row: _number(row["p50_ms"]), False),
    "p99 ms": (lambda row: _number(row["p99_ms"]), False),
    "images/s": (lambda row: _number(row["images_per_s"]), False),
    "baseline": (lambda row: row["baseline"] or "–", True),
    "baseline ms": (lambda row: _number(row["baseline_ms"]), False),
    "ratio": (lambda row: _number(row["ratio"]), False),
    "GB/s": (lambda row: _number(row["gb_per_s"]), False),
    "of copy": (lambda row: _percent(row["share_of_copy"]), False),
    "floor ms": (lambda row: _number(row["floor_ms"]), False),
    "of floor": (lambda row: _percent(row["share_of_floor"]), False),
    "extra MiB": (lambda row: _number(row["peak_mib"]), False),
    "spread": (lambda row: _percent(row["spread"]), False),
    "asked": (_asked, True),
    "reach": (_verdict, True),
}
_OPS = (
    "op, shape, precision, backend, engine, p50 ms, p99 ms, baseline, baseline ms, ratio, GB/s, "
    "of copy, floor ms, of floor, extra MiB, spread, reach"
)
_DEFENSES = (
    "name, model, batch, classes, precision, backend, engine, p50 ms, p99 ms, images/s, baseline, "
    "baseline ms, ratio, floor ms, of floor, extra MiB, spread, reach"
)
_BRIEF = (
    "op, shape, precision, backend, p50 ms, baseline, baseline ms, ratio, of copy, extra MiB, "
    "asked, reach"
)
_BRIEF_DEFENSES = (
    "name, model, batch, precision, engine, p50 ms, p99 ms, baseline, baseline ms, ratio, "
    "of floor, extra MiB, asked, reach"
)
# Fits 80 characters.
_TERMINAL = "batch, p50 ms, p99 ms, images/s, ratio, floor ms, of floor, extra MiB, spread"


def _table(rows: Sequence[Row], columns: str) -> str:
    names = columns.split(", ")
    body = [[_COLUMNS[name][0](row) for name in names] for row in rows]
    rule = ["---" if _COLUMNS[name][1] else "--:" for name in names]
    return "\n".join("| " + " | ".join(line) + " |" for line in [names, rule, *body])


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by group, in order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["group"], []).append(row)
    return found


def markdown(rows: Sequence[Row]) -> str:
    """Markdown tables of a run, one per group."""
    return _by_group(rows, _OPS, _DEFENSES)


def brief(rows: Sequence[Row]) -> str:
    """Markdown tables of rows with targets, one per group."""
    return _by_group([row for row in rows if row["reach"]], _BRIEF, _BRIEF_DEFENSES)


def _by_group(rows: Sequence[Row], of_ops: str, of_others: str) -> str:
    return "\n\n".join(
        f"### {name}\n\n{_table(some, of_ops if name == 'ops' else of_others)}"
        for name, some in groups(rows).items()
    )


def terminal(rows: Sequence[Row], title: str) -> Table:
    """Terminal table of `scc-fast bench`."""
    from rich import box
    from rich.table import Table

    drawn = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    drawn.add_column("name")
    names = _TERMINAL.split(", ")
    for name in names:
        drawn.add_column(name.replace(" ", "\n").replace("/", "\n/"), justify="right")
    for row in rows:
        cells = [_COLUMNS[name][0](row) for name in names]
        cells[-1] += "\nnoisy" if row["loaded"] else ""
        drawn.add_row(f"{row['name']}\n{row['precision']} {row['engine']}", *cells)
    return drawn


SHORT_LEGEND = (
    "Ratio: {baseline} / this row. Medians of rounds in which all sides took turns; with fewer "
    "than 100 rounds p99 is near the longest. Floor: the larger of FLOPs / matmul rate and bytes "
    "of weights / copy rate, measured here. Random pictures, every one repaired."
)
LEGEND = (
    "Times are medians of rounds in which all sides (for an op a copy, too) took turns; ratio = "
    "baseline / ours, of times, and of peaks in the group “memory”. p99: with fewer than 100 "
    "rounds it is near the longest. The floor is the larger of FLOPs / matmul rate and bytes / "
    "copy rate, rates of the same run; a defense's bytes are its weights, left out where they may "
    "stay in the last cache. GB/s counts the bytes an op must move, beside a copy of as many "
    "bytes; extra MiB is the peak beyond inputs and results, of torch's allocator; spread is the "
    "larger interquartile range over median of the two sides. Noisy: the spread is above "
    f"{100 * TOO_WIDE:.0f} %, or other processes kept more than {TOO_BUSY:g} cores busy, or there "
    f"were fewer than {TOO_FEW} rounds; conclude nothing from it."
)


def page(rows: Sequence[Row], environment: Row) -> str:
    """Markdown page of a run."""
    quick = "**Quick run: the sizes are too small to mean anything.**\n\n" if is_quick(rows) else ""
    asked = ""
    if any(row["reach"] for row in rows):
        asked = f"## What was asked\n\n{brief(rows)}\n\n{summary(rows)}\n\n"
    facts = "".join(f"- {name}: {value}\n" for name, value in environment.items())
    return (
        f"# Benchmarks on {environment['device']}, {environment['date']}\n\n{quick}{facts}\n"
        f"{asked}## All rows\n\n{markdown(rows)}\n\n{LEGEND}\n"
    )


def write(path: Path, rows: Sequence[Row], environment: Row) -> None:
    """Write JSON at `path` and Markdown beside it, atomically."""
    write_json(path, {"environment": environment, "rows": list(rows)})
    with atomic(path.with_suffix(".md")) as partial:
        partial.write_text(page(rows, environment))
