"""Time of the first call, and memory of a Defender."""

from __future__ import annotations

import copy
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench_defense import CLASSES, defender, reference
from scc_fast.bench import measure, rows, timing
from session import Session, device_of


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    kind, quick = device_of(metafunc.config), metafunc.config.getoption("--quick")
    if metafunc.function is bench_first_call:
        names = ["tiny", "ViT-B-32"] if kind == "cpu" else ["ViT-B-32"]
        metafunc.parametrize("name", ["tiny"] if quick else names)
        return
    sizes = [("tiny", 1), ("tiny", 16), ("ViT-B-32", 1)]
    if kind == "cuda":
        sizes = [("ViT-B-32", 1), ("ViT-B-32", 64), ("ViT-B-32", 256)]
    metafunc.parametrize(("name", "batch"), [("tiny", 2)] if quick else sizes)


def bench_first_call(benchmark: Any, session: Session, name: str) -> None:
    """First call of a process, with and without warmup(), against later calls."""
    script = str(Path(__file__).parent / "first_call.py")
    threads = str(torch.get_num_threads())
    found: dict[str, list[dict[str, Any]]] = {"yes": [], "no": []}

    def process(warm: str) -> None:
        command = [sys.executable, script, name, session.kind, threads, warm]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found[warm].append(json.loads(done.stdout.splitlines()[-1]))

    benchmark.group = f"first call: {name}"
    neighbours = timing.Others()
    benchmark.pedantic(lambda: process("no"), setup=lambda: process("yes"), rounds=1)
    others = neighbours.cores() if session.kind == "cpu" else None
    if benchmark.stats is None:
        return
    cold, warm = found["no"], found["yes"]
    steady = [statistics.median(one["calls"][1:]) for one in cold + warm]
    told = {key: cold[0][key] for key in ("precision", "backend", "engine", "shape")}
    several = {
        "later call": steady,
        "first call": [one["calls"][0] for one in cold],
        "first call after warmup()": [one["calls"][0] for one in warm],
        "warmup()": [one["warmup"] for one in warm],
        "import": [one["import"] for one in cold + warm],
        "load_model()": [one["load"] for one in cold + warm],
        "Defender()": [one["defender"] for one in cold + warm],
    }
    for what, times in several.items():
        measured = rows.timings(times, steady, images=1, others=others)
        measured["loaded"] = (others or 0.0) > rows.TOO_BUSY  # what happens once has no rounds
        if "call" not in what:
            measured["images_per_s"] = None
        session.add(
            group="first call",
            name=what,
            model=name,
            batch=1,
            classes=1000,
            baseline="later call",
            peak_mib=None,
            reach=None,
            **told,
            **measured,
            **rows.NO_TRAFFIC,
            **rows.floored(1.0, None),
        )


def bench_memory(benchmark: Any, session: Session, name: str, batch: int) -> None:
    """Peak memory from model to result, against the reference."""
    kept = session.model(name)
    images = measure.pictures(batch, kept)
    made: dict[str, Any] = {}

    def whole(key: str) -> Any:
        model = copy.copy(kept)  # as if new: weights and graphs of ours are kept with a model
        if key == "reference":  # with text embeddings, whose making is not the defense's
            one = made[key] = reference(model, CLASSES)
        else:
            one = made[key] = defender(model, CLASSES, precision=key)
        if session.kind == "cuda":  # a graph's memory is taken where it is captured
            one.warmup(batch)
        return one(images, 1).logits

    both = session.kind == "cpu" and name != "tiny"
    peaks = {"reference": timing.peak_mib(lambda: whole("reference"), session.kind)}
    for precision in ("fp32", "bf16") if both else ("auto",):
        try:
            peaks[precision] = timing.peak_mib(lambda p=precision: whole(p), session.kind)
        except RuntimeError as error:  # a processor without bfloat16
            benchmark.extra_info[f"no {precision}"] = str(error)
    benchmark.group = f"memory: {name}, batch {batch}"
    benchmark.pedantic(lambda: made[next(reversed(peaks))](images, 1), rounds=1)
    if benchmark.stats is None:
        return
    asked = session.kind == "cuda" and name == "ViT-B-32" and batch == 64
    for key, peak in peaks.items():
        one = made[key]
        ours = key != "reference"
        row = session.add(
            **rows.NO_TIME,
            **rows.NO_TRAFFIC,
            group="memory",
            name="scc" if ours else key,
            model=name,
            batch=batch,
            classes=len(one.text_features),
            precision=one.precision,
            shape=f"{'×'.join(map(str, images.shape))}, {measure.setting(one)}",
            backend=one.backend,
            engine=one.engine,
            baseline="reference",
            ratio=peaks["reference"] / peak if peak else None,
            peak_mib=peak,
            spread=0.0,
            others=None,
            loaded=False,
            rounds=1,
            reach={"ratio": 2.0} if asked and ours and not session.quick else None,
        )
        session.hold([row])
