"""`scc-fast bench` and what it shares with `pytest benchmarks`: rows, turns, floors, figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from scc_fast import cli
from scc_fast.bench import figures, measure, rows, run, tables, timing
from scc_fast.bench.machine import Machine
from scc_fast.bench.measure import Budget, Side
from scc_fast.engine.plan import Pass, Plan
from scc_fast.evaluate.schema import misfits
from session import Session

ROOT = Path(__file__).parents[1]
# As the issue lists them.
ASKED = (
    "group", "name", "device", "model", "batch", "classes", "precision", "backend", "engine",
    "p50_ms", "p99_ms", "images_per_s", "baseline", "ratio", "floor_ms", "share_of_floor",
    "peak_mib", "versions", "commit",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Rates from small products, and the test process's allocator as it is."""
    with pytest.MonkeyPatch.context() as patch:
        rate = timing.matmul_rate
        patch.setattr(timing, "matmul_rate", lambda kind, quick, dtype: rate(kind, True, dtype))
        patch.setattr(timing, "keep_memory", lambda: False)
        yield


def bench(*arguments: str | Path) -> tuple[int, str]:
    """Exit code and output of scc-fast bench."""
    done = CliRunner().invoke(cli.app, ["bench", *map(str, arguments)])
    return done.exit_code, done.output


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run that is interrupted after its first batch size, and gone on with."""
    folder = tmp_path_factory.mktemp("bench")
    file, stem = folder / "rows.json", folder / "fig.1"
    arguments = ("--model", "tiny", "--batch", "2,1", "--seconds", "0.1", "--no-reference")
    arguments += ("--json", str(file), "--figure", str(stem))
    measured: list[int] = []
    once = measure.measure

    def counted(sides: list[Side], *others: Any) -> list[rows.Row]:
        if len(measured) == 1:
            measured.append(0)
            raise KeyboardInterrupt
        measured.append(sides[0].images)
        return once(sides, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "measure", counted)
        first = bench(*arguments)
        between = json.loads(file.read_text())
        second = bench(*arguments)
    return {
        "arguments": arguments,
        "first": first,
        "between": between,
        "second": second,
        "measured": measured,
        "file": file,
        "stem": stem,
    }


def stored(found: dict[str, Any]) -> dict[str, Any]:
    return json.loads(found["file"].read_text())


def test_help() -> None:
    code, said = bench("--help")
    assert code == 0
    for option in ("--model", "--batch", "--json", "--figure", "--no-reference", "--fresh"):
        assert option in said


def test_keys() -> None:
    assert set(ASKED) <= set(rows.KEYS)
    assert len(set(rows.KEYS)) == len(rows.KEYS)
    with pytest.raises(KeyError, match="p50_ms"):
        rows.finished({"reach": None})


def test_bench_writes_rows_and_figures(interrupted: dict[str, Any]) -> None:
    code, said = interrupted["second"]
    assert code == 0, said
    found = stored(interrupted)
    assert {(row["name"], row["batch"]) for row in found["rows"]} == {
        (name, batch) for name in ("undefended", "scc") for batch in (1, 2)
    }
    for row in found["rows"]:
        assert tuple(row) == rows.KEYS
        assert misfits(row) == []
        assert row["group"] == run.GROUP
        assert row["baseline"] == "undefended"
        assert row["p50_ms"] > 0
        assert row["p99_ms"] >= row["p50_ms"]
        assert row["images_per_s"] == pytest.approx(1e3 * row["batch"] / row["p50_ms"])
        assert row["ratio"] == pytest.approx(row["baseline_ms"] / row["p50_ms"])
        assert row["share_of_floor"] == pytest.approx(row["floor_ms"] / row["p50_ms"])
        assert row["floor_ms"] > 0
        assert row["peak_mib"] > 0
        assert row["rounds"] >= run.FEWEST
    (waterfall,) = found["waterfalls"]
    assert waterfall["batch"] == 1
    assert "scc, 4 views" in said
    assert "gate off" in said
    assert "Ratio: undefended / this row" in said
    for what in ("latency", "waterfall"):
        path = interrupted["stem"].with_name(f"fig.1-{what}.png")
        assert path.name in said
        with Image.open(path) as picture:
            picture.load()
    assert len(list(interrupted["file"].parent.iterdir())) == 3


def test_an_interruption_loses_nothing(interrupted: dict[str, Any]) -> None:
    assert interrupted["first"][0] in (1, 130)
    assert interrupted["measured"] == [1, 0, 2]  # the second was broken off, and none made again
    between = interrupted["between"]
    assert [row["batch"] for row in between["rows"]] == [1, 1]
    assert between["rows"] == stored(interrupted)["rows"][:2]


def test_known_rows_are_not_measured_again(
    interrupted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("measured again")

    before = stored(interrupted)
    monkeypatch.setattr(rows, "TOO_WIDE", -1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "measure", never)
        patch.setattr("scc_fast.Defender.waterfall", never)
        code, said = bench(*interrupted["arguments"])
        assert code == 0, said
        assert "too wide to conclude anything" in " ".join(said.split())
        assert stored(interrupted) == before
        code, _ = bench(*interrupted["arguments"], "--fresh")
        assert code == 1
        code, _ = bench(*interrupted["arguments"], "--classes", "7")
        assert code == 1
    assert stored(interrupted) == before


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    for text in ("{}", "no json", '{"rows": [{"a": 1}]}'):
        (tmp_path / "x.json").write_text(text)
        done = CliRunner().invoke(cli.app, ["bench", "--json", str(tmp_path / "x.json")])
        assert done.exit_code == 1
        assert "holds no rows of scc-fast bench" in str(done.exception)
        assert (tmp_path / "x.json").read_text() == text


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--batch", "0"), "'0'"),
        (("--batch", "1,,2"), "1,,2"),
        (("--batch", "1;2"), "1;2"),
        (("--batch", "-1"), "-1"),
        (("--classes", "1"), "--classes"),
        (("--precision", "int8"), "int8"),
        (("--engine", "turbo"), "turbo"),
        (("--device", "tpu"), "tpu"),
        (("--method", "none"), "undefended"),
        (("--seconds", "0"), "--seconds"),
        (("--figure", "f.png"), ".png"),
        (("--figure", "."), "--figure"),
        (("--json", "."), "--json"),
        (("--seconds", "inf"), "--seconds"),
        (("--nonsense",), "--nonsense"),
    ],
)
def test_wrong_usage(
    arguments: tuple[str, ...],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", *arguments])
    assert caught.value.code == 2
    assert named in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_no_device_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", "--device", "cuda"])
    assert caught.value.code == 2
    assert "finds no CUDA device" in " ".join(capsys.readouterr().err.split())


# ---- figures, from rows alone


def test_the_latency_figure_shows_the_rows(interrupted: dict[str, Any]) -> None:
    found = stored(interrupted)["rows"]
    (axis,) = figures.latency_figure(found, "scc").axes
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    drawn = {line.get_label(): line for line in axis.get_lines()}
    assert len(drawn) == 3
    for line in drawn.values():
        assert list(line.get_xdata()) == [1, 2]
    (floor,) = (line for label, line in drawn.items() if label.startswith("floor"))
    assert floor.get_linestyle() == "--"
    scc = [row for row in found if row["name"] == "scc"]
    assert list(floor.get_ydata()) == [row["floor_ms"] for row in scc]
    (ours,) = (line for label, line in drawn.items() if label.startswith("scc"))
    assert list(ours.get_ydata()) == [row["p50_ms"] for row in scc]
    title = axis.get_title()
    assert scc[0]["device"] in title
    assert "gate off" in title
    assert "ms" in axis.get_ylabel()
    assert axis.get_legend() is not None


def test_the_waterfalls_bars_follow_each_other(interrupted: dict[str, Any]) -> None:
    (row,) = stored(interrupted)["waterfalls"]
    (axis,) = figures.waterfall_figure(row).axes
    bars, stages = axis.patches, row["stages"]
    assert [bar.get_width() for bar in bars] == pytest.approx([stage["ms"] for stage in stages])
    end = 0.0
    for bar in bars:
        assert bar.get_x() == pytest.approx(end)
        end += bar.get_width()
    assert end == pytest.approx(sum(stage["ms"] for stage in stages))
    assert f"{end:.3g} ms in all" in axis.get_xlabel()
    steps = list(dict.fromkeys(stage["step"] for stage in stages))
    assert [label.get_text() for label in axis.get_yticklabels()] == steps
    assert [text.get_text() for text in axis.get_legend().get_texts()] == list(
        dict.fromkeys(stage["part"] for stage in stages)
    )
    assert row["device"] in axis.get_title()
    assert "graph" not in axis.get_xlabel()
    (axis,) = figures.waterfall_figure({**row, "engine": "graph"}).axes
    assert "outside its graph" in axis.get_xlabel()


# ---- turns and floors


def side(name: str, calls: list[str], seconds: float = 0.0) -> Side:
    def call() -> str:
        calls.append(name)
        time.sleep(seconds)
        return name

    return Side(name, call, "m", 1, "fp32", "cpp", "eager", "1×3×8×8, still")


def test_sides_take_turns_and_the_first_round_warms_up() -> None:
    calls: list[str] = []
    sides = [side(name, calls) for name in "abc"]
    assert measure.take_turns(sides, 2, "cpu", Budget(10.0, 3, 4), measure.loop)
    assert "".join(calls) == "abc" * 5
    assert [len(one.times) for one in sides] == [4, 4, 4]
    assert [one.result for one in sides] == ["a", "b", "c"]


def test_a_slow_case_gets_the_fewest_rounds_and_wastes_none() -> None:
    calls: list[str] = []
    sides = [side("a", calls, 0.02), side("b", calls)]
    assert measure.take_turns(sides, 1, "cpu", Budget(0.03, 3), measure.loop)
    assert "".join(calls) == "ab" * 3
    assert [len(one.times) for one in sides] == [3, 3]
    assert min(sides[0].times) >= 20


def test_nothing_timed_is_no_row() -> None:
    sides = [side("a", []), side("b", [])]
    machine = Machine("cpu", "fresh", quick=True)
    budget = Budget(1.0)
    assert measure.measure(sides, "g", machine, budget, lambda *_: None) == []


def test_the_floor_counts_weights_that_no_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    class Encoder:
        forward, backward, weights = 10**9, 10**9, 10**8

    machine = Machine("cpu", "fresh", quick=True)
    monkeypatch.setattr(machine, "flops_per_s", lambda precision: 1e12)
    monkeypatch.setattr(machine, "bytes_per_s", lambda: 1e10)
    plan = Plan("scc", 4, (Pass("first", 5, 4, ""), Pass("predict", 4, 0, "")), gate=False)
    cost: Any = Encoder()
    monkeypatch.setattr(timing, "last_cache", lambda kind: 2 * 10**8)
    assert machine.floor_ms(plan, cost, 1, "fp32") == pytest.approx(13.0)
    monkeypatch.setattr(timing, "last_cache", lambda kind: 10**7)
    assert machine.floor_ms(plan, cost, 1, "fp32") == pytest.approx(30.0)
    assert machine.floor_ms(plan, cost, 8, "fp32") == pytest.approx(104.0)


def test_rates_are_measured_once_and_said() -> None:
    machine = Machine("cpu", "fresh", quick=True)
    assert machine.flops_per_s("fp32") == machine.flops_per_s("fp32") > 0
    said = machine.environment["matmul_fp32_gflop_per_s"]
    assert said == pytest.approx(machine.flops_per_s("fp32") / 1e9, abs=0.1)
    assert machine.bytes_per_s() > 0
    assert timing.last_cache("cpu") > 2**10


def test_a_loaded_machine_is_said() -> None:
    calm = {"spread": 0.01, "others": 0.0, "rounds": 9, "loaded": False}
    assert rows.warnings([calm]) == []
    (wide,) = rows.warnings([calm, {**calm, "spread": 0.5, "others": None}])
    assert "1 of 2 rows is too wide to conclude" in wide
    assert "50 %" in wide
    (busy,) = rows.warnings([calm, {**calm, "spread": 0.0, "others": 0.7}])
    assert "The machine was loaded" in busy
    assert "0.70 cores" in busy
    measured = rows.timings([1.0, 2.0, 3.0], [], images=1, others=0.0)
    assert measured["loaded"]
    assert not rows.timings([2.0, 2.0, 2.0], [], images=1, others=0.0)["loaded"]
    once = rows.timings([2.0], [], images=1, others=0.0)
    assert once["loaded"]
    (few,) = rows.warnings([calm, {**calm, **once}])
    assert "1 of 2 rows have fewer than 3 rounds" in few


def test_defenses_that_disagree_are_refused() -> None:
    class Result:
        def __init__(self, logits: torch.Tensor) -> None:
            self.logits = logits

    one: Any = Result(torch.randn(3, 9, generator=torch.Generator().manual_seed(0)))
    other: Any = Result(one.logits.flip(-1))
    measure.check(one, one, "fp32")
    with pytest.raises(RuntimeError, match="disagree"):
        measure.check(one, other, "bf16")


# ---- the suites


def test_less_time_means_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session.__new__(Session)
    session.quick, session.budget, session.deadline, session.cases_left = False, 0.5, None, 4
    assert session.budget_of(2.0, 5, 9) == Budget(2.0, 5, 9)
    session.deadline = time.monotonic() + 3.0
    share = session.budget_of(2.0, 5, 9)
    assert share.seconds == pytest.approx(1.0, abs=0.1)
    assert share.fewest == 5
    session.deadline = time.monotonic() - 1.0
    assert session.budget_of(2.0, 5, 9) == Budget(0.0, 1, 9)
    assert session.late


@pytest.mark.slow
def test_the_quick_suites_rows(tmp_path: Path) -> None:
    """Ops are in test_run_gpu's smoke; a first call takes a process of its own."""
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "--quick", "-q"]
    command += ["-p", "no:cacheprovider", "--threads=1", f"--rows={tmp_path / 'rows.json'}"]
    command += ["-k", "not bench_op and not bench_first_call", "--device=cpu"]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "rows.json").read_text())["rows"]
    groups = tables.groups(found)
    assert set(groups) == {
        "end to end", "gate", "batch sweep", "class-count sweep", "views and steps sweep",
        "encoder", "memory",
    }  # fmt: skip
    assert len({rows.same_setting(row) for row in found}) == len(found)
    for row in found:
        assert tuple(row) == rows.KEYS
        beside = [other for other in groups[row["group"]] if other["name"] == row["baseline"]]
        assert any(other["model"] == row["model"] for other in beside)
    page = (tmp_path / "rows.md").read_text()
    for name, some in groups.items():
        assert f"\n### {name}\n" in page
        assert tables.markdown(some) in page
