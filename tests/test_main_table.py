"""The main table's columns and their order: clean, damaged, PGD, its controls, the knowing ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny_results
from report_rows import row, write
from scc_fast.evaluate.report import make_report
from scc_fast.evaluate.report.pool import measured
from scc_fast.evaluate.report.tables import make_tables
from scc_fast.evaluate.results import Row, attack_titles, base_of, footnotes, read, tables

OWN = {"title": "PGD-10 (own prediction)", "attack_settings": {"attack": "pgd-own", "steps": 10}}
RANDOM = {
    "title": "PGD-10 (random target)",
    "attack_settings": {"attack": "pgd-random", "steps": 10},
}
DAMAGED = {"eps": "0/255", "attack_settings": {"attack": "damaged", "kind": "any"}}
NOTES = (
    "damaged: no attacker, but ordinary damage, one of nine kinds a picture",
    "own answer: PGD driven by the model's own answer, so that no label leaks",
    "random class: PGD towards a random class",
)


def rows_of(defense: str, eps: tuple[str, ...] = ("1/255", "4/255")) -> list[dict[str, Any]]:
    """All columns of a method, in an order that is not the table's."""
    found = [row(defense, hits=900)]
    for e in eps:
        found += [
            row(defense, "worst", 100, eps=e, of=["clean", "pgd10", "bpda"]),
            row(defense, "pgd-random10", 700, eps=e, **RANDOM),
            row(defense, "aa", 450, eps=e),
            row(defense, "bpda", 150, eps=e),
            row(defense, "pgd-own10", 600, eps=e, **OWN),
            row(defense, "pgd10", 500, eps=e),
        ]
    return [*found, row(defense, "damaged", 850, **DAMAGED)]


def stored(path: Path) -> list[Row]:
    return [Row(**one) for one in json.loads(path.read_text())["rows"]]


def test_the_report_has_the_columns_in_order(tmp_path: Path) -> None:
    write(tmp_path, [*rows_of("none"), *rows_of("scc")])
    made = make_tables(measured(read(tmp_path)))
    oblivious, knowing = (one for one in made if one.kind == "attacks")
    each = ("PGD-10", "own answer", "random class", "aa", "worst adaptive")
    assert oblivious.columns == (
        ("", "clean"),
        ("", "damaged"),
        *((f"at {eps}", name) for eps in ("1/255", "4/255") for name in each),
    )
    assert [name for _, name in knowing.columns] == ["bpda", "worst per image"] * 2
    for line in oblivious.wide().values.tolist():
        shown = [text.split(" [")[0] for text in line[1:8]]
        assert shown == ["90.0", "85.0", "50.0", "60.0", "70.0", "45.0", "10.0"]
    for note in NOTES:
        assert sum(said.startswith(note) for said in oblivious.notes) == 1
        assert not any(said.startswith(note) for said in knowing.notes)


def test_every_form_of_the_report_has_them(tmp_path: Path) -> None:
    write(tmp_path, [*rows_of("none"), *rows_of("scc")])
    make_report(tmp_path)
    for name in ("report.html", "report.md", "attacks.md", "attacks.tex"):
        text = (tmp_path / "report" / name).read_text()
        places = [text.find(head) for head in ("damaged", "own answer", "random class")]
        assert -1 < places[0] < places[1] < places[2], name
        for note in NOTES:
            assert note in text.replace("&#39;", "'"), (name, note)
    head = (tmp_path / "report" / "attacks.md").read_text().split("\n")[2]
    assert "| damaged (n=1000) | at 1/255 PGD-10 (n=1000) |" in head


def test_damage_is_no_attack_in_a_report(tmp_path: Path) -> None:
    """It heads no table or figure, and being above clean leaks no label."""
    rows = [row("none", hits=900), row("scc", hits=800)]
    rows += [row(name, "damaged", 850, **DAMAGED) for name in ("none", "scc")]
    write(tmp_path, rows)
    found = measured(read(tmp_path)).figures
    assert list(found.attack) == ["clean", "damaged"] * 2
    assert not any(found.oblivious)
    assert not any(found.headline)
    assert not any(found.control)
    assert {one.kind for one in make_tables(measured(read(tmp_path)))} == {"attacks"}
    written = make_report(tmp_path)
    assert not [path for path in written if path.suffix == ".png"]
    assert "Read this first" not in written[1].read_text()


def test_the_console_has_the_columns_in_order(tmp_path: Path) -> None:
    path = write(tmp_path, rows_of("scc", ("4/255",)))
    (drawn,) = tables(stored(path), "a title")
    heads = [str(column.header).replace("\n", " ") for column in drawn.columns]
    assert heads == [
        "defense",
        "clean n=1000",
        "damaged n=1000",
        "PGD-10 4/255 n=1000",
        "own answer 4/255 n=1000",
        "random class 4/255 n=1000",
        "aa 4/255 n=1000",
        "bpda 4/255 n=1000",
        "worst per image 4/255 n=1000",
    ]
    cells = [str(next(iter(column.cells))).split("\n")[0] for column in drawn.columns]
    assert cells == ["scc", "90.0", "85.0", "50.0", "60.0", "70.0", "45.0", "15.0", "10.0"]
    first, *notes = str(drawn.caption).split("\n")
    assert first == "percent correct, 95 % Wilson interval"
    assert [note.startswith(begin) for note, begin in zip(notes, NOTES, strict=True)] == [True] * 3


def heads_of(drawn: Any) -> list[str]:
    return [str(column.header).replace("\n", " ").split(" n=")[0] for column in drawn.columns]


def test_a_console_without_room_has_the_knowing_attacks_apart(tmp_path: Path) -> None:
    more = [row("scc", spec, 300, eps="4/255", aware=True) for spec in ("gate", "View-aware-30")]
    path = write(tmp_path, [*rows_of("none", ("4/255",)), *rows_of("scc", ("4/255",)), *more])
    times = [{"defense": "scc", "attack": "clean", "ms_per_image": 2.0}]
    drawn = list(tables(stored(path), "a title", times))
    oblivious = ["clean", "damaged", *(f"{one} 4/255" for one in ("PGD-10", "own answer"))]
    knowing = [f"{one} 4/255" for one in ("bpda", "gate", "View- aware- 30", "worst per image")]
    assert [heads_of(one) for one in drawn] == [
        ["defense", *oblivious, "random class 4/255", "aa 4/255", "ms/ image"],
        ["defense", *knowing],
    ]
    assert list(drawn[1].columns[2].cells) == ["–", "30.0\n28–33"]
    assert [str(one.caption).count("own answer:") for one in drawn] == [1, 0]


def test_a_console_table_has_at_most_nine_attacks(tmp_path: Path) -> None:
    path = write(tmp_path, rows_of("scc", ("1/255", "2/255", "4/255")))
    drawn = list(tables(stored(path), "a title"))
    assert [len(one.columns) - 1 for one in drawn] == [7, 7, 6]  # 2 + 4 · 3, and 2 · 3
    every = [head for one in drawn for head in heads_of(one)[1:]]
    assert len(set(every)) == 20
    assert every[:3] == ["clean", "damaged", "PGD-10 1/255"]


def test_a_column_that_was_not_measured_is_absent(tmp_path: Path) -> None:
    path = write(tmp_path, [row("scc"), row("scc", "pgd10", 500)])
    (drawn,) = tables(stored(path), "a title")
    assert len(drawn.columns) == 3
    assert drawn.caption == "percent correct, 95 % Wilson interval"
    (shown,) = (one for one in make_tables(measured(read(tmp_path))) if one.kind == "attacks")
    assert [name for _, name in shown.columns] == ["clean", "PGD-10"]
    assert not any(note.startswith(NOTES) for note in shown.notes)


def test_heads_tell_steps_apart() -> None:
    specs = (
        "pgd-own10",
        "pgd-own",
        "pgd-own20",
        "pgd-random:steps=5",
        "damaged:kind=grey",
        "pgd10",
    )
    path = [Row(**row("scc", spec, title=f"T {spec}")) for spec in specs]
    heads = attack_titles([one for one in path if one.attack != "pgd-own"])
    assert list(heads.values()) == [
        "own answer",
        "own answer (pgd-own20)",
        "random class (pgd-random:steps=5)",
        "T damaged:kind=grey",
        "T pgd10",
    ]
    assert [base_of(spec) for spec in specs] == [
        *["pgd-own"] * 3, "pgd-random", "damaged", "pgd",
    ]  # fmt: skip
    assert [note.split(":")[0] for note in footnotes(specs)] == [
        "damaged", "own answer", "random class",
    ]  # fmt: skip


# -------------------------------------------------------------------------------- what is stored


def test_stored_results_have_the_columns_that_they_hold() -> None:
    """Controls of eight methods; the run in float32, of doc, has neither these nor damage."""
    found = measured(read(tiny_results.STORED))
    controls = found.figures[found.figures.control]
    assert set(controls.method) == {
        "none", "views", "ttc", "scc", "csr", "dbd", "agc", "extrapolate",
    }  # fmt: skip
    made = [one for one in make_tables(found) if one.kind == "attacks"]
    names = {"PGD-10", "PGD-100", "own answer", "random class", "worst adaptive"}
    names.add("AutoAttack (apgd-ce, apgd-dlr)")
    every = {(f"at {eps}", name) for eps in ("1/255", "2/255", "4/255") for name in names}
    assert made[0].columns[:2] == (("", "clean"), ("", "damaged"))
    assert set(made[0].columns[2:]) == every
    assert [name for _, name in made[2].columns] == ["clean", *["PGD-10"] * 3, "worst adaptive"]


def test_the_pages_tables_are_those_of_the_stored_rows() -> None:
    found = tiny_results.tables(tiny_results.STORED)
    page = tiny_results.PAGE.read_text()
    for name, lines in found.items():
        assert "\n".join([f"<!-- table {name} -->", *lines, ""]) in page, name
    assert "\n".join(["<!-- table docs/results.md -->", *found["methods"], ""]) in (
        tiny_results.README.read_text()
    )
    heads = found["methods"][0].strip("| ").split(" | ")
    assert heads == [
        "defense",
        "clean",
        "damaged",
        "PGD-10, 1/255",
        "PGD-10, 2/255",
        "PGD-10, 4/255",
        "PGD-100, 4/255",
        "own answer, 4/255",
        "random class, 4/255",
        "AutoAttack (apgd-ce, apgd-dlr), 4/255",
        "worst of all, 4/255",
    ]


def test_the_script_asks_for_all_and_shows_damage_once_measured() -> None:
    asked = [asked for _, asked in tiny_results.stages(5)["table"]]
    assert {"damaged", "pgd10"} <= set(asked[0].attacks)
    ((_, controls),) = tiny_results.stages(5)["controls"]
    assert set(tiny_results.TABLE) <= set(controls.defenses)
    columns = {"clean": ("clean", "0/255"), "damaged": ("damaged", "0/255"), "x": ("x", "1/255")}
    rows = {
        (one.defense, one.attack, one.eps): one
        for one in (Row(**row("scc")), Row(**row("scc", "damaged", 850, **DAMAGED)))
    }
    lines = tiny_results._grid(("scc", "ttc"), columns, rows)
    assert lines[0] == "| defense | clean | damaged |"
    assert lines[2] == "| scc | 80.0 [78.0, 83.0] | 85.0 [83.0, 88.0] |"
    assert lines[3] == "| ttc | – | – |"
