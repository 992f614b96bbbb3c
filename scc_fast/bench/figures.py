"""Figures of a benchmark: latency by batch, and a waterfall of one call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scc_fast._files import atomic
from scc_fast.bench.rows import TOO_WIDE, Row

# Distinct without colour vision.
_LINES = {
    "reference": ("#6e6e6e", "s", "reference, eager float32"),
    "undefended": ("#e69f00", "^", "undefended, one forward pass"),
}
_OURS, _FLOOR = "#0072b2", "#111111"
_PARTS = {
    "views": "#56b4e9",
    "forward": "#0072b2",
    "head": "#cc79a7",
    "backward": "#d55e00",
    "step": "#009e73",
}
_OTHER = "#999999"


def _title(row: Row) -> str:
    shape = row["shape"].split(", ", 1)
    config = shape[1] if len(shape) > 1 else shape[0]
    return (
        f"{row['model']} on {row['device']}\n"
        f"{config}; {row['precision']}, {row['engine']} engine, {row['classes']} classes"
    )


def _saved(figure: Any, path: Path) -> None:
    figure.tight_layout()
    with atomic(path) as partial:
        figure.savefig(partial, dpi=150)


def latency_figure(rows: Sequence[Row], method: str) -> Any:
    """p50 by batch for each name, log-log, with the method's floor."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, NullLocator

    figure = Figure(figsize=(7.0, 4.8), facecolor="white")
    axis = figure.subplots()
    for name in dict.fromkeys(row["name"] for row in rows):
        some = sorted((row for row in rows if row["name"] == name), key=lambda row: row["batch"])
        colour, marker, label = _LINES.get(name, (_OURS, "o", f"{name}, {some[0]['precision']}"))
        batches, times = [row["batch"] for row in some], [row["p50_ms"] for row in some]
        axis.plot(batches, times, color=colour, marker=marker, linewidth=2, label=label)
    ours = sorted((row for row in rows if row["name"] == method), key=lambda row: row["batch"])
    batches = [row["batch"] for row in ours]
    axis.plot(
        batches,
        [row["floor_ms"] for row in ours],
        color=_FLOOR,
        linestyle="--",
        marker="_",
        label=f"floor of {method}; %: share of floor",
    )
    for row in ours:
        axis.annotate(
            f"{100 * row['share_of_floor']:.0f} %",
            (row["batch"], row["floor_ms"]),
            xytext=(0, -13),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=_FLOOR,
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(batches, [str(batch) for batch in batches])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.margins(x=0.1, y=0.15)
    axis.set_xlabel("batch (images a call)")
    axis.set_ylabel("time of a call, median (ms)")
    axis.set_title(_title(ours[0]), fontsize=10)
    axis.grid(True, which="major", alpha=0.3)
    axis.legend(fontsize=9)
    if any(row["loaded"] for row in rows):
        note = f"some spreads above {100 * TOO_WIDE:.0f} %, or a loaded machine: conclude nothing"
        figure.text(0.99, 0.005, note, ha="right", fontsize=8, color="#b00020")
    return figure


def waterfall_figure(row: Row) -> Any:
    """Waterfall of a call: one line per step, parts in order of time.

    Args:
        row: of the defense, with `stages`: {"step", "part", "ms"} in order of time.
    """
    from matplotlib.figure import Figure

    stages = row["stages"]
    steps = list(dict.fromkeys(stage["step"] for stage in stages))
    total = sum(stage["ms"] for stage in stages)
    figure = Figure(figsize=(8.0, 1.6 + 0.5 * len(steps)), facecolor="white")
    axis = figure.subplots()
    shown: set[str] = set()
    start = 0.0
    ends: dict[str, float] = {}
    for stage in stages:
        step, part, ms = stage["step"], stage["part"], stage["ms"]
        label = "_" if part in shown else part  # no legend entry
        shown.add(part)
        axis.barh(
            steps.index(step), ms, left=start, height=0.6, color=_PARTS.get(part, _OTHER),
            label=label,
        )  # fmt: skip
        start += ms
        ends[step] = start
    for place, step in enumerate(steps):
        ms = sum(stage["ms"] for stage in stages if stage["step"] == step)
        text = f" {ms:.3g} ms, {100 * ms / total:.0f} %"
        axis.text(ends[step], place, text, va="center", fontsize=8)
    axis.set_yticks(range(len(steps)), steps, fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.18 * total)
    outside = ", the same work outside its graph" if row["engine"] == "graph" else ""
    axis.set_xlabel(
        f"ms since the call began; {total:.3g} ms in all, batch {row['batch']}{outside}"
    )
    axis.set_title(_title(row), fontsize=10)
    axis.grid(True, axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return figure


def draw(stem: Path, rows: Sequence[Row], waterfall: Row, method: str) -> tuple[Path, Path]:
    """Write STEM-latency.png and STEM-waterfall.png."""
    paths = tuple(stem.with_name(f"{stem.name}-{what}.png") for what in ("latency", "waterfall"))
    _saved(latency_figure(rows, method), paths[0])
    _saved(waterfall_figure(waterfall), paths[1])
    return paths[0], paths[1]
