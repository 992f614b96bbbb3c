"""View extrapolation's sweep: views × c × rule, on pictures of a validation part.

    python benchmarks/extrapolation.py tiny              # the bundled model, 300 pictures
    python benchmarks/extrapolation.py photos MODEL.py KEPT.pt PHOTOS.pt [FORM]
    python benchmarks/extrapolation.py scc               # SCC's steps × the strength of its mean
    python benchmarks/extrapolation.py figure

The second takes a network and photographs of one's own: MODEL.py has load(KEPT.pt, FORM), a model
as scc_fast takes it; PHOTOS.pt holds "pixels" (n, 3, H, W) uint8, "labels" (n,) and "names" (K,).
Its first half is the validation part. Every picture is encoded once for each view that any set of
views has; all rules are then read off the features. Results are in results/cpu/extrapolation; SCC's
stand beside it, in scc-strength.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scc_fast import Defender, View, image_seeds, load_model, ops, tiny
from scc_fast._files import write_json
from scc_fast._progress import with_progress
from scc_fast.attacks import parse_attack
from scc_fast.config import IDENTITY, resolve_views
from scc_fast.engine.batch import Batch

STORED = Path(__file__).parent / "results" / "cpu" / "extrapolation"
PICTURES = {
    "clean": None, "damaged": ("damaged", 0.0),
    **{f"PGD-10 {n}/255": ("pgd10", n / 255) for n in (1, 2, 4)},
    "own answer 4/255": ("pgd-own10", 4 / 255), "random class 4/255": ("pgd-random10", 4 / 255),
}  # fmt: skip
JUDGED = ("clean", "damaged", "own answer 4/255")  # no label leaks into these


def _both(p: float) -> list[View]:
    return [View(shift=(p, p)), View(flip=True, shift=(-p, -p))]


P = 1 / 32
SETS: dict[str, list[View]] = {
    "2F flip": [View(flip=True)],
    "2F shift": [View(shift=(P, P))],
    "3F": [View(flip=True), View(shift=(P, P))],
    "3F, 1/16": [View(flip=True), View(shift=(2 * P, 2 * P))],
    "4F": [View(flip=True), *_both(P)],
    "4F, 1/64": [View(flip=True), *_both(P / 2)],
    "4F, 1/16": [View(flip=True), *_both(2 * P)],
    "5F": [View(flip=True), *_both(P), View(shift=(2 * P, 2 * P))],
    "5F, four corners": [
        View(shift=(P, P)), View(shift=(-P, -P)), View(shift=(P, -P)), View(flip=True)
    ],
    "6F": [View(flip=True), *_both(P), *_both(2 * P)],
    "8F": [View(flip=True), *_both(P), *_both(2 * P), *_both(3 * P)],
}  # fmt: skip
STRENGTHS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)
THRESHOLDS = (0.7, 0.8, 0.85, 0.9)


def rules() -> Iterator[tuple[str, float, float, dict[str, Any]]]:
    """Rule, c, θ, and the arguments of view_weights."""
    for c in STRENGTHS:
        yield "constant", c, math.nan, {"low": c, "high": c, "threshold": math.inf}
    for c, theta in itertools.product(STRENGTHS[2:], THRESHOLDS):
        yield "agreement", c, theta, {"low": 1.0, "high": c, "threshold": theta}
    for c in (1.5, 2.25, 3.0):
        given = {"low": 0.45, "high": c, "threshold": math.inf, "geodesic": True}
        yield "geodesic", c, math.nan, given


def features(defender: Defender, x: Tensor, views: Sequence[View]) -> Tensor:
    """f of every view, (L, B, D)."""
    session, parts = defender.session, []
    for part in x.split(16):
        batch = Batch(part, torch.zeros(len(part), dtype=torch.int64))
        seen = session.views(batch, resolve_views(tuple(views), min(batch.size)))
        parts.append(seen.forward(None))
    return torch.cat(parts, dim=1)


@torch.no_grad()
def sweep(defender: Defender, x: Tensor, labels: Tensor, name: str) -> dict[str, Any]:
    """Accuracies of every set of views and rule on every kind of pictures."""
    every = list(dict.fromkeys([IDENTITY, *itertools.chain(*SETS.values())]))
    table, seeds = defender.session.table, image_seeds(5, len(x))
    rows: dict[tuple[Any, ...], dict[str, float]] = {}
    clean: dict[str, dict[str, float]] = {}
    for kind, attack in with_progress(list(PICTURES.items()), f"{name}: pictures"):
        shown = x
        if attack is not None:
            made = parse_attack(attack[0], attack[1])
            parts = zip(x.split(50), labels.split(50), seeds.split(50), strict=True)
            shown = torch.cat([made.run(defender, *part) for part in parts])
        found = features(defender, shown, every)
        for views, wanted in SETS.items():
            part = found[[0, *(every.index(view) for view in wanted)]]
            for rule, c, theta, given in rules():
                if rule == "agreement" and len(wanted) < 2:  # one drift agrees with itself
                    continue
                weights, cosine, agreement = ops.view_weights(part, **given)
                logits = ops.mean_logits(part, table, weights, unit=True)
                right = (logits.argmax(dim=1) == labels).double().mean().item()
                rows.setdefault((views, rule, c, theta), {})[kind] = 100 * right
            if kind == "clean":
                clean[views] = {
                    "mean cosine": cosine.mean().item(),
                    "agreement": agreement.mean().item(),
                    "agreement, 95 %": agreement.quantile(0.95).item(),
                }
        alone = ops.mean_logits(found[:1], table).argmax(dim=1) == labels
        key = ("1F", "none", 0.0, math.nan)
        rows.setdefault(key, {})[kind] = 100 * alone.double().mean().item()
    listed = [
        {"views": views, "rule": rule, "c": c, "theta": None if math.isnan(theta) else theta}
        | found
        for (views, rule, c, theta), found in rows.items()
    ]
    return {"model": name, "n": len(x), "clean statistics": clean, "rows": listed}


@torch.no_grad()
def with_repair() -> dict[str, Any]:
    """SCC on the bundled model with fewer steps and a stronger mean: whether the two add up."""
    model, prompts = load_model("tiny"), tiny.prompts()
    x, labels = tiny.generate("validation", range(100))
    bare, seeds = Defender(model, prompts, method="none"), image_seeds(5, len(x))
    shown = {}
    for kind in ("clean", "PGD-10 4/255", "own answer 4/255"):
        attack = PICTURES[kind]
        shown[kind] = x if attack is None else parse_attack(*attack).run(bare, x, labels, seeds)
    rows = []
    cases = list(itertools.product(((2, 2), (2, 0), (1, 1), (1, 0)), (1.0, 1.5, 2.0, 2.5)))
    for (warmup, semantic), strength in with_progress(cases, "SCC"):
        config = {"warmup_steps": warmup, "semantic_steps": semantic, "strength": strength}
        config |= {"gate": False, "semantic": semantic > 0}
        scc = Defender(model, prompts, method="scc", config=config)
        row = {"warm-up steps": warmup, "semantic steps": semantic, "strength": strength}
        for kind, pictures in shown.items():
            right = scc(pictures, 3).labels == labels
            row[kind] = round(100 * right.double().mean().item(), 1)
        rows.append(row)
        print(*row.values(), flush=True)
    return {"model": "tiny", "n": len(x), "rows": rows}


def judged(row: dict[str, Any]) -> float:
    """The worst of clean, damaged and the attack that knows no label."""
    return min(row[kind] for kind in JUDGED)


def of_photos(module: Path, kept: Path, photos: Path, form: str) -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location("photo_model", module)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    model, data = made.load(kept, form), torch.load(photos, weights_only=True)
    half = len(data["labels"]) // 2
    prompts = [made.TEMPLATE.format(name) for name in data["names"]]
    defender = Defender(model, prompts, method="none")
    x = data["pixels"][:half].float() / 255
    return sweep(defender, x, data["labels"][:half], model.name)


def of_tiny() -> dict[str, Any]:
    defender = Defender(load_model("tiny"), tiny.prompts(), method="none")
    return sweep(defender, *tiny.generate("validation", range(300)), "tiny")


def figure() -> None:
    """Best of the validation part against F, for each rule, one panel a network."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = [json.loads(file.read_text()) for file in sorted(STORED.glob("*.json"))]
    _, axes = plt.subplots(1, len(runs), figsize=(4.2 * len(runs), 3.6), squeeze=False, sharey=True)
    for axis, run in zip(axes[0], runs, strict=True):
        for rule in ("none", "constant", "agreement", "geodesic"):
            best: dict[int, float] = {}
            for row in run["rows"]:
                if row["rule"] == rule:
                    cost = int(row["views"].split("F")[0])
                    best[cost] = max(best.get(cost, 0.0), judged(row))
            axis.plot(list(best), list(best.values()), "o-", label=rule)
        axis.set(title=f"{run['model']}, n = {run['n']}", xlabel="forward passes")
    axes[0][0].set_ylabel("worst of clean, damaged,\nown answer 4/255 (%)")
    axes[0][-1].legend()
    plt.tight_layout()
    plt.savefig(Path(__file__).parents[1] / "docs" / "results-extrapolation.png", dpi=120)


def show(run: dict[str, Any]) -> None:
    best = sorted(run["rows"], key=judged, reverse=True)[:12]
    for row in [*best, *(row for row in run["rows"] if row["rule"] == "none")]:
        cells = " ".join(f"{row[kind]:6.1f}" for kind in PICTURES)
        print(f"{row['views']:18s} {row['rule']:10s} {row['c']:4.2f} {row['theta']} {cells}")


def main() -> None:
    say = argparse.ArgumentParser(description=__doc__)
    say.add_argument("what", choices=("tiny", "photos", "scc", "figure"))
    say.add_argument("files", nargs="*", help="photos: MODEL.py KEPT.pt PHOTOS.pt [FORM]")
    asked = say.parse_args()
    if asked.what == "figure":
        figure()
        return
    STORED.mkdir(parents=True, exist_ok=True)
    if asked.what == "scc":
        write_json(STORED.parent / "scc-strength.json", with_repair())
        return
    if asked.what == "tiny":
        run = of_tiny()
    else:
        module, kept, photos, *form = asked.files
        run = of_photos(Path(module), Path(kept), Path(photos), *(form or ["rows"]))
    write_json(STORED / f"{run['model']}.json", run)
    show(run)


if __name__ == "__main__":
    main()
