"""Rows and their intervals, the terminal table, JSON and the comparison figure."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from PIL import Image

from report_rows import row as result
from report_rows import write
from scc_fast._files import write_json
from scc_fast.evaluate.pictures import comparison_figure
from scc_fast.evaluate.report import make_report
from scc_fast.evaluate.results import (
    AttackFailed,
    Row,
    cell,
    check_attack,
    format_rows,
    read,
    row_of,
    tables,
    wilson,
    worst_of,
)
from toys import defender_of


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [  # R: prop.test(correct = FALSE), and Wilson's formula by hand
        (95, 100, 0.8882, 0.9785),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (1, 2, 0.0945, 0.9055),
        (500, 1000, 0.4691, 0.5309),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson(hits: int, n: int, low: float, high: float) -> None:
    assert wilson(hits, n) == pytest.approx((low, high), abs=1e-4)


def test_the_interval_holds_the_accuracy() -> None:
    for n in range(1, 101):
        for hits in range(n + 1):
            low, high = wilson(hits, n)
            assert 0 <= low <= hits / n <= high <= 1, (hits, n)


def row(defense: str, title: str, eps: str, right: str, clean: str | None = None) -> Row:
    return row_of(
        right,
        "1" * len(right) if clean is None else clean,
        defense=defense,
        method=defense,
        attack="clean" if title == "clean" else title.lower().replace("-", ""),
        title=title,
        aware=False,
        eps=eps,
        seed=0,
    )


ROWS = [
    row("none", "clean", "0/255", "1" * 95 + "0" * 5),
    row("none", "PGD-10", "1/255", "1" * 25 + "0" * 75),
    row("none", "worst per image", "4/255", "0" * 16),
    row("scc", "clean", "0/255", "1" * 90 + "0" * 10),
]


def test_rows() -> None:
    """Hits among the images that the undefended model gets right, and among the others."""
    found = row_of(
        "110100", "110011", "111000",
        defense="scc", method="scc", attack="pgd10", title="PGD-10", aware=False, eps="1/255",
        seed=0,
    )  # fmt: skip
    assert (found.n, found.hits, found.accuracy) == (6, 3, 0.5)
    assert (found.ci_low, found.ci_high) == wilson(3, 6)
    assert found.clean_right == {"n": 4, "hits": 2}
    assert found.clean_wrong == {"n": 2, "hits": 1}
    assert found.flagged == 0.5
    assert ROWS[0].flagged is None
    assert worst_of(["1101", "1011", "111"]) == "100"
    assert [("of" in one) for one in format_rows([found, ROWS[0]])] == [False, False]


@pytest.mark.parametrize(
    ("kept", "right", "fails"),
    [(10, 10, True), (91, 100, True), (90, 100, False), (0, 0, False)],
)
def test_an_attack_must_cost_a_tenth_of_what_was_right(kept: int, right: int, fails: bool) -> None:
    after, before = ("1" * count + "0" * (200 - count) for count in (kept, right))
    found = row("none", "PGD-10", "1/255", after, before)
    if not fails:
        check_attack(found)
        return
    with pytest.raises(AttackFailed, match=f"keeps {kept} of the {right}"):
        check_attack(found)


def test_the_terminal_table() -> None:
    assert cell(ROWS[0]) == "95.0 [88.8, 97.8]"
    assert cell(None) == "–"
    (drawn,) = tables(
        ROWS, "a title", [{"defense": "none", "attack": "clean", "ms_per_image": 2.04}]
    )
    heads = [str(column.header).split("\n") for column in drawn.columns]
    assert heads == [
        ["defense"], ["clean", "n=100"], ["PGD-10", "1/255", "n=100"],
        ["worst", "per", "image", "4/255", "n=16"], ["ms/", "image"],
    ]  # fmt: skip
    cells = [list(column.cells) for column in drawn.columns]
    assert cells[0] == ["none", "scc"]
    assert cells[1] == ["95.0\n89–98", "90.0\n83–94"]
    assert cells[2] == ["25.0\n18–34", "–"]
    assert cells[-1] == ["2.0", "–"]
    assert [len(one.columns) for one in tables(ROWS, "a title")] == [4]


def test_attacks_of_one_title_have_columns_of_their_own() -> None:
    strong = row("none", "PGD-10", "1/255", "1" * 5 + "0" * 15)
    strong = dataclasses.replace(strong, attack="pgd10:restarts=5")
    (drawn,) = tables([*ROWS[:2], strong, ROWS[2]], "a title")
    heads = [str(column.header).split("\n") for column in drawn.columns]
    assert heads[2:4] == [
        ["PGD-10", "(pgd10)", "1/255", "n=100"],
        ["PGD-10", "(pgd10:", "restarts=5)", "1/255", "n=20"],
    ]
    # Wilson by hand for 5 of 20: (0.25 + 0.0960 ± 0.2146) / 1.1921 = 0.112 to 0.469.
    cells = [list(column.cells) for column in drawn.columns[2:4]]
    assert cells == [["25.0\n18–34"], ["25.0\n11–47"]]


def test_json_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder" / "rows.json"
    write_json(path, {"rows": ROWS})
    old = path.read_bytes()
    assert json.loads(old)["rows"][0] == dataclasses.asdict(ROWS[0])
    with pytest.raises(TypeError, match="cannot write Tensor"):
        write_json(path, {"rows": torch.zeros(2)})
    write_text = Path.write_text

    def full_disk(self: Path, text: str, *args: Any) -> int:
        write_text(self, text[: len(text) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"rows": ROWS[:1]})
    monkeypatch.undo()
    assert path.read_bytes() == old
    assert list(path.parent.iterdir()) == [path]
    write_json(path, {"rows": []})
    assert json.loads(path.read_text()) == {"rows": []}


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
@pytest.mark.parametrize("attacked", [True, False])
def test_comparison_figure(tmp_path: Path, suffix: str, attacked: bool) -> None:
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    names = ["a cat", "$5 or $^ more", "{a} bee", "Žluť_1", "a % b"]
    bare = defender_of("open_clip", method="none")(x)
    after = defender_of("open_clip")(x, 0)
    seen = (x + 0.01).clamp(0, 1) if attacked else None
    path = tmp_path / "new" / f"figure{suffix}"
    backend = matplotlib.get_backend()
    matplotlib.use("svg")
    try:
        comparison_figure(path, x, seen, bare, after, names, [0, 1], bare if attacked else None)
        assert matplotlib.get_backend().lower() == "svg"  # a notebook keeps its own
    finally:
        matplotlib.use(backend)
    data = path.read_bytes()
    assert list(path.parent.iterdir()) == [path]
    if suffix == ".png":
        with Image.open(path) as picture:
            picture.load()
            assert picture.width > picture.height > 200
    elif suffix == ".pdf":
        assert data.startswith(b"%PDF-")
        assert data.rstrip().endswith(b"%%EOF")
    else:
        assert b"<svg" in data
        assert data.rstrip().endswith(b"</svg>")


# ------------------------------------------------------------------- what a report says of its own


def report_of(folder: Path) -> str:
    make_report(folder)
    return (folder / "report" / "report.md").read_text().replace("\\", "")


def test_what_the_worst_is_of_stands_below_a_table_once(tmp_path: Path) -> None:
    of = ["clean", "pgd10", "bpda"]
    rows = [result(name, "worst", 100, of=of) for name in ("ttc", "scc")]
    write(tmp_path, [*rows, result("ttc", "pgd10", 300), result("scc", "pgd10", 600)])
    text = report_of(tmp_path)
    assert "\nAdapt. of CIFAR-10: the worst of pgd10 + bpda.\n" in text
    assert "\nAdapt.: the worst of pgd10 + bpda.\n" in text
    assert "\nworst adaptive at 1/255: the worst of pgd10 + bpda.\n" in text
    assert "\nworst per image at 1/255: the worst of pgd10 + bpda.\n" in text
    assert "(worst of" not in text
    assert "same attacks everywhere" not in text
    assert "other numbers of images" not in text


def test_a_worst_over_other_attacks_or_images_is_said(tmp_path: Path) -> None:
    rows = [
        result("ttc", "pgd10", 300),
        result("ttc", "worst", 100, of=["clean", "pgd10", "bpda"]),
        result("scc", "pgd10", 600),
        result("scc", "worst", 60, n=500, of=["clean", "pgd10", "bpda", "gate"]),
        result("anti", "pgd10", 500),
        result("anti", "bpda", 90),
    ]
    write(tmp_path, rows)
    text = report_of(tmp_path)
    head, body = text.split("## ", 2)[1:]
    said = "ttc: pgd10 + bpda; scc: pgd10 + bpda + gate; anti: bpda alone"
    assert sorted(said.split("; ")) == sorted(
        head.split("same attacks everywhere (")[1].split(").")[0].split("; ")
    )
    assert "worst per image at 1/255 rests on other numbers of images" in head
    assert "ttc: n=1000" in head
    assert "scc: n=500" in head
    assert "10.0 [8.0, 13.0] (n=1000, worst of pgd10 + bpda)" in body
    assert "12.0 [10.0, 15.0] (n=500, worst of pgd10 + bpda + gate)" in body
    assert "9.0 [7.0, 12.0] (n=1000, bpda alone)" in body
    assert ": the worst of" not in body


def test_seeds_over_other_attacks_are_told_apart(tmp_path: Path) -> None:
    for seed, of in enumerate((["bpda", "gate"], ["bpda"])):
        rows = [result("scc", "pgd10", 600), result("scc", "worst", 100, of=of)]
        write(tmp_path / str(seed), rows, seed=seed)
    text = report_of(tmp_path)
    assert "everywhere (scc: bpda + gate / bpda)" in text


def test_an_average_counts_a_data_set_once(tmp_path: Path) -> None:
    """CIFAR-10 full and sampled beside STL-10: (60 + 70)/2, and not (60 + 20 + 70)/3."""
    full = [result("scc", "pgd10", 6000, n=10000), result("scc", hits=8000, n=10000)]
    some = [result("scc", "pgd10", 200), result("scc", hits=500), result("ttc", "pgd10", 300)]
    stl = {"name": "stl10", "paper": "STL-10", "pictures": 8000, "pictures_expected": 8000}
    write(tmp_path / "sampled", some)
    write(tmp_path / "full", full, data={"n": 10000})
    write(tmp_path / "stl", [result("scc", "pgd10", 700), result("scc", hits=900)], data=stl)
    text = report_of(tmp_path)
    table_1 = text.split("### Table 1 (PGD-10")[1].split("\n### ")[0].splitlines()
    (ours,) = [line for line in table_1 if line.startswith("| ViT-B-32 | SCC |")]
    # Clean: (80 + 90)/2. Intervals of ±2 and ±3 are √8/2 and √18/2 wide.
    assert ours.endswith("| 65.0 [63.6, 67.1] (2 sets) | 85.0 [83.6, 87.1] (2 sets) |")
    # The sampled run alone has TTC: it counts there.
    (other,) = [line for line in table_1 if line.startswith("| ViT-B-32 | TTC |")]
    assert other.endswith("| 30.0 [28.0, 33.0] (1 set) |  |")
    line = next(line for line in text.splitlines() if "in no average for" in line)
    left, kept = line.split(": in no average for scc; ")
    assert left.startswith("- CIFAR-10 (sample 0), ViT-B-32")
    assert kept.startswith("CIFAR-10")
    assert "sample 0" not in kept
    assert text.count("in no average for") == 1


def test_one_environment_or_several(tmp_path: Path) -> None:
    path = write(tmp_path, [result("scc", "pgd10", 600)])
    content = json.loads(path.read_text())
    first = content["environment"]
    second = {**first, "device": "NVIDIA H200"}
    assert read(tmp_path).environments[0] == (first,)
    path.write_text(json.dumps({**content, "environments": [first, second, first]}))
    assert read(tmp_path).environments[0] == (first, second)
    text = report_of(tmp_path)
    assert "device cpu; scc_fast 0.1.0, torch 2.15.0, device NVIDIA H200" in text
    path.write_text(json.dumps({**content, "environment": None, "environments": [second]}))
    assert read(tmp_path).environments[0] == (second,)
    path.write_text(json.dumps({**content, "environments": [first, "cpu"]}))
    with pytest.raises(ValueError, match=r"results\.json: environments\[1\] must be an object"):
        read(tmp_path)
