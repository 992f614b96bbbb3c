"""Waterfall: time of each part of a defense."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from scc_fast.engine.batch import Batch
from scc_fast.engine.defense import Defense
from scc_fast.engine.drive import DirectPasses, carry_out
from scc_fast.engine.plan import Plan
from scc_fast.engine.session import Session


@dataclass(frozen=True)
class Stage:
    """Part of a defense.

    Args:
        step: name of the pass in the plan.
        part: "views", "forward", "head", "backward" or "step".
        ms: its time.
    """

    step: str
    part: str
    ms: float


def waterfall(session: Session, defense: Defense, batch: Batch) -> list[Stage]:
    """Timed parts of one piece, without graphs."""
    plan = defense.plan(session, batch.size)
    assert plan is not None
    clock = _Recorder(batch.x.device)
    timed = replace(session, mark=clock.mark)
    clock.mark("")
    carry_out(DirectPasses(timed, defense), defense, Batch(batch.x.contiguous(), batch.seeds))
    return clock.stages(plan)


class _Recorder:
    """Recorder of the times at which parts end."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._times = device, list[tuple[str, Any]]()

    def mark(self, part: str) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._times.append((part, event))
        else:
            self._times.append((part, time.perf_counter()))

    def stages(self, plan: Plan) -> list[Stage]:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        found, place = [], -1
        for (_, before), (part, after) in zip(self._times, self._times[1:], strict=False):
            place += part == "views"
            on_gpu = self._device.type == "cuda"
            ms = before.elapsed_time(after) if on_gpu else 1e3 * (after - before)
            found.append(Stage(plan.passes[min(place, len(plan.passes) - 1)].name, part, ms))
        return found
