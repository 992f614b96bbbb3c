"""Every op on every backend against the eager reference, taken in turns in one process.

A round is: the baseline once, a copy of the op's traffic once, the op once. First the backend must
agree with the baseline. A missed reach does not fail the run (a loaded machine must not be red)
unless --require-reach.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest

import encoder_work
from op_work import CROPS, PERSPECTIVES, Case, Work, work
from scc_fast import ops
from scc_fast.bench import rows, timing
from session import Session, device_of

HEADS = ("drift_head", "pseudo_label", "margin_head", "mean_logits")
WARM_UP = 3
FEWEST, MOST = 7, 200


def cases(kind: str) -> list[Case]:
    """Cases of all rows except graphs."""
    cuda = kind == "cuda"
    large = 256 if cuda else 64
    bandwidth = {"share_of_copy": 0.75} if cuda else {"ratio": 4.0, "share_of_copy": 0.5}
    speed = {} if cuda else {"ratio": 2.0}
    found = []
    for batch in (1, 64, 256) if cuda else (1, 64):
        reach = bandwidth if batch == large else {}
        half = reach if cuda else {}  # a GPU's encoder takes bf16
        found += [
            Case("make_views", batch, reach=reach),
            Case("make_views", batch, "bf16", reach=half),
            Case("make_views", batch, "bf16", patch=32),
            Case("make_views", batch, patch=32),
            Case("make_views_adjoint", batch),
            Case("pgd_step_", batch, reach=reach),
            Case("pgd_step_", batch, "bf16", reach=half),
            Case("pgd_step_", batch, "bf16", patch=32),
            Case("pgd_step_", batch, baseline="autograd backward"),
        ]
        warps = {"ratio": 3.0} if batch == 1 and not cuda else {}
        found += [
            Case("warp_views", batch, count=32 if batch == 1 else 4, baseline=baseline, reach=warps)
            for baseline in (CROPS, PERSPECTIVES)
        ]
        found += [Case(op, batch, classes=1000, reach=speed if batch == 64 else {}) for op in HEADS]
        philox = {"ratio": 0.7} if batch == 64 and not cuda else {}
        found.append(Case("philox_uniform", batch, baseline="torch.rand", reach=philox))
        found.append(Case("philox_normal", batch, baseline="torch.randn"))
    for batch, precision in ((1, "fp32"), (1, "bf16"), (16, "fp32"), (16, "bf16")):
        for op in encoder_work.OPS:
            if op.startswith("attention") and cuda:
                continue  # torch's own serves there
            width = 3072 if op.startswith("gelu") else 768
            tokens = encoder_work.TOKENS
            found.append(
                Case(op, batch, precision, tokens=tokens, width=width, baseline="torch, eager")
            )
    many = {"classes": 20_011, "width": 768, "reach": {"peak_mib": 64.0}}
    return found + [Case(op, 128, **many) for op in HEADS]


def graph_cases() -> list[Case]:
    """Cases of ops in a captured defense at batch 1; CUDA only."""
    views = [
        Case("make_views", 1, "bf16"),
        Case("make_views", 1, "bf16", patch=32),
        Case("pgd_step_", 1, "bf16"),
    ]
    return views + [Case(op, 1, classes=1000, reach={"p50_ms": 0.015}) for op in HEADS]


def quickened(case: Case) -> Case:
    """Small case without targets."""
    classes = case.classes and min(case.classes, 100)
    small = dataclasses.replace(case, batch=min(case.batch, 4), size=64, classes=classes, reach={})
    return dataclasses.replace(small, width=128) if case.tokens else small


def backends(case: Case, kind: str) -> list[str]:
    """Available backends, without Triton's interpreter."""
    found = [name for name, why in ops.backends_of(case.op, kind).items() if why is None]
    return [name for name in found if not (name == "triton" and kind == "cpu")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    kind = device_of(metafunc.config)
    if metafunc.function is bench_graph and kind != "cuda":
        why_not = pytest.mark.skip(reason="CUDA graphs need a CUDA device")
        metafunc.parametrize(("case", "backend"), [pytest.param(None, None, marks=why_not)])
        return
    chosen = graph_cases() if metafunc.function is bench_graph else cases(kind)
    if metafunc.config.getoption("--quick"):
        chosen = list({case.id: case for case in map(quickened, chosen)}.values())
    both = [(case, name) for case in chosen for name in backends(case, kind)]
    if metafunc.function is bench_graph:  # its reference copies constants, which no graph captures
        both = [(case, name) for case, name in both if name != "reference"]
    ids = [f"{case.id}-{name}" for case, name in both]
    metafunc.parametrize(("case", "backend"), both, ids=ids)


def bench_op(benchmark: Any, session: Session, case: Case, backend: str) -> None:
    """Op called from Python."""
    job = (encoder_work.work if case.tokens else work)(case, session.kind)
    job.check(backend)
    copy = timing.Copy(job.bytes_moved, session.kind)
    for i in range(WARM_UP):
        job.baseline(i % job.sets), copy(), job.ours(backend, i % job.sets)
    peak = timing.peak_mib(lambda: job.ours(backend, 0), session.kind)
    _measure(
        benchmark, session, case, backend, job, copy,
        lambda i: job.ours(backend, i), job.baseline, engine="eager", peak_mib=peak,
    )  # fmt: skip


def bench_graph(benchmark: Any, session: Session, case: Case, backend: str) -> None:
    """Op replayed in a CUDA graph: time without launches."""
    job = (encoder_work.work if case.tokens else work)(case, session.kind)
    job.check(backend)
    copy = timing.Copy(job.bytes_moved, session.kind)
    ours = timing.Graph(lambda: job.ours(backend, 0))
    try:
        baseline = timing.Graph(lambda: job.baseline(0))
    except RuntimeError as error:  # eager code may do what a capture forbids
        baseline = None
        benchmark.extra_info["baseline not captured"] = str(error)
    _measure(
        benchmark, session, case, backend, job, timing.Graph(copy), ours, baseline,
        engine="graph", peak_mib=None, copied=copy.bytes, repeats=timing.REPLAYS,
    )  # fmt: skip


def _measure(
    benchmark: Any,
    session: Session,
    case: Case,
    backend: str,
    job: Work,
    copy: Any,
    ours: Callable[[int], Any],
    baseline: Callable[[int], Any] | None,
    *,
    engine: str,
    peak_mib: float | None,
    copied: int | None = None,
    repeats: int = 1,
) -> None:
    """Take turns for the budget; add the row, and fail on a missed reach if that was asked."""
    clock = timing.Clock(session.kind)
    ours_ms: list[float] = []
    baseline_ms: list[float] = []
    copy_ms: list[float] = []
    turn = itertools.count()

    def others() -> tuple[tuple[int], dict[str, Any]]:
        i = next(turn) % job.sets
        if baseline:
            baseline_ms.append(clock(lambda: baseline(i), "baseline") / repeats)
        copy_ms.append(clock(lambda: copy(), "copy") / repeats)
        if session.kind == "cuda":  # pytest-benchmark's own clock would count the launches
            ours_ms.append(clock(lambda: ours(i), "ours") / repeats)
        return (i,), {}

    def timed(i: int) -> None:
        ours(i)
        clock.wait()

    started = time.perf_counter()
    for _ in range(2):
        (i,), _ = others()
        timed(i)
    once = (time.perf_counter() - started) / 2
    for seen in (ours_ms, baseline_ms, copy_ms):
        seen.clear()
    budget = session.budget_of(session.budget, FEWEST, MOST)
    rounds = max(budget.fewest, min(budget.most, int(budget.seconds / once)))
    benchmark.group = f"{case.name}, {case.shape}, {case.precision}, {engine}"
    neighbours = timing.Others()
    benchmark.pedantic(timed, setup=others, rounds=rounds)
    if benchmark.stats is None:  # --benchmark-disable: the check alone
        return
    if session.kind == "cpu":
        ours_ms = [1e3 * seconds for seconds in benchmark.stats.stats.data]
    # What a user gets is asked to reach it, not what else there is.
    served = backend == ops.choose(case.op, session.kind, None)
    neighbours_busy = neighbours.cores() if session.kind == "cpu" else None
    times = rows.timings(ours_ms, baseline_ms, images=case.batch, others=neighbours_busy)
    moved = rows.traffic(
        times["p50_ms"],
        copy_ms,
        bytes_moved=job.bytes_moved,
        copied=copied or copy.bytes,
        flops=job.flops,
        flops_per_s=session.machine.flops_per_s() if job.flops else None,
    )
    row = session.add(
        group="ops",
        name=case.name,
        model=None,
        batch=case.batch,
        classes=case.classes,
        precision=case.precision,
        shape=case.shape,
        backend=backend,
        engine=engine,
        baseline=case.baseline if baseline else None,
        peak_mib=peak_mib,
        reach=case.reach if case.reach and served else None,
        **times,
        **moved,
    )
    benchmark.extra_info.update({k: v for k, v in row.items() if k not in ("versions", "shape")})
    if session.require and row["reached"] is False:
        pytest.fail(f"{case.id}-{backend}: missed {', '.join(rows.misses(row))}")
