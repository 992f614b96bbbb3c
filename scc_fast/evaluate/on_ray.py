"""Execution on Ray: Ray Data hands batches to actors, one per GPU or number of cores.

Ray restarts a dead actor and repeats its batch. Results depend on the batch alone and equal those
of one process.
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
from scc_fast.evaluate.worker import Judged, Made, Origin, Setting, Task, Worker
from scc_fast.models import VisionLanguage

_AT_ONCE = 16  # batches handed to an actor together; their images are in memory


class Driver(Worker):
    """Worker of the driving process: gives the facts of the run, which the actors share.

    Args:
        setting: of the run.
        gpus: per actor; this process needs none.
        model, dataset: if loaded already.

    Raises:
        ValueError: the setting's device is not the actors'.
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
        if self._elsewhere:  # this CPU may lack the GPUs' precision
            here = replace(here, precision="auto")
        super().__init__(here, model, dataset)

    def facts(self) -> dict[str, Any]:
        facts = super().facts()
        if self._elsewhere:
            bare = self.defense("none")
            # As engine.choose resolves "auto" on a GPU with bfloat16.
            reduced = bare.precision == "fp32" and bare.engine == "runner"
            auto = "bf16" if reduced else bare.precision
            facts["model"]["precision"] = auto if self._asked == "auto" else self._asked
        return facts


@dataclass(frozen=True)
class RayExecutor:
    """Executor for Run.go().

    Args:
        setting: of the run; each actor loads its own model and data.
        facts: of the run; an actor with other facts fails. They include the precision.
        workers: number of actors; None: as many as fit.
        cores: CPU cores and threads per actor without a GPU.
        gpus: per actor, may be a fraction; 0: CPU.
        address: of a cluster ("auto": this machine's); None starts one here.

    Raises:
        ValueError: in the call: no running node has room for an actor.
    """

    setting: Setting
    facts: dict[str, Any]
    workers: int | None = None
    cores: int = 1
    gpus: float = 0.0
    address: str | None = None

    def __call__(
        self, tasks: Sequence[Task], kept: Callable[[Task], Tensor | None]
    ) -> Iterator[tuple[Task, Origin | Made | Judged]]:
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
    ) -> Iterator[tuple[Task, Origin | Made | Judged]]:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        items = [
            {"task": pickle.dumps((place, task, kept(task)))} for place, task in enumerate(tasks)
        ]
        device = "cuda" if self.gpus else "cpu"
        # Relative paths are of this process's folder.
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
        for row in found.iter_rows():  # to the end, to keep the others' results
            place, events = pickle.loads(row["found"])
            if isinstance(events, str):
                failure = failure or events
                continue
            for event in events:
                yield tasks[place], event
        if failure:
            raise RuntimeError(f"a worker failed: {failure}")

    def _room(self, ray: Any) -> int:
        """Number of actors that fit on the running nodes.

        Raises:
            ValueError: none; Ray would wait silently.
        """
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        room = sum(self._holds(node) for node in nodes)
        if not room:
            # GPUs first, if requested.
            sizes = [(node.get("GPU", 0), node.get("CPU", 0)) for node in nodes] or [(0, 0)]
            gpus, cores = max(sizes, key=lambda size: size if self.gpus else size[::-1])
            asked = f"--gpus {self.gpus:g} and " if self.gpus else ""
            raise ValueError(
                f"{asked}--cores {self.cores}: no node has so much for an actor, the largest has "
                f"GPU {gpus:g} and CPU {cores:g}; nodes must be up before the run begins"
            )
        return room

    def _holds(self, node: dict[str, float]) -> int:
        """Number of actors that fit on a node with these resources."""
        by_cores = int(node.get("CPU", 0) / self.cores)
        return min(by_cores, int(node.get("GPU", 0) / self.gpus)) if self.gpus else by_cores


class RayWorker:
    """Ray actor with a Worker, made at its first batch."""

    def __init__(
        self, setting: Setting, facts: dict[str, Any], threads: int | None, folder: str
    ) -> None:
        with contextlib.suppress(OSError):  # may not exist on another machine
            os.chdir(folder)  # for relative paths of model files
        self.setting, self.facts, self.threads = setting, facts, threads
        self.worker: Worker | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        found = []
        for item in batch["task"]:
            place, task, delta = pickle.loads(item)
            events: list[Any] | str
            try:
                worker = self._made()
                events = [worker.origin(), *worker.work(task, delta)]
            except Exception as error:  # short text instead of Ray's traceback
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
    # Otherwise Ray copies this environment to its workers and reports usage.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError('engine "ray" needs Ray Data: pip install "scc_fast[ray]"') from error
    return ray
