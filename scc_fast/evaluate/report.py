"""Rows of an evaluation as a table, as JSON, and as one comparison figure per picture set."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scc_fast.evaluate.groups import attack_titles
from scc_fast.evaluate.rows import Row
from scc_fast.result import DefenseResult

if TYPE_CHECKING:
    from rich.table import Table


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place only if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".partial-", suffix=path.suffix)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o644)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all; Row objects become plain dicts."""

    def plain(item: Any) -> Any:
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            return dataclasses.asdict(item)
        raise TypeError(f"cannot write {type(item).__name__} as JSON")

    with atomic(path) as partial:
        partial.write_text(json.dumps(value, indent=1, default=plain) + "\n")


def cell(row: Row | None) -> str:
    """Accuracy in percent with its 95 % interval, as "94.8 [93.2, 96.0]"."""
    if row is None:
        return "–"
    return f"{100 * row.accuracy:.1f} [{100 * row.ci_low:.1f}, {100 * row.ci_high:.1f}]"


def table(rows: Sequence[Row], title: str, times: Sequence[Mapping[str, Any]] = ()) -> Table:
    """The accuracy table for a terminal, narrow enough for 80 columns.

    Args:
        rows: a line a defense, a column an attack.
        title: above it.
        times: of each row; those of clean pictures are shown.
    """
    from rich import box
    from rich.table import Table

    found = {(row.defense, row.attack, row.eps): row for row in rows}
    titles = attack_titles(rows)
    drawn = Table(
        title=title,
        caption="percent correct, 95 % Wilson interval",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    drawn.add_column("defense")
    for (attack, eps), name in titles.items():
        counts = sorted({row.n for row in rows if (row.attack, row.eps) == (attack, eps)})
        budget = "" if attack == "clean" else f"\n{eps}"
        head = name.replace(" ", "\n").replace("view-aware", "view-\naware")
        head = head.replace(":", ":\n")
        drawn.add_column(f"{head}{budget}\nn={'/'.join(map(str, counts))}", justify="right")
    ms = {time["defense"]: time["ms_per_image"] for time in times if time["attack"] == "clean"}
    if ms:
        drawn.add_column("ms/\nimage", justify="right")
    for name in dict.fromkeys(row.defense for row in rows):
        cells = [_narrow(found.get((name, *column))) for column in titles]
        last = [f"{ms[name]:.1f}" if name in ms else "–"] if ms else []
        drawn.add_row(name, *cells, *last)
    return drawn


def _narrow(row: Row | None) -> str:
    """The interval in whole percent on a line of its own: a terminal has no room for more."""
    if row is None:
        return "–"
    return f"{100 * row.accuracy:.1f}\n{100 * row.ci_low:.0f}–{100 * row.ci_high:.0f}"


def comparison_figure(
    path: Path,
    pictures: Tensor,
    attacked: Tensor | None,
    before: DefenseResult,
    after: DefenseResult,
    names: Sequence[str],
    truth: Sequence[int] | None = None,
    clean: DefenseResult | None = None,
) -> None:
    """One row a picture: picture, attacked, repaired, amplified differences, top-3 with bars.

    Args:
        path: PNG, PDF or SVG to write.
        pictures: (n, 3, H, W) in [0, 1], before any attack.
        attacked: the same after the attack, or None where there was none.
        before, after: undefended and defended results on what the model got to see.
        names: the K class names.
        truth: n true classes, to colour the bars.
        clean: undefended result on the pictures before the attack.
    """
    from matplotlib.figure import Figure

    seen = pictures if attacked is None else attacked
    images: list[tuple[str, Tensor]] = [("picture", pictures)]
    if attacked is not None:
        images += [("attacked", attacked), ("attack ×20", _amplify(attacked - pictures))]
    images += [("repaired", after.images), ("repair ×20", _amplify(after.images - seen))]
    bars = [] if clean is None else [("picture, undefended", clean)]
    bars += [("attacked, undefended" if attacked is not None else "undefended", before)]
    bars += [("attacked, defended" if attacked is not None else "defended", after)]
    figure = Figure(figsize=(1.6 * len(images) + 2.3 * len(bars), 1.75 * len(pictures) + 0.4))
    axes = figure.subplots(
        len(pictures),
        len(images) + len(bars),
        squeeze=False,
        width_ratios=[1.0] * len(images) + [1.35] * len(bars),
    )
    for row in range(len(pictures)):
        for column, (title, batch) in enumerate(images):
            axis = axes[row][column]
            axis.imshow(batch[row].permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
            axis.set_axis_off()
            if row == 0:
                axis.set_title(title, fontsize=9)
        for column, (title, result) in enumerate(bars, start=len(images)):
            axis = axes[row][column]
            _draw_bars(axis, result, row, names, None if truth is None else truth[row])
            if row == 0:
                axis.set_title(title, fontsize=9)
    figure.tight_layout()
    with atomic(path) as partial:
        figure.savefig(partial, dpi=130)


def _amplify(difference: Tensor) -> Tensor:
    return (0.5 + 20 * difference).clamp(0, 1)


def _draw_bars(
    axis: Any, result: DefenseResult, row: int, names: Sequence[str], truth: int | None
) -> None:
    values, labels = torch.topk(result.probs[row], min(3, len(names)))
    for place, (value, label) in enumerate(zip(values.tolist(), labels.tolist(), strict=True)):
        colour = "#8a8a8a" if truth is None else "#3a923a" if label == truth else "#c03d3e"
        axis.barh(-place, value, color=colour, height=0.42)
        text = f"{names[label]}  {value:.0%}"
        axis.text(0.0, -place + 0.27, text, fontsize=7.5, va="bottom", ha="left", parse_math=False)
    axis.set(xlim=(0, 1), ylim=(-2.5, 0.75))
    axis.set_axis_off()
