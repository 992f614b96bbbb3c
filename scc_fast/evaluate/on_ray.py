"""The same tasks on Ray: Ray Data hands batches to actors, one for each GPU or so many cores.

An actor that dies is started again and its batch repeated; what comes of a batch depends on the
batch alone, so that the results are those of one process.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from scc_fast.evaluate.worker import Judged, Made, Setting, Task, Worker


@dataclass(frozen=True)
class OnRay:
    """An executor for Run.go().

    Args:
        setting: of the run; each actor loads its own model and data.
        workers: how many actors; None: as many as the cluster has room for.
        cores: CPU cores, and threads, of an actor without a GPU.
        gpus: of an actor, may be a fraction; 0 runs on the CPU.
        address: of a cluster ("auto" takes the one this machine is part of); None starts one here.
    """

    setting: Setting
    workers: int | None = None
    cores: int = 1
    gpus: float = 0.0
    address: str | None = None

    def __call__(
        self, tasks: Sequence[Task], kept: Callable[[Task], Tensor | None]
    ) -> Iterator[tuple[Task, Made | Judged]]:
        ray = _ray()
        if not ray.is_initialized():
            ray.init(address=self.address, log_to_driver=False, logging_level="error")
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        workers = min(self.workers or self._room(ray), len(tasks))
        items = [
            {"task": pickle.dumps((place, task, kept(task)))} for place, task in enumerate(tasks)
        ]
        found = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            _Actor,
            fn_constructor_args=(self.setting, self.cores if self.gpus == 0 else None),
            batch_size=1,
            concurrency=workers,
            num_cpus=self.cores,
            num_gpus=self.gpus,
        )
        for row in found.iter_rows():
            place, events = pickle.loads(row["found"])
            for event in events:
                yield tasks[place], event

    def _room(self, ray: Any) -> int:
        """One actor a GPU, or as many as there are cores for."""
        there = ray.cluster_resources()
        if self.gpus:
            return max(1, int(there.get("GPU", 0) / self.gpus))
        return max(1, int(there.get("CPU", 1)) // self.cores)


class _Actor:
    """A worker in a process of its own."""

    def __init__(self, setting: Setting, threads: int | None) -> None:
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        self.worker = Worker(setting)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        found = []
        for item in batch["task"]:
            place, task, delta = pickle.loads(item)
            found.append(pickle.dumps((place, list(self.worker.work(task, delta)))))
        return {"found": found}


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
