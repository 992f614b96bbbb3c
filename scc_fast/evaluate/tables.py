"""Tables as Markdown, CSV and LaTeX; scc_fast.evaluate.html has the same for a page."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

from scc_fast.evaluate.cells import DAGGER, Cell


@dataclass(frozen=True)
class Line:
    """One line: what it is of, and a cell for each column.

    Args:
        labels: one for each key of the table.
        cells: one for each column.
        published: every figure in it is a paper's.
    """

    labels: tuple[str, ...]
    cells: tuple[Cell, ...]
    published: bool = False

    def shown(self) -> tuple[str, ...]:
        """The labels, the last one marked where the line is published."""
        mark = f" {DAGGER} published" if self.published else ""
        return (*self.labels[:-1], self.labels[-1] + mark)


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        kind: what file it goes to: "table-1", "attacks", …
        title: above it.
        keys: headings of the labels.
        columns: (group, name) of each column; neighbours of one group share its heading.
        lines: its body.
        notes: below it.
    """

    kind: str
    title: str
    keys: tuple[str, ...]
    columns: tuple[tuple[str, str], ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()

    def names(self) -> list[str]:
        """The columns' names, with the number of images where a column has only one."""
        return [
            f"{name} (n={n})" if (n := self.common(at)) else name
            for at, (_, name) in enumerate(self.columns)
        ]

    def common(self, at: int) -> str:
        """The number of images of every measured cell of a column, "" where they differ."""
        found = {line.cells[at].counted() for line in self.lines if line.cells[at].measured}
        return found.pop() if len(found) == 1 else ""

    def body(self) -> list[list[str]]:
        """Labels and cells as text."""
        alone = [not self.common(at) for at in range(len(self.columns))]
        return [
            [*line.shown(), *(c.text(own) for c, own in zip(line.cells, alone, strict=True))]
            for line in self.lines
        ]

    def spans(self) -> list[tuple[str, int]]:
        """(group, how many columns), in order."""
        found: list[tuple[str, int]] = []
        for group, _ in self.columns:
            if found and found[-1][0] == group:
                found[-1] = group, found[-1][1] + 1
            else:
                found.append((group, 1))
        return found


# ------------------------------------------------------------------------------------- Markdown

# A bracket makes a link only where another follows it: intervals stay readable.
_MARKDOWN = re.compile(r"([\\`*_|~#$]|\](?=[(\[]))")


def escape_markdown(text: str) -> str:
    """Text that Markdown, and HTML in it, leaves as it is; fit for a table's cell."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split()))


def markdown(table: Table, level: int = 2) -> str:
    """Heading, table and notes."""
    groups = [group for group, _ in table.columns]
    names = [f"{g} {n}".strip() for g, n in zip(groups, table.names(), strict=True)]
    header = [*table.keys, *names]
    rule = ["---"] * len(table.keys) + ["--:"] * len(names)
    lines = [[escape_markdown(cell) for cell in line] for line in (header, *table.body())]
    text = ["#" * level + " " + escape_markdown(table.title), ""]
    text += ["| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:])]
    text += [f"\n{escape_markdown(note)}" for note in table.notes]
    return "\n".join(text) + "\n"


# ------------------------------------------------------------------------------------------ CSV

_FIELDS = ("kind", "value", "ci_low", "ci_high", "n", "seeds", "std", "sets", "note")


def csv_text(tables: Sequence[Table]) -> str:
    """Tables of one kind, a line a figure: numbers as numbers, and whose each one is."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("table", *tables[0].keys, "group", "column", *_FIELDS))
    for table in tables:
        for line in table.lines:
            for (group, name), cell in zip(table.columns, line.cells, strict=True):
                if cell.measured or cell.printed:
                    writer.writerow((table.title, *line.labels, group, name, *_fields(cell)))
    return out.getvalue()


def _fields(cell: Cell) -> tuple[str, ...]:
    if cell.printed:
        sets = str(cell.sets) if cell.sets > 1 else ""
        return ("published", cell.printed, "", "", "", "", "", sets, cell.note)
    numbers = [_plain(cell.value), _plain(cell.low), _plain(cell.high)]
    seeds = str(cell.seeds) if cell.n or cell.sets else ""
    sets = str(cell.sets) if cell.sets else ""
    n = cell.counted()
    return ("measured", *numbers, n, seeds, _plain(cell.spread), sets, cell.note)


def _plain(value: float | None) -> str:
    return "" if value is None else f"{round(value, 4):.12g}"


# ---------------------------------------------------------------------------------------- LaTeX

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


def escape_latex(text: str) -> str:
    """Text that LaTeX sets as it is."""
    return "".join(_LATEX.get(sign, sign) for sign in " ".join(text.split()))


def latex(table: Table) -> str:
    r"""A `table` environment; needs \usepackage{booktabs}."""
    keys = len(table.keys)
    text = [
        "% needs \\usepackage{booktabs}",
        "\\begin{table}",
        f"\\caption{{{escape_latex(table.title)}}}",
        f"\\begin{{tabular}}{{{'l' * keys}{'r' * len(table.columns)}}}",
        "\\toprule",
    ]
    if any(group for group, _ in table.columns):
        parts, rules, at = [""] * keys, [], keys + 1
        for group, count in table.spans():
            parts.append(f"\\multicolumn{{{count}}}{{c}}{{{escape_latex(group)}}}")
            if group:
                rules.append(f"\\cmidrule(lr){{{at}-{at + count - 1}}}")
            at += count
        text += [" & ".join(parts) + " \\\\", " ".join(rules)]
    header = [*table.keys, *table.names()]
    text += [" & ".join(map(escape_latex, header)) + " \\\\", "\\midrule"]
    text += [" & ".join(map(_latex_cell, line)) + " \\\\" for line in table.body()]
    text += ["\\bottomrule", "\\end{tabular}"]
    text += [f"\\par\\smallskip\\footnotesize {escape_latex(note)}" for note in table.notes]
    return "\n".join([*text, "\\end{table}"]) + "\n"


def _latex_cell(text: str) -> str:
    """A line that begins with "[" would be taken as the length of the break before it."""
    escaped = escape_latex(text)
    return "{}" + escaped if escaped.startswith("[") else escaped
