"""Results read back, put together and set as tables; figures are worked out by hand."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pandas import DataFrame

from report_rows import HOSTILE, row, write
from scc_fast.evaluate.data import CATALOGUE
from scc_fast.evaluate.report import paper
from scc_fast.evaluate.report.page import (
    csv_text,
    escape_latex,
    escape_markdown,
    latex,
    markdown,
)
from scc_fast.evaluate.report.pool import (
    average,
    clean,
    figure,
    measured,
    shares,
    text,
    titles,
    worst,
)
from scc_fast.evaluate.report.tables import Table
from scc_fast.evaluate.results import MODEL, Row, read

STORED = Path(__file__).parents[1] / "benchmarks" / "results" / "cpu" / "evaluation"


def pooled(tmp_path: Path, *counts: tuple[int, int]) -> Any:
    """The line of one defense's figures over as many seeds, of (hits, n) each."""
    for seed, (hits, n) in enumerate(counts):
        write(tmp_path / str(seed), [row("scc", hits=hits, n=n)], seed=seed)
    (line,) = measured(read(tmp_path)).figures.to_dict("records")
    return line


# ------------------------------------------------------------------------------------- reading


def test_reads_what_the_runner_writes(tmp_path: Path) -> None:
    path = write(tmp_path / "a", [row("none"), row("scc", "pgd10", 412)], seed=3)
    times = [{"defense": "scc", "attack": "pgd10", "eps": "1/255", "ms_per_image": 12.5}]
    path.with_name("timings.json").write_text(json.dumps({"rows": times}))
    found = read(tmp_path)
    one = found.iloc[0]
    assert (one.model, one["size"], one.paper, one.seed) == ("ViT-B-32", "224x224", "CIFAR-10", 3)
    assert list(found.attack) == ["clean", "pgd10"]
    assert list(found.accuracy) == [0.8, 0.412]
    assert list(found.ms_per_image) == [None, 12.5]
    assert (found.hits[1], found.eps[1]) == (412, "1/255")
    assert found.clean_right[1] == {"n": 800, "hits": 206}
    assert list(measured(found).figures.papers) == ["", "pgd10"]


def test_a_folder_of_an_older_version_is_read() -> None:
    """Stored results of November: their rows, times and environments, as they were measured."""
    found = read(STORED)
    assert found.groupby("file", sort=False).size().tolist() == [67, 167, 13, 43, 52]
    assert set(found.columns) >= {field.name for field in dataclasses.fields(Row)}
    one = found[(found.n == 1000) & (found.defense == "scc") & (found.attack == "pgd10")]
    assert list(one.eps) == ["1/255", "2/255", "4/255"]
    stored = json.loads((STORED / one.file.iloc[0].parent.name / "results.json").read_text())
    for line in one.itertuples():
        (same,) = (
            r
            for r in stored["rows"]
            if (r["defense"], r["attack"], r["eps"]) == ("scc", "pgd10", line.eps)
        )
        assert {name: getattr(line, name) for name in same} == same
    assert (one.ms_per_image > 0).all()
    assert one.environments.iloc[0][0]["scc_fast"] == "0.1.0"


@pytest.mark.parametrize(
    ("attack", "settings", "name"),
    [
        ("aa", {}, "aa"),
        ("aa", {"steps": 20}, ""),
        ("aa", {"complete": True}, ""),
        ("autoattack", {}, ""),
        ("pgd", {"steps": 10}, "pgd10"),
        ("pgd", {"steps": 10, "restarts": 2}, ""),
        ("pgd", {"steps": 10, "alpha": "2/255"}, ""),
        ("cw", {"steps": 10}, "cw"),
    ],
)
def test_the_papers_attacks(tmp_path: Path, attack: str, settings: Any, name: str) -> None:
    usual = {"attack": attack, "steps": 100, "complete": False, **settings}
    write(tmp_path, [row("scc", attack, 50, attack_settings=usual)])
    assert list(measured(read(tmp_path)).figures.papers) == [name]


def test_budgets_are_one_however_they_are_written(tmp_path: Path) -> None:
    rows = [row("scc", "pgd10", eps=0.01568627450980392), row("scc", eps=None)]
    write(tmp_path, rows)
    assert list(read(tmp_path).eps) == ["4/255", "0/255"]


def test_a_row_of_no_image_is_left_out(tmp_path: Path) -> None:
    empty = {**row("scc"), "n": 0, "hits": 0, "accuracy": 0.0, "ci_low": 0.0, "ci_high": 1.0}
    write(tmp_path, [empty, row("ttc")])
    assert list(read(tmp_path).defense) == ["ttc"]


def _cut(path: Path) -> None:
    path.write_text(path.read_text()[:200])


def _changed(**fields: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_cut, "cut short"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "cut short"),
        (lambda path: path.write_text("[1]"), "must be an object"),
        (lambda path: path.write_text('{"accuracy": 0.5}'), "format must be 1"),
        (_changed(format=2), "format must be 1, got 2"),
        (_changed(run={"seed": 0}), "has no 'model'"),
        (_changed(rows={}), "'rows' must be list"),
        (_changed(rows=[7]), r"rows\[0\] must be an object, got 7"),
        (_changed(rows=[{**row("scc"), "n": "1000"}]), "'n' must be int, got '1000'"),
        (_changed(rows=[{**row("scc"), "n": True}]), "'n' must be int, got True"),
        (_changed(rows=[{**row("scc"), "hits": 1001}]), "1001 of 1000"),
        (_changed(rows=[{**row("scc"), "accuracy": 0.9}]), "hits/n = 0.8, got 0.9"),
        (_changed(rows=[{**row("scc"), "ci_low": math.nan}]), "'ci_low' must be float"),
        (_changed(rows=[{**row("scc"), "ci_low": 0.85}]), "must hold the accuracy"),
        (_changed(rows=[{**row("scc", "pgd10"), "eps": "255"}]), "eps must be a budget"),
        (_changed(rows=[row("scc"), row("scc")]), "two rows for scc under clean"),
        (
            lambda path: path.with_name("timings.json").write_text('{"rows": ['),
            r"timings\.json: cannot be read",
        ),
    ],
)
def test_bad_files_are_named(tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    path = write(tmp_path / "run", [row("scc")])
    spoil(path)
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path)
    assert str(path.parent) in str(caught.value)


def test_folders_without_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no results\.json"):
        read(tmp_path)
    with pytest.raises(ValueError, match="not a folder"):
        read(tmp_path / "absent")


# ------------------------------------------------------------------------------------- grouping


def test_only_seeds_are_put_together(tmp_path: Path) -> None:
    write(tmp_path / "a", [row("scc")], seed=0)
    write(tmp_path / "b", [row("scc")], seed=1)
    write(tmp_path / "c", [row("scc")], data={"protocol": "open_clip"})
    write(tmp_path / "d", [row("scc")], model={"precision": "bf16"})
    write(tmp_path / "e", [row("scc")], data={"split": "train"})
    found = measured(read(tmp_path))
    assert sorted(found.runs.groupby("group").size()) == [1, 1, 1, 2]
    assert len(found.figures) == 4
    named = set(titles(found.runs, MODEL))
    assert named == {"ViT-B-32 (precision fp32)", "ViT-B-32 (precision bf16)"}


def test_more_images_win_and_contradictions_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", [row("scc", hits=80, n=100), row("ttc", hits=70, n=100)])
    write(tmp_path / "b", [row("scc", hits=700, n=1000)])
    found = measured(read(tmp_path))
    kept = clean(found.figures).set_index("defense")
    assert (kept.n["scc"], kept.n["ttc"]) == ("1000", "100")
    assert "1 rows of" in found.left_out[0][0]
    write(tmp_path / "c", [row("scc", hits=701, n=1000)])
    with pytest.raises(ValueError, match=r"c/results.json and .*b/results.json contradict"):
        measured(read(tmp_path))


def test_the_worst_row_is_preferred_and_else_the_worst_attack(tmp_path: Path) -> None:
    rows = [row("scc", "bpda", 200), row("scc", "gate", 150, aware=True), row("scc", "pgd10", 5)]
    write(tmp_path, rows)
    found = worst(measured(read(tmp_path)).figures)
    assert [(one.attack, one.eps, one.over) for one in found.itertuples()] == [
        ("gate", "1/255", "gate alone")
    ]
    write(tmp_path, [*rows, row("scc", "worst", 120, of=["bpda", "gate"])])
    (one,) = worst(measured(read(tmp_path)).figures).itertuples()
    assert (one.value, one.over) == (12.0, "bpda + gate")


# -------------------------------------------------------------------------------------- figures


def test_one_seed_has_its_interval_and_several_have_a_spread(tmp_path: Path) -> None:
    one = pooled(tmp_path / "one", (412, 1000))
    assert text(one) == "41.2 [39.2, 44.2] (n=1000)"
    # Mean of 80, 84 and 88; deviations -4, 0, 4: sqrt(32 / 2) = 4.
    three = pooled(tmp_path / "three", (80, 100), (84, 100), (88, 100))
    assert text(three) == "84.0 ± 4.0 (3 seeds, n=100)"
    assert pooled(tmp_path / "uneven", (80, 100), (42, 50))["n"] == "50–100"
    # Wilson by hand for 5 of 20, as in test_evaluate.
    assert text(shares([(5, 20)])) == "25.0 [11.2, 46.9] (n=20)"
    assert shares([]) == shares([(1, 2), (0, 0)]) == {}


def test_average_over_sets(tmp_path: Path) -> None:
    def seeds(name: str, *counts: tuple[int, int]) -> Any:
        return pooled(tmp_path / name, *counts)["by_seed"]

    # 50 [48, 53] and 70 [68, 73]: 60 - sqrt(4 + 4)/2 and 60 + sqrt(9 + 9)/2.
    one = average([seeds("a", (500, 1000)), seeds("b", (700, 1000))])
    assert one["sets"] == 2
    ends = one["value"], one["ci_low"], one["ci_high"]
    assert ends == pytest.approx((60.0, 58.585786, 62.121320))
    # Seeds: (50 + 70)/2 = 60 and (54 + 78)/2 = 66; their deviation is 6/sqrt(2).
    sets = [seeds("c", (500, 1000), (540, 1000)), seeds("d", (700, 1000), (780, 1000))]
    two = average(sets)
    assert (two["value"], two["std"], two["seeds"]) == pytest.approx((63.0, 4.242641, 2))
    mixed = average([sets[0], seeds("e", (700, 1000))])
    assert text(mixed) == "61.0 (2 sets, seeds differ)"
    others = [(seed + 5, *rest) for seed, *rest in sets[1]]  # as many
    assert text(average([sets[0], others])) == "63.0 (2 sets, seeds differ)"
    assert average([]) == {}


def published(source: str, dataset: str, **facts: Any) -> paper.Published:
    """The one published figure of a data set in a table."""
    wanted = {"source": source, "dataset": dataset, **facts}
    (one,) = (p for p in paper.FIGURES if all(getattr(p, k) == v for k, v in wanted.items()))
    return one


def test_published_figures_have_their_digits() -> None:
    one = published("table-1", "average", method="scc")
    assert text(figure(one.robust, sets=one.sets)) == "51.68† (16 sets)"
    assert published("table-1", "pcam", method="hd").clean == ""


def test_published_figures_are_numbers_of_known_sets() -> None:
    assert len(paper.FIGURES) > 70
    for one in paper.FIGURES:
        assert one.dataset == paper.AVERAGE or paper.known_set(one.dataset) == one.dataset
        assert one.method in paper.METHODS
        assert paper.SOURCES[one.source]
        values = [float(value) for value in (one.robust, one.clean) if value]
        assert values
        assert all(0 <= value <= 100 for value in values)
    # From the fact cards, typed a second time.
    doc = published("table-1", "pets", method="doc")
    assert (doc.robust, doc.clean) == ("67.18", "81.36")
    r_tpt = published("table-4", "dtd", method="r_tpt")
    assert (r_tpt.robust, r_tpt.ms) == ("32.8", "370")
    biomed = published("table-3", "average", method="scc", model=paper.BIOMEDCLIP_MODEL)
    assert (biomed.robust, biomed.clean, biomed.sets) == ("34.00", "44.63", 6)
    assert published("ablation", "sun397", semantic=False, spatial=True).robust == "48.0"


def test_every_set_of_the_papers_has_its_published_column() -> None:
    for group, sets in (("natural", paper.SETS), ("medical", paper.MEDICAL)):
        names = [entry.name for entry in CATALOGUE.values() if entry.group == group]
        assert list(sets) == names == [paper.known_set(name) for name in names]
    assert paper.known_set("emoji") is None


@pytest.mark.parametrize(
    ("name", "source", "encoder"),
    [
        ("ViT-B-32", "open_clip, openai", "clip"),
        ("ViT-B-32", "laion2b_s34b_b79k", ""),
        ("ViT-B-32+best.pth.tar", "best.pth.tar over openai", ""),
        ("hf-hub:chs20/FARE4-ViT-B-32-laion2B", "", "fare"),
        ("ViT-B-32@openai+TeCoA.pth.tar", "", "tecoa"),
        ("hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224", "", "biomedclip"),
        ("welfare-model", "openai", ""),
    ],
)
def test_encoders(name: str, source: str, encoder: str) -> None:
    assert paper.encoder_of(name, source) == encoder


# --------------------------------------------------------------------------------------- tables


def table(name: str = "SCC", lines: tuple[int, ...] = (0, 1, 2)) -> Table:
    """Two measured lines and a published one."""
    figures = [
        (0, name, "CIFAR", "Rob.", figure(94.12, ci_low=92.5, ci_high=95.44, n="1000")),
        (0, name, "", "ms", figure(12.5)),
        (1, "TTC", "CIFAR", "Rob.", figure(50.0, ci_low=49.0, ci_high=51.0, n="100–1000")),
        (2, "SCC", "CIFAR", "Rob.", figure("59.18")),
    ]
    cells = [
        {"line": line, "m": m, "published": line == 2, "heading": heading, "column": column, **one}
        for line, m, heading, column, one in figures
        if line in lines
    ]
    columns = (("CIFAR", "Rob."), ("", "ms"))
    frame = DataFrame(cells, dtype=object).astype({"published": bool})
    return Table("t", f"A {name}", ("m",), columns, frame, ("A note.",))


def test_markdown_is_exact() -> None:
    assert markdown(table()) == (
        "## A SCC\n\n"
        "| m | CIFAR Rob. | ms |\n"
        "| --- | --: | --: |\n"
        "| SCC | 94.1 [92.5, 95.4] (n=1000) | 12.5 |\n"
        "| TTC | 50.0 [49.0, 51.0] (n=100–1000) |  |\n"
        "| SCC † published | 59.18† |  |\n"
        "\nA note.\n"
    )


def test_a_common_n_stands_in_the_heading() -> None:
    same = table(lines=(0, 2))
    assert same.names() == ["Rob. (n=1000)", "ms"]
    assert same.wide().iloc[0].tolist() == ["SCC", "94.1 [92.5, 95.4]", "12.5"]


def test_csv_says_of_every_number_whose_it_is() -> None:
    rows = list(csv.DictReader(io.StringIO(csv_text([table('a,"b"')]))))
    assert [one["kind"] for one in rows] == ["measured", "measured", "measured", "published"]
    assert rows[0]["m"] == 'a,"b"'
    assert (rows[0]["value"], rows[0]["ci_low"], rows[0]["n"]) == ("94.12", "92.5", "1000")
    assert (rows[0]["group"], rows[0]["column"], rows[3]["value"]) == ("CIFAR", "Rob.", "59.18")
    assert rows[3]["n"] == rows[3]["ci_low"] == ""


def test_latex_is_exact() -> None:
    assert latex(table()).splitlines()[1:] == [
        "\\begin{table}",
        "\\caption{A SCC}",
        "\\begin{tabular}{lrr}",
        "\\toprule",
        " & CIFAR &  \\\\",
        "m & Rob. & ms \\\\",
        "\\midrule",
        "SCC & 94.1 [92.5, 95.4] (n=1000) & 12.5 \\\\",
        "TTC & 50.0 [49.0, 51.0] (n=100--1000) &  \\\\",
        "SCC \\textsuperscript{\\dag} published & 59.18\\textsuperscript{\\dag} &  \\\\",
        "\\bottomrule",
        "\\end{tabular}",
        "\\par\\smallskip\\footnotesize A note.",
        "\\end{table}",
    ]


def test_hostile_names_stay_text() -> None:
    assert escape_markdown("<x>&_%|[a](b) *c*\n`d`") == (
        "&lt;x&gt;&amp;\\_%\\|[a\\](b) \\*c\\* \\`d\\`"
    )
    assert escape_latex("<x>&_%#$^~{}\\") == (
        r"\textless{}x\textgreater{}\&\_\%\#\$\textasciicircum{}\textasciitilde{}\{\}"
        r"\textbackslash{}"
    )
    for content in (markdown(table(HOSTILE)), latex(table(HOSTILE))):
        body = [line for line in content.splitlines() if "94.1" in line]
        assert len(body) == 1
    cells = markdown(table(HOSTILE)).replace("\\|", "").splitlines()
    assert {line.count("|") for line in cells if line.startswith("|")} == {4}
    assert latex(table("[x]")).count("{}[x] & 94.1") == 1
