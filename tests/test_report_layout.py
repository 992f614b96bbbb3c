"""What keeps a report readable: headers, footnotes, labels, and lines of figures with gaps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from report_rows import row, write
from scc_fast.evaluate import figures
from scc_fast.evaluate.cells import Cell
from scc_fast.evaluate.collect import read
from scc_fast.evaluate.groups import groups
from scc_fast.evaluate.html import page
from scc_fast.evaluate.paper_tables import method_title, settings_of
from scc_fast.evaluate.tables import Line, Table

LONG = "worst of aa + pgd10 + bpda"


def html_of(*cells: Cell) -> str:
    lines = tuple(Line((f"m{at}",), (cell,)) for at, cell in enumerate(cells))
    table = Table("t", "T", ("method",), (("", "Rob."),), lines, ("below",))
    return page("P", (), (), [("S", [table])], ())


def test_headers_have_two_lines_and_the_first_column_stays() -> None:
    text = html_of(Cell(50.0, 40.0, 60.0, n=(100,)))
    assert '<th scope="col">Rob.<br>(n=100)</th>' in text
    assert '<th class="key first" scope="col">method</th>' in text
    assert "tbody th:first-child, thead .first { position: sticky; left: 0;" in text
    assert '<div class="scroll"><table>' in text


def test_long_notes_are_footnotes_each_said_once() -> None:
    cells = [Cell(50.0, 40.0, 60.0, note=note) for note in (LONG, "other & longer note", LONG, "")]
    text = html_of(*cells, Cell(50.0, note="seeds differ"))
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
    assert method_title("scc", spec) == 'SCC (views=[{}, {"flip": true}], gate=false)'
    assert settings_of("scc{oops") == ["{oops"]


def test_a_line_breaks_where_a_budget_was_left_out(tmp_path: Path) -> None:
    rows: list[Any] = [row("none", hits=900), row("ttc", hits=800)]
    rows += [row("none", "pgd10", 9 - at, eps=f"{at}/255") for at in (1, 2, 4)]
    rows += [row("ttc", "pgd10", 500, eps="4/255")]
    write(tmp_path, rows)
    (group,) = groups(read(tmp_path))
    attack = figures._sweep(group)
    assert attack is not None
    axis = Figure().subplots()
    figures._epsilon(axis, figures.Panel(group, "here", attack))
    drawn = {c.get_label(): list(c.lines[0].get_ydata()) for c in axis.containers}
    assert [round(float(y), 1) for y in drawn["undefended"]] == [90.0, 0.8, 0.7, 0.5]
    assert [math.isnan(float(y)) for y in drawn["TTC"]] == [False, True, True, False]
