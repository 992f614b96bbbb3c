"""What keeps a report readable: headers, footnotes, labels, and lines of figures with gaps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from pandas import DataFrame

from report_rows import row, write
from scc_fast.evaluate.report import figures
from scc_fast.evaluate.report.page import template
from scc_fast.evaluate.report.pool import figure, measured, method_label, settings_of
from scc_fast.evaluate.report.tables import Table
from scc_fast.evaluate.results import read

LONG = "worst of aa + pgd10 + bpda"


def html_of(*cells: dict[str, Any]) -> str:
    lines = [
        {"line": at, "method": f"m{at}", "published": False, "heading": "", "column": "Rob.", **one}
        for at, one in enumerate(cells)
    ]
    frame = DataFrame(lines, dtype=object).astype({"published": bool})
    table = Table("t", "T", ("method",), (("", "Rob."),), frame, ("below",))
    content = {"title": "P", "lead": [], "warnings": [], "sections": [("S", [table])]}
    return template("page.j2").render(content, figures=[], runs=[])


def part(**more: Any) -> dict[str, Any]:
    return figure(50.0, ci_low=40.0, ci_high=60.0, **more)


def test_headers_have_two_lines_and_the_first_column_stays() -> None:
    text = html_of(part(n="100"))
    assert '<th scope="col">Rob.<br>(n=100)</th>' in text
    assert '<th class="key first" scope="col">method</th>' in text
    assert "tbody th:first-child, thead .first { position: sticky; left: 0;" in text
    assert '<div class="scroll"><table>' in text


def test_long_notes_are_footnotes_each_said_once() -> None:
    cells = [part(note=note) for note in (LONG, "other & longer note", LONG, "")]
    text = html_of(*cells, figure(50.0, note="seeds differ"))
    assert text.count("50.0 [40.0, 60.0]<sup>1</sup></td>") == 2
    assert text.count("50.0 [40.0, 60.0]<sup>2</sup></td>") == 1
    assert text.count("50.0 [40.0, 60.0]</td>") == 1
    assert "50.0 (seeds differ)</td>" in text
    assert text.count(LONG) == 1
    first, second = f"<sup>1</sup> {LONG}</p>", "<sup>2</sup> other &amp; longer note</p>"
    assert -1 < text.index(first) < text.index(second) < text.index(">below</p>")


def test_settings_are_read_from_both_spellings() -> None:
    assert settings_of("scc") == []
    assert settings_of("scc:gate=false:tau=0.1") == ["gate=false", "tau=0.1"]
    spec = 'scc{"views": [{}, {"flip": true}], "gate": false}'
    assert method_label("scc", spec) == 'SCC (views=[{}, {"flip": true}], gate=false)'
    assert settings_of("scc{oops") == ["{oops"]


def test_a_line_breaks_where_a_budget_was_left_out(tmp_path: Path) -> None:
    rows: list[Any] = [row("none", hits=900), row("ttc", hits=800)]
    rows += [row("none", "pgd10", 9 - at, eps=f"{at}/255") for at in (1, 2, 4)]
    rows += [row("ttc", "pgd10", 500, eps="4/255")]
    write(tmp_path, rows)
    (panel,) = figures._sweeps(measured(read(tmp_path)).figures)
    axis = Figure().subplots()
    figures._epsilon(axis, panel)
    drawn = {c.get_label(): list(c.lines[0].get_ydata()) for c in axis.containers}
    assert [round(float(y), 1) for y in drawn["undefended"]] == [90.0, 0.8, 0.7, 0.5]
    assert [math.isnan(float(y)) for y in drawn["TTC"]] == [False, True, True, False]
