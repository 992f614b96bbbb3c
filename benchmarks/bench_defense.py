"""SCC as a whole: pixels in, logits out, beside the eager reference loop that does the same work.

All that a test compares takes turns in one process, with the same pictures and seeds. Unless it is
said otherwise the config is METHOD.md's, gate off. Times are by the wall, what a caller sees.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import scc_fast
from scc_fast import SCCConfig, tiny
from scc_fast.bench import measure
from scc_fast.config import View
from session import Session, device_of

CONFIG = SCCConfig(gate=False)
CLASSES = 1000

REACH: dict[tuple[str, str, int, str], dict[str, float]] = {
    ("cpu", "tiny", 1, "auto"): {"ratio": 2.5},
    ("cpu", "ViT-B-32", 1, "fp32"): {"ratio": 1.15},
    ("cpu", "ViT-B-32", 1, "bf16"): {"ratio": 2.3},
    ("cpu", "ViT-B-32", 8, "fp32"): {"ratio": 1.15},
    ("cpu", "ViT-B-32", 8, "bf16"): {"ratio": 2.3},
    ("cuda", "ViT-B-32", 1, "auto"): {"p50_ms": 3.0, "p99_ms": 4.0, "ratio": 10.0},
    ("cuda", "ViT-B-32", 256, "auto"): {"share_of_floor": 0.45, "ratio": 4.0},
    ("cuda", "ViT-B-16", 1, "auto"): {"p50_ms": 5.0},
    ("cuda", "ViT-L-14", 1, "auto"): {"p50_ms": 12.0},
}


def cases(kind: str, quick: bool) -> list[tuple[str, int]]:
    """(model, batch), those of one model together."""
    if quick:
        return [("tiny", 1), ("tiny", 2)]
    if kind == "cpu":
        return [("tiny", 1), ("tiny", 16), ("ViT-B-32", 1), ("ViT-B-32", 8)]
    found = [("ViT-B-32", batch) for batch in (1, 8, 64, 256)]
    found += [(name, batch) for name in ("ViT-B-16", "ViT-B-16-SigLIP") for batch in (1, 64)]
    return [*found, ("ViT-L-14", 1), ("ViT-L-14", 8)]  # its reference takes 8 s for 64


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    kind, quick = device_of(metafunc.config), metafunc.config.getoption("--quick")
    if metafunc.function is bench_defense:
        metafunc.parametrize(("name", "batch"), cases(kind, quick))
    elif metafunc.function is bench_engines:
        metafunc.parametrize("batch", [1, 64])
    elif metafunc.function is bench_gate:
        metafunc.parametrize("batch", [1, 2] if quick else [1, 16 if kind == "cpu" else 64])


def swept(session: Session) -> Any:
    """The model of the gate's group and of the sweeps."""
    return session.model("tiny" if session.kind == "cpu" or session.quick else "ViT-B-32")


def defender(model: Any, classes: int | None = None, **options: Any) -> scc_fast.Defender:
    """A defender with random text embeddings, or the bundled model's prompts."""
    options = {"config": CONFIG, **options} if "method" not in options else options
    if classes is None and model.name == "tiny":
        return scc_fast.Defender(model, tiny.prompts(), **options)
    text = measure.unit_features(classes or CLASSES, model.embed_dim, model.device)
    return scc_fast.Defender(model, text_features=text, **options)


def reference(model: Any, classes: int | None = None) -> scc_fast.Defender:
    """The eager loop in float32."""
    # On 64 pictures at once the largest model's autograd graph is beyond any device's memory.
    most = {"max_batch": 128} if model.name == "ViT-L-14" else {}
    plain = {"backend": "reference", "engine": "eager", "precision": "fp32"}
    return defender(model, classes, **plain, **most)


def engines(session: Session, model: Any, batch: int) -> list[scc_fast.Defender]:
    """The engines that "auto" does not take and that need no compiler, where they are compared."""
    names = ["eager", "runner", "graph"] if session.kind == "cuda" else ["eager"]
    if session.kind == "cuda" and (model.name != "ViT-B-32" or batch not in (1, 64)):
        return []
    if session.kind == "cpu" and (model.name != "tiny" or batch > 1):
        return []
    taken = defender(model).engine
    return [defender(model, engine=name) for name in names if name != taken]


def bench_defense(benchmark: Any, session: Session, name: str, batch: int) -> None:
    """End to end, against the reference and one undefended forward pass."""
    model = session.model(name)
    images = measure.pictures(batch, model)
    both = session.kind == "cpu" and name != "tiny"
    least = defender(model)
    plain = measure.defense("reference", reference(model), images, session.machine, work=least)
    sides = [plain]
    for precision in ("bf16", "fp32") if both else ("auto",):
        try:
            bare = defender(model, method="none", precision=precision)
            ours = defender(model, precision=precision)
        except RuntimeError as error:  # a processor without bfloat16
            benchmark.extra_info[f"no {precision}"] = str(error)
            continue
        reach = None if session.quick else REACH.get((session.kind, name, batch, precision))
        sides.append(measure.defense("undefended", bare, images, session.machine))
        sides.append(measure.defense("scc", ours, images, session.machine, reach=reach))
    more = engines(session, model, batch)
    sides[1:1] = [
        measure.defense("scc", other, images, session.machine, work=least) for other in more
    ]
    if session.kind == "cpu":
        budget = session.budget_of(1.5 * session.budget, 5 if batch < 8 else 3)
    else:
        seconds = (6 if batch == 1 else 2) * session.budget
        budget = session.budget_of(seconds, 5 if batch < 64 else 3, 400)
    session.run(benchmark, "end to end", sides, budget)
    agree(sides)


def agree(sides: list[measure.Side]) -> None:
    """Check that every defense agrees with the reference."""
    for side in sides[1:]:
        if side.name == "scc":
            measure.check(sides[0].result, side.result, side.precision)


def bench_engines(benchmark: Any, session: Session, batch: int) -> None:
    """torch.compile of the modules; takes a minute: CUDA only, and last."""
    if session.kind == "cpu" or session.quick:
        pytest.skip("compilations are measured on CUDA alone, and not in a quick run")
    if session.late:
        pytest.skip("--max-seconds are over")
    model = session.model("ViT-B-32")
    images = measure.pictures(batch, model)
    both = {"reference": reference(model), "scc": defender(model, engine="compile")}
    sides = [
        measure.defense(name, one, images, session.machine, work=defender(model))
        for name, one in both.items()
    ]
    session.run(
        benchmark, "end to end", sides, session.budget_of(session.budget), baseline_known=True
    )
    agree(sides)


def bench_gate(benchmark: Any, session: Session, batch: int) -> None:
    """Gate against no gate, for clean, half clean and attacked pictures."""
    model = swept(session)
    images = measure.pictures(batch, model)
    plain = defender(model)
    drift = plain(images, 1).drift.sort().values.tolist()
    middle = sum(drift[batch // 2 - 1 : batch // 2 + 1]) / 2
    taus = {"all flagged": 2 * drift[-1] + 1, "half flagged": middle, "all clean": 0.0}
    if batch == 1:
        del taus["half flagged"]
    sides = [measure.defense("gate off", plain, images, session.machine)]
    for name, tau in taus.items():
        gated = defender(model, config=dataclasses.replace(CONFIG, gate=True, tau=tau))
        flagged = int(gated(images, 1).flagged.sum())
        fast = session.kind == "cuda" and batch == 1 and name == "all clean" and not session.quick
        side = measure.defense(
            f"gate on, {name}",
            gated,
            images,
            session.machine,
            flagged=flagged,
            reach={"p50_ms": 1.0} if fast else None,
        )
        sides.append(side)
    session.run(benchmark, "gate", sides, session.budget_of(2 * session.budget))


def bench_batches(benchmark: Any, session: Session) -> None:
    """Batch sizes, relative to one picture."""
    model = swept(session)
    batches = (1, 2, 4, 8, 16, 32) if session.kind == "cpu" else (1, 4, 16, 64, 256)
    ours = defender(model)
    sides = [
        measure.defense(f"batch {n}", ours, measure.pictures(n, model), session.machine)
        for n in (batches[:2] if session.quick else batches)
    ]
    session.run(benchmark, "batch sweep", sides, session.budget_of(3 * session.budget))


def bench_classes(benchmark: Any, session: Session) -> None:
    """Numbers of classes up to twenty thousand, relative to two."""
    model = swept(session)
    counts = (2, 10, 100, 1000, 5000, 20_000) if session.kind == "cpu" else (2, 1000, 20_000)
    images = measure.pictures(1, model)
    sides = [
        measure.defense(f"{k} classes", defender(model, k), images, session.machine)
        for k in (counts[:2] if session.quick else counts)
    ]
    session.run(benchmark, "class-count sweep", sides, session.budget_of(3 * session.budget))


def bench_settings(benchmark: Any, session: Session) -> None:
    """Numbers of views and steps, relative to METHOD.md's."""
    model = swept(session)
    shifts = [View(shift=(y, x)) for y, x in ((1, 1), (-1, -1), (1, -1), (-1, 1), (2, 2), (-2, -2))]
    many = (View(), View(flip=True), *shifts)
    changes: dict[str, dict[str, Any]] = {
        "as METHOD.md": {},
        "1 view": {"spatial": False},
        "2 views": {"views": many[:2]},
        "8 views": {"views": many},
        "1 warm-up step": {"warmup_steps": 1},
        "4 warm-up steps": {"warmup_steps": 4},
        "no semantic step": {"semantic_steps": 0},
        "4 semantic steps": {"semantic_steps": 4},
    }
    if session.kind == "cuda":  # graphs of eight settings are kept
        del changes["2 views"], changes["4 semantic steps"]
    images = measure.pictures(1, model)
    sides = [
        measure.defense(
            name, defender(model, config=dataclasses.replace(CONFIG, **change)), images,
            session.machine,
        )
        for name, change in list(changes.items())[: 2 if session.quick else None]
    ]  # fmt: skip
    group = "views and steps sweep"
    session.run(benchmark, group, sides, session.budget_of(3 * session.budget))
