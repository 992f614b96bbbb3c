"""Plans, costs and memory: counted, and held against METHOD.md, FLOP counters and allocators."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import scc_fast
from scc_fast import Defender, SCCConfig, tiny
from scc_fast.engine import cost, drive, memory, vit
from scc_fast.engine.cost import Cost
from scc_fast.engine.encoder import Backward, Modules
from scc_fast.engine.plan import ascent_plan
from scc_fast.engine.vit import Tower
from scc_fast.engine.vit_from import tower_of

pytestmark = pytest.mark.slow  # together more than a minute

PROMPTS = tiny.prompts()[:20]


@pytest.fixture(scope="module")
def model() -> scc_fast.VisionLanguage:
    return scc_fast.load_model("tiny", device="cpu")


@pytest.mark.parametrize("views", [1, 4, 7])
@pytest.mark.parametrize(("warm_up", "semantic"), [(2, 2), (0, 3), (3, 0), (0, 0), (1, 1)])
def test_the_cost_is_that_of_the_method(views: int, warm_up: int, semantic: int) -> None:
    """METHOD.md: SCC (1 + L·(N_w+S+1))·F + L·(N_w+S)·B in N_w+S+1 passes; TTC (N+2)·F + N·B."""
    plan = ascent_plan("scc", views, warm_up, semantic, True)
    steps = warm_up + semantic
    assert plan.forward == 1 + views * (steps + 1)
    assert plan.backward == views * steps
    assert len(plan.passes) == steps + 1
    assert (plan.clean().forward, plan.clean().backward) == (1 + views, 0)
    ttc = ascent_plan("ttc", 1, warm_up, 0, True)
    assert (ttc.forward, ttc.backward) == (warm_up + 2, warm_up)


class Counted(Modules):
    """The modules, counting what goes through them."""

    looked = backward = passes = 0

    def forward(self, pictures: Tensor) -> Tensor:
        self.looked += len(pictures)
        self.passes += not torch.is_grad_enabled()
        return super().forward(pictures)

    def vjp(self, pictures: Tensor, beside: Tensor | None) -> Any:
        features, other, backward = super().vjp(pictures, beside)
        self.passes += beside is None

        def back(slope: Tensor, retain: bool) -> Tensor:
            self.backward += len(slope)
            return backward(slope, retain)

        return features, other, Backward(back)


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "scc": ("scc", {"gate": False}),
    "no warm-up": ("scc", {"gate": False, "warmup_steps": 0}),
    "no steps": ("scc", {"gate": False, "semantic_steps": 0}),
    "nothing": ("scc", {"gate": False, "semantic_steps": 0, "warmup_steps": 0}),
    "semantic off": ("scc", {"gate": False, "semantic": False}),
    "spatial off": ("scc", {"gate": False, "spatial": False}),
    "clean": ("scc", {"tau": 0.0}),
    "ttc": ("ttc", {"tau": 9.0}),
    "views": ("views", {}),
    "none": ("none", {}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_engine_makes_the_passes_of_its_plan(model: Any, name: str) -> None:
    method, config = CONFIGS[name]
    defender = Defender(model, PROMPTS, method=method, config=config, engine="eager")
    if defender.backend == "reference":
        pytest.skip("no compiled ops: the reference serves")
    encoder = Counted(model)
    defender.session = replace(defender.session, encoder=encoder)
    defender(tiny.generate("test", range(3))[0], 0)
    plan = defender.plan()
    plan = plan.clean() if name == "clean" else plan
    assert (encoder.looked, encoder.backward) == (3 * plan.forward, 3 * plan.backward)
    assert encoder.passes == len(plan.passes)


def test_a_plan_prints_itself() -> None:
    plan = ascent_plan("scc", 4, 2, 2, True)
    text = plan.describe(Cost(10**9, 2 * 10**9, 10**6, 0, 0), 2, 1e12, 1e9)
    lines = text.splitlines()
    assert lines[0] == "scc, 4 views, batch 2"
    assert [line.split("  ")[0] for line in lines[2:7]] == [one.name for one in plan.passes]
    together = next(line for line in lines if line.startswith("together")).split()
    assert together[1:5] == ["21", "16", "106.00", "9.0"]
    assert lines[-1] == "floor 106 ms at 1000 GFLOP/s, 1.0 GB/s"
    assert plan.floor_ms(Cost(1, 1, 10**6, 0, 0), 1, 1e12, 1e9) == pytest.approx(9.0)
    assert "floor" not in plan.describe(Cost(1, 1, 1, 0, 0))


def test_flops_of_the_runner(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own counter sees the same products."""
    tower = tower_of(model)
    assert isinstance(tower, Tower)
    monkeypatch.setattr(vit, "has_onednn", lambda dtype: False)  # whose products it does not know
    monkeypatch.setattr(vit, "kernel_of", lambda *_: "plain")
    rows = torch.randn(1, len(tower.position), tower.patch.shape[1])
    with torch.no_grad():
        with FlopCounterMode(display=False) as forward:
            features, kept = tower(rows)
        with FlopCounterMode(display=False) as backward:
            tower.back(torch.ones_like(features), kept)
    found = cost.cost_of(model, tower, torch.float32)
    assert found.forward == forward.get_total_flops()
    assert found.backward == backward.get_total_flops()


def test_flops_of_modules(model: Any) -> None:
    """About the runner's, which leaves out what the last block need not compute."""
    plain, ours = (cost.cost_of(model, t, torch.float32) for t in (None, tower_of(model)))  # type: ignore[arg-type]
    assert 1.0 < plain.forward / ours.forward < 1.4
    assert 1.0 < plain.backward / ours.backward < 1.4
    assert 1.0 <= plain.weights / ours.weights < 1.1


# ---------------------------------------------------------------------------------------- memory


def peak(call: Any) -> int:
    """The peak of torch's allocator during a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("options", [{}, {"engine": "eager"}, {"method": "views"}])
@pytest.mark.parametrize("batch", [1, 16, 40])
def test_the_estimate_of_memory(model: Any, options: dict[str, Any], batch: int) -> None:
    config = {} if "method" in options else {"gate": False}
    defender = Defender(model, PROMPTS, config=config, **options)
    if defender.backend == "reference":
        pytest.skip("no compiled ops: the reference serves")
    x = torch.rand(batch, 3, 64, 64)
    defender(x, 0)
    measured, estimate = peak(lambda: defender(x, 0)), defender.memory_estimate(batch)
    assert 0.8 < estimate / measured < 2.0, (estimate / 2**20, measured / 2**20)


def test_out_of_memory_says_what_fits(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    defender = Defender(model, PROMPTS, max_batch=64)

    def full(*_: Any) -> Any:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr(drive, "run", full)
    monkeypatch.setattr(memory, "free_memory", lambda device: 2**27)
    with pytest.raises(torch.OutOfMemoryError, match=r"16 images of 64x64 .*in 4 views") as caught:
        defender(torch.rand(20, 3, 64, 64), 0)
    assert "128 MiB are free" in str(caught.value)
    fits = int(str(caught.value).split("max_batch=")[1].split(" ")[0])
    assert 4 <= fits < 64
    assert defender.memory_estimate(fits // 4) <= 2**26
    with pytest.raises(torch.OutOfMemoryError, match="even one image does not fit"):
        defender(torch.rand(1, 3, 64, 64), 0)

    def other(*_: Any) -> Any:
        raise RuntimeError("something else")

    monkeypatch.setattr(drive, "run", other)
    with pytest.raises(RuntimeError, match="something else"):
        defender(torch.rand(1, 3, 64, 64), 0)


@pytest.mark.parametrize("name", ["memory_estimate", "warmup"])
def test_refused_batches(model: Any, name: str) -> None:
    defender = Defender(model, PROMPTS)
    for bad in (-1, 2.5, "4", True):
        with pytest.raises(ValueError, match=f"batch must be .*{bad}"):
            getattr(defender, name)(bad)


def test_warmup_and_waterfall(model: Any) -> None:
    defender = Defender(model, PROMPTS, config={"gate": False})
    assert defender.warmup(2) > 0
    if defender.backend == "reference":
        pytest.skip("no compiled ops: the reference serves")
    stages = defender.waterfall(torch.rand(2, 3, 64, 64))
    names = [one.name for one in defender.plan().passes]
    assert list(dict.fromkeys(stage.step for stage in stages)) == names
    whole = ["views", "forward", "head", "backward", "step"]
    assert [stage.part for stage in stages] == whole * 4 + whole[:3]
    assert all(stage.ms > 0 for stage in stages)


def test_a_waterfall_of_a_batch_that_is_flagged_in_part(model: Any) -> None:
    """Modules make the first pass of the flagged ones again: still the same pass of the plan."""
    x = tiny.generate("test", range(4))[0]
    drift = Defender(model, PROMPTS, config={"tau": 0.0})(x, 0).drift
    config = {"tau": float(drift.median()) + 1e-6}
    for engine in ("eager", "runner"):
        defender = Defender(model, PROMPTS, config=config, engine=engine)
        stages = defender.waterfall(x)
        backward = [stage.step for stage in stages if stage.part == "backward"]
        assert backward == [one.name for one in defender.plan().passes[:-1]]
        assert stages[-1].step == "predict"
        with pytest.raises(ValueError, match="empty batch"):
            defender.waterfall(x[:0])
    with pytest.raises(RuntimeError, match="reference"):
        Defender(model, PROMPTS, backend="reference").waterfall(x)


@pytest.mark.parametrize("size", [64, (3, 64, 64), ("a", "b"), (0, 0), (-5, 3)])
def test_refused_sizes(model: Any, size: Any) -> None:
    defender = Defender(model, PROMPTS)
    for call in (lambda: defender.plan(size), lambda: defender.memory_estimate(2, size)):
        with pytest.raises(ValueError, match=r"size must be \(height, width\)"):
            call()


def test_the_model_carries_its_own_config(model: Any) -> None:
    defender = Defender(model, PROMPTS)
    config = SCCConfig(**model.defaults["scc"])
    assert defender.config == config
    steps = config.warmup_steps, config.semantic_steps
    assert defender.plan() == ascent_plan("scc", 4, *steps, config.gate)
    assert defender.plan((100, 80)).views == 4
