"""A report as one HTML page that needs nothing else: no script, no request, figures inside."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import replace

from scc_fast.evaluate.cells import Cell
from scc_fast.evaluate.figures import Figure
from scc_fast.evaluate.tables import Table

_LONGEST_NOTE = 16  # letters that a cell has room for
_STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; --mark: #d97706; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 78rem; padding: 1rem 1.5rem;
  background: Canvas; color: CanvasText; }
h1, h3, li, p { overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; } h3 { font-size: 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; }
th { font-weight: 600; } th.group { text-align: center; }
thead th { vertical-align: bottom; }
tbody th, th.key { text-align: left; }
tbody th { font-weight: 500; min-width: 5rem; max-width: 15rem; overflow-wrap: anywhere; }
tbody th:first-child, thead .first { position: sticky; left: 0; background: Canvas; }
td { white-space: nowrap; }
tr.published { background: var(--soft); font-style: italic; }
.note { font-size: .82rem; opacity: .85; max-width: 60rem; margin: .3rem 0; }
.warnings { border-left: 4px solid var(--mark); background: var(--soft); padding: .4rem 1rem; }
figure { margin: 1rem 0; } figcaption { font-size: .85rem; max-width: 60rem; }
sup { line-height: 0; }
img { max-width: 100%; background: #fff; border: 1px solid var(--line); }
"""


def page(
    title: str,
    lead: Sequence[str],
    warnings: Sequence[str],
    sections: Sequence[tuple[str, Sequence[Table]]],
    figures: Sequence[Figure],
) -> str:
    """The whole page.

    Args:
        title: of the page.
        lead: paragraphs below it.
        warnings: a list at the head; may be empty.
        sections: (heading, tables), in order; the last one stands behind the figures.
        figures: PNG files, read and put into the page.
    """
    body = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{html.escape(text)}</p>" for text in lead)]
    if warnings:
        items = "".join(f"<li>{html.escape(text)}</li>" for text in warnings)
        body.append(f'<section class="warnings"><h2>Read this first</h2><ul>{items}</ul></section>')
    parts = [_section(name, tables) for name, tables in sections]
    body += parts[:-1]
    if figures:
        body += ["<h2>Figures</h2>", *(_figure(figure) for figure in figures)]
    body += parts[-1:]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _section(name: str, tables: Sequence[Table]) -> str:
    return f"<h2>{html.escape(name)}</h2>\n" + "\n".join(_table(table) for table in tables)


def _table(table: Table) -> str:
    rows = []
    if any(group for group, _ in table.columns):
        groups = "".join(
            f'<th class="group" colspan="{count}" scope="colgroup">{html.escape(group)}</th>'
            for group, count in table.spans()
        )
        corner = f'<td class="first" colspan="{len(table.keys)}"></td>'
        rows.append(f"<tr>{corner}{groups}</tr>")
    keys = "".join(
        f'<th class="key{" first" * (not at)}" scope="col">{html.escape(key)}</th>'
        for at, key in enumerate(table.keys)
    )
    names = "".join(f'<th scope="col">{_two_lines(name)}</th>' for name in table.names())
    rows.append(f"<tr>{keys}{names}</tr>")
    lines, marks = [], dict[str, str]()
    alone = [not table.common(at) for at in range(len(table.columns))]
    for line in table.lines:
        inner = "".join(f'<th scope="row">{html.escape(text)}</th>' for text in line.shown())
        inner += "".join(_cell(*one, marks) for one in zip(line.cells, alone, strict=True))
        opening = '<tr class="published">' if line.published else "<tr>"
        lines.append(f"{opening}{inner}</tr>")
    below = [f"<sup>{mark}</sup> {html.escape(note)}" for note, mark in marks.items()]
    below += map(html.escape, table.notes)
    notes = "".join(f'<p class="note">{note}</p>' for note in below)
    return (
        f'<h3>{html.escape(table.title)}</h3>\n<div class="scroll"><table>\n'
        f"<thead>{''.join(rows)}</thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody></table></div>"
        f"\n{notes}"
    )


def _two_lines(name: str) -> str:
    """A column's name with its number of images below it."""
    return html.escape(name).replace(" (n=", "<br>(n=")


def _cell(cell: Cell, with_n: bool, marks: dict[str, str]) -> str:
    """A cell; a long note of its own goes below the table under a number kept in `marks`."""
    mark = ""
    if len(cell.note) > _LONGEST_NOTE:
        number = marks.setdefault(cell.note, str(len(marks) + 1))
        cell, mark = replace(cell, note=""), f"<sup>{number}</sup>"
    return f"<td>{html.escape(cell.text(with_n))}{mark}</td>"


def _figure(figure: Figure) -> str:
    data = base64.b64encode(figure.path.read_bytes()).decode("ascii")
    text = html.escape(figure.text)
    return (
        f'<figure><h3>{html.escape(figure.title)}</h3><img alt="{text}" '
        f'src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'
    )
