"""The runner (intervals, resuming, refusals), tables, JSON and the comparison figure."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from PIL import Image
from test_api import defender_of, model_of
from torch import Tensor

from scc_fast import Defender, image_seeds, tiny
from scc_fast.evaluate.report import (
    cell,
    columns,
    comparison_figure,
    grid,
    markdown,
    table,
    write_json,
)
from scc_fast.evaluate.runner import Attack, AttackFailed, Row, evaluate, wilson

PLAN = [
    Attack(),
    Attack("pgd", 8 / 255, steps=4),
    Attack("adaptive", 8 / 255, steps=1, limit=3),
]


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


class Pictures:
    """Test pictures whose labels are the model's own, so that it is always right when clean."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.calls: list[tuple[int, int]] = []
        self.fail_at = fail_at

    def __call__(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append((start, stop))
        x, _ = tiny.generate("test", range(start, stop))
        return x, defender_of("tiny", method="none")(x).labels


def defenders(**options: Any) -> dict[str, Defender]:
    return {name: defender_of("tiny", method=name, **options) for name in ("none", "rn")}


def finish(pictures: Pictures, state: Path | None, n: int = 5, **options: Any) -> list[Row]:
    given = options.pop("defenders", None) or defenders()
    arguments = {"plan": PLAN, "chunk": 2, "seed": 3, **options}
    *_, rows = evaluate(given, "rn", pictures, n, state=state, **arguments)
    return rows


def facts(rows: list[Row]) -> list[dict[str, Any]]:
    """Everything but the clock."""
    return [{**dataclasses.asdict(row), "ms_per_image": 0} for row in rows]


def test_an_evaluation() -> None:
    pictures = Pictures()
    rows = finish(pictures, None)
    assert pictures.calls == [(0, 2), (2, 4), (4, 5)] * 2 + [(0, 2), (2, 3)]
    names = ["clean", "PGD-4", "adaptive PGD-1 EOT-1", "worst per image"]
    assert [(row.defense, row.attack) for row in rows] == [
        (d, a) for d in ("none", "rn") for a in names
    ]
    by_name = {(row.defense, row.attack): row for row in rows}
    clean, pgd = by_name["none", "clean"], by_name["none", "PGD-4"]
    assert (clean.accuracy, clean.n, clean.eps, clean.seed) == (1, 5, "0/255", 3)
    assert (pgd.n, pgd.eps) == (5, "8/255")
    assert pgd.accuracy <= 0.4
    assert (clean.ci_low, clean.ci_high) == pytest.approx(wilson(5, 5))
    assert by_name["rn", "adaptive PGD-1 EOT-1"].n == by_name["rn", "worst per image"].n == 3
    assert clean.ms_per_image > 0
    assert clean.settings["method"] == "none"
    assert by_name["rn", "PGD-4"].settings["config"] == {"epsilon": 4 / 255}
    assert pgd.settings["attack"]["steps"] == 4
    assert facts(finish(Pictures(), None)) == facts(rows)
    assert facts(finish(Pictures(), None, seed=4)) != facts(rows)
    assert facts(finish(Pictures(), None, chunk=5))[0] == facts(rows)[0]


def test_the_seeds_are_fixed_and_the_judges_are_not_the_attackers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judged: list[list[int]] = []
    attacked: list[list[int]] = []
    call, run = Defender.__call__, Attack.run

    def judge(self: Defender, images: Any, seeds: Any = None) -> Any:
        if seeds is not None:
            judged.append(seeds.tolist())
        return call(self, images, seeds)

    def attack(self: Attack, defender: Defender, x: Tensor, y: Tensor, seeds: Tensor) -> Tensor:
        attacked.append(seeds.tolist())
        return run(self, defender, x, y, seeds)

    monkeypatch.setattr(Defender, "__call__", judge)
    monkeypatch.setattr(Attack, "run", attack)
    given = {"rn": defender_of("tiny", method="rn")}
    for chunk in (2, 3):
        finish(Pictures(), None, n=3, plan=[Attack()], chunk=chunk, defenders=given)
    expected = image_seeds(3, 3).tolist()
    assert judged == [expected[:2], expected[2:], expected]
    assert [len(seeds) for seeds in attacked] == [2, 1, 3]
    assert attacked[2] == attacked[0] + attacked[1]
    assert not set(attacked[2]) & set(expected)


@pytest.mark.parametrize(("stop_at", "cut"), [(1, None), (4, 1), (4, 20), (7, 20)])
def test_an_interrupted_evaluation_goes_on(tmp_path: Path, stop_at: int, cut: int | None) -> None:
    state = tmp_path / "folder" / "state.jsonl"
    whole = facts(finish(Pictures(), None))
    interrupted = Pictures(fail_at=stop_at)
    with pytest.raises(KeyboardInterrupt):
        finish(interrupted, state)
    assert len(interrupted.calls) == stop_at
    if cut is not None:  # the last line, one defender's chunk, was being written
        state.write_bytes(state.read_bytes()[:-cut])
    rest = Pictures()
    assert facts(finish(rest, state)) == whole
    # A cut newline alone loses nothing
    assert len(rest.calls) == 8 - stop_at + (cut == 20)
    again = Pictures()
    assert facts(finish(again, state)) == whole
    assert again.calls == []


def test_a_state_file_serves_more_images_and_attacks(tmp_path: Path) -> None:
    state = tmp_path / "state.jsonl"
    finish(Pictures(), state, n=5)
    more = finish(Pictures(), state, n=6)
    assert facts(more) == facts(finish(Pictures(), None, n=6))
    fewer = finish(Pictures(), state, n=4)
    assert facts(fewer) == facts(finish(Pictures(), None, n=4))
    longer = [*PLAN, Attack("view-aware", 8 / 255, steps=1)]
    pictures = Pictures()
    rows = finish(pictures, state, n=4, plan=longer)
    assert pictures.calls == [(0, 2), (2, 4)]
    assert facts(rows) == facts(finish(Pictures(), None, n=4, plan=longer))


def test_a_state_file_of_other_settings_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state.jsonl"
    finish(Pictures(), state, n=2)
    before = state.read_bytes()
    others: list[dict[str, Any]] = [
        {"seed": 4},
        {"chunk": 3},
        {"defenders": {**defenders(), "rn": defender_of(method="rn", config={"epsilon": 0.1})}},
        {"defenders": {**defenders(), "tte": defender_of(method="tte")}},
        {
            "defenders": {
                name: Defender(model_of("tiny"), tiny.prompts()[::-1], method=name)
                for name in ("none", "rn")
            }
        },
    ]
    for other in others:
        with pytest.raises(ValueError, match=r"state file .*state\.jsonl belongs to another"):
            finish(Pictures(), state, n=2, **other)
    assert state.read_bytes() == before
    finish(Pictures(fail_at=0), state, n=2)


@pytest.mark.parametrize("size", [0, 30])
def test_a_state_file_cut_in_its_first_line_starts_anew(tmp_path: Path, size: int) -> None:
    state = tmp_path / "state.jsonl"
    whole = facts(finish(Pictures(), state, n=2))
    state.write_bytes(state.read_bytes()[:size])
    assert facts(finish(Pictures(), state, n=2)) == whole
    finish(Pictures(fail_at=0), state, n=2)


def test_an_attack_that_does_nothing_is_an_error() -> None:
    weak = [Attack(), Attack("pgd", 1e-6, steps=1)]
    message = r"attack does not work.*PGD-1 at 1e-06.*keeps 100\.0% of its 100\.0%"
    with pytest.raises(AttackFailed, match=message):
        finish(Pictures(), None, plan=weak)
    # The strongest budget decides
    rows = finish(Pictures(), None, plan=[*weak[:1], *PLAN[1:2]])
    assert len(rows) == 4
    rows = finish(Pictures(), None, plan=weak, defenders={"rn": defender_of(method="rn")})
    assert len(rows) == 2  # nothing undefended to judge the attack by


def test_worst_per_image_counts_each_image_once(monkeypatch: pytest.MonkeyPatch) -> None:
    breaks = {"clean": [], "pgd": [0, 1, 3], "view-aware": [1], "adaptive": [1, 2]}

    def run(self: Attack, defender: Defender, x: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
        seen = x.clone()
        for i in breaks[self.kind]:  # another picture is another label
            others = (labels != labels[i]).nonzero()
            seen[i] = x[int(others[0])]
        return seen

    monkeypatch.setattr(Attack, "run", run)
    four = 4 / 255
    plan = [
        Attack(),
        Attack("pgd", four),
        Attack("pgd", 1 / 255),
        Attack("view-aware", four),
        Attack("adaptive", four),
    ]
    given = {"none": defender_of("tiny", method="none")}
    *_, rows = evaluate(given, "none", Pictures(), 5, plan, chunk=5)
    found = {(row.attack, row.eps): round(row.accuracy * row.n) for row in rows}
    assert found["clean", "0/255"] == 5
    assert found["PGD-10", "4/255"] == 2
    assert found["adaptive PGD-10 EOT-1", "4/255"] == 3
    assert found["view-aware PGD-10", "4/255"] == 4
    assert found["worst per image", "4/255"] == 1
    assert ("worst per image", "1/255") not in found
    worst = next(row for row in rows if row.attack == "worst per image")
    assert (worst.ci_low, worst.ci_high) == wilson(1, 5)
    assert worst.settings["of"] == ["PGD-10", "view-aware PGD-10", "adaptive PGD-10 EOT-1"]


def row(defense: str, attack: str, eps: str, accuracy: float, n: int = 100, ms: float = 2.0) -> Row:
    low, high = wilson(round(accuracy * n), n)
    return Row(defense, attack, eps, accuracy, n, low, high, ms, 0, {})


ROWS = [
    row("none", "clean", "0/255", 0.95, ms=1.0),
    row("none", "worst per image", "4/255", 0.0, n=16, ms=0.0),
    row("none", "PGD-10", "1/255", 0.25),
    row("none", "PGD-10", "4/255", 0.0),
    row("scc", "clean", "0/255", 0.9, ms=30.0),
    row("scc", "PGD-10", "4/255", 0.5, ms=40.0),
    row("scc", "new", "4/255", 0.5, n=16, ms=50.0),
]


def test_tables() -> None:
    assert [name for name, _ in columns(ROWS)] == [
        "clean", "PGD-10", "PGD-10", "new", "worst per image",
    ]  # fmt: skip
    assert cell(ROWS[0]) == "95.0 [88.8, 97.8]"
    assert cell(None) == "–"
    header, body = grid(ROWS)
    assert header == [
        "defense",
        "clean (n=100)",
        "PGD-10 1/255 (n=100)",
        "PGD-10 4/255 (n=100)",
        "new 4/255 (n=16)",
        "worst per image 4/255 (n=16)",
        "ms/image",
    ]
    assert [line[0] for line in body] == ["none", "scc"]
    assert body[0][1].startswith("95.0")
    assert body[0][4] == body[1][2] == body[1][5] == "–"
    assert [line[-1] for line in body] == ["2.0", "40.0"]
    lines = markdown(ROWS).splitlines()
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {8}
    assert lines[1] == "| --- | --: | --: | --: | --: | --: | --: |"
    assert lines[3].startswith("| scc | 90.0 [")
    drawn = table(ROWS, "a title")
    assert [str(column.header).replace("\n", "") for column in drawn.columns] == header
    assert drawn.row_count == 2


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
