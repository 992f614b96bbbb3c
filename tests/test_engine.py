"""The defense on the ops, end to end, beside the reference: every δ on the way, and the answer."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import op_cases
import scc_fast
from scc_fast import DefendedCLIP, ops, tiny
from scc_fast.api import Defender
from scc_fast.config import TTCConfig, View
from scc_fast.defenses import TTC
from scc_fast.engine import choose, encoder
from scc_fast.engine.batch import Batch, Views
from scc_fast.engine.choose import PRECISIONS
from scc_fast.engine.encoder import Runner
from scc_fast.engine.vit import Tower
from scc_fast.engine.vit_from import tower_of
from scc_fast.images import to_batch
from scc_fast.reference import philox
from scc_fast.reference import step as reference_step

PROMPTS = tiny.prompts()[:20]
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "scc": ("scc", {"gate": False}),
    "scc gated": ("scc", {}),  # with the middle of the drifts as threshold
    "scc gated paper": ("scc", {"views": "paper"}),
    "scc paper": ("scc", {"views": "paper", "gate": False}),
    "scc odd views": ("scc", {"views": (View(), View(True, (-3, 5), 0.02)), "gate": False}),
    "scc semantic off": ("scc", {"semantic": False, "gate": False}),
    "scc spatial off": ("scc", {"spatial": False, "gate": False}),
    "scc no warm-up": ("scc", {"warmup_steps": 0, "gate": False}),
    "scc no steps": ("scc", {"semantic_steps": 0, "gate": False}),
    "ttc": ("ttc", {"tau": 9.0}),
    "views": ("views", {}),
    "rn": ("rn", {}),
    "none": ("none", {}),
    "extrapolate": ("extrapolate", {}),
    "extrapolate geodesic": ("extrapolate", {"rule": "geodesic"}),
    "views beyond": ("views", {"strength": 2.0}),
    "scc beyond": ("scc", {"strength": 1.5, "gate": False}),
}


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def model(request: pytest.FixtureRequest) -> scc_fast.VisionLanguage:
    return scc_fast.load_model("tiny", device=request.param)


def pictures(count: int, size: int, device: torch.device) -> Tensor:
    """Some of the bundled pictures, resized if asked."""
    found = [to_batch(str(path), scc_fast.load_model("tiny")) for path in tiny.samples()[:count]]
    pixels = torch.cat(found)
    if size != pixels.shape[-1]:
        pixels = torch.nn.functional.interpolate(pixels, (size, size), mode="bilinear")
    return pixels.to(device)


def defenders(model: Any, backend: str | None, name: str, x: Tensor) -> tuple[Defender, Defender]:
    """The reference and the fast path, of one config."""
    method, config = METHODS[name]
    if "gated" in name:
        drift = Defender(model, PROMPTS, method="ttc", backend="reference")(x, 7).drift
        config = {**config, "tau": float(drift.median()) * 1.0001, "gate": True}
    made = [
        Defender(model, PROMPTS, method=method, config=config, backend=choice, engine="eager")
        for choice in ("reference", backend)
    ]
    return made[0], made[1]


class Trace:
    """Every δ after a step of the reference and of the fast path, and the reference's gradient."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.reference: list[Tensor] = []
        self.gradient: list[Tensor] = []
        self.fast: list[Tensor] = []
        plain, fused = reference_step.pgd_step, ops.pgd_step_

        def traced(delta: Tensor, gradient: Tensor, *rest: Any) -> Tensor:
            self.gradient.append(gradient.clone())
            self.reference.append(plain(delta, gradient, *rest))
            return self.reference[-1]

        def traced_(delta: Tensor, *rest: Any, **options: Any) -> None:
            fused(delta, *rest, **options)
            self.fast.append(delta.clone())

        patch.setattr(reference_step, "pgd_step", traced)
        patch.setattr(ops, "pgd_step_", traced_)


def cases() -> list[Any]:
    """Every method where kernels are compiled; the two main ones in Triton's slow interpreter."""
    made = []
    for backend in op_cases.backends_under_test("pgd_step_", ("cpp", "triton")):
        slow = backend.values == ("cpu", "triton")
        for name in ("scc gated", "scc paper") if slow else METHODS:
            for size in (64,) if slow or not name.startswith("scc") else (64, 80):
                label = f"{backend.id}-{name}-{size}"
                made.append(
                    pytest.param(*backend.values, name, size, marks=backend.marks, id=label)
                )
    return made


@pytest.mark.parametrize(("device", "backend", "name", "size"), cases())
def test_every_delta_and_the_answer(
    model: Any, device: str, backend: str, name: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device != model.device.type:
        pytest.skip(f"the {backend} backend on {device} is another case")
    x = pictures(3, size, model.device)
    reference, fast = defenders(model, backend, name, x)
    trace = Trace(monkeypatch)
    want, got = reference(x, 7), fast(x, 7)
    assert got.backend == backend
    assert torch.equal(got.flagged, want.flagged)
    if "gated" in name:
        assert 0 < int(got.flagged.sum()) < 3
    assert len(trace.fast) == len(trace.reference)
    # Where a gradient is rounding noise, its sign is free; from then on δ may differ there.
    free = torch.zeros_like(trace.reference[0], dtype=torch.bool) if trace.reference else None
    for gradient, one, other in zip(trace.gradient, trace.reference, trace.fast, strict=True):
        assert free is not None
        free = free | (gradient.abs() < 1e-6 * gradient.abs().max())
        assert free.float().mean() < 0.1
        assert torch.equal(one[~free], other[~free])
    torch.testing.assert_close(got.drift, want.drift, rtol=1e-5, atol=0, equal_nan=True)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(got.labels, want.labels)
    assert (got.delta - want.delta).abs().mean() < 1e-3 / 255


def test_auto_takes_the_ops(model: Any) -> None:
    """And says who served."""
    found = Defender(model, PROMPTS)
    assert found.backend == choose.choose_backends(model.device, None)
    if all(ops.backends_of(op, model.device)["cpp"] is None for op in choose.OPS):
        assert found.backend != "reference"


def test_ops_of_a_defense_are_ops() -> None:
    assert set(choose.OPS) <= set(ops.names())


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 80], ids=["fits", "resized"])
@pytest.mark.parametrize("mode", ["through", "bpda", "identity"])
@pytest.mark.parametrize("views", ["geometric", "paper"])
def test_an_attacker_gets_the_true_gradient(model: Any, mode: Any, views: Any, size: int) -> None:
    """The fast path's gradients are those of the reference, in every mode."""
    x = pictures(2, size, model.device)
    found = []
    for backend in ("reference", None):
        defender = Defender(model, PROMPTS, config={"gate": False, "views": views}, backend=backend)
        robust = DefendedCLIP(defender, mode, seed=3)
        leaf = x.clone().requires_grad_()
        logits = robust(leaf)
        (gradient,) = torch.autograd.grad(logits[:, 0].sum(), leaf)
        found.append((logits.detach(), gradient))
    (want, slope), (got, other) = found
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    cosine = torch.nn.functional.cosine_similarity(slope.flatten(1), other.flatten(1))
    assert cosine.min() > 0.999
    assert slope.abs().max() > 0


@pytest.mark.parametrize("size", [64, 80], ids=["fits", "resized"])
def test_view_logits_are_the_references(model: Any, size: int) -> None:
    x = pictures(2, size, model.device)
    seeds = torch.arange(2, device=model.device)
    both = [
        Defender(model, PROMPTS, backend=backend).view_logits(x, seeds)
        for backend in ("reference", None)
    ]
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-4)


def test_nothing_of_the_callers_is_written(model: Any) -> None:
    x = pictures(2, 64, model.device)
    before, seeds = x.clone(), torch.arange(2, device=model.device)
    Defender(model, PROMPTS, config={"gate": False})(x, seeds)
    assert torch.equal(x, before)
    assert seeds.tolist() == [0, 1]


COMPILED = list(op_cases.backends_under_test("pgd_step_", ("cpp",)))


@pytest.mark.parametrize(("device", "backend"), COMPILED)
def test_every_op_is_asked_for_the_backend(
    device: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = scc_fast.load_model("tiny", device=device)
    asked: dict[str, Any] = {}
    for name in choose.OPS:
        whole = getattr(ops, name)

        def noted(*rest: Any, _name: str = name, _whole: Any = whole, **options: Any) -> Any:
            asked.setdefault(_name, set()).add(options.get("backend"))
            return _whole(*rest, **options)

        monkeypatch.setattr(ops, name, noted)
    for method, config in (("scc", {"gate": False}), ("extrapolate", {})):
        made = Defender(model, PROMPTS, method=method, config=config, backend=backend)
        made(pictures(1, 64, model.device))
    assert set(asked) == set(choose.OPS) - {"make_views_adjoint"}
    assert set.union(*asked.values()) == {backend}


@pytest.mark.parametrize("size", [64, 80], ids=["fits", "resized"])
@pytest.mark.parametrize("name", METHODS)
def test_the_runner_gives_the_same_defense(model: Any, name: str, size: int) -> None:
    """Its rounding is its own: a sign may turn where a gradient is nearly zero, and little else."""
    x = pictures(3, size, model.device)
    want, _ = defenders(model, "reference", name, x)
    method, config = METHODS[name]
    if "gated" in name:
        config = {**config, "tau": want.config.tau, "gate": True}
    fast = Defender(model, PROMPTS, method=method, config=config, precision="fp32")
    if fast.backend == "reference":
        pytest.skip("no compiled ops: the reference serves")
    plain, got = want(x, 7), fast(x, 7)
    assert fast.engine == ("graph" if x.is_cuda else "runner")
    assert got.engine == (fast.engine if size == 64 else "runner")
    assert torch.equal(got.flagged, plain.flagged)
    assert ((got.delta - plain.delta).abs() > 1e-6).float().mean() < 2e-3
    torch.testing.assert_close(got.drift, plain.drift, rtol=1e-4, atol=0, equal_nan=True)
    torch.testing.assert_close(got.logits, plain.logits, rtol=1e-3, atol=2e-2)
    assert torch.equal(got.labels, plain.labels)


HALF = [name for name in ("bf16", "fp16") if choose.is_native(PRECISIONS[name], "cpu")]


@pytest.mark.parametrize("engine", ["eager", "runner"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("size", [64, 80], ids=["fits", "resized"])
def test_half_precision_gives_nearly_the_same_defense(
    model: Any, engine: str, precision: str, size: int
) -> None:
    """Signs turn where a gradient is small beside its rounding; labels and logits hardly move."""
    if model.device.type == "cpu" and precision not in HALF:
        with pytest.raises(RuntimeError, match=f"precision='{precision}'.*no arithmetic"):
            Defender(model, PROMPTS, precision=precision, engine=engine)
        return
    x = pictures(6, size, model.device)
    options: dict[str, Any] = {"config": {"gate": False}}
    plain = Defender(model, PROMPTS, backend="reference", precision="fp32", **options)(x, 7)
    fast = Defender(model, PROMPTS, precision=precision, engine=engine, **options)
    if fast.backend == "reference":
        pytest.skip("no compiled ops: the reference serves")
    got = fast(x, 7)
    assert fast.precision == precision
    assert torch.equal(got.labels, plain.labels)
    assert got.logits.dtype == got.delta.dtype == torch.float32
    turned = ((got.delta - plain.delta).abs() > 0.5 / 255).float().mean()
    assert turned < 0.1
    assert (got.logits - plain.logits).abs().mean() < 0.2
    # A difference of features that are rounded to 8 bits or 11.
    torch.testing.assert_close(got.drift, plain.drift, rtol=0, atol=0.02)


def test_half_precision_does_not_underflow(model: Any) -> None:
    """A gradient that fp16 would hold as zero still moves δ, in every image."""
    x, seeds = pictures(2, 64, model.device), torch.arange(2, device=model.device)
    tower = tower_of(model, torch.float16)
    assert isinstance(tower, Tower)
    defender = Defender(model, PROMPTS, precision="fp32")
    runner: Any = defender.session.encoder
    half = dataclasses.replace(defender.session, encoder=Runner(tower, runner.trust))
    batch = Batch(x, seeds)
    with torch.no_grad():
        state = TTC(TTCConfig()).first_pass(half, batch)
        slope = state.views["slope"] * torch.tensor([1e-12, 1.0], device=x.device).view(1, 2, 1)
        assert not slope[:, 0].half().any()
        assert state.backward is not None
        gradient = Views(half, batch, (View(),)).pull(state.backward, slope)
    assert ((gradient != 0).flatten(1).float().mean(dim=1) > 0.9).all()


class Bare:
    """A model that is nothing but what VisionLanguage asks for."""

    def __init__(self, inner: Any) -> None:
        for name in scc_fast.VisionLanguage.__annotations__:
            setattr(self, name, getattr(inner, name))
        self.encode_image, self.encode_text = inner.encode_image, inner.encode_text
        self.info = inner.info


def test_a_model_without_a_module() -> None:
    inner = scc_fast.load_model("tiny", device="cpu")
    x = pictures(2, 64, inner.device)
    want = Defender(inner, PROMPTS, config={"gate": False})(x, 7)
    for precision in ("fp32", *HALF):
        one = Defender(Bare(inner), PROMPTS, config={"gate": False}, precision=precision)
        assert torch.equal(one(x, 7).labels, want.labels)
        assert one.cost().forward > 0
        assert one.memory_estimate(2) > 0


@pytest.mark.parametrize("precision", ["fp32", *HALF])
def test_changed_weights_are_seen_by_a_new_defender(precision: str) -> None:
    model = scc_fast.load_model("tiny", device="cpu")
    x = pictures(2, 64, model.device)
    options: dict[str, Any] = {"config": {"gate": False}, "precision": precision}
    before = Defender(model, PROMPTS, **options)(x, 7)
    with torch.no_grad():
        for parameter in model.module.parameters():  # type: ignore[attr-defined]
            parameter.add_(0.02 * torch.randn_like(parameter))
    after = Defender(model, PROMPTS, **options)
    plain = Defender(model, PROMPTS, config={"gate": False}, backend="reference")
    assert torch.equal(after.text_features, model.encode_text(PROMPTS))
    torch.testing.assert_close(after(x, 7).logits, plain(x, 7).logits, rtol=1e-2, atol=1.0)
    assert (after(x, 7).logits - before.logits).abs().max() > 3.0


def test_modules_in_fp16_do_not_underflow_either(monkeypatch: pytest.MonkeyPatch) -> None:
    model = scc_fast.load_model("tiny", device="cpu")
    monkeypatch.setattr(choose, "is_native", lambda dtype, kind: True)
    defender = Defender(model, PROMPTS, precision="fp16", engine="eager")
    images = pictures(1, 64, model.device)
    views = Views(defender.session, Batch(images, torch.arange(1)), (View(),))
    seen: list[Tensor] = []

    def back(slope: Tensor, retain: bool) -> Tensor:
        seen.append(slope)
        return slope

    views.pull(encoder.Backward(back), torch.full((1, 1, 8), 1e-9))
    assert 0.5 < float(seen[0].abs().max()) <= 2.0


def test_a_model_without_a_gradient_is_told() -> None:
    inner = scc_fast.load_model("tiny", device="cpu")
    deaf = Bare(inner)
    deaf.encode_image = lambda pixels: inner.encode_image(pixels).detach()
    defender = Defender(deaf, PROMPTS)
    if defender.backend == "reference":
        pytest.skip("no compiled ops: the reference serves")
    with pytest.raises(RuntimeError, match=r"encode_image of .* passes no gradient"):
        defender(pictures(1, 64, inner.device), 0)


def test_the_runner_whatever_the_default_dtype_is() -> None:
    model = scc_fast.load_model("tiny", device="cpu")
    torch.set_default_dtype(torch.float64)
    try:
        assert isinstance(tower_of(model), Tower)
    finally:
        torch.set_default_dtype(torch.float32)


def test_fresh_seeds_differ_and_given_ones_are_the_references() -> None:
    drawn = scc_fast.image_seeds(None, 64)
    assert len(set(drawn.tolist())) == 64
    assert scc_fast.image_seeds(None, 0).shape == (0,)
    for seed in (0, 5, -3, 2**64 - 1):
        assert torch.equal(scc_fast.image_seeds(seed, 9), philox.image_seeds(seed, 9))
    scc_fast.image_seeds(0, 9).zero_()  # a copy: what is kept of it stays
    assert torch.equal(scc_fast.image_seeds(0, 9), philox.image_seeds(0, 9))


@pytest.mark.compile
def test_compiled_modules_give_the_same_defense() -> None:
    model = scc_fast.load_model("tiny", device="cpu")
    x = pictures(2, 64, model.device)
    options: dict[str, Any] = {"config": {"gate": False}}
    want = Defender(model, PROMPTS, engine="eager", **options)(x, 7)
    compiled = Defender(model, PROMPTS, engine="compile", **options)
    if compiled.backend == "reference":
        pytest.skip("no compiled ops: the reference serves")
    got = compiled(x, 7)
    assert got.engine == "compile"
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-3, atol=2e-2)
    assert torch.equal(got.labels, want.labels)
