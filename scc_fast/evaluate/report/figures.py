"""Figures of a report: accuracy against cost and budget, oblivious against adaptive attacks.

One panel per data set and budget, with a legend beside it. Drawn without a display.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
from pandas import DataFrame

from scc_fast._files import atomic
from scc_fast.config import parse_epsilon
from scc_fast.evaluate.report.pool import beside, clean, each, is_ablation, worst
from scc_fast.evaluate.results import NO_BUDGET

NAMES = ("pareto.png", "epsilon.png", "adaptive.png")
# Okabe and Ito's colours, distinct without colour vision; with the markers 56 pairs.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6e6e6e")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_OBLIVIOUS, _ADAPTIVE, _GRAY, _DARK = "#0072b2", "#d55e00", "#8a8a8a", "#444444"
_WORST = "worst, the defense known"
_PANEL = (7.4, 4.6)  # inches
_DPI = 130
_BESIDE = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.02), "fontsize": 8, "frameon": False}
_BELOW = {"loc": "upper left", "bbox_to_anchor": (0, -0.13), "fontsize": 8, "frameon": False}


@dataclass(frozen=True)
class Figure:
    """Drawn figure.

    Args:
        path: the PNG.
        title: above it.
        text: caption and alternative text.
    """

    path: Path
    title: str
    text: str


@dataclass(frozen=True)
class Panel:
    """Data of a panel.

    Args:
        title: above it.
        attack: title of the oblivious attack.
        points: a line per defense, with `cost` (encoder passes per image, 0 if unknown) and the
            figures `oblivious`, `adaptive` and `clean`, {} if not measured.
        lines: {defense: (budget in 1/255, figure)}; {} for a missing budget.
    """

    title: str
    attack: str
    points: DataFrame = field(default_factory=DataFrame)
    lines: Mapping[str, Sequence[tuple[float, dict[str, Any]]]] = field(default_factory=dict)


def draw(figures: DataFrame, out: Path) -> list[Figure]:
    """Draw all figures supported by the results, as PNG in `out`."""
    groups = [group for _, group in figures.groupby("group", sort=False)]
    panels = [panel for group in groups for panel in _points(group)]
    kinds = (
        (
            "pareto.png",
            [panel for panel in map(_priced, panels) if len(panel.points) > 1],
            _pareto,
            "Accuracy against cost",
            "Robust accuracy over encoder passes an image (F + B). Full marks: attacks that do not "
            "know the defense; open ones: image by image the worst of all, those that know it "
            "among them. The steps are the Pareto fronts: nothing is both cheaper and better.",
        ),
        (
            "epsilon.png",
            [panel for group in groups for panel in _sweeps(group)],
            _epsilon,
            "Robust accuracy against the budget",
            "Zero is the clean accuracy; lines join budgets between which none is left out. One "
            "panel for an attack that does not know the defense, one for the worst of all, image "
            "by image. Bars are 95 % intervals, or the standard deviation over seeds.",
        ),
        (
            "adaptive.png",
            [panel for panel in panels if any(panel.points.adaptive)],
            _dumbbell,
            "Oblivious against adaptive",
            "What is left of robust accuracy when the attacker knows the defense. Bars are 95 % "
            "intervals, or the standard deviation over seeds; the gray tick is the clean accuracy.",
        ),
    )
    found = []
    for name, some, paint, title, text in kinds:
        if some:
            _save(out / name, some, paint)
            found.append(Figure(out / name, title, text))
    return found


def _points(group: DataFrame) -> Iterator[Panel]:
    """A panel per budget, with the defenses under its headline attack."""
    for _, hit in group[group.headline].groupby("attack_order"):
        attack = hit.iloc[0]
        points = hit.assign(
            cost=[_passes(traits) for traits in hit.traits],
            oblivious=beside(hit, hit),
            adaptive=beside(hit, worst(group[group.eps == attack.eps])),
            clean=beside(hit, clean(group)),
        )
        yield Panel(f"{attack['where']}, {attack.eps}", attack.title, points)


def _passes(traits: Mapping[str, Any]) -> float:
    both = (traits.get(name) for name in ("forward", "backward"))
    return sum(passes for passes in both if isinstance(passes, int | float))


def _priced(panel: Panel) -> Panel:
    """A panel of costs, without SCC's ablations."""
    points = panel.points
    return replace(panel, points=points[(points.cost > 0) & ~is_ablation(points)])


def _sweeps(group: DataFrame) -> Iterator[Panel]:
    """Panels over budgets: the attack with the most, at least two, and the worst."""
    some = group[group.oblivious & ~group.control].sort_values("attack_order", kind="stable")
    budgets = some.drop_duplicates("attack_order").attack.value_counts(sort=False)
    first = set(group.attack[group.headline])
    attack = max(budgets.index, key=lambda name: (budgets[name], name in first), default="")
    if budgets.get(attack, 0) < 2:
        return
    plain = group[~is_ablation(group)]
    met = plain[(plain.attack == attack) & plain.oblivious]
    one, known = met.iloc[0], worst(plain)
    yield Panel(f"{one['where']}, {one.title}", one.title, lines=_lines(plain, met))
    if len(known):
        # For the undefended model an oblivious attack is its worst, without another.
        bare = met[met.method == "none"]
        both = pd.concat([known, bare]).drop_duplicates(["defense", "eps"])
        yield Panel(f"{one['where']}, {_WORST}", one.title, lines=_lines(plain, both))


def _lines(group: DataFrame, under: DataFrame) -> dict[str, list[tuple[float, dict[str, Any]]]]:
    """Lines of a panel: defenses with more than one figure."""
    budgets = list(group[group.eps != NO_BUDGET].sort_values("attack_order").eps.unique())
    whose = group.drop_duplicates("defense")
    columns = [beside(whose, clean(group))]
    columns += [beside(whose, under[under.eps == eps]) for eps in budgets]
    x = [0.0, *(255 * parse_epsilon(eps) for eps in budgets)]
    lines = zip(whose.label, *columns, strict=True)
    return {
        name: list(zip(x, line, strict=True)) for name, *line in lines if sum(map(bool, line)) > 1
    }


def front(pairs: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Pareto front of (cost, accuracy), by rising cost."""
    found: list[tuple[float, float]] = []
    for cost, value in sorted(pairs, key=lambda pair: (pair[0], -pair[1])):
        if not found or value > found[-1][1]:
            found.append((cost, value))
    return found


# --------------------------------------------------------------------------------------- the panels


def _save(path: Path, panels: Sequence[Panel], paint: Callable[[Any, Panel], None]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    wide = min(2, len(panels))
    high = math.ceil(len(panels) / wide)
    canvas = Canvas(figsize=(wide * _PANEL[0], high * _PANEL[1]), facecolor="white", dpi=_DPI)
    FigureCanvasAgg(canvas)
    axes = canvas.subplots(high, wide, squeeze=False).ravel()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, panel in zip(axes, panels, strict=False):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e6e6e6", linewidth=0.7)
        axis.set_axisbelow(True)
        title = "\n".join(textwrap.wrap(panel.title, 58))
        axis.set_title(title, fontsize=9.5, loc="left", parse_math=False)
        paint(axis, panel)
        for text in [*axis.get_legend().get_texts(), *axis.get_yticklabels()]:
            text.set_parse_math(False)
    canvas.tight_layout(w_pad=2.0, h_pad=2.0)
    with atomic(path) as partial:
        canvas.savefig(partial, dpi=_DPI, metadata={"Software": None})


def _look(turn: int) -> dict[str, Any]:
    return {"color": _COLOURS[turn % len(_COLOURS)], "marker": _MARKERS[turn % len(_MARKERS)]}


def _folded(name: str) -> str:
    """Wrap a name for the legend."""
    return textwrap.fill(name, 32)


def _bounds(one: Mapping[str, Any]) -> tuple[float, float]:
    """Lengths of an error bar, down and up."""
    if not one or (one["std"] is None and one["ci_low"] is None):
        return 0.0, 0.0
    if one["std"] is not None:
        return one["std"], one["std"]
    value = one["value"]
    return max(0.0, value - one["ci_low"]), max(
        0.0, one["ci_high"] - value
    )  # >= 0 despite rounding


def _pareto(axis: Any, panel: Panel) -> None:
    costs = list(panel.points.cost)
    for side, style, label in (("oblivious", "-", panel.attack), ("adaptive", "--", _WORST)):
        found = zip(costs, panel.points[side], strict=True)
        edge = front([(cost, one["value"]) for cost, one in found if one])
        if edge:
            x, y = zip(*edge, (max(costs), edge[-1][1]), strict=True)
            axis.step(x, y, where="post", color=_GRAY, linestyle=style, label=label)
    top = 10.0
    for turn, point in enumerate(each(panel.points)):
        ends = [one["value"] for one in (point.oblivious, point.adaptive) if one]
        top = max(top, *ends)
        axis.plot([point.cost] * len(ends), ends, color=_GRAY, linewidth=0.9, zorder=1)
        look = {**_look(turn), "linestyle": "", "markersize": 6.5, "zorder": 3}
        axis.plot(point.cost, ends[0], **look, label=_folded(point.label))
        axis.plot([point.cost] * (len(ends) - 1), ends[1:], **look, markerfacecolor="white")
    if max(costs) > 4 * min(costs):
        from matplotlib.ticker import FuncFormatter, NullFormatter

        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
    axis.margins(x=0.08)
    axis.set_ylim(-0.06 * top, 1.06 * top)
    axis.set(xlabel="encoder passes an image, F + B", ylabel="robust accuracy, %")
    axis.legend(**_BESIDE)


def _epsilon(axis: Any, panel: Panel) -> None:
    lines = panel.lines
    for turn, (name, line) in enumerate(lines.items()):
        spans = [_bounds(one) for _, one in line]
        axis.errorbar(
            [x for x, _ in line],
            [one.get("value", math.nan) for _, one in line],
            yerr=[[down for down, _ in spans], [up for _, up in spans]],
            **_look(turn),
            markersize=5,
            linewidth=1.4,
            elinewidth=0.8,
            label=_folded(name),
        )
    budgets = sorted({x for line in lines.values() for x, one in line if one})
    axis.set_xticks(budgets, [f"{x:g}" for x in budgets])
    axis.set(xlabel="budget ε, in 1/255", ylabel="accuracy, %", ylim=(-3, 103))
    axis.legend(**_BESIDE, handlelength=2.4)


def _dumbbell(axis: Any, panel: Panel) -> None:
    marks = (
        ("oblivious", "o", _OBLIVIOUS, -0.13, panel.attack),
        ("adaptive", "D", _ADAPTIVE, 0.13, _WORST),
        ("clean", "|", _DARK, 0.0, "clean"),
    )
    for row, point in enumerate(each(panel.points)):
        pair = [one["value"] for one in (point.oblivious, point.adaptive) if one]
        axis.plot(pair, [row] * len(pair), color=_GRAY, linewidth=1.6, zorder=1)
        for side, marker, colour, shift, _ in marks:
            if one := getattr(point, side):
                down, up = _bounds(one) if side != "clean" else (0.0, 0.0)
                axis.errorbar(
                    one["value"], row + shift, xerr=[[down], [up]], fmt=marker, color=colour,
                    markersize=11 if side == "clean" else 5.5, elinewidth=1.2, capsize=2.5,
                )  # fmt: skip
    for _, marker, colour, _, label in marks:
        axis.plot([], [], marker, color=colour, markersize=6, label=label)
    axis.set_yticks(range(len(panel.points)), list(panel.points.label), fontsize=8.5)
    axis.set_ylim(len(panel.points) - 0.4, -0.6)
    axis.set_xlim(-3, 103)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("accuracy, %")
    axis.legend(**_BELOW, ncols=3)
