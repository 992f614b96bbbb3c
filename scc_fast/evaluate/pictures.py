"""Defense of picture files: labels before and after, repaired pictures, a figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from scc_fast._files import atomic, write_json
from scc_fast.api import Defender
from scc_fast.images import to_batch, to_pil
from scc_fast.models import load_model
from scc_fast.result import DefenseResult

_FIGURE_ROWS = 16


@dataclass(frozen=True)
class Defended:
    """Rows for --json, and the files that failed."""

    rows: list[dict[str, Any]]
    failed: list[Path]


def defend_files(
    files: Sequence[Path],
    *,
    model: str,
    pretrained: str | None,
    classes: Sequence[str],
    method: str,
    config: dict[str, Any],
    top: int,
    output: Path,
    figure: Path | None,
    seed: int,
    json: Path | None,
    report: Callable[[Any], None],
    warn: Callable[[str], None],
    tick: Callable[[], None],
) -> Defended:
    """Defend all readable files.

    `report` gets output to print, `warn` a line per failed file; `tick` is called once per file.
    """
    loaded = load_model(model, pretrained)
    defender = Defender(loaded, classes, method=method, config=config)
    bare = Defender(loaded, text_features=defender.text_features, method="none")
    rows: list[dict[str, Any]] = []
    failed: list[Path] = []
    kept: list[tuple[Tensor, DefenseResult, DefenseResult]] = []
    for file in files:
        try:
            x = to_batch(file, loaded)
            before, after = bare(x, seed), defender(x, seed)
            target = _free_name(output, file.stem, [row["repaired"] for row in rows])
            with atomic(target) as partial:
                to_pil(after.images[0]).save(partial)
        except (ValueError, OSError) as error:
            failed.append(file)
            warn(f"scc-fast: {file}: {error}")
            tick()
            continue
        row = {
            "picture": str(file),
            "before": _top(before, classes, top),
            "after": _top(after, classes, top),
            "flagged": bool(after.flagged[0]),
            "drift": None if torch.isnan(after.drift[0]) else float(after.drift[0]),
            "repaired": str(target),
            "seed": seed,
            "method": method,
        }
        rows.append(row)
        if figure is not None and len(kept) < _FIGURE_ROWS:
            kept.append((x, before, after))
        report(_table(row))
        tick()
    if figure is not None and kept:
        _figure(figure, kept, classes)
        shown = f" (the first {len(kept)} pictures)" if len(kept) < len(rows) else ""
        report(escape(f"figure: {figure}{shown}"))
    if json is not None:
        write_json(json, {"rows": rows, "failed": [str(file) for file in failed]})
    return Defended(rows, failed)


def _free_name(folder: Path, stem: str, taken: Sequence[str]) -> Path:
    """NAME.repaired.png, numbered if taken by an earlier picture of this call."""
    names = [
        f"{stem}.repaired.png",
        *(f"{stem}-{i}.repaired.png" for i in range(2, 2 + len(taken))),
    ]
    return next(folder / name for name in names if str(folder / name) not in taken)


def _top(result: DefenseResult, classes: Sequence[str], k: int) -> list[dict[str, Any]]:
    values, labels = result.topk(k)
    return [
        {"label": classes[label], "probability": value}
        for value, label in zip(values[0].tolist(), labels[0].tolist(), strict=True)
    ]


def _table(row: dict[str, Any]) -> Table:
    drift = "" if row["drift"] is None else f", drift {row['drift']:.3f}"
    verdict = "flagged as attacked" if row["flagged"] else "not flagged"
    table = Table(
        title=escape(f"{row['picture']}: {verdict}{drift}; repaired: {row['repaired']}"),
        title_justify="left",
    )
    table.add_column("before")
    table.add_column("", justify="right")
    table.add_column("after")
    table.add_column("", justify="right")
    for old, new in zip(row["before"], row["after"], strict=True):
        cells = [
            escape(old["label"]),
            f"{old['probability']:.1%}",
            escape(new["label"]),
            f"{new['probability']:.1%}",
        ]
        table.add_row(*cells)
    return table


def _figure(path: Path, kept: list, classes: Sequence[str]) -> None:
    pictures = torch.cat([x for x, _, _ in kept])
    before = DefenseResult.concatenate([b for _, b, _ in kept])
    after = DefenseResult.concatenate([a for _, _, a in kept])
    comparison_figure(path, pictures, None, before, after, classes)


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
    """Draw one row per picture: pictures, amplified differences, top-3 bars.

    Args:
        path: PNG, PDF or SVG to write.
        pictures: (n, 3, H, W) in [0, 1], before any attack.
        attacked: the same after the attack, or None.
        before, after: undefended and defended results on the attacked (or given) pictures.
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
