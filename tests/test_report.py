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

from report_rows import HOSTILE, row, write
from scc_fast.evaluate import paper
from scc_fast.evaluate.cells import Cell, average, pooled, printed
from scc_fast.evaluate.collect import Measure, read
from scc_fast.evaluate.data import CATALOGUE
from scc_fast.evaluate.groups import groups, paper_attack, titles
from scc_fast.evaluate.tables import (
    Line,
    Table,
    csv_text,
    escape_latex,
    escape_markdown,
    latex,
    markdown,
)


def measures(tmp_path: Path, *shares: tuple[int, int]) -> list[Measure]:
    """One measure a seed, of (hits, n)."""
    for seed, (hits, n) in enumerate(shares):
        write(tmp_path / str(seed), [row("scc", hits=hits, n=n)], seed=seed)
    return [run.measures[0] for run in read(tmp_path)]


# ------------------------------------------------------------------------------------- reading


def test_reads_what_the_runner_writes(tmp_path: Path) -> None:
    path = write(tmp_path / "a", [row("none"), row("scc", "pgd10", 412)], seed=3)
    times = [{"defense": "scc", "attack": "pgd10", "eps": "1/255", "ms_per_image": 12.5}]
    path.with_name("timings.json").write_text(json.dumps({"rows": times}))
    (run,) = read(tmp_path)
    clean, robust = run.measures
    assert (run.model.name, run.model.size, run.data.title, run.seed) == (
        "ViT-B-32",
        "224x224",
        "CIFAR-10",
        3,
    )
    assert (clean.attack, clean.accuracy, clean.ms) == ("clean", 0.8, None)
    assert (robust.hits, robust.eps, robust.ms) == (412, "1/255", 12.5)
    assert robust.right is not None
    assert (robust.right.n, robust.right.hits) == (800, 206)
    assert paper_attack(robust) == "pgd10"


def test_budgets_are_one_however_they_are_written(tmp_path: Path) -> None:
    rows = [row("scc", "pgd10", eps=0.01568627450980392), row("scc", eps=None)]
    write(tmp_path, rows)
    assert [one.eps for one in read(tmp_path)[0].measures] == ["4/255", "0/255"]


def test_a_row_of_no_image_is_left_out(tmp_path: Path) -> None:
    empty = {**row("scc"), "n": 0, "hits": 0, "accuracy": 0.0, "ci_low": 0.0, "ci_high": 1.0}
    write(tmp_path, [empty, row("ttc")])
    assert [one.defense for one in read(tmp_path)[0].measures] == ["ttc"]


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
    found = groups(read(tmp_path))
    assert sorted(len(group.runs) for group in found) == [1, 1, 1, 2]
    named = set(titles([group.model for group in found]).values())
    assert named == {"ViT-B-32 (precision fp32)", "ViT-B-32 (precision bf16)"}


def test_more_images_win_and_contradictions_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", [row("scc", hits=80, n=100), row("ttc", hits=70, n=100)])
    write(tmp_path / "b", [row("scc", hits=700, n=1000)])
    (group,) = groups(read(tmp_path))
    assert [one.n for one in group.clean("scc")] == [1000]
    assert [one.n for one in group.clean("ttc")] == [100]
    assert "1 rows of" in group.left_out[0]
    write(tmp_path / "c", [row("scc", hits=701, n=1000)])
    with pytest.raises(ValueError, match=r"c/results.json and .*b/results.json contradict"):
        groups(read(tmp_path))


def test_the_worst_row_is_preferred_and_else_the_worst_attack(tmp_path: Path) -> None:
    rows = [row("scc", "bpda", 200), row("scc", "gate", 150, aware=True), row("scc", "pgd10", 5)]
    write(tmp_path, rows)
    (group,) = groups(read(tmp_path))
    assert [one.attack for one in group.worst("scc", "1/255")] == ["gate"]
    assert group.worst("scc", "4/255") == ()
    write(tmp_path, [*rows, row("scc", "worst", 120, of=["bpda", "gate"])])
    (group,) = groups(read(tmp_path))
    assert [one.hits for one in group.worst("scc", "1/255")] == [120]


# ---------------------------------------------------------------------------------------- cells


def test_one_seed_has_its_interval_and_several_have_a_spread(tmp_path: Path) -> None:
    one = pooled(measures(tmp_path / "one", (412, 1000)))
    assert one.text() == "41.2 [39.2, 44.2] (n=1000)"
    # Mean of 80, 84 and 88; deviations -4, 0, 4: sqrt(32 / 2) = 4.
    three = pooled(measures(tmp_path / "three", (80, 100), (84, 100), (88, 100)))
    assert three.text() == "84.0 ± 4.0 (3 seeds, n=100)"
    uneven = pooled(measures(tmp_path / "uneven", (80, 100), (42, 50)))
    assert uneven.counted() == "50–100"


def test_average_over_sets(tmp_path: Path) -> None:
    # 50 [48, 53] and 70 [68, 73]: 60 - sqrt(4 + 4)/2 and 60 + sqrt(9 + 9)/2.
    sets = [measures(tmp_path / "a", (500, 1000)), measures(tmp_path / "b", (700, 1000))]
    cell = average([*sets, []])
    assert cell.sets == 2
    assert (cell.value, cell.low, cell.high) == pytest.approx((60.0, 58.585786, 62.121320))
    # Seeds: (50 + 70)/2 = 60 and (54 + 78)/2 = 66; their deviation is 6/sqrt(2).
    sets = [
        measures(tmp_path / "c", (500, 1000), (540, 1000)),
        measures(tmp_path / "d", (700, 1000), (780, 1000)),
    ]
    cell = average(sets)
    assert (cell.value, cell.spread, cell.seeds) == pytest.approx((63.0, 4.242641, 2))
    mixed = average([sets[0], measures(tmp_path / "e", (700, 1000))])
    assert mixed.text() == "61.0 (2 sets, seeds differ)"
    others = [dataclasses.replace(one, seed=one.seed + 5) for one in sets[1]]  # as many
    assert average([sets[0], others]).text() == "63.0 (2 sets, seeds differ)"
    assert average([[], []]) == Cell()


def test_published_cells_have_no_value() -> None:
    figure = paper.SIXTEEN["pgd10", "1/255"]["scc"]["average"]
    cell = printed(figure)
    assert (cell.text(), cell.measured) == ("51.68† (16 sets)", False)
    assert printed(paper.SIXTEEN["pgd10", "1/255"]["hd"]["pcam"], clean=True) == Cell()


def test_published_figures_are_numbers_of_known_sets() -> None:
    lines = [by_set for figures in paper.SIXTEEN.values() for by_set in figures.values()]
    lines += [s for six in paper.SIX.values() for figs in six.values() for s in figs.values()]
    lines += list(paper.SWITCHES.values())
    assert sum(len(line) for line in lines) > 70
    for line in lines:
        for name, figure in line.items():
            assert name == paper.AVERAGE or paper.known_set(name) == name
            values = [float(text) for text in (figure.robust, figure.clean) if text]
            assert values
            assert all(0 <= value <= 100 for value in values)
            assert figure.source
    # From the fact cards, typed a second time.
    table = paper.SIXTEEN["pgd10", "1/255"]
    assert (table["doc"]["pets"].robust, table["doc"]["pets"].clean) == ("67.18", "81.36")
    assert table["r_tpt"]["dtd"].robust == "32.8"
    biomed = paper.SIX["pgd10", "1/255"][paper.BIOMEDCLIP_MODEL]["scc"]["average"]
    assert (biomed.robust, biomed.clean, biomed.sets) == ("34.00", "44.63", 6)
    assert paper.SWITCHES[False, True]["sun397"].robust == "48.0"


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


def table(name: str = "SCC") -> Table:
    """Two measured lines and a published one."""
    ours = Cell(94.12, 92.5, 95.44, n=(1000,)), Cell(12.5)
    other = Cell(50.0, 49.0, 51.0, n=(100, 1000)), Cell()
    theirs = Cell(printed="59.18"), Cell()
    lines = (
        Line((name,), ours),
        Line(("TTC",), other),
        Line(("SCC",), theirs, published=True),
    )
    return Table("t", f"A {name}", ("m",), (("CIFAR", "Rob."), ("", "ms")), lines, ("A note.",))


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
    same = table()
    same = Table(same.kind, same.title, same.keys, same.columns, (same.lines[0], same.lines[2]))
    assert same.names() == ["Rob. (n=1000)", "ms"]
    assert same.body()[0] == ["SCC", "94.1 [92.5, 95.4]", "12.5"]


def test_csv_says_of_every_number_whose_it_is() -> None:
    rows = list(csv.DictReader(io.StringIO(csv_text([table('a,"b"')]))))
    assert [one["kind"] for one in rows] == ["measured", "measured", "measured", "published"]
    assert rows[0]["m"] == 'a,"b"'
    assert (rows[0]["value"], rows[0]["ci_low"], rows[0]["n"]) == ("94.12", "92.5", "1000")
    assert (rows[0]["group"], rows[0]["column"], rows[3]["value"]) == ("CIFAR", "Rob.", "59.18")
    assert rows[3]["n"] == rows[3]["ci_low"] == ""


def test_latex_is_exact() -> None:
    lines = latex(table()).splitlines()
    assert lines[1:8] == [
        "\\begin{table}",
        "\\caption{A SCC}",
        "\\begin{tabular}{lrr}",
        "\\toprule",
        " & \\multicolumn{1}{c}{CIFAR} & \\multicolumn{1}{c}{} \\\\",
        "\\cmidrule(lr){2-2}",
        "m & Rob. & ms \\\\",
    ]
    assert lines[9] == "SCC & 94.1 [92.5, 95.4] (n=1000) & 12.5 \\\\"
    assert (
        lines[11]
        == "SCC \\textsuperscript{\\dag} published & 59.18\\textsuperscript{\\dag} &  \\\\"
    )


def test_hostile_names_stay_text() -> None:
    assert escape_markdown("<x>&_%|[a](b) *c*\n`d`") == (
        "&lt;x&gt;&amp;\\_%\\|[a\\](b) \\*c\\* \\`d\\`"
    )
    assert escape_latex("<x>&_%#$^~{}\\") == (
        r"\textless{}x\textgreater{}\&\_\%\#\$\textasciicircum{}\textasciitilde{}\{\}"
        r"\textbackslash{}"
    )
    for text in (markdown(table(HOSTILE)), latex(table(HOSTILE))):
        body = [line for line in text.splitlines() if "94.1" in line]
        assert len(body) == 1
    cells = markdown(table(HOSTILE)).replace("\\|", "").splitlines()
    assert {line.count("|") for line in cells if line.startswith("|")} == {4}
    assert latex(table("[x]")).count("{}[x] & 94.1") == 1
