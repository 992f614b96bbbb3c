"""Files of a report: tables as Markdown, CSV and LaTeX, and one page."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from scc_fast._files import atomic
from scc_fast.evaluate.report.cautions import cautions
from scc_fast.evaluate.report.figures import NAMES as FIGURES
from scc_fast.evaluate.report.figures import draw
from scc_fast.evaluate.report.pool import DAGGER, measured, text
from scc_fast.evaluate.report.tables import Table, make_tables, provenance
from scc_fast.evaluate.results import read

TITLE = "Robust accuracy of test-time defenses"
KINDS: dict[str, str] = {
    "table-1": "Table 1: the data sets of the paper",
    "table-3": "Table 3: the medical data sets",
    "table-4": "Table 4: accuracy and its price",
    "ablation": "Ablation of SCC",
    "attacks": "All attacks",
    "label-leak": "Label leak",
}
_LONGEST_NOTE = 16  # letters of a note within a cell


def make_report(folder: Path, out: Path | None = None) -> list[Path]:
    """Make tables, figures and pages of every results.json below a folder.

    Includes unfinished runs. Files of an earlier report in `out` are replaced or removed; other
    files stay.

    Args:
        folder: results of scc-fast evaluate.
        out: folder of the report; None: folder/report.

    Returns:
        Files, report.html and report.md first: tables as .md, .csv and .tex, figures as .png.

    Raises:
        ValueError: no results.json, or an unreadable one.
    """
    folder = Path(folder)
    out = folder / "report" if out is None else Path(out)
    found = measured(read(folder))
    tables = list(make_tables(found))
    by_kind = {kind: [table for table in tables if table.kind == kind] for kind in KINDS}
    by_kind = {kind: some for kind, some in by_kind.items() if some}
    warnings = cautions(found)
    out.mkdir(parents=True, exist_ok=True)
    for name in [*FIGURES, *(f"{kind}.{end}" for kind in KINDS for end in ("md", "csv", "tex"))]:
        (out / name).unlink(missing_ok=True)
    figures = draw(found.figures, out)
    count = len(found.rows)
    content = {
        "title": TITLE,
        "lead": [
            f"{len(found.runs)} run{'s' * (len(found.runs) != 1)}, {count} measured figures. Top-1 "
            "accuracy in percent with 95 % Wilson intervals; budgets are L-infinity, pixels in "
            f"[0, 1]. Lines and figures marked {DAGGER} are published by others, not measured here."
        ],
        "warnings": warnings,
        "sections": [(KINDS[kind], some) for kind, some in by_kind.items()],
        "figures": figures,
        "runs": [provenance(found, folder)],
    }
    written = [
        _write(out / "report.html", template("page.j2").render(content)),
        _write(out / "report.md", template("page.md.j2").render(content).rstrip() + "\n"),
    ]
    for kind, some in by_kind.items():
        written += [
            _write(out / f"{kind}.md", "\n".join(map(markdown, some))),
            _write(out / f"{kind}.csv", csv_text(some)),
            _write(out / f"{kind}.tex", "\n".join(map(latex, some))),
        ]
    return written + [figure.path for figure in figures]


def _write(path: Path, content: str) -> Path:
    with atomic(path) as partial:
        partial.write_text(content, encoding="utf-8")
    return path


def template(name: str) -> Template:
    """Template in this folder: page.j2 is HTML, the others Markdown."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=name == "page.j2",
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"md": escape_markdown, "base64": _base64}
    environment.globals |= {"footnoted": footnoted, "zip": zip}
    return environment.get_template(name)


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode("ascii")


# -------------------------------------------------------------------------------- HTML and Markdown


def footnoted(table: Table) -> tuple[pd.DataFrame, list[str]]:
    """Table of the page, with cells (text, footnote number or ""), and its footnotes.

    Long notes of cells become footnotes.
    """
    notes: list[str] = []

    def show(one: Mapping[str, Any], with_n: bool) -> tuple[str, str]:
        if len(one["note"]) <= _LONGEST_NOTE:
            return text(one, with_n), ""
        if one["note"] not in notes:
            notes.append(one["note"])
        return text({**one, "note": ""}, with_n), str(notes.index(one["note"]) + 1)

    return table.wide(show), notes


# Only adjacent brackets make a link: intervals need no escape.
_MARKDOWN = re.compile(r"([\\`*_|~#$]|\](?=[(\[]))")


def escape_markdown(content: str) -> str:
    """Escape text for a Markdown table cell."""
    content = content.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN.sub(r"\\\1", " ".join(content.split()))


def markdown(table: Table) -> str:
    """Markdown of a table, with heading and notes."""
    return str(template("table.md.j2").module.show(table, 2))  # type: ignore[attr-defined]


# ---------------------------------------------------------------------------------------------- CSV

_COLUMNS = ("value", "ci_low", "ci_high", "n", "seeds", "std", "sets", "note")


def csv_text(tables: Sequence[Table]) -> str:
    """CSV of tables of one kind, one line per figure."""
    parts = []
    for table in tables:
        cells = table.cells
        order = {column: order for order, column in enumerate(table.columns)}
        at = [order[column] for column in zip(cells.heading, cells.column, strict=True)]
        cells = cells.assign(at=at).sort_values(["line", "at"], kind="stable")
        parts.append(cells.assign(table=table.title))
    found = pd.concat(parts)
    shown = {name: [_plain(value) for value in found[name]] for name in _COLUMNS}
    ours = ~found.published
    counted = ours & ((found.n != "") | (found.sets > 0))
    shown["seeds"] = found.seeds.where(counted, "")
    shown["sets"] = found.sets.where(found.sets > 0, "")
    found = found.assign(**shown, kind=ours.map({True: "measured", False: "published"}))
    columns = ["table", *tables[0].keys, "heading", "column", "kind", *_COLUMNS]
    return found[columns].rename(columns={"heading": "group"}).to_csv(index=False)


def _plain(value: float | str | None) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else f"{round(value, 4):.12g}"


# -------------------------------------------------------------------------------------------- LaTeX

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    DAGGER: r"\textsuperscript{\dag}",
    "±": r"$\pm$",
    "–": "--",
    "·": r"$\cdot$",
    "…": r"\dots{}",
    "ε": r"$\varepsilon$",
    "√": r"$\surd$",
}


def escape_latex(content: str) -> str:
    """Escape text for LaTeX."""
    return "".join(_LATEX.get(sign, sign) for sign in " ".join(content.split()))


def latex(table: Table) -> str:
    r"""A `table` environment; needs \usepackage{booktabs}."""
    wide = table.wide()
    names = [*table.keys, *table.names()]
    headings = [""] * len(table.keys) + [heading for heading, _ in table.columns]
    wide.columns = pd.MultiIndex.from_arrays([headings, names]) if any(headings) else names
    style = wide.style.hide(axis="index").format(_latex_cell).format_index(escape_latex, axis=1)
    found = style.to_latex(
        hrules=True,
        caption=escape_latex(table.title),
        column_format="l" * len(table.keys) + "r" * len(table.columns),
        multicol_align="c",
        environment="table",
    )
    notes = [f"\\par\\smallskip\\footnotesize {escape_latex(note)}\n" for note in table.notes]
    body, end = found.split("\\end{table}")
    return "% needs \\usepackage{booktabs}\n" + body + "".join(notes) + "\\end{table}" + end


def _latex_cell(content: str) -> str:
    """Protect a leading "[", which would be an argument of the line break."""
    escaped = escape_latex(content)
    return "{}" + escaped if escaped.startswith("[") else escaped
