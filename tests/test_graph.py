"""Graphs: buckets, classes and the gate, with a stand-in for the capture where there is no GPU.

The stand-in calls again what a graph would replay, on the same fixed memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import scc_fast
from scc_fast import Defender, tiny
from scc_fast.api import make_defense
from scc_fast.engine import cuda_graph as graph
from scc_fast.engine import drive, vit
from scc_fast.engine.batch import Batch
from scc_fast.engine.choose import PRECISIONS
from scc_fast.engine.cuda_graph import Graphs, bucket
from scc_fast.engine.encoder import Runner
from scc_fast.engine.vit_from import tower_of
from scc_fast.reference import step
from scc_fast.reference.ttc import Outcome

pytestmark = pytest.mark.slow  # together more than a minute

PROMPTS = tiny.prompts()[:40]


class Called:
    """What `graph.Graph` is, without a graph; counts the captures."""

    made = 0

    def __init__(self, call: Callable[[], Any], pool: Any, final: Any = None) -> None:
        Called.made += 1
        self.call = call
        for _ in range(2):  # the calls before a capture
            self.result = call()

    def __call__(self) -> Any:
        self.result = self.call()
        return self.result


@pytest.fixture
def uncaptured(monkeypatch: pytest.MonkeyPatch) -> None:
    Called.made = 0
    monkeypatch.setattr(graph, "Graph", Called)
    monkeypatch.setattr(graph, "on", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(graph, "Pool", lambda device: None)
    monkeypatch.setattr(graph, "record", lambda: None)


@pytest.fixture(scope="module")
def model() -> scc_fast.VisionLanguage:
    return scc_fast.load_model("tiny", device="cpu")


def pictures(count: int) -> Tensor:
    return tiny.generate("test", range(count))[0]


def both(defender: Defender, graphs: Graphs, x: Tensor, seed: int = 3) -> tuple[Outcome, Outcome]:
    """Of the plain engine and of graphs."""
    seeds = scc_fast.image_seeds(seed, len(x))
    session, defense = defender.session, defender.defense
    with torch.no_grad():
        with graphs.passes(session, defense, x.device) as passes:
            captured = drive.carry_out(passes, defense, Batch(x, seeds))
        return defender.run(x, seeds), captured


def same(want: Outcome, got: Outcome) -> None:
    assert torch.equal(want.flagged, got.flagged)
    torch.testing.assert_close(got.drift, want.drift, rtol=1e-4, atol=0, equal_nan=True)
    assert ((got.delta - want.delta).abs() > 1e-6).float().mean() < 2e-3
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-3, atol=2e-2)


def test_buckets() -> None:
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 16, 17)] == [1, 2, 4, 4, 8, 16, 32]
    assert [bucket(n, 32) for n in (1, 32, 33)] == [32, 32, 64]


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_a_bucket_is_filled_up_and_cut(model: Any, uncaptured: None, batch: int) -> None:
    defender = Defender(model, PROMPTS, config={"gate": False})
    want, got = both(defender, Graphs(), pictures(batch))
    same(want, got)
    assert got.logits.shape == (batch, len(PROMPTS))


@pytest.mark.parametrize("method", ["scc", "ttc"])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_gate_sends_flagged_images_to_a_smaller_bucket(
    model: Any, uncaptured: None, method: str, share: float
) -> None:
    x = pictures(5)
    drift = Defender(model, PROMPTS, method=method, config={"tau": 0.0})(x, 3).drift
    tau = float(drift.quantile(share)) + (1e-6 if share else -1e-6)
    defender = Defender(model, PROMPTS, method=method, config={"tau": tau})
    graphs = Graphs()
    want, got = both(defender, graphs, x)
    same(want, got)
    flagged = int(got.flagged.sum())
    assert flagged == {0.0: 0, 0.4: 2, 1.0: 5}[share]
    (_, slots), *_ = graphs._sets.values()
    assert set(slots) == ({8, 2} if flagged == 2 else {8})


def test_a_flagged_majority_stays_in_its_bucket(model: Any, uncaptured: None) -> None:
    x = pictures(4)
    drift = Defender(model, PROMPTS, config={"tau": 0.0})(x, 3).drift
    defender = Defender(model, PROMPTS, config={"tau": float(drift.max()) - 1e-6})
    graphs = Graphs()
    want, got = both(defender, graphs, x)
    same(want, got)
    assert int(got.flagged.sum()) == 3
    (_, slots), *_ = graphs._sets.values()
    assert set(slots) == {4}


def test_other_classes_are_copied_in_and_not_captured(model: Any, uncaptured: None) -> None:
    graphs, x = Graphs(), pictures(2)
    lists = [PROMPTS, tiny.prompts()[60:100], [*tiny.prompts()[5:40], PROMPTS[7]]]
    for prompts in lists:
        twice = len(set(prompts)) < len(prompts)
        with pytest.warns(UserWarning, match="duplicates") if twice else contextlib.nullcontext():
            defender = Defender(model, prompts, config={"gate": False})
        want, got = both(defender, graphs, x)
        same(want, got)
        assert got.logits.shape[1] == len(prompts)
    assert Called.made == 2  # the first pass and the repair, once
    assert len(graphs._sets) == 1
    few = Defender(model, PROMPTS[:20], config={"gate": False})  # another bucket of classes
    same(*both(few, graphs, x))
    assert len(graphs._sets) == 2


@pytest.mark.parametrize("method", ["views", "none", "extrapolate"])
def test_controls(model: Any, uncaptured: None, method: str) -> None:
    same(*both(Defender(model, PROMPTS, method=method), Graphs(), pictures(3)))


def test_old_settings_are_let_go(model: Any, uncaptured: None) -> None:
    graphs, x = Graphs(), pictures(1)
    for place in range(graph._KEPT + 2):
        config = {"gate": False, "alpha": (1 + place) / 255, "semantic_steps": 0}
        same(*both(Defender(model, PROMPTS, config=config), graphs, x))
    assert len(graphs._sets) == graph._KEPT


def test_what_comes_out_is_not_overwritten(model: Any, uncaptured: None) -> None:
    graphs, x = Graphs(), pictures(2)
    defender = Defender(model, PROMPTS, config={"gate": False})
    _, first = both(defender, graphs, x[:1])
    before = first.logits.clone(), first.delta.clone()
    both(defender, graphs, x[1:])
    assert torch.equal(before[0], first.logits)
    assert torch.equal(before[1], first.delta)


def test_threads_take_turns(model: Any, uncaptured: None) -> None:
    """And get each its own answer."""
    graphs, x = Graphs(), pictures(4)
    defender = Defender(model, PROMPTS, config={"gate": False, "semantic_steps": 0})
    found: dict[int, tuple[Outcome, Outcome]] = {}

    def work(place: int) -> None:
        found[place] = both(defender, graphs, x[place : place + 1], seed=place)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place in range(4):
        same(*found[place])
    assert Called.made == 2


def test_a_failed_capture_is_told_and_leaves_nothing(
    model: Any, uncaptured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs, x = Graphs(), pictures(1)
    defender = Defender(model, PROMPTS, config={"gate": False})

    def failing(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    with monkeypatch.context() as patch:
        patch.setattr(graph, "Graph", failing)
        with pytest.raises(RuntimeError, match=r"engine='graph': .*runner.*not permitted.*eager"):
            both(defender, graphs, x)
    assert not graphs._sets
    same(*both(defender, graphs, x))


def test_buckets_stay_within_max_batch(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    defender = Defender(model, PROMPTS, max_batch=100)
    assert defender._piece((64, 64)) == 25
    defender.session = dataclasses.replace(defender.session, engine="graph")
    assert defender._piece((64, 64)) == 16
    assert defender._piece((80, 80)) == 25  # not of the encoder's size: not captured
    assert defender.serves((80, 80)) == "runner"


def test_graphs_do_not_keep_a_model_alive(uncaptured: None) -> None:
    import gc
    import weakref

    model = scc_fast.load_model("tiny", device="cpu")
    defender = Defender(model, PROMPTS, config={"gate": False, "semantic_steps": 0})
    encoder: Any = defender.session.encoder
    both(defender, graph.graphs_of(encoder), pictures(1))
    seen = weakref.ref(model)
    del model, defender, encoder
    gc.collect()
    assert seen() is None


def on_cuda(part: Any) -> Any:
    """A part of the engine, its tensors empty ones of a fake CUDA device."""
    if isinstance(part, Tensor):
        return torch.empty_strided(part.shape, part.stride(), dtype=part.dtype, device="cuda")
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        names = [field.name for field in dataclasses.fields(part)]
        return dataclasses.replace(part, **{n: on_cuda(getattr(part, n)) for n in names})
    return [on_cuda(one) for one in part] if isinstance(part, list | tuple) else part


class Numbers(list[float]):
    """What a host knows already, as a tensor gives it."""

    def tolist(self) -> list[float]:
        return list(self)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_captured_asks_the_device_nothing(
    model: Any, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On fake tensors: a value that a host asked for, or an operator CUDA lacks, would raise."""
    pytest.importorskip("triton")
    defender = Defender(model, PROMPTS, config={"gate": False}, precision="fp32")
    weights = Numbers(step.iterate_weights(2, 2.0).tolist())
    monkeypatch.setattr(step, "iterate_weights", lambda *_: weights)
    monkeypatch.setattr(vit, "has_onednn", lambda dtype: False)  # no packed weights
    monkeypatch.setattr(vit, "_is_ampere", lambda device: True)
    tower = tower_of(model, PRECISIONS[precision])
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(3, 3, 64, 64, device="cuda")
        seeds = torch.empty(3, dtype=torch.int64, device="cuda")
        table = on_cuda(defender.session.table).padded(64, 64)
        session = dataclasses.replace(
            defender.session,
            encoder=Runner(on_cuda(tower), defender.session.encoder.trust),
            table=table,
            backend="triton",
        )
        batch, defense = Batch(x, seeds), defender.defense
        repaired = defense.after_gate(session, batch, defense.first_pass(session, batch))
        delta, logits = repaired.delta, repaired.logits
        assert delta is not None
        assert (delta.device.type, delta.shape) == ("cuda", x.shape)
        assert (logits.dtype, logits.shape) == (torch.float32, (3, 64))


# ------------------------------------------------------------------------------------ on a device


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("batch", [1, 3])
def test_captured_on_a_gpu(precision: str, batch: int) -> None:
    model = scc_fast.load_model("tiny", device="cuda")
    x = pictures(batch).cuda()
    for config in ({"gate": False}, {"tau": 100.0}, {"tau": 0.0}):
        plain = Defender(model, PROMPTS, config=config, precision=precision, engine="runner")
        fast = Defender(model, PROMPTS, config=config, precision=precision, engine="graph")
        for seed in (3, 4):
            want, got = plain(x, seed), fast(x, seed)
            assert got.engine == "graph"
            assert torch.equal(want.labels, got.labels)
            torch.testing.assert_close(got.logits, want.logits, rtol=2e-2, atol=0.3)


@pytest.mark.gpu
def test_a_gpu_gate_sends_flagged_images_to_a_smaller_bucket() -> None:
    model = scc_fast.load_model("tiny", device="cuda")
    x = pictures(5).cuda()
    drift = Defender(model, PROMPTS, config={"tau": 0.0}, precision="fp32")(x, 3).drift
    config = {"tau": float(drift.quantile(0.4)) + 1e-6}
    plain = Defender(model, PROMPTS, config=config, precision="fp32", engine="runner")
    fast = Defender(model, PROMPTS, config=config, precision="fp32", engine="graph")
    want, got = plain(x, 3), fast(x, 3)
    assert int(got.flagged.sum()) == 2
    assert torch.equal(want.labels, got.labels)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-3, atol=2e-2)


@pytest.mark.gpu
def test_threads_share_graphs_on_a_gpu() -> None:
    model = scc_fast.load_model("tiny", device="cuda")
    fast = Defender(model, PROMPTS, config={"gate": False}, precision="fp32")
    x = pictures(4).cuda()
    want = [fast(x[i : i + 1], i).logits for i in range(4)]
    found: dict[int, list[Tensor]] = {i: [] for i in range(4)}

    def work(place: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                found[place].append(fast(x[place : place + 1], place).logits)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place in range(4):
        for logits in found[place]:
            torch.testing.assert_close(logits, want[place], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("method", ["none", "rn", "views", "ttc", "scc", "extrapolate", "tte"])
def test_the_result_names_the_engine_that_served(
    model: Any, uncaptured: None, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    x = pictures(2)
    for one in (
        Defender(model, PROMPTS, method=method, config={}),
        make_defense(method, model, PROMPTS),
    ):
        want = one(x, 3)
        one.session = dataclasses.replace(one.session, engine="graph")
        with monkeypatch.context() as patch:
            patch.setattr(one.session.encoder, "graphs", Graphs(), raising=False)
            Called.made = 0
            got, other = one(x, 3), one(x[..., :60], 3)
        assert (got.engine == "graph") == (Called.made > 0) == (method != "tte")
        assert (want.engine, other.engine) == ("runner", "runner")
        torch.testing.assert_close(got.logits, want.logits, rtol=1e-3, atol=2e-2)
