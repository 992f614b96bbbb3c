"""Implementation of `scc-fast evaluate`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from scc_fast.config import parse_epsilon, shown
from scc_fast.evaluate.on_ray import Driver, RayExecutor
from scc_fast.evaluate.results import Row
from scc_fast.evaluate.runner import Asked, Run
from scc_fast.evaluate.worker import Setting, Worker


@dataclass(frozen=True)
class Cluster:
    """Options of `--engine ray`; see RayExecutor."""

    workers: int | None = None
    cores: int = 1
    gpus: float = 0.0
    address: str | None = None


@dataclass(frozen=True)
class Outcome:
    """Results of one seed."""

    folder: Path
    rows: list[Row]
    times: list[dict[str, Any]]


def listed(name: str, text: str) -> tuple[str, ...]:
    """Parts of "a,b,c"; commas inside brackets, as in scc{"views": [...]}, do not split.

    Raises:
        ValueError: empty list.
    """
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    parts = [part.strip() for part in parts if part.strip()]
    if not parts:
        raise ValueError(f"{name} must be a list such as none,scc; got {shown(text)}")
    return tuple(parts)


def budgets(text: str) -> tuple[float, ...]:
    """Budgets of "1/255,4/255"."""
    return tuple(parse_epsilon(part) for part in listed("--eps", text))


def seeds_of(text: str) -> tuple[int, ...]:
    """Seeds of "0,1,2"."""
    try:
        found = tuple(dict.fromkeys(int(part) for part in listed("--seeds", text)))
        if not all(0 <= seed < 1 << 32 for seed in found):
            raise ValueError
        return found
    except ValueError:
        raise ValueError(
            f"--seeds must be whole numbers in [0, 2^32) such as 0,1,2; got {shown(text)}"
        ) from None


def run_all(
    settings: list[Setting],
    asked: Asked,
    out: Path,
    cluster: Cluster | None,
    *,
    start: Callable[[str, int, int], None],
    tick: Callable[[str], None],
    say: Callable[[str], None] = print,
) -> list[Outcome]:
    """Run every setting in turn, with model and data loaded once.

    `start` gets the run's name, its number of judgements, and how many are done.
    """
    outcomes = []
    first: Worker | None = None
    for setting in settings:
        loaded = (None, None) if first is None else (first.model, first.data)
        worker = (
            Worker(setting, *loaded) if cluster is None else Driver(setting, cluster.gpus, *loaded)
        )
        first = worker if first is None else first
        run = Run(setting, out, worker)
        execute = None
        if cluster is not None:
            execute = RayExecutor(
                setting,
                run.store.facts,
                workers=cluster.workers,
                cores=cluster.cores,
                gpus=cluster.gpus,
                address=cluster.address,
            )
        rows = run.go(
            asked,
            execute=execute,
            start=partial(start, run.store.folder.name),
            tick=tick,
            say=say,
        )
        outcomes.append(Outcome(run.store.folder, rows, run.timings()))
    return outcomes
