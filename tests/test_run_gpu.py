"""benchmarks/run_gpu.sh, as far as it goes without a GPU."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scc_fast.bench import rows, tables

ROOT = Path(__file__).parents[1]
DEVICE_STEPS = [
    "device",
    "wheels",
    "build",
    "build without extension",
    "gpu tests of the engine",
    "benchmarks",
    "gpu tests of the ops",
    "memcheck",
]
SMOKE = "smoke of the benchmarks on the CPU"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What the script needs of a checkout, so that others may edit theirs meanwhile."""
    tree = tmp_path / "a checkout"
    ignored = shutil.ignore_patterns("__pycache__", "results", ".partial-*")
    shutil.copytree(ROOT / "benchmarks", tree / "benchmarks", ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tree)
    return tree


def start(tree: Path, *arguments: str) -> subprocess.Popen[str]:
    """Run it from elsewhere, as another process group."""
    return subprocess.Popen(
        ["bash", str(tree / "benchmarks" / "run_gpu.sh"), *arguments],
        cwd="/",
        env={**os.environ, "PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def left(out: Path) -> tuple[dict[str, Any], str, str]:
    """JSON, table and log, which is all that may be in `out`."""
    found = sorted(out.iterdir())
    assert [path.suffix for path in found] == [".json", ".log", ".md"], found
    assert len({path.stem for path in found}) == 1
    datetime.date.fromisoformat(found[0].stem)
    stored, log, table = found
    return json.loads(stored.read_text()), table.read_text(), log.read_text()


def contents(tree: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in tree.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_without_a_device(tree: Path, tmp_path: Path) -> None:
    before = contents(tree)
    run = start(tree, str(tmp_path / "out"), "--no-device")
    said = run.communicate(timeout=120)[0]
    assert run.returncode == 0, said
    stored, table, log = left(tmp_path / "out")
    assert stored["finished"]
    assert not stored["with_device"]
    assert stored["failed"] == []
    ended = {step["name"]: (step["status"], step["reason"]) for step in stored["steps"]}
    assert ended == {
        **dict.fromkeys(DEVICE_STEPS, ("skipped", "--no-device")),
        SMOKE: ("passed", ""),
    }
    assert all(step["seconds"] < 60 for step in stored["steps"])
    for name in DEVICE_STEPS:
        assert f"=== {name}: skipped, --no-device" in log
    assert {"torch, its CUDA", "platform"} <= set(stored["environment"]["machine"])
    assert stored["rows"]
    for row in stored["rows"]:
        assert tuple(row) == rows.KEYS
        assert row["quick"]
        assert row["reach"] is None
        assert row["p50_ms"] > 0
        assert row["baseline_ms"] > 0
    assert f"| {SMOKE} | passed |" in table
    assert tables.markdown(stored["rows"]) in table
    assert contents(tree) == before


@pytest.mark.slow
def test_a_failed_step_is_told(tree: Path, tmp_path: Path) -> None:
    (tree / "benchmarks" / "bench_ops.py").write_text("raise SystemError('planted')\n")
    run = start(tree, str(tmp_path / "out"), "--no-device")
    said = run.communicate(timeout=120)[0]
    assert run.returncode == 1, said
    stored, table, log = left(tmp_path / "out")
    assert stored["finished"]
    assert stored["failed"] == [SMOKE]
    assert stored["rows"] == []
    assert f"| {SMOKE} | failed |" in table
    assert "planted" in log


@pytest.mark.slow
def test_an_interrupted_run_leaves_whole_files(tree: Path, tmp_path: Path) -> None:
    run = start(tree, str(tmp_path / "out"), "--no-device")
    assert run.stdout is not None
    for line in run.stdout:
        if "started, at most" in line:
            break
    run.send_signal(signal.SIGTERM)
    said = run.communicate(timeout=60)[0]
    assert run.returncode == 1, said
    stored, table, log = left(tmp_path / "out")
    assert not stored["finished"]
    assert "not finished" in table
    assert "interrupted" in log


@pytest.mark.parametrize("arguments", [(), ("--no-device",), ("a", "b"), ("a", "--fast")])
def test_wrong_arguments(arguments: tuple[str, ...], tmp_path: Path) -> None:
    run = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "run_gpu.sh"), *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert "usage: " in run.stderr
    assert not list(tmp_path.iterdir())
