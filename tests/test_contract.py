"""What callers may rely on: any mode, any thread, nothing of theirs changed; DefendedCLIP."""

from __future__ import annotations

import dataclasses
import random
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import scc_fast
from scc_fast import DefendedCLIP, Defender, attacks
from scc_fast.api import make_defense
from scc_fast.defenses import DEFENSES
from toys import (
    CONFIG,
    FIVE,
    KINDS,
    METHODS,
    HFTokenizer,
    assert_same,
    defender_of,
    hf_clip,
    hf_image_processor,
    hf_siglip,
    model_of,
    pictures,
    small_open_clip,
    small_tokenizer,
)

MODES: dict[str, Callable[[], Any]] = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}
GRADIENTS = ("through", "bpda", "identity")


def all_repaired(kind: str, **options: Any) -> Defender:
    """SCC with every image repaired, whatever the random weights make of it."""
    return defender_of(kind, config={"gate": False}, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_any_mode_gives_the_same(kind: str, mode: str) -> None:
    n = 1 if kind == "tiny" else 2
    x = pictures(kind, n)
    expected = defender_of(kind)(x, 1)
    clean = DefendedCLIP(defender_of(kind), seed=1)(x)
    with MODES[mode]():
        made_inside = defender_of(kind)
        inside = pictures(kind, n)
        assert inside.is_inference() == (mode == "inference_mode")
        for defender in (made_inside, defender_of(kind)):
            for given in (x, inside):
                assert_same(defender(given, 1), expected)
        seeded = defender(inside, expected.seeds.clone())
        robust = DefendedCLIP(made_inside, seed=1)(inside)
    assert_same(seeded, expected)
    assert not seeded.logits.is_inference()
    assert not seeded.inputs.is_inference()
    torch.testing.assert_close(robust, clean, atol=2e-3, rtol=1e-4)
    assert robust.dtype == torch.float32
    # Tensors made in inference mode, used outside it
    assert_same(defender_of(kind)(inside, 1), expected)
    text = Defender(model_of(kind), text_features=made_inside.text_features)
    assert_same(text(inside, 1), expected)
    if mode == "inference_mode":
        with torch.inference_mode():
            features = made_inside.text_features.clone()
            assert features.is_inference()
        attacker = DefendedCLIP(Defender(model_of(kind), text_features=features), seed=1)
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(attacker(leaf).sum(), leaf)
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_four_threads_at_once(kind: str) -> None:
    defender, x = defender_of(kind), pictures(kind, 1 if kind == "tiny" else 2)
    expected = [defender(x, seed) for seed in range(4)]
    found: dict[int, list[Any]] = {seed: [] for seed in range(4)}
    start = threading.Barrier(4)

    def work(seed: int, mode: Callable[[], Any]) -> None:
        start.wait()
        with mode():
            found[seed] += [defender(x, seed), defender_of(kind)(x, seed)]

    threads = [
        threading.Thread(target=work, args=(seed, mode)) for seed, mode in enumerate(MODES.values())
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, results in found.items():
        assert len(results) == 2
        for result in results:
            assert_same(result, expected[seed])


def with_dropout(kind: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model object in train mode whose outputs are random there, and load_model's options."""
    if kind == "open_clip":
        vision = {**CONFIG["vision_cfg"], "patch_dropout": 0.5}
        return small_open_clip(vision_cfg=vision).train(), {"tokenizer": small_tokenizer}
    original = hf_clip() if kind == "hf_clip" else hf_siglip()
    for module in original.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.5  # type: ignore[assignment]
    name = "CLIP" if kind == "hf_clip" else "Siglip"
    return original.train(), {"processor": (hf_image_processor(name), HFTokenizer(300))}


@pytest.mark.parametrize("kind", ["open_clip", "hf_clip", "hf_siglip"])
def test_the_users_model_is_left_as_found(kind: str) -> None:
    original, options = with_dropout(kind)
    encode = getattr(original, "encode_image", None) or original.get_image_features  # type: ignore
    x = pictures(kind, 2)
    a, b = (getattr(f, "pooler_output", f) for f in (encode(x), encode(x)))
    assert not torch.equal(a, b), "without dropout this test shows nothing"
    modules = list(original.modules())
    modules[3].eval()
    next(original.parameters()).requires_grad_(False)

    def state() -> list[Any]:
        parameters = list(original.parameters())
        return [
            [m.training for m in modules],
            [p.requires_grad for p in parameters],
            [p.grad is None for p in parameters],
            [p.data_ptr() for p in parameters],
        ]

    before, weights = state(), {k: v.clone() for k, v in original.state_dict().items()}
    model = scc_fast.load_model(original, **options)
    defender = Defender(model, FIVE, config={"gate": False})
    first = defender(x, 1)
    assert_same(defender(x, 1), first)
    assert torch.equal(defender(x, 1).logits, first.logits)  # no dropout in it
    robust = DefendedCLIP(defender, seed=1).train()
    leaf = x.clone().requires_grad_()
    robust(leaf).sum().backward()
    labels = first.labels
    knowing = make_defense("scc:gate=false", model, FIVE)
    attacks.parse_attack("bpda:steps=1:eot=1", 4 / 255).run(knowing, x, labels, first.seeds)
    nn.Sequential(robust).train()
    assert state() == before
    assert all(before[2])
    assert all(torch.equal(weights[k], v) for k, v in original.state_dict().items())
    module = model.module  # type: ignore[attr-defined]
    assert not any(m.training for m in module.modules())
    assert all(p.grad is None and not p.requires_grad for p in module.parameters())
    assert torch.equal(defender(x, 1).logits, first.logits)


def test_global_random_state_is_untouched() -> None:
    def state() -> list[Any]:
        return [torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())]  # noqa: NPY002

    before = state()
    flags = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
    x = pictures("open_clip", 2)
    for method in METHODS:
        defender = defender_of("open_clip", method=method)
        defender(x)
        DefendedCLIP(defender)(x)
    noisy = defender_of("open_clip", config={"views": "paper"})
    noisy(x)
    labels = torch.tensor([0, 1])
    seeds = scc_fast.image_seeds(None, 2)
    for spec in attacks.ATTACKS:
        if spec != "transfer":  # wants another encoder
            attack = attacks.parse_attack(spec, 4 / 255)
            defenses = ("scc:views=paper", "extrapolate")
            made = (make_defense(one, noisy.model, FIVE) for one in defenses)
            target = next(one for one in made if attack.suits(one))
            small = {"steps": 1, "queries": 2}
            known = {f.name for f in dataclasses.fields(attack)}
            given = {k: v for k, v in small.items() if k in known}
            dataclasses.replace(attack, **given).run(target, x, labels, seeds)
    for spec in DEFENSES:
        make_defense(spec, noisy.model, FIVE)(x)
    scc_fast.load_model("tiny")
    assert state() == before
    assert flags == (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads())


# DefendedCLIP


def gradient_of(robust: nn.Module, x: Tensor, weights: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((robust(leaf) * weights).sum(), leaf)
    return gradient


@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_the_defenders(kind: str) -> None:
    options = {"method": "ttc" if kind == "tiny" else "scc"}  # for time
    defender, x = defender_of(kind, **options), pictures(kind, 3)
    seeds = scc_fast.image_seeds(6, 1).expand(3)
    expected = defender(x, seeds.clone()).logits
    for gradient in GRADIENTS:
        robust = DefendedCLIP(defender, gradient, seed=6)  # type: ignore[arg-type]
        assert torch.equal(robust(x), expected)
        leaf = x.clone().requires_grad_()
        live = robust(leaf)
        assert live.requires_grad
        torch.testing.assert_close(live, expected, atol=2e-3, rtol=1e-4)
        order = [2, 0, 1]
        torch.testing.assert_close(robust(x[order]), expected[order], atol=2e-3, rtol=1e-4)
        torch.testing.assert_close(robust(x[1:2]), expected[1:2], atol=2e-3, rtol=1e-4)
        assert robust(x[:0]).shape == (0, expected.shape[1])
    split = DefendedCLIP(defender_of(kind, max_batch=2, **options), seed=6)
    torch.testing.assert_close(split(x), expected, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_no_graph_where_the_caller_wants_none(gradient: Any, mode: str) -> None:
    leaf = pictures("open_clip", 2).requires_grad_()
    with MODES[mode]():
        assert not DefendedCLIP(defender_of("open_clip"), gradient)(leaf).requires_grad


@pytest.mark.parametrize("engine", ["eager", "auto"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["tiny", "open_clip", "hf_siglip"])
def test_gradient_modes(kind: str, method: str, engine: str) -> None:
    defender = defender_of(kind, method=method, engine=engine)
    x = 0.3 + 0.4 * pictures(kind, 2)  # the box never binds
    classes = len(defender.text_features)
    weights = torch.randn(2, classes, generator=torch.Generator().manual_seed(0))
    through, bpda, identity = (
        gradient_of(DefendedCLIP(defender, mode, seed=2), x, weights)  # type: ignore[arg-type]
        for mode in GRADIENTS
    )
    bare = gradient_of(DefendedCLIP(defender_of(kind, method="none")), x, weights)
    scale = float(through.abs().max())
    assert scale > 0
    if engine == "eager":
        torch.testing.assert_close(through, bpda, atol=1e-4 * scale, rtol=1e-3)
    # "through" is at the reference's δ, "bpda" at the runner's, of which a sign may have turned.
    assert (through - bpda).norm() < 0.02 * through.norm()
    torch.testing.assert_close(identity, bare, atol=1e-4 * scale, rtol=1e-3)
    cosine = F.cosine_similarity(bpda.flatten(1), bare.flatten(1))
    assert (cosine > 0.9999).all() == (method == "none")


def test_the_box_stops_the_true_gradient_alone() -> None:
    defender = defender_of("open_clip", method="rn")
    x, weights = torch.zeros(1, 3, 32, 32), torch.ones(1, 5)
    through = gradient_of(DefendedCLIP(defender, "through", seed=2), x, weights)
    bpda = gradient_of(DefendedCLIP(defender, "bpda", seed=2), x, weights)
    seeds = scc_fast.image_seeds(2, 1)
    stopped = defender(x, seeds).delta == 0  # the noise that pointed out of the box
    assert 0.4 < stopped.float().mean() < 0.6
    assert (through[stopped] == 0).all()
    torch.testing.assert_close(through[~stopped], bpda[~stopped])
    assert (bpda[stopped] != 0).float().mean() > 0.9


def test_what_defended_clip_declares() -> None:
    x = pictures("open_clip", 2)
    robust = DefendedCLIP(defender_of("open_clip"))
    assert robust.is_dynamic
    assert robust.is_randomized
    assert not torch.equal(robust(x), robust(x))
    fixed = DefendedCLIP(defender_of("open_clip"), seed=0)
    assert fixed.is_dynamic
    assert not fixed.is_randomized
    assert torch.equal(fixed(x), fixed(x))
    none = DefendedCLIP(defender_of("open_clip", method="none"))
    assert not none.is_randomized
    assert next(robust.parameters()).device.type == "cpu"


def test_modes_of_a_wrapper_stop_at_it() -> None:
    x, robust = pictures("open_clip", 2), DefendedCLIP(defender_of("open_clip"), seed=1)
    expected = robust(x)
    wrapper = nn.Sequential(nn.Identity(), robust)
    wrapper.train()
    robust.train()
    assert not any(module.training for module in robust.modules())
    assert wrapper.training
    assert torch.equal(wrapper(x), expected)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("context", [None, "autocast"])
def test_in_the_loop_of_an_attack_library(gradient: Any, context: str | None) -> None:
    robust = DefendedCLIP(all_repaired("open_clip"), gradient, seed=3)
    x = pictures("open_clip", 3)
    labels, epsilon = robust(x).argmax(dim=-1), 8 / 255
    before = F.cross_entropy(robust(x), labels)
    attacked = x.clone()
    with ExitStack() as stack:
        if context is not None:
            stack.enter_context(MODES[context]())
        for _ in range(6):
            attacked.requires_grad = True
            loss = F.cross_entropy(robust(attacked), labels)
            grad = torch.autograd.grad(loss, attacked, retain_graph=False, create_graph=False)[0]
            attacked = attacked.detach() + 2 / 255 * grad.sign()
            delta = (attacked - x).clamp(-epsilon, epsilon)
            attacked = (x + delta).clamp(0, 1).detach()
    assert attacked.isfinite().all()
    assert F.cross_entropy(robust(attacked), labels) > before
    leaf = x.clone().requires_grad_()
    F.cross_entropy(robust(leaf), labels).backward()
    assert leaf.grad is not None
    assert all(p.grad is None and not p.requires_grad for p in robust.parameters())
