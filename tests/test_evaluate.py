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
from test_api import defender_of

from scc_fast.evaluate.report import cell, columns, comparison_figure, table, write_json
from scc_fast.evaluate.rows import Row, format_rows, row_of, wilson, worst_of


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


def row(defense: str, title: str, eps: str, right: str) -> Row:
    return row_of(
        right,
        "1" * len(right),
        defense=defense,
        method=defense,
        attack="clean" if title == "clean" else title.lower(),
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


def test_the_terminal_table() -> None:
    assert columns(ROWS) == [
        ("clean", "0/255"), ("PGD-10", "1/255"), ("worst per image", "4/255"),
    ]  # fmt: skip
    assert cell(ROWS[0]) == "95.0 [88.8, 97.8]"
    assert cell(None) == "–"
    drawn = table(ROWS, "a title", {"none": 2.04})
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
    assert len(table(ROWS, "a title").columns) == 4


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
