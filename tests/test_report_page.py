"""A whole report of hand-written results: tables, warnings, page, figures."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

from report_rows import HOSTILE, row, write
from scc_fast.evaluate.report import make_report
from scc_fast.evaluate.report.figures import front
from scc_fast.evaluate.report.pool import measured
from scc_fast.evaluate.report.tables import Table, make_tables
from scc_fast.evaluate.results import read

STL = {"name": "stl10", "paper": "STL-10", "pictures": 8000, "pictures_expected": 8000}
DTD = {"name": "dtd", "paper": "DTD", "pictures": 1880, "pictures_expected": 1880}
BUSI = {"name": "busi", "paper": "BUSI", "pictures": 780, "pictures_expected": None}
VOID = {"br", "img", "meta", "hr", "link", "input"}


class Page(HTMLParser):
    """Tags that are closed in order, what they point to, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def sample(folder: Path) -> None:
    """CIFAR-10 and STL-10, three methods, two budgets, adaptive on one of the sets."""
    rows = [
        row("none", hits=850),
        row("none", "pgd10", 20),
        row("ttc", hits=800),
        row("ttc", "pgd10", 300),
        row("scc", hits=810),
        row("scc", "pgd10", 600),
        row("scc", "pgd10", 400, eps="4/255"),
        row("ttc", "pgd10", 200, eps="4/255"),
        row("none", "pgd10", 10, eps="4/255"),
    ]
    adaptive = [
        row("ttc", "worst", 100, of=["clean", "bpda"]),
        row("scc", "bpda", 150),
        row("scc", "worst", 120, n=500, of=["clean", "bpda"]),
    ]
    path = write(folder / "cifar", [*rows, *adaptive])
    times = [{"defense": "scc", "attack": "pgd10", "eps": "1/255", "ms_per_image": 12.5}]
    path.with_name("timings.json").write_text(json.dumps({"rows": times}))
    write(folder / "stl", [*rows[:4], row("scc", "pgd10", 700)], data=STL)


def of_kind(folder: Path, kind: str) -> list[Table]:
    return [table for table in make_tables(measured(read(folder))) if table.kind == kind]


def texts(table: Table) -> dict[tuple[str, ...], dict[str, str]]:
    """{labels: {column: text}}."""
    names = [f"{heading} {name}".strip() for heading, name in table.columns]
    keys, body = len(table.keys), table.wide().values.tolist()
    return {tuple(line[:keys]): dict(zip(names, line[keys:], strict=True)) for line in body}


# ------------------------------------------------------------------------------ the paper's tables


def test_table_1_has_published_lines_and_averages_of_measured_figures_only(tmp_path: Path) -> None:
    sample(tmp_path)
    table, at_four = of_kind(tmp_path, "table-1")
    assert table.title == "Table 1 (PGD-10 at 1/255, protocol ttc)"
    lines = texts(table)
    ours, theirs = lines["ViT-B-32", "SCC"], lines["CLIP ViT-B/32", "SCC † published"]
    assert ours["CIFAR-10 Rob."] == "60.0 [58.0, 63.0]"
    assert theirs["CIFAR-10 Rob."] == "59.18†"
    assert ours["CIFAR-10 Adapt."] == "24.0 [22.0, 27.0] (n=500)"
    assert "STL-10 Adapt." not in ours
    # (60 + 70)/2 with ±2 and ±3: √8/2 = 1.41 and √18/2 = 2.12. Clean on one of the two alone.
    assert ours["Average Rob."] == "65.0 [63.6, 67.1] (2 sets)"
    assert ours["Average Acc."] == "81.0 [79.0, 84.0] (1 set)"
    assert theirs["Average Rob."] == "51.68† (16 sets)"
    assert theirs["CIFAR-10 Adapt."] == ""
    order = [label.split(" †")[0] for label in table.lines().method]
    assert order.index("undefended") < order.index("FARE") < order.index("TTC")
    assert list(table.lines().published).count(False) == 3
    # A published figure is a paper's own digits, and nothing of it has a value to average.
    assert all(isinstance(v, str) for v in table.cells.value[table.cells.published])
    assert at_four.title.startswith("Table 1's layout (PGD-10 at 4/255")
    assert texts(at_four)["CLIP ViT-B/32", "DOC † published"]["CIFAR-10 Rob."] == "38.14†"


def test_fine_tuned_encoders_and_variants_have_lines_of_their_own(tmp_path: Path) -> None:
    rows = [row("none"), row("none", "pgd10", 300), row("scc", "pgd10", 500)]
    write(tmp_path / "t", rows, model={"name": "ViT-B-32+TeCoA.pth.tar"})
    write(tmp_path / "c", [*rows, row("scc:gate=false", "pgd10", 510)])
    (table,) = of_kind(tmp_path, "table-1")
    lines = texts(table)
    assert lines["ViT-B-32+TeCoA.pth.tar", "TeCoA"]["CIFAR-10 Rob."] == "30.0 [28.0, 33.0]"
    assert ("ViT-B-32", "SCC (gate=false)") in lines
    assert ("ViT-B-32", "undefended") in lines


def test_table_3_has_both_backbones(tmp_path: Path) -> None:
    rows = [row("none", "pgd10", 1), row("scc", "pgd10", 340)]
    write(tmp_path, rows, data=BUSI, model={"name": "hf-hub:microsoft/BiomedCLIP-x"})
    (table,) = of_kind(tmp_path, "table-3")
    lines = texts(table)
    assert lines["BiomedCLIP", "SCC † published"]["Average Acc."] == "44.63† (6 sets)"
    assert lines["CLIP ViT-B/32", "TTC † published"]["Average Rob."] == "7.38† (6 sets)"
    assert lines["hf-hub:microsoft/BiomedCLIP-x", "SCC"]["BUSI Rob."] == "34.0 [32.0, 37.0]"


def test_table_4_has_times_and_passes(tmp_path: Path) -> None:
    path = write(tmp_path, [row("scc"), row("scc", "pgd10", 346)], data=DTD)
    times = [{"defense": "scc", "attack": "pgd10", "eps": "1/255", "ms_per_image": 12.54}]
    path.with_name("timings.json").write_text(json.dumps({"rows": times}))
    (table,) = of_kind(tmp_path, "table-4")
    lines = texts(table)
    ours, theirs = lines[("SCC",)], lines[("R-TPT, CLIP ViT-B/32 † published",)]
    assert [ours[key] for key in ("ms/image", "F", "B", "F+B")] == ["12.5", "21", "16", "37"]
    assert (theirs["Rob."], theirs["ms/image"], theirs["F"]) == ("32.8†", "370†", "")


def test_the_ablation_stands_apart(tmp_path: Path) -> None:
    rows = [row("scc", "pgd10", 500), row("scc:semantic=false", "pgd10", 450)]
    write(tmp_path, rows, data=DTD)
    (table,) = of_kind(tmp_path, "ablation")
    lines = texts(table)
    assert lines["ViT-B-32", "off", "on", "–"]["DTD Rob."] == "45.0 [43.0, 48.0]"
    assert lines["CLIP ViT-B/32", "off", "off", "as published † published"]["DTD Rob."] == "27.4†"
    (main,) = of_kind(tmp_path, "table-1")
    assert not any("semantic" in label for label in main.lines().method)


def test_seeds_give_a_spread(tmp_path: Path) -> None:
    for seed, hits in enumerate((500, 520, 540)):
        write(tmp_path / str(seed), [row("scc", "pgd10", hits)], seed=seed)
    (table,) = of_kind(tmp_path, "table-1")
    assert texts(table)["ViT-B-32", "SCC"]["CIFAR-10 Rob."] == "52.0 ± 2.0 (3 seeds)"


# ---------------------------------------------------------------------------------- whole reports


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    sample(folder)
    written = make_report(folder)
    assert all(path.is_file() for path in written)
    assert len(written) == len(set(written))
    return folder / "report"


def test_the_page_is_whole_and_needs_nothing_else(report: Path) -> None:
    text = (report / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert page.sources
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in page.sources)
    assert not re.search(r"url\(|@import|<script|<link", text)
    assert {"h1", "table", "figure"} <= set(page.tags)
    assert page.tags.count("img") == 3
    assert "59.18†" in page.words


def test_the_worst_adaptive_stands_beside_the_oblivious(report: Path) -> None:
    heading = next(
        line
        for line in (report / "attacks.md").read_text().splitlines()
        if line.startswith("| defense")
    )
    names = [name.split(" (n=")[0] for name in heading.strip("| ").split(" | ")]
    assert names == [
        "defense",
        "clean",
        "at 1/255 PGD-10",
        "at 1/255 worst adaptive",
        "at 4/255 PGD-10",
    ]


def test_csv_files_are_numbers(report: Path) -> None:
    with (report / "table-1.csv").open(newline="") as file:
        rows = [one for one in csv.DictReader(file) if one["method"] == "SCC"]
    ours = [one for one in rows if (one["group"], one["column"]) == ("STL-10", "Rob.")]
    found = [(one["kind"], one["value"]) for one in ours]
    assert found == [("measured", "70"), ("published", "90.50")]


def test_figures_are_pictures(report: Path) -> None:
    for name in ("pareto.png", "epsilon.png", "adaptive.png"):
        image = matplotlib.image.imread(report / name)
        assert min(image.shape[:2]) > 300
        assert len(np.unique(image[::5, ::5, :3].reshape(-1, 3), axis=0)) > 20


def test_a_second_report_is_the_same_and_leaves_nothing_stale(tmp_path: Path) -> None:
    sample(tmp_path / "in")
    first = {path.name: path.read_bytes() for path in make_report(tmp_path / "in", tmp_path)}
    second = {path.name: path.read_bytes() for path in make_report(tmp_path / "in", tmp_path)}
    assert first == second
    write(tmp_path / "less", [row("none")], data={"name": "emoji", "paper": "emoji"})
    left = make_report(tmp_path / "less", tmp_path)
    assert not (tmp_path / "table-1.csv").exists()
    assert not (tmp_path / "pareto.png").exists()
    assert sorted(path.name for path in left) == [
        "attacks.csv",
        "attacks.md",
        "attacks.tex",
        "report.html",
        "report.md",
    ]


def test_hostile_names_are_escaped_everywhere(tmp_path: Path) -> None:
    rows = [row("scc"), row("scc", "pgd10", 500), row("none", "pgd10", 5)]
    data = {"name": HOSTILE, "paper": HOSTILE}
    write(tmp_path, rows, data=data, model={"name": f"m{HOSTILE}"})
    make_report(tmp_path)
    text = (tmp_path / "report" / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert "x" not in page.tags
    assert any(HOSTILE in word for word in page.words)
    assert "<x>" not in (tmp_path / "report" / "report.md").read_text()
    latex = (tmp_path / "report" / "attacks.tex").read_text()
    assert r"\textless{}x\textgreater{}\&\_\%\textbar{}" in latex


def test_a_run_that_has_only_begun_is_shown(tmp_path: Path) -> None:
    write(tmp_path / "a", [])
    make_report(tmp_path)
    assert "no figure yet" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "rows",
    [
        [row("scc:semantic=false", "pgd10", 300)],
        [row("scc", "bpda", 300)],
        [row("scc", "worst", 300, of=["bpda"])],
        [row("scc", "pgd10", 300, traits={}), row("none", "pgd10", 30, traits={})],
        [row("scc:gate=false", "pgd10", 300), row('scc{"gate": false}', "pgd10", 310)],
        [row("scc", "pgd10", 300, clean_right={}, clean_wrong={})],
        [row("scc", "pgd10:restarts=5", 300, title="PGD-10"), row("scc", "pgd10", 320)],
    ],
)
def test_what_was_not_measured_is_no_obstacle(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    write(tmp_path, rows)
    make_report(tmp_path)
    text = (tmp_path / "report" / "report.md").read_text()
    shown = [f"{one['hits'] / 10:.1f} [" for one in rows]
    assert [figure for figure in shown if figure not in text] == []


# ---------------------------------------------------------------------------------------- warnings


def warnings(folder: Path) -> str:
    make_report(folder)
    text = (folder / "report" / "report.md").read_text()
    head = text.split("## ", 2)[1] if "Read this first" in text else ""
    return head.replace("\\", "")


def test_nothing_to_warn_of(tmp_path: Path) -> None:
    rows = [row("none"), row("scc"), row("scc", "pgd10", 500), row("scc", "worst", 100, of=["b"])]
    write(tmp_path, rows)
    assert warnings(tmp_path) == ""


@pytest.mark.parametrize(
    ("rows", "more", "said"),
    [
        ([row("scc", hits=80, n=100)], {}, "fewer than 500 images (n = 100)"),
        (
            [row("none", "pgd10", 5), row("scc", "pgd10", 5), row("ttc", "pgd10", 5)],
            {},
            "at 1/255: no attack that knows the defense was made on ttc, scc.",
        ),
        (
            [row("scc", hits=500), row("scc", "pgd10", 600)],
            {},
            "60.0 % under PGD-10 at 1/255, but 50.0 %",
        ),
        ([row("scc", hits=500, n=900)], {}, "(900 of 1000)"),
        ([row("scc")], {"pictures": 9999}, "9999 pictures here, 10000 in the protocol"),
        ([row("scc")], {"duplicate_prompts": [[1, 4]]}, "name two classes or more: 1;"),
    ],
)
def test_warnings(
    tmp_path: Path, rows: list[dict[str, Any]], more: dict[str, Any], said: str
) -> None:
    write(tmp_path, rows, data=more)
    assert said in warnings(tmp_path)


def test_protocols_are_never_mixed(tmp_path: Path) -> None:
    write(tmp_path / "a", [row("scc", "pgd10", 500)])
    write(tmp_path / "b", [row("scc", "pgd10", 700)], data={"protocol": "open_clip"})
    assert "Protocols are mixed (ttc, open_clip)" in warnings(tmp_path)
    tables = of_kind(tmp_path, "table-1")
    assert [texts(t)["ViT-B-32", "SCC"]["Average Rob."][:4] for t in tables] == ["50.0", "70.0"]


# ----------------------------------------------------------------------------------------- figures


def test_the_front_is_what_nothing_cheaper_beats() -> None:
    assert front([(1, 5), (4, 5), (4, 9), (6, 8), (7, 30), (7, 20)]) == [(1, 5), (4, 9), (7, 30)]
