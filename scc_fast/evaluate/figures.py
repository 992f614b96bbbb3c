"""Figures of a report: accuracy against cost and budget, and what an adaptive attack takes.

One panel a data set and budget. Drawn without a display.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scc_fast.config import parse_epsilon
from scc_fast.evaluate.attack_tables import place
from scc_fast.evaluate.cells import Cell, pooled
from scc_fast.evaluate.collect import Measure
from scc_fast.evaluate.groups import Group, is_control, is_oblivious, titles
from scc_fast.evaluate.paper_tables import is_ablation, method_title
from scc_fast.evaluate.placing import label_points
from scc_fast.evaluate.report import atomic

# Okabe and Ito's colours, told apart without colour vision; with the markers 56 pairs.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6e6e6e")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_OBLIVIOUS, _ADAPTIVE, _GRAY, _DARK = "#0072b2", "#d55e00", "#8a8a8a", "#444444"
_WORST = "worst, the defense known"
_PANEL = (6.2, 4.6)  # inches
_DPI = 130


@dataclass(frozen=True)
class Figure:
    """A figure that was drawn.

    Args:
        path: the PNG.
        title: above it.
        text: what it shows, in words, for who cannot see it and as its caption.
    """

    path: Path
    title: str
    text: str


@dataclass(frozen=True)
class Panel:
    """What one panel is of.

    Args:
        group, where: its data, and their name.
        attack: stands for those that do not know the defense.
        adaptive: it shows the worst of all instead.
    """

    group: Group
    where: str
    attack: Measure
    adaptive: bool = False


@dataclass(frozen=True)
class Point:
    """A defense in a panel; accuracies in percent, cost in encoder passes an image."""

    name: str
    cost: float | None
    oblivious: Cell
    adaptive: Cell
    clean: Cell


def draw(groups: Sequence[Group], out: Path) -> list[Figure]:
    """Every figure that the figures are there for, as PNG in `out`."""
    models = titles([group.model for group in groups])
    datas = titles([group.data for group in groups])
    panels = [
        Panel(group, place(group, models, datas), attack)
        for group in groups
        for attack in group.headlines()
    ]
    found = []
    priced = [p for p in panels if len(_priced(p)) > 1]
    if priced:
        _save(out / "pareto.png", priced, _pareto)
        found.append(
            Figure(
                out / "pareto.png",
                "Accuracy against cost",
                "Robust accuracy over encoder passes an image (F + B). Circles: attacks that do "
                "not know the defense; diamonds: image by image the worst of all, those that know "
                "it among them. The steps are the Pareto fronts: nothing is both cheaper and "
                "better.",
            )
        )
    swept = [
        Panel(group, place(group, models, datas), attack, adaptive)
        for group in groups
        if (attack := _sweep(group)) is not None
        for adaptive in (False, True)
    ]
    swept = [panel for panel in swept if _lines(panel)]
    if swept:
        _save(out / "epsilon.png", swept, _epsilon)
        found.append(
            Figure(
                out / "epsilon.png",
                "Robust accuracy against the budget",
                "Zero is the clean accuracy; lines join budgets between which none is left out. "
                "One panel for an attack that does not know the defense, one for the worst of all, "
                "image by image. Bars are 95 % intervals, or the standard deviation over seeds.",
            )
        )
    paired = [p for p in panels if any(pt.adaptive.measured for pt in points(p))]
    if paired:
        _save(out / "adaptive.png", paired, _dumbbell)
        found.append(
            Figure(
                out / "adaptive.png",
                "Oblivious against adaptive",
                "What is left of robust accuracy when the attacker knows the defense. Bars are "
                "95 % intervals, or the standard deviation over seeds; the gray tick is the clean "
                "accuracy.",
            )
        )
    return found


def points(panel: Panel) -> list[Point]:
    """The defenses of a panel that met its attack."""
    group, attack = panel.group, panel.attack
    found = []
    for defense in group.defenses():
        one = group.first(defense)
        cell = pooled(group.get(defense, attack.attack, attack.eps))
        if not cell.measured:
            continue
        passes = [one.traits.get(name) for name in ("forward", "backward")]
        cost = sum(p for p in passes if isinstance(p, int | float)) or None
        worst = pooled(group.worst(defense, attack.eps))
        found.append(Point(_name(group, defense), cost, cell, worst, pooled(group.clean(defense))))
    return found


def _name(group: Group, defense: str) -> str:
    return method_title(group.first(defense).method, defense)


def front(pairs: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (cost, accuracy) those that nothing cheaper or as cheap beats, by rising cost."""
    found: list[tuple[float, float]] = []
    for cost, value in sorted(pairs, key=lambda pair: (pair[0], -pair[1])):
        if not found or value > found[-1][1]:
            found.append((cost, value))
    return found


def _save(path: Path, panels: Sequence[Panel], paint: Callable[[Any, Panel], None]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    wide = min(2, len(panels))
    high = math.ceil(len(panels) / wide)
    figure = Canvas(figsize=(wide * _PANEL[0], high * _PANEL[1]), facecolor="white", dpi=_DPI)
    FigureCanvasAgg(figure)
    axes = figure.subplots(high, wide, squeeze=False).ravel()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, panel in zip(axes, panels, strict=False):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e6e6e6", linewidth=0.7)
        axis.set_axisbelow(True)
        paint(axis, panel)
    figure.tight_layout(w_pad=2.0, h_pad=2.0)
    if paint is _pareto:  # labels need to know how large the panels have become
        for axis, panel in zip(axes, panels, strict=False):
            _label_pareto(axis, panel)
    with atomic(path) as partial:
        figure.savefig(partial, dpi=_DPI, metadata={"Software": None})


def _title(axis: Any, text: str) -> None:
    axis.set_title("\n".join(textwrap.wrap(text, 58)), fontsize=9.5, loc="left", parse_math=False)


def _bounds(cell: Cell) -> tuple[float, float]:
    """How far an error bar goes down and up."""
    if cell.value is None:
        return 0.0, 0.0
    if cell.spread is not None:
        return cell.spread, cell.spread
    if cell.low is None or cell.high is None:
        return 0.0, 0.0
    return max(0.0, cell.value - cell.low), max(0.0, cell.high - cell.value)  # but for rounding


# ------------------------------------------------------------------------------------ the panels


def _priced(panel: Panel) -> list[Point]:
    """The points of the figure of costs; SCC's switches have a table of their own."""
    group, shown = panel.group, points(panel)
    off = {_name(group, d) for d in group.defenses() if is_ablation(group.first(d))}
    return [point for point in shown if point.cost and point.name not in off]


def _pareto(axis: Any, panel: Panel) -> None:
    some = _priced(panel)
    kinds = (
        ("oblivious", "o", _OBLIVIOUS, panel.attack.title),
        ("adaptive", "D", _ADAPTIVE, _WORST),
    )
    for name, marker, colour, label in kinds:
        cells = [(p.cost or 0.0, getattr(p, name).value) for p in some]
        pairs = [(cost, value) for cost, value in cells if value is not None]
        if not pairs:
            continue
        edge = front(pairs)
        last = max(cost for cost, _ in pairs)
        axis.step(
            [x for x, _ in edge] + [last],
            [y for _, y in edge] + [edge[-1][1]],
            where="post",
            color=colour,
            alpha=0.45,
            linewidth=1.3,
            linestyle="-" if name == "oblivious" else "--",
        )
        axis.plot(
            [x for x, _ in pairs],
            [y for _, y in pairs],
            marker,
            color=colour,
            markersize=6.5 if marker == "o" else 6,
            label=label,
            markeredgecolor="white",
            markeredgewidth=0.6,
        )
    for point in some:
        if point.oblivious.value is not None and point.adaptive.value is not None:
            ends = [point.oblivious.value, point.adaptive.value]
            axis.plot([point.cost] * 2, ends, color=_GRAY, linewidth=0.9, zorder=1)
    costs = [point.cost or 1.0 for point in some]
    if max(costs) > 4 * min(costs):
        from matplotlib.ticker import FuncFormatter, NullFormatter

        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
    axis.margins(x=0.12)
    axis.set(xlabel="encoder passes an image, F + B", ylabel="robust accuracy, %")
    top = max(cell.value or 0.0 for p in some for cell in (p.oblivious, p.adaptive))
    axis.set_ylim(-0.06 * max(top, 10), 1.14 * max(top, 10))
    _title(axis, f"{panel.where}, {panel.attack.eps}")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.13), ncols=2, frameon=False)


def _label_pareto(axis: Any, panel: Panel) -> None:
    some = _priced(panel)
    named = [(p.cost or 0.0, p.oblivious.value or 0.0, p.name) for p in some]
    marks, walls = [], []
    for name in ("oblivious", "adaptive"):
        cells = [(p.cost or 0.0, getattr(p, name).value) for p in some]
        pairs = [(x, y) for x, y in cells if y is not None]
        marks += pairs
        edge = front(pairs)
        for (x0, y0), (x1, y1) in itertools.pairwise(edge):
            walls += [((x0, y0), (x1, y0)), ((x1, y0), (x1, y1))]
    for p in some:
        if p.cost and p.oblivious.value is not None and p.adaptive.value is not None:
            walls.append(((p.cost, p.adaptive.value), (p.cost, p.oblivious.value)))
    label_points(axis, named, marks, walls)


def _sweep(group: Group) -> Measure | None:
    """The attack with the most budgets, at least two; the papers' PGD-10 before others."""
    first = {one.attack for one in group.headlines()}
    some = [one for one in group.attacks() if is_oblivious(one) and not is_control(one)]
    counts = Counter(one.attack for one in some)
    best = max(some, key=lambda one: (counts[one.attack], one.attack in first), default=None)
    return best if best is not None and counts[best.attack] > 1 else None


def _lines(panel: Panel) -> dict[str, list[tuple[float, Cell]]]:
    """{defense: (budget in 1/255, accuracy)} of each that has more than one point.

    A budget that was not measured is there with an empty cell, where the line breaks.
    """
    group, found = panel.group, {}
    for defense in group.defenses():
        line = [(0.0, pooled(group.clean(defense)))]
        for eps in group.budgets():
            some = group.get(defense, panel.attack.attack, eps)
            if panel.adaptive:  # to whom nothing is unknown of the bare model, either is the same
                is_bare = group.first(defense).method == "none"
                some = group.worst(defense, eps) or (some if is_bare else ())
            line.append((255 * parse_epsilon(eps), pooled(some)))
        if sum(cell.measured for _, cell in line) > 1 and not is_ablation(group.first(defense)):
            found[_name(group, defense)] = line
    pairs = ((defense, eps) for defense in group.defenses() for eps in group.budgets())
    known = any(group.worst(*pair) for pair in pairs)
    return found if known or not panel.adaptive else {}


def _epsilon(axis: Any, panel: Panel) -> None:
    for index, (name, line) in enumerate(_lines(panel).items()):
        spans = [_bounds(cell) for _, cell in line]
        axis.errorbar(
            [x for x, _ in line],
            [math.nan if cell.value is None else cell.value for _, cell in line],
            yerr=[[down for down, _ in spans], [up for _, up in spans]],
            color=_COLOURS[index % len(_COLOURS)],
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=5,
            linewidth=1.4,
            elinewidth=0.8,
            label=name,
        )
    budgets = sorted({x for line in _lines(panel).values() for x, cell in line if cell.measured})
    axis.set_xticks(budgets, [f"{x:g}" for x in budgets])
    axis.set(xlabel="budget ε, in 1/255", ylabel="accuracy, %", ylim=(-3, 103))
    _title(axis, f"{panel.where}, {_WORST if panel.adaptive else panel.attack.title}")
    axis.legend(
        fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False, handlelength=2.4
    )


def _dumbbell(axis: Any, panel: Panel) -> None:
    some = points(panel)
    for row, point in enumerate(some):
        pair = [c.value for c in (point.oblivious, point.adaptive) if c.value is not None]
        if len(pair) == 2:
            axis.plot(pair, [row, row], color=_GRAY, linewidth=1.6, zorder=1)
        for cell, marker, colour, shift in (
            (point.oblivious, "o", _OBLIVIOUS, -0.13),
            (point.adaptive, "D", _ADAPTIVE, 0.13),
        ):
            if cell.value is None:
                continue
            down, up = _bounds(cell)
            axis.errorbar(
                cell.value,
                row + shift,
                xerr=[[down], [up]],
                fmt=marker,
                color=colour,
                markersize=5.5,
                elinewidth=1.2,
                capsize=2.5,
            )
        if point.clean.value is not None:
            axis.plot(point.clean.value, row, "|", color=_DARK, markersize=11, markeredgewidth=1.5)
    for marker, colour, label in (
        ("o", _OBLIVIOUS, panel.attack.title),
        ("D", _ADAPTIVE, _WORST),
        ("|", _DARK, "clean"),
    ):
        axis.plot([], [], marker, color=colour, markersize=6, label=label)
    axis.set_yticks(range(len(some)), [point.name for point in some], fontsize=8.5)
    for text in axis.get_yticklabels():
        text.set_parse_math(False)
    axis.set_ylim(len(some) - 0.4, -0.6)
    axis.set_xlim(-3, 103)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("accuracy, %")
    _title(axis, f"{panel.where}, {panel.attack.eps}")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.13), ncols=3, frameon=False)
