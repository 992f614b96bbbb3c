"""Our runner of the image encoder beside the model's own modules: forward, and back to the pixels.

Pictures are counted as the encoder sees them: the four views of one picture are a batch of 4.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from scc_fast.bench import measure
from scc_fast.engine.choose import PRECISIONS, is_native
from scc_fast.engine.cost import cost_of
from scc_fast.engine.plan import Pass, Plan
from scc_fast.engine.vit_from import tower_of
from scc_fast.reference.views import to_patches
from session import Session, device_of


def cases(kind: str, quick: bool) -> list[tuple[str, int]]:
    """(model, pictures), those of one model together."""
    if quick:
        return [("tiny", 4)]
    if kind == "cpu":
        return [("tiny", 4), ("tiny", 64), ("ViT-B-32", 4)]
    names = ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-B-16-SigLIP")
    return [(name, pictures) for name in names for pictures in (4, 64)] + [("ViT-B-32", 256)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    kind, quick = device_of(metafunc.config), metafunc.config.getoption("--quick")
    both = [(*case, back) for case in cases(kind, quick) for back in (False, True)]
    metafunc.parametrize(
        ("name", "pictures", "back"),
        both,
        ids=[f"{n}-{p}-{'backward' if b else 'forward'}" for n, p, b in both],
    )


def bench_encoder(benchmark: Any, session: Session, name: str, pictures: int, back: bool) -> None:
    """Both on the same normalised pixels; the gradient is that of a fixed product."""
    model = session.model(name)
    pixels = measure.pictures(pictures, model) * 4 - 2
    slope = measure.unit_features(pictures, model.embed_dim, model.device)
    way = "forward, backward" if back else "forward"
    machine = session.machine
    one_pass = Plan(way, 1, (Pass(way, 1, int(back), ""),), gate=False)

    def side(who: str, call: measure.Call, engine: str, tower: Any, precision: str) -> measure.Side:
        # The modules' floor is that of the least work, too.
        least = tower_of(model, PRECISIONS[precision]) if tower is None else tower
        cost = cost_of(model, None if isinstance(least, str) else least, PRECISIONS[precision])
        return measure.Side(
            f"{who}, {way}",
            call,
            model=name,
            images=pictures,
            precision=precision,
            backend="reference" if tower is None else "auto",
            engine=engine,
            shape="×".join(map(str, pixels.shape)),
            floor=lambda: machine.floor_ms(one_pass, cost, pictures, precision),
        )

    def modules() -> tuple[Tensor, ...]:
        if not back:
            return (model.encode_image(pixels),)
        with torch.enable_grad():
            leaf = pixels.detach().requires_grad_()
            features = model.encode_image(leaf)
        return features.detach(), torch.autograd.grad(features, leaf, slope)[0]

    sides = [side("modules", modules, "eager", None, "fp32")]
    for precision in ("bf16",) if session.kind == "cuda" else ("bf16", "fp32"):
        if not is_native(PRECISIONS[precision], session.kind):
            benchmark.extra_info[f"no {precision}"] = "this processor has no arithmetic for it"
            continue
        tower = tower_of(model, PRECISIONS[precision])
        if isinstance(tower, str):
            pytest.skip(f"no runner for {name}: {tower}")
        rows = to_patches(pixels, tower.size).to(tower.dtype).contiguous()

        def ours(tower: Any = tower, rows: Tensor = rows) -> tuple[Tensor, ...]:
            features, kept = tower(rows, back)
            return (features, tower.back(slope, kept)) if back else (features,)

        sides.append(side("runner", ours, "runner", tower, precision))
    budget = session.budget_of(session.budget, 5 if session.kind == "cpu" else 3)
    session.run(benchmark, "encoder", sides, budget)
    want = sides[0].result
    for one in sides[1:]:
        agree(want[0], one.result[0], one.precision)
        if back:
            agree(to_patches(want[1], math.isqrt(one.result[1].shape[-1] // 3)), one.result[1],
                  one.precision)  # fmt: skip


def agree(want: Tensor, got: Tensor, precision: str) -> None:
    """Check the direction of gradients; tests check parity."""
    alike = cosine_similarity(want.flatten(1).float(), got.flatten(1).float()).min()
    assert alike > (0.999 if precision == "fp32" else 0.9), float(alike)
