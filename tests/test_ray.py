"""The runner on a local Ray cluster: the same files, also when a worker dies on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from test_runner import BATCH, FOUR, results, run_in, setting

from scc_fast.evaluate.on_ray import OnRay
from scc_fast.evaluate.runner import Asked
from scc_fast.evaluate.worker import Made, Task

ASKED = Asked(("none", "ttc"), ("pgd3",), (FOUR,))
N = 6 * BATCH


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two workers of one core, in processes of their own."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The results of one process with as many threads as a worker has."""
    with one_thread():
        folder = tmp_path_factory.mktemp("alone")
        run_in(folder, n_samples=N).go(ASKED)
    return results(folder)


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def workers() -> set[int]:
    """The processes of our actors."""
    listed = subprocess.run(["pgrep", "-f", r"ray::.*_Actor"], capture_output=True, text=True)
    return {int(line) for line in listed.stdout.split()}


@pytest.mark.slow
def test_a_worker_that_dies_changes_nothing(tmp_path: Path, cluster: None, alone: bytes) -> None:
    run = run_in(tmp_path, n_samples=N)
    execute = OnRay(setting(n_samples=N), run.store.facts, workers=2)
    seen: list[int] = []

    def killing(tasks: Any, kept: Any) -> Iterator[tuple[Task, Any]]:
        for task, found in execute(tasks, kept):
            if isinstance(found, Made) and not seen:
                seen.extend(sorted(workers()))
                os.kill(seen[0], signal.SIGKILL)
            yield task, found

    ticks: list[str] = []
    run.go(ASKED, execute=killing, tick=ticks.append)
    assert len(seen) == 2  # there were two, and one was killed
    assert len(ticks) == 4 * 6
    assert results(tmp_path) == alone


@pytest.mark.slow
def test_kept_images_are_not_made_again(tmp_path: Path, cluster: None, alone: bytes) -> None:
    with one_thread():
        run_in(tmp_path, n_samples=N).go(Asked(("none",), ("pgd3",), (FOUR,)))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    run = run_in(tmp_path, n_samples=N)
    run.go(ASKED, execute=OnRay(setting(n_samples=N), run.store.facts, workers=2))
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")} == before
    assert len(before) == 6
    assert results(tmp_path) == alone


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    task = Task("clean", 0.0, None, 0, 1, ("none",))
    with pytest.raises(ImportError, match=r'pip install "scc_fast\[ray\]"'):
        list(OnRay(setting(), {})([task], lambda task: None))


@pytest.mark.slow
def test_what_goes_wrong_in_a_worker_is_one_line(tmp_path: Path, cluster: None) -> None:
    run = run_in(tmp_path, n_samples=2)
    task = Task("clean", 0.0, None, 0, 2, ("none",))
    other = {**run.store.facts, "batch": 7}
    with pytest.raises(RuntimeError, match=r"^a worker failed: ValueError: it has another model or "
                       r"other data than the run: batch is 7 there and 2 here$"):  # fmt: skip
        list(OnRay(setting(n_samples=2), other, workers=1)([task], lambda task: None))
    wrong = Task("clean", 0.0, None, 0, 2, ("sccc",))
    with pytest.raises(RuntimeError, match=r"^a worker failed: ValueError: defense must be one of"):
        list(OnRay(setting(n_samples=2), run.store.facts, workers=1)([wrong], lambda task: None))
