"""The same tasks on Ray: Ray Data hands batches to actors, one for each GPU or so many cores.

An actor that dies is started again and its batch repeated; what comes of a batch depends on the
batch alone, so that the results are those of one process.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from scc_fast.evaluate.data import Dataset, default_root
from scc_fast.evaluate.store import differences
from scc_fast.evaluate.worker import Judged, Made, Place, Setting, Task, Worker
from scc_fast.models import VisionLanguage

_AT_ONCE = 16  # batches of an actor that are handed out together: their images are in memory


class Driver(Worker):
    """The run's own worker where actors do the tasks: its facts are theirs.

    Args:
        setting: of the run.
        gpus: of an actor; this process needs none.
        model, dataset: where the caller has loaded them.

    Raises:
        ValueError: another device than the actors have.
    """

    def __init__(
        self,
        setting: Setting,
        gpus: float,
        model: VisionLanguage | None = None,
        dataset: Dataset | None = None,
    ) -> None:
        kind = "cuda" if gpus else "cpu"
        if setting.device not in (None, kind):
            raise ValueError(
                f"--device {setting.device} with --engine ray and --gpus {gpus:g}: an actor is on "
                "CUDA with --gpus above 0 and else on the CPU; leave --device out"
            )
        self._asked = setting.precision
        self._elsewhere = kind == "cuda" and not torch.cuda.is_available()
        here = replace(setting, device="cpu" if self._elsewhere else kind)
        if self._elsewhere:  # this CPU may have no arithmetic for what GPUs are asked for
            here = replace(here, precision="auto")
        super().__init__(here, model, dataset)

    def facts(self) -> dict[str, Any]:
        facts = super().facts()
        if self._elsewhere:
            bare = self.defense("none")
            # What engine.choose makes of "auto" on a GPU that has bfloat16.
            reduced = bare.precision == "fp32" and bare.engine == "runner"
            auto = "bf16" if reduced else bare.precision
            facts["model"]["precision"] = auto if self._asked == "auto" else self._asked
        return facts


@dataclass(frozen=True)
class RayExecutor:
    """An executor for Run.go().

    Args:
        setting: of the run; each actor loads its own model and data.
        facts: what the run's results depend on; an actor for which they differ is refused. It
            computes in their precision, whatever "auto" would be on its device.
        workers: how many actors; None: as many as the cluster has room for.
        cores: CPU cores, and threads, of an actor without a GPU.
        gpus: of an actor, may be a fraction; 0 runs on the CPU.
        address: of a cluster ("auto" takes the one this machine is part of); None starts one here.

    Raises:
        ValueError: in the call, where an actor fits on no node that is up.
    """

    setting: Setting
    facts: dict[str, Any]
    workers: int | None = None
    cores: int = 1
    gpus: float = 0.0
    address: str | None = None

    def __call__(
        self, tasks: Sequence[Task], kept: Callable[[Task], Tensor | None]
    ) -> Iterator[tuple[Task, Place | Made | Judged]]:
        ray = _ray()
        if not ray.is_initialized():
            ray.init(address=self.address or "local", log_to_driver=False, logging_level="error")
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        room = self._room(ray)
        workers = min(self.workers or room, len(tasks))
        for start in range(0, len(tasks), _AT_ONCE * workers):
            yield from self._some(ray, tasks[start : start + _AT_ONCE * workers], kept, workers)

    def _some(
        self, ray: Any, tasks: Sequence[Task], kept: Callable[[Task], Tensor | None], workers: int
    ) -> Iterator[tuple[Task, Place | Made | Judged]]:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        items = [
            {"task": pickle.dumps((place, task, kept(task)))} for place, task in enumerate(tasks)
        ]
        device = "cuda" if self.gpus else "cpu"
        # Files are named from where this process stands, which an actor does not share.
        root = (self.setting.root or default_root()).absolute()
        precision = self.facts["model"]["precision"]
        setting = replace(self.setting, root=root, device=device, precision=precision)
        threads = None if self.gpus else self.cores
        found = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            RayWorker,
            fn_constructor_args=(setting, self.facts, threads, os.getcwd()),
            batch_size=1,
            concurrency=min(workers, len(items)),
            num_cpus=self.cores,
            num_gpus=self.gpus,
        )
        failure = ""
        for row in found.iter_rows():  # to its end: what the others have done is kept
            place, events = pickle.loads(row["found"])
            if isinstance(events, str):
                failure = failure or events
                continue
            for event in events:
                yield tasks[place], event
        if failure:
            raise RuntimeError(f"a worker failed: {failure}")

    def _room(self, ray: Any) -> int:
        """How many actors the nodes that are up hold.

        Raises:
            ValueError: none at all; Ray would wait for such a node without a word.
        """
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        room = sum(self._holds(node) for node in nodes)
        if not room:
            # GPUs count first where they are asked for.
            sizes = [(node.get("GPU", 0), node.get("CPU", 0)) for node in nodes] or [(0, 0)]
            gpus, cores = max(sizes, key=lambda size: size if self.gpus else size[::-1])
            asked = f"--gpus {self.gpus:g} and " if self.gpus else ""
            raise ValueError(
                f"{asked}--cores {self.cores}: no node has so much for an actor, the largest has "
                f"GPU {gpus:g} and CPU {cores:g}; nodes must be up before the run begins"
            )
        return room

    def _holds(self, node: dict[str, float]) -> int:
        """How many actors a node with these resources holds."""
        by_cores = int(node.get("CPU", 0) / self.cores)
        return min(by_cores, int(node.get("GPU", 0) / self.gpus)) if self.gpus else by_cores


class RayWorker:
    """A worker in a process of its own, made with its first batch."""

    def __init__(
        self, setting: Setting, facts: dict[str, Any], threads: int | None, folder: str
    ) -> None:
        with contextlib.suppress(OSError):  # another machine's may not have it, nor need it
            os.chdir(folder)  # where model files are named from
        self.setting, self.facts, self.threads = setting, facts, threads
        self.worker: Worker | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        found = []
        for item in batch["task"]:
            place, task, delta = pickle.loads(item)
            events: list[Any] | str
            try:
                worker = self._made()
                events = [worker.place(), *worker.work(task, delta)]
            except Exception as error:  # its text travels; Ray's would be a page
                events = " ".join(f"{type(error).__name__}: {error}".split())
            found.append(pickle.dumps((place, events)))
        return {"found": found}

    def _made(self) -> Worker:
        if self.worker is None:
            if self.threads is not None:
                torch.set_num_threads(self.threads)
            worker = Worker(self.setting)
            other = differences(self.facts, json.loads(json.dumps(worker.facts())))
            if other:
                raise ValueError(f"it has another model or other data than the run: {other}")
            self.worker = worker
        return self.worker


def _ray() -> Any:
    # Ray would ship this environment to its workers and report usage by itself.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError('engine "ray" needs Ray Data: pip install "scc_fast[ray]"') from error
    return ray
