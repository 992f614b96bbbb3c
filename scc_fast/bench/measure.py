"""Interleaved timing of Defenders and other calls: one round calls each side once.

The rounds may be driven by another tool, such as pytest-benchmark.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from scc_fast.api import Defender
from scc_fast.bench import timing
from scc_fast.bench.machine import Machine
from scc_fast.bench.rows import NO_TRAFFIC, Row, floored, timings
from scc_fast.defenses.scc import SCC, Ascent
from scc_fast.result import DefenseResult

Call = Callable[[], Any]
# (setup of each round, timed call, rounds) -> ms per round; None: not timed
Driver = Callable[[Call, Call, int], "list[float] | None"]

_LONG_MS = 4000.0  # longer calls are not repeated to measure memory


@dataclass(frozen=True)
class Budget:
    """Time for a case: `seconds` of rounds, within `fewest` and `most` rounds."""

    seconds: float
    fewest: int = 5
    most: int = 200


@dataclass
class Side:
    """One side of a comparison, and its columns in the row.

    Args:
        name, model, precision, backend, engine, shape: columns of the row.
        images: pictures per call.
        floor: lower bound of the time, ms; called once, after the rounds.
        reach: targets of the row.
        warmup: compiles and captures; called once, before the rounds.
    """

    name: str
    call: Call
    model: str
    images: int
    precision: str
    backend: str
    engine: str
    shape: str
    classes: int | None = None
    floor: Callable[[], float] | None = None
    reach: dict[str, float] | None = None
    warmup: Call | None = None
    times: list[float] = field(default_factory=list)
    result: Any = None  # of the first call


def defense(
    name: str,
    defender: Defender,
    images: Tensor,
    machine: Machine,
    *,
    seeds: int = 1,
    flagged: int | None = None,
    reach: dict[str, float] | None = None,
    work: Defender | None = None,
) -> Side:
    """Side of a Defender on pictures.

    Args:
        flagged: number of repaired images; None: all.
        work: the Defender whose plan and cost set the floor; None: this one.
    """
    batch = len(images)

    def floor() -> float:
        least = defender if work is None else work
        plan, cost = least.plan(), least.cost()
        many = batch if flagged is None else flagged
        parts = [(plan, many), (plan.clean(), batch - many)]
        # Not the sum: weights are read once for all images.
        return max(machine.floor_ms(p, cost, n, defender.precision) for p, n in parts if n)

    # On a CPU only torch.compile compiles, and never for the reference.
    compiles = machine.kind == "cuda" or defender.engine == "compile"
    compiles = compiles and defender.backend != "reference"
    return Side(
        name,
        lambda: defender(images, seeds),
        model=defender.model.name,
        images=batch,
        classes=len(defender.text_features),
        precision=defender.precision,
        backend=defender.backend,
        engine=defender.engine,
        shape=f"{'×'.join(map(str, images.shape))}, {setting(defender)}",
        floor=floor,
        reach=reach,
        warmup=(lambda: defender.warmup(batch)) if compiles else None,
    )


def setting(defender: Defender) -> str:
    """Description of the method and its steps."""
    defense, config = defender.defense, defender.config
    views = len(defender.views(min(defender.model.image_size)))
    said = f"{defender.method}, {views} view{'s' if views > 1 else ''}"
    if not isinstance(defense, Ascent):
        return said
    semantic = f" + {defense.semantic_steps}" if isinstance(defense, SCC) else ""
    said += f", {defense.warmup_steps}{semantic} steps"
    gated = defense.has_gate and config.tau < math.inf
    return said + (f", gate at {config.tau:.3g}" if gated else ", gate off")


def take_turns(sides: Sequence[Side], timed: int, kind: str, budget: Budget, drive: Driver) -> bool:
    """Run the rounds, filling each side's `times` and `result`; False if nothing was timed.

    The first round is a warm-up; it counts only if the fewest rounds exceed the budget.
    """
    clock = timing.Clock(kind)
    first = []
    for side in sides:
        first.append(clock.wall(lambda side=side: _first(side)))  # type: ignore[misc]
    once = sum(first) / 1e3
    slow = once * budget.fewest > budget.seconds
    rounds = max(budget.fewest, min(budget.most, int(budget.seconds / max(once, 1e-6))))
    if slow:
        for side, ms in zip(sides, first, strict=True):
            side.times.append(ms)
        rounds -= 1
    if rounds < 1:
        return True

    def others() -> None:
        for place, side in enumerate(sides):
            if place != timed:
                side.times.append(clock.wall(side.call))

    def call() -> None:
        sides[timed].call()
        clock.wait()

    found = drive(others, call, rounds)
    if found is None:
        return False
    sides[timed].times += found
    return True


def _first(side: Side) -> None:
    side.result = side.call()


def loop(before: Call, call: Call, rounds: int) -> list[float]:
    """Default driver of rounds."""
    found = []
    for _ in range(rounds):
        before()
        started = time.perf_counter()
        call()
        found.append((time.perf_counter() - started) * 1e3)
    return found


def measure(
    sides: Sequence[Side],
    group: str,
    machine: Machine,
    budget: Budget,
    drive: Driver = loop,
    timed: int = -1,
) -> list[Row]:
    """A row per side, the first being the baseline; empty if nothing was timed.

    rows.finished(machine.columns() | row) completes a row.
    """
    for side in sides:
        if side.warmup is not None:
            side.warmup()
    neighbours = timing.Others()
    if not take_turns(sides, timed % len(sides), machine.kind, budget, drive):
        return []
    others = neighbours.cores() if machine.kind == "cpu" else None
    baseline = sides[0]
    found = []
    for side in sides:
        times = timings(side.times, baseline.times, images=side.images, others=others)
        # A replay allocates only its results: the group "memory" measures the capture.
        seen = side.engine != "graph" and times["p50_ms"] < _LONG_MS
        floor = None if side.floor is None else side.floor()
        found.append(
            described(side, group, baseline.name)
            | times
            | NO_TRAFFIC
            | floored(times["p50_ms"], floor)
            | {"peak_mib": timing.peak_mib(side.call, machine.kind) if seen else None}
        )
    return found


def described(side: Side, group: str, baseline: str) -> Row:
    """Columns that identify a side."""
    return {
        "group": group,
        "name": side.name,
        "model": side.model,
        "batch": side.images,
        "classes": side.classes,
        "precision": side.precision,
        "shape": side.shape,
        "backend": side.backend,
        "engine": side.engine,
        "baseline": baseline,
        "reach": side.reach,
    }


def check(want: DefenseResult, got: DefenseResult, precision: str) -> None:
    """Check that two results are of the same computation (tests check parity).

    Raises:
        RuntimeError: their logits disagree.
    """
    a, b = (normalize(r.logits - r.logits.mean(-1, keepdim=True), dim=-1) for r in (want, got))
    alike = float((a * b).sum(-1).mean())
    least = 0.99 if precision == "fp32" else 0.9
    if not alike >= least:
        raise RuntimeError(
            f"the defense in {precision} and the reference disagree: the cosine of their logits is "
            f"{alike:.3f}, at least {least} is asked"
        )


def unit_features(classes: int, width: int, device: torch.device | str) -> Tensor:
    """(classes, width) fixed random text embeddings of unit length."""
    generator = torch.Generator().manual_seed(0)
    return normalize(torch.randn(classes, width, generator=generator), dim=-1).to(device)


def pictures(batch: int, model: Any) -> Tensor:
    """(batch, 3, H, W) fixed random pixels in [0, 1] of a model's size."""
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, 3, *model.image_size, generator=generator).to(model.device)
