"""SCC as a whole on the bundled model, against the reference, taken in turns in one process.

Both sides get the same images and seeds, gate off, and must give the same labels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rows
import scc_fast
import timing
from scc_fast import tiny
from session import Session


@pytest.mark.parametrize("batch", [1, 16])
def bench_defense(benchmark: Any, session: Session, batch: int) -> None:
    """What a user calls: pixels in, logits out."""
    model = scc_fast.load_model("tiny", device=session.kind)
    setting = {"config": {"gate": False}}
    plain = scc_fast.Defender(model, tiny.prompts(), backend="reference", **setting)
    fast = scc_fast.Defender(model, tiny.prompts(), **setting)
    images, _ = tiny.generate("validation", range(batch))
    images = images.to(session.kind)
    want, got = plain(images, 1), fast(images, 1)
    assert torch.equal(want.labels, got.labels)
    assert (want.delta - got.delta).abs().mean() < 1e-3 / 255
    peak = timing.peak_mib(lambda: fast(images, 1).logits, session.kind)

    clock = timing.Clock(session.kind)
    baseline_ms: list[float] = []

    def reference() -> None:
        baseline_ms.append(clock(lambda: plain(images, 1), "baseline"))

    benchmark.group = f"SCC, bundled model, batch {batch}"
    neighbours = timing.Others()
    rounds = 3 if session.quick else 25 if batch == 1 else 9
    benchmark.pedantic(lambda: fast(images, 1), setup=reference, rounds=rounds)
    if benchmark.stats is None:
        return
    measured = rows.timings(
        [1e3 * seconds for seconds in benchmark.stats.stats.data],
        baseline_ms,
        [1.0],
        images=batch,
        bytes_moved=0,
        copied=1,
        flops=0,
        flops_per_s=None,
        others=neighbours.cores() if session.kind == "cpu" else None,
    )
    unknown = ("bytes_moved", "gb_per_s", "copy_gb_per_s", "share_of_copy")
    unknown += ("floor_ms", "share_of_floor")
    session.add(
        **{**measured, **dict.fromkeys(unknown)},
        group="defense",
        name="SCC",
        model="tiny",
        batch=batch,
        classes=len(tiny.prompts()),
        precision="fp32",
        shape=f"{batch}×3×{images.shape[-1]}×{images.shape[-1]}, bundled model, gate off",
        backend=fast.backend,
        engine=fast.engine,
        baseline="reference",
        peak_mib=peak,
        reach=None,
    )
