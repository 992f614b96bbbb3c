"""The runner on a local Ray cluster: the same files, also when a worker dies on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch

import scc_fast
from runs import BATCH, FOUR, results, run_in, setting
from scc_fast.evaluate import command, on_ray
from scc_fast.evaluate.on_ray import RayExecutor
from scc_fast.evaluate.runner import Asked
from scc_fast.evaluate.worker import Made, Task

ASKED = Asked(("none", "ttc"), ("pgd3",), (FOUR,))
N = 6 * BATCH
FACTS: dict[str, Any] = {"model": {"precision": "fp32"}}


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
    listed = subprocess.run(["pgrep", "-f", r"ray::.*RayWorker"], capture_output=True, text=True)
    return {int(line) for line in listed.stdout.split()}


@pytest.mark.ray
def test_a_worker_that_dies_changes_nothing(tmp_path: Path, cluster: None, alone: bytes) -> None:
    run = run_in(tmp_path, n_samples=N)
    execute = RayExecutor(setting(n_samples=N), run.store.facts, workers=2)
    seen: list[int] = []

    def killing(tasks: Any, kept: Any) -> Iterator[tuple[Task, Any]]:
        for task, found in execute(tasks, kept):
            if isinstance(found, Made) and not seen:
                until = time.monotonic() + 60  # the second may still be starting
                while len(workers()) < 2 and time.monotonic() < until:
                    time.sleep(0.1)
                seen.extend(sorted(workers()))
                os.kill(seen[0], signal.SIGKILL)
            yield task, found

    ticks: list[str] = []
    run.go(ASKED, execute=killing, tick=ticks.append)
    assert len(seen) >= 2  # one was killed, and was not the only one
    assert len(ticks) == 4 * 6
    assert results(tmp_path) == alone


@pytest.mark.ray
def test_kept_images_are_not_made_again(tmp_path: Path, cluster: None, alone: bytes) -> None:
    with one_thread():
        run_in(tmp_path, n_samples=N).go(Asked(("none",), ("pgd3",), (FOUR,)))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    run = run_in(tmp_path, n_samples=N)
    run.go(ASKED, execute=RayExecutor(setting(n_samples=N), run.store.facts, workers=2))
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")} == before
    assert len(before) == 6
    assert results(tmp_path) == alone


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    task = Task("clean", 0.0, None, 0, 1, ("none",))
    with pytest.raises(ImportError, match=r'pip install "scc_fast\[ray\]"'):
        list(RayExecutor(setting(), {})([task], lambda task: None))


class FakeRay:
    """A `ray` without processes: actors work in this one, or not at all."""

    def __init__(self, *nodes: dict[str, float], works: bool = True) -> None:
        self.live, self.works = nodes, works
        self.data = self
        self.DataContext = SimpleNamespace(get_current=SimpleNamespace)
        self.actors: list[tuple[Any, ...]] = []  # what each was made with
        self.options: dict[str, Any] = {}

    def is_initialized(self) -> bool:
        return True

    def nodes(self) -> list[dict[str, Any]]:
        gone = {"Alive": False, "Resources": {"CPU": 999.0, "GPU": 999.0}}
        return [gone, *({"Alive": True, "Resources": node} for node in self.live)]

    def cluster_resources(self) -> dict[str, float]:
        names = {name for node in self.live for name in node}
        return {name: sum(node.get(name, 0) for node in self.live) for name in names}

    def from_items(self, items: list[Any], **_: Any) -> Any:
        def map_batches(actor: Any, fn_constructor_args: Any, **options: Any) -> Any:
            self.actors.append(fn_constructor_args)
            self.options = options
            return SimpleNamespace(iter_rows=lambda: rows(actor, fn_constructor_args))

        def rows(actor: Any, arguments: Any) -> Iterator[dict[str, Any]]:
            if self.works:
                Path("actor").mkdir(exist_ok=True)
                os.chdir("actor")  # Ray gives it another folder than the driver's
                work = actor(*arguments)
                for item in items:
                    yield {"found": work({"task": [item["task"]]})["found"][0]}

        return SimpleNamespace(map_batches=map_batches)


def beside(folder: Path, monkeypatch: pytest.MonkeyPatch, ray: FakeRay) -> FakeRay:
    monkeypatch.setattr(on_ray, "_ray", lambda: ray)
    monkeypatch.chdir(folder)
    return ray


def evaluated(folder: Path, gpus: float, **options: Any) -> Any:
    """`scc-fast evaluate --engine ray` of two pictures without an attack."""
    asked = setting(n_samples=2, **options)
    cluster = command.Cluster(workers=1, gpus=gpus)
    quiet: dict[str, Any] = {"start": lambda *_: None, "tick": lambda _: None}
    with one_thread():
        command.run_all([asked], Asked(("none",), ("clean",)), folder, cluster, **quiet)
    (found,) = folder.glob("*/results.json")
    return json.loads(found.read_text())


SMALL, GPU = {"CPU": 2.0}, {"CPU": 4.0, "GPU": 1.0}


@pytest.mark.parametrize(
    ("nodes", "options", "told"),
    [
        ((SMALL,), {"cores": 64}, "--cores 64: .* the largest has GPU 0 and CPU 2;"),
        ((SMALL, SMALL), {"cores": 3, "workers": 1}, "--cores 3: .* CPU 2;"),
        ((SMALL,), {"gpus": 1.0}, "--gpus 1 and --cores 1: .* GPU 0 and CPU 2; nodes must be up"),
        ((SMALL, GPU), {"gpus": 2.0}, "--gpus 2 and .* GPU 1 and CPU 4;"),
        ((GPU, {"CPU": 64.0}), {"gpus": 0.5, "cores": 8}, "--gpus 0.5 and --cores 8: .* CPU 4;"),
        ((), {}, "--cores 1: .* CPU 0;"),
    ],
)
def test_what_no_node_has_is_refused(
    nodes: Any, options: Any, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = beside(tmp_path, monkeypatch, FakeRay(*nodes, works=False))
    task = Task("clean", 0.0, None, 0, 2, ("none",))
    with pytest.raises(ValueError, match=told):
        list(RayExecutor(setting(), FACTS, **options)([task], lambda task: None))
    assert ray.actors == []


@pytest.mark.parametrize(
    ("options", "actors"),
    [({}, 6), ({"cores": 2}, 3), ({"cores": 3}, 1), ({"gpus": 0.5}, 2), ({"gpus": 0.2}, 4)],
)
def test_as_many_actors_as_nodes_hold(
    options: Any, actors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = beside(tmp_path, monkeypatch, FakeRay(SMALL, GPU, works=False))
    tasks = [Task("clean", 0.0, None, batch, 2, ("none",)) for batch in range(9)]
    list(RayExecutor(setting(), FACTS, **options)(tasks, lambda task: None))
    assert ray.options["concurrency"] == actors


def test_auto_precision_is_that_of_the_actors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the driver has: here no GPU, and then one that it must not use."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_gpus = beside(tmp_path, monkeypatch, FakeRay(GPU, works=False))
    for asked, precision in (("auto", "bf16"), ("fp32", "fp32"), ("fp16", "fp16")):
        found = evaluated(tmp_path / asked, 1.0, device=None, precision=asked)
        assert found["run"]["model"]["precision"] == precision
        made_with, facts, *_ = on_gpus.actors[-1]
        assert (made_with.precision, made_with.device) == (precision, "cuda")
        assert facts == found["run"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    on_cpus = beside(tmp_path, monkeypatch, FakeRay(SMALL))
    found = evaluated(tmp_path / "cpu", 0.0, device=None)
    assert found["run"]["model"]["precision"] == "fp32"
    assert [row["n"] for row in found["rows"]] == [2]
    assert on_cpus.actors[0][0].precision == "fp32"


@pytest.mark.parametrize(("device", "gpus"), [("cuda", 0.0), ("cpu", 1.0)])
def test_a_device_that_actors_do_not_have_is_refused(
    device: str, gpus: float, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"^--device {device} with .*--gpus {gpus:g}: .*leave"):
        evaluated(tmp_path, gpus, device=device)


def test_relative_files_are_the_drivers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(Path(scc_fast.__file__).parent / "tiny" / "assets", tmp_path / "model")
    beside(tmp_path, monkeypatch, FakeRay(SMALL))
    found = evaluated(tmp_path / "out", 0.0, model="local-dir:model")
    assert [row["n"] for row in found["rows"]] == [2]
    here = os.getcwd()
    on_ray.RayWorker(setting(), FACTS, None, str(tmp_path / "of another machine"))
    assert os.getcwd() == here


@pytest.mark.ray
def test_what_goes_wrong_in_a_worker_is_one_line(tmp_path: Path, cluster: None) -> None:
    run = run_in(tmp_path, n_samples=2)
    task = Task("clean", 0.0, None, 0, 2, ("none",))
    other = {**run.store.facts, "batch": 7}
    with pytest.raises(RuntimeError, match=r"^a worker failed: ValueError: it has another model or "
                       r"other data than the run: batch is 7 there and 2 here$"):  # fmt: skip
        list(RayExecutor(setting(n_samples=2), other, workers=1)([task], lambda task: None))
    wrong = Task("clean", 0.0, None, 0, 2, ("sccc",))
    with pytest.raises(RuntimeError, match=r"^a worker failed: ValueError: defense must be one of"):
        list(
            RayExecutor(setting(n_samples=2), run.store.facts, workers=1)(
                [wrong], lambda task: None
            )
        )
