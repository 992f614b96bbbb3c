"""What `scc-fast report` makes: tables, figures and pages of all results below a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path

from scc_fast.evaluate.attack_tables import attack_tables, place
from scc_fast.evaluate.cautions import cautions
from scc_fast.evaluate.cells import Cell, number
from scc_fast.evaluate.collect import Run, read
from scc_fast.evaluate.figures import Figure, draw
from scc_fast.evaluate.groups import Group, groups, titles
from scc_fast.evaluate.html import page
from scc_fast.evaluate.paper_tables import paper_tables
from scc_fast.evaluate.report import atomic, write_json
from scc_fast.evaluate.robustbench import entries, is_ours
from scc_fast.evaluate.tables import Line, Table, csv_text, escape_markdown, latex, markdown

TITLE = "Robust accuracy of test-time defenses"
KINDS: dict[str, str] = {
    "table-1": "Table 1: the data sets of the paper",
    "table-3": "Table 3: the medical data sets",
    "table-4": "Table 4: accuracy and its price",
    "ablation": "Ablation of SCC",
    "attacks": "All attacks",
    "label-leak": "Label leak",
}
_MADE = ("scc_fast", "torch", "device")
_FIGURES = ("pareto.png", "epsilon.png", "adaptive.png")


def make_report(folder: Path, out: Path | None = None) -> list[Path]:
    """Make tables, figures and pages of every results.json below a folder.

    Runs that are not done are shown as far as they are. What an earlier report left in `out` under
    the same names is replaced, or removed where there is nothing to say any more; so is what it
    left in `out`/robustbench, told by name and content. Other files stay.

    Args:
        folder: what scc-fast evaluate wrote to.
        out: where the report goes; None: folder/report.

    Returns:
        The files, report.html and report.md first: tables as .md, .csv and .tex, figures as .png,
        and robustbench/MODEL-DATASET-DEFENSE.json.

    Raises:
        ValueError: there is no results.json, or one that cannot be read; it is named.
    """
    folder = Path(folder)
    out = folder / "report" if out is None else Path(out)
    runs = read(folder)
    grouped = groups(runs)
    tables = [*paper_tables(grouped), *attack_tables(grouped)]
    by_kind = {kind: [table for table in tables if table.kind == kind] for kind in KINDS}
    warnings = cautions(grouped)
    lead = _lead(runs)
    out.mkdir(parents=True, exist_ok=True)
    for name in [*_FIGURES, *(f"{kind}.{end}" for kind in KINDS for end in ("md", "csv", "tex"))]:
        (out / name).unlink(missing_ok=True)
    figures = draw(grouped, out)
    sections = [(KINDS[kind], some) for kind, some in by_kind.items() if some]
    sections.append(("Runs", [_provenance(runs, grouped, folder)]))
    written = [
        _write(out / "report.html", page(TITLE, lead, warnings, sections, figures)),
        _write(out / "report.md", _markdown(lead, warnings, sections, figures)),
    ]
    for kind, some in by_kind.items():
        if some:
            written += [
                _write(out / f"{kind}.md", "\n".join(map(markdown, some))),
                _write(out / f"{kind}.csv", csv_text(some)),
                _write(out / f"{kind}.tex", "\n".join(map(latex, some))),
            ]
    written += [figure.path for figure in figures]
    found = entries(grouped)
    _clear(out / "robustbench", found)
    for name, entry in found.items():
        path = out / "robustbench" / name
        write_json(path, entry)
        written.append(path)
    return written


def _clear(folder: Path, kept: Collection[str]) -> None:
    """Remove the entries that an earlier report wrote, but for the names kept."""
    for path in sorted(folder.glob("*.json")):
        if path.name in kept or path.is_symlink() or not path.is_file():
            continue
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if is_ours(path.name, value):
            path.unlink()


def _write(path: Path, text: str) -> Path:
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def _lead(runs: Sequence[Run]) -> list[str]:
    figures = sum(len(run.measures) for run in runs)
    return [
        f"{len(runs)} run{'s' * (len(runs) != 1)}, {figures} measured figures. Top-1 accuracy in "
        "percent with 95 % Wilson intervals; budgets are L-infinity, pixels in [0, 1]. Lines and "
        "figures marked † are published by others, not measured here."
    ]


def _markdown(
    lead: Sequence[str],
    warnings: Sequence[str],
    sections: Sequence[tuple[str, Sequence[Table]]],
    figures: Sequence[Figure],
) -> str:
    parts = [f"# {TITLE}\n", *(f"{escape_markdown(text)}\n" for text in lead)]
    if warnings:
        items = "\n".join(f"- {escape_markdown(text)}" for text in warnings)
        parts.append(f"## Read this first\n\n{items}\n")
    bodies = [
        f"## {escape_markdown(name)}\n\n" + "\n".join(markdown(table, 3) for table in tables)
        for name, tables in sections
    ]
    parts += bodies[:-1]
    if figures:
        parts.append("## Figures\n")
        parts += [
            f"### {figure.title}\n\n![{figure.title}]({figure.path.name})\n\n{figure.text}\n"
            for figure in figures
        ]
    return "\n".join([*parts, *bodies[-1:]])


def _provenance(runs: Sequence[Run], grouped: Sequence[Group], folder: Path) -> Table:
    """Which file each figure is from, and where it was made."""
    models = titles([group.model for group in grouped])
    datas = titles([group.data for group in grouped])
    where = {id(run): place(group, models, datas) for group in grouped for run in group.runs}
    lines = []
    for run in runs:
        made = dict.fromkeys(
            ", ".join(f"{key} {env[key]}" for key in _MADE if env.get(key))
            for env in run.environments
        )
        labels = (
            os.path.relpath(run.path, folder),
            where[id(run)],
            run.model.weights[:12],
            run.model.precision,
            run.data.split,
            run.data.template,
            "; ".join(filter(None, made)),
        )
        cells = (
            number(run.seed),
            number(run.asked),
            _count(run.pictures),
            _count(run.expected),
            _count(run.classes),
            number(len(run.measures)),
        )
        lines.append(Line(labels, cells))
    names = ("seed", "n", "pictures", "expected", "classes", "figures")
    return Table(
        "runs",
        "Where the figures come from",
        ("file", "run", "weights", "precision", "split", "template", "made with"),
        tuple(("", name) for name in names),
        tuple(lines),
        ("weights: the first digits of their SHA-256. expected: pictures that the protocol has.",),
    )


def _count(value: int | None) -> Cell:
    return number(None if value is None else float(value))
