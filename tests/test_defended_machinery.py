"""PyTorch's machinery around a Defender and a DefendedCLIP: it works, or is refused in words."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import scc_fast
from scc_fast import DefendedCLIP, Defender, tiny
from scc_fast.api import make_defense
from scc_fast.defenses import DEFENSES
from toys import FIVE, METHODS, defender_of, model_of, pictures

GRADIENTS: tuple[Any, ...] = ("through", "bpda", "identity")


def robust_of(gradient: Any = "bpda", **options: Any) -> DefendedCLIP:
    return DefendedCLIP(defender_of("open_clip", **options), gradient, seed=0)


def gradient_of(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """That of the first class's logits."""
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf)[:, 0].sum(), leaf)
    assert gradient.abs().sum() > 0
    return gradient


# ------------------------------------------------------------------------ the process's defaults


@pytest.fixture(params=["float64", "meta"])
def defaults(request: Any) -> Iterator[Callable[[], None]]:
    """Sets another default dtype, or a default device on which there are no values."""

    def change() -> None:
        if request.param == "float64":
            torch.set_default_dtype(torch.float64)
        else:
            torch.set_default_device("meta")

    yield change
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


def answers(x: Tensor) -> dict[str, Tensor]:
    drawn, labels = tiny.generate("test", range(2))
    found = {"pictures": drawn, "labels": labels, "no pictures": tiny.generate("test", range(0))[0]}
    loaded = scc_fast.load_model("tiny", device="cpu")
    found["text"] = loaded.encode_text(["a dog", "a cat"])
    picture = tiny.samples()[0]
    found["path"] = scc_fast.defend(picture, loaded, FIVE, method="none").logits
    model = model_of("open_clip")
    for method in METHODS:
        for backend in ("auto", "reference"):
            defender = Defender(model, FIVE, method=method, backend=backend)
            found[f"{method} {backend}"] = defender(x, 0).logits
            found[f"{method} {backend} resized"] = defender(x[..., :20, :24], 0).logits
        for gradient in GRADIENTS:
            robust = DefendedCLIP(defender_of("open_clip", method=method), gradient, seed=0)
            found[f"{method} {gradient}"] = gradient_of(robust, x)
    found["empty"] = Defender(model, FIVE)([]).logits
    found["uint8"] = Defender(model, FIVE)((255 * x).byte(), 0).logits
    found["normalized"] = Defender(model, FIVE)(x, 0, is_normalized=True).logits
    return found


def test_default_dtype_and_device_change_nothing(defaults: Any) -> None:
    x = pictures("open_clip", 2)
    expected = answers(x)
    defaults()
    found = answers(x)
    torch.set_default_device(None)
    assert torch.tensor(1.0).dtype == torch.get_default_dtype()
    for name, value in expected.items():
        assert (found[name].dtype, found[name].device) == (value.dtype, value.device), name
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.slow
def test_defenses_under_another_default(defaults: Any) -> None:
    x = tiny.generate("test", range(1))[0]
    model, classes = model_of("tiny"), tiny.prompts()[:5]
    expected = {name: make_defense(name, model, classes)(x, 0).logits for name in DEFENSES}
    defaults()
    found = {name: make_defense(name, model, classes)(x, 0).logits for name in DEFENSES}
    torch.set_default_device(None)
    for name, value in expected.items():
        assert found[name].dtype == torch.float32, name
        torch.testing.assert_close(found[name], value, atol=1e-3, rtol=1e-4, msg=name)


# ----------------------------------------------------------------------------------- torch.compile


@pytest.mark.compile
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_compile_goes_around_the_module(gradient: Any) -> None:
    robust, x = robust_of(gradient), pictures("open_clip", 2)
    compiled = torch.compile(robust, backend="aot_eager")
    assert torch.equal(compiled(x), robust(x))
    assert torch.equal(gradient_of(compiled, x), gradient_of(robust, x))
    around = torch.compile(lambda y: 3 * robust(0.5 * y), backend="aot_eager")
    torch.testing.assert_close(
        gradient_of(around, x), gradient_of(lambda y: 3 * robust(0.5 * y), x)
    )


@pytest.mark.compile
def test_compile_goes_around_a_defender() -> None:
    defender, x = defender_of("open_clip"), pictures("open_clip", 2)
    expected = defender(x, 1).logits
    options: dict[str, Any] = {"backend": "aot_eager"}
    around = torch.compile(lambda y: 2 * defender(1.0 * y, seeds=1).logits, **options)
    assert torch.equal(around(x), 2 * expected)

    def whole(y: Tensor) -> Tensor:
        return 2 * scc_fast.defend(y, defender.model, FIVE, seeds=1).logits

    assert torch.equal(torch.compile(whole, **options)(x), 2 * expected)
    defense = make_defense("scc", defender.model, FIVE)
    judged = torch.compile(lambda y: 2 * defense(y, seeds=1).logits, **options)
    assert torch.equal(judged(x), 2 * defense(x, seeds=1).logits)


@pytest.mark.compile
def test_compile_with_inductor() -> None:
    robust, x = robust_of(), pictures("open_clip", 2)
    around = torch.compile(lambda y: robust(y).softmax(dim=-1))
    torch.testing.assert_close(around(x), robust(x).softmax(dim=-1))


# -------------------------------------------------------------------------------------- torch.func


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("method", ["scc", "none"])
def test_func_transforms(method: str, gradient: Any) -> None:
    robust, x = robust_of(gradient, method=method), pictures("open_clip", 2)
    logits, slope = robust(x), gradient_of(robust, x)

    def first(y: Tensor) -> Tensor:
        return robust(y)[..., 0].sum()

    close: dict[str, float] = {"atol": 1e-5 * float(slope.abs().max()), "rtol": 1e-4}
    torch.testing.assert_close(torch.func.grad(first)(x), slope, **close)
    found, value = torch.func.grad_and_value(first)(x)
    torch.testing.assert_close(found, slope, **close)
    torch.testing.assert_close(value, logits[:, 0].sum())
    jacobian = torch.func.jacrev(robust)(x)
    assert jacobian.shape == (*logits.shape, *x.shape)
    torch.testing.assert_close(jacobian[:, 0].sum(dim=0), slope, **close)
    assert jacobian[0, :, 1].abs().max() == 0  # an image's logits are its own
    rows = torch.func.vmap(robust)(x)
    torch.testing.assert_close(rows[:, 0], logits)
    pairs = torch.stack([x, x.flip(0)], dim=1)  # (2, 2, 3, H, W), mapped over the second
    torch.testing.assert_close(torch.func.vmap(robust, in_dims=1)(pairs)[1], logits.flip(0))
    each = torch.func.vmap(torch.func.grad(first))(x)
    torch.testing.assert_close(each, slope, **close)
    scaled = torch.func.vmap(lambda s: s * robust(x))(torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(scaled[1], 2 * logits)


def test_fresh_noise_is_one_draw_for_a_value_and_its_gradient() -> None:
    robust = DefendedCLIP(defender_of("open_clip", method="rn"))
    x = pictures("open_clip", 1)
    value, pull = torch.func.vjp(robust, x)
    once, again = pull(torch.ones_like(value))[0], pull(torch.ones_like(value))[0]
    assert torch.equal(once, again)
    other = torch.func.vjp(robust, x)[1](torch.ones_like(value))[0]
    assert not torch.equal(once, other)


@pytest.mark.parametrize("method", ["scc", "none"])
def test_what_func_cannot_have_is_refused(method: str) -> None:
    robust, x = robust_of(method=method), pictures("open_clip", 1)

    def total(y: Tensor) -> Tensor:
        return robust(y).sum()

    forward: list[Callable[[], Any]] = [
        lambda: torch.func.jvp(robust, (x,), (x,)),
        lambda: torch.func.jacfwd(robust)(x),
        lambda: torch.func.hessian(total)(x),
    ]
    for call in forward:
        with pytest.raises(TypeError, match="no forward-mode derivatives"):
            call()
    with forward_ad.dual_level(), pytest.raises(TypeError, match="no forward-mode derivatives"):
        robust(forward_ad.make_dual(x, x))
    with pytest.raises(TypeError, match="only first derivatives"):
        torch.func.grad(lambda y: torch.func.grad(total)(y).sum())(x)
    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        torch.func.grad(total)(x + 3)
    with pytest.raises(TypeError, match="use DefendedCLIP"):
        torch.func.vmap(lambda y: robust.defender(y[None]).logits)(x)


def test_func_transforms_of_a_defenses_encoder() -> None:
    defense, x = make_defense("none", model_of("open_clip"), FIVE), pictures("open_clip", 2)
    features = defense.encode(x)
    torch.testing.assert_close(torch.func.vmap(defense.encode)(x[:, None])[:, 0], features)
    slope = gradient_of(defense.encode, x)
    found = torch.func.grad(lambda y: defense.encode(y)[:, 0].sum())(x)
    torch.testing.assert_close(found, slope)
    jacobian = torch.func.jacrev(defense.encode)(x)
    torch.testing.assert_close(jacobian[:, 0].sum(dim=0), slope, atol=1e-6, rtol=1e-4)


# ------------------------------------------------------------------------------- graphs of one call


def test_what_keeps_a_graph_of_one_call_is_refused() -> None:
    robust, x = robust_of(), pictures("open_clip", 1)
    makers: list[Callable[[], Any]] = [
        lambda: torch.jit.trace(robust, (x,)),
        lambda: torch.jit.trace(lambda y: robust.defender(y, 0).logits, (x,)),
        lambda: torch.jit.script(robust),
        lambda: torch.jit.script(nn.Sequential(robust)),
        lambda: torch.export.export(robust, (x,)),
        lambda: torch.export.export(robust, (x,), strict=True),
        lambda: torch.fx.symbolic_trace(robust),
    ]
    for make in makers:
        with pytest.raises(Exception, match="cannot be traced, scripted or exported"):
            make()


# --------------------------------------------------------------------- moves, copies and processes


def test_moves_are_made_or_refused() -> None:
    robust, x = robust_of(), pictures("open_clip", 2)
    expected = robust(x)
    moves: list[Callable[[nn.Module], nn.Module]] = [
        lambda module: module.half(),
        lambda module: module.double(),
        lambda module: module.bfloat16(),
        lambda module: module.to(torch.float64),
        lambda module: module.to("meta"),
    ]
    for move in moves:
        for module in (robust, nn.Sequential(robust)):
            with pytest.raises(TypeError, match=r"DefendedCLIP stays on cpu in torch\.float32"):
                move(module)
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, AssertionError), match=r"NVIDIA|CUDA"):
            robust.cuda()
    robust.to("cpu").float().cpu().to(x).to(memory_format=torch.channels_last).share_memory()
    assert torch.equal(robust(x), expected)
    for name in ("to", "half", "cuda", "cpu", "float", "double", "bfloat16"):
        with pytest.raises(AttributeError, match=f"Defender has no {name}"):
            getattr(robust.defender, name)
    assert not hasattr(robust.defender, "to")
    with pytest.raises(AttributeError, match=r"no attribute 'nothing'"):
        robust.defender.nothing  # noqa: B018


def test_copies_answer_alike() -> None:
    robust, x = robust_of(), pictures("open_clip", 2)
    expected = robust(x)
    file = io.BytesIO()
    torch.save(robust, file)
    file.seek(0)
    copies = [
        copy.copy(robust),
        copy.deepcopy(robust),
        pickle.loads(pickle.dumps(robust)),
        torch.load(file, weights_only=False),
        DefendedCLIP(copy.deepcopy(robust.defender), "bpda", seed=0),
        DefendedCLIP(pickle.loads(pickle.dumps(robust.defender)), "bpda", seed=0),
        nn.DataParallel(robust),
        robust.train().requires_grad_(),
    ]
    for other in copies:
        assert torch.equal(other(x), expected)
        torch.testing.assert_close(gradient_of(other, x), gradient_of(robust, x))
    robust.requires_grad_(False)  # the snapshot is shared with other tests' defenders


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_another_process_answers_alike_after_use(start: str) -> None:
    robust, x = robust_of(), pictures("open_clip", 2)
    expected = robust(x)
    context: Any = multiprocessing.get_context(start)
    with context.Pool(1, torch.set_num_threads, (1,)) as pool:
        found = pool.apply_async(robust, (x,)).get(120)
        torch.testing.assert_close(found, expected)
    # What was sent lies in shared memory now; that is no reason for the slower engine.
    assert defender_of("open_clip", method="none")(x, 0).engine == "runner"


# -------------------------------------------------------------------------------------------- repr


@pytest.mark.parametrize("kind", ["tiny", "open_clip", "hf_siglip"])
def test_reprs_are_one_short_line(kind: str) -> None:
    defender = defender_of(kind)
    robust = DefendedCLIP(defender, "bpda", seed=3)
    for thing in (defender.model, defender, robust):
        text = repr(thing)
        assert "\n" not in text
        assert " at 0x" not in text
        assert len(text) < 250
        assert text == str(thing)
    assert repr(defender.model) in repr(defender)
    assert "method='scc'" in repr(defender)
    assert f"{len(defender.text_features)} classes" in repr(defender)
    assert repr(robust) == f"DefendedCLIP({defender!r}, gradient='bpda', seed=3)"
