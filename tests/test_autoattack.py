"""AutoAttack and Square through pyautoattack: which images come back, and what is left behind."""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any

import numpy as np
import pyautoattack
import pytest
import torch
from pyautoattack import autopgd_base
from torch import Tensor, nn

import scc_fast
from attack_toys import by_hand, drawn, moved, target_of
from scc_fast import Defender, tiny
from scc_fast.attacks import PaperAA, Square, autoattack, parse_attack
from scc_fast.defenses import Defense
from toys import FIVE, model_of

PROMPTS = (*FIVE, "a photo of a car", "a photo of a cup", "a map", "a drum", "a boat", "a shoe")
QUICK = ("aa:steps=4", "autoattack:steps=3:queries=5", "square:queries=20")


def case(n: int = 4) -> tuple[Defense, Tensor, Tensor, Tensor]:
    """The bundled model, pictures of which the last is wrong clean, and seeds."""
    x, labels = drawn(n)
    labels = labels.clone()
    labels[-1] = (labels[-1] + 1) % 201
    return target_of(), x, labels, scc_fast.image_seeds(7, n)


@functools.cache
def attacked(spec: str, epsilon: float) -> Tensor:
    return parse_attack(spec, epsilon).run(*case())


@pytest.mark.parametrize("spec", QUICK)
def test_what_comes_back(spec: str) -> None:
    target, x, labels, _ = case()
    for epsilon in (1 / 255, 6 / 255):
        found = attacked(spec, epsilon)
        assert found.shape == x.shape
        assert found.dtype == torch.float32
        assert not found.requires_grad
        assert 0 <= found.min() <= found.max() <= 1
        assert (found - x).abs().max() <= epsilon + 1e-6
        assert torch.equal(found[-1], x[-1])  # wrong clean
        right = target(found, 0).labels == labels
        touched = (found != x).flatten(1).any(dim=1)
        assert torch.equal(right, ~touched & (torch.arange(4) < 3))  # survivors come back clean
        if epsilon > 2 / 255 and not spec.startswith("square"):
            assert not right.any()


def test_steps_are_what_makes_it_strong() -> None:
    target, _, labels, _ = case()
    few, many = (attacked(f"aa:steps={steps}", 1 / 255) for steps in (1, 20))
    assert (target(many, 0).labels == labels).sum() <= (target(few, 0).labels == labels).sum()
    assert not torch.equal(few, many)


@pytest.mark.parametrize("spec", ["aa:steps=4", "autoattack:steps=3:queries=5"])
def test_complete_leaves_no_image_clean(spec: str) -> None:
    target, x, labels, seeds = case()
    plain = attacked(spec, 1 / 255)
    full = parse_attack(f"{spec}:complete=true", 1 / 255).run(target, x, labels, seeds)
    clean = (plain == x).flatten(1).all(dim=1)
    assert 1 < int(clean.sum()) < 4
    assert torch.equal(full[~clean], plain[~clean])
    steps = spec.split(":")[1]
    ours = parse_attack(f"apgd-ce:{steps}", 1 / 255).run(target, x, labels, seeds)
    for i in torch.nonzero(clean)[:, 0].tolist():
        assert moved(full[i], ours[i]) < 5e-3
        assert (full[i] - x[i]).abs().max() > 0.9 / 255


@pytest.mark.parametrize("spec", QUICK)
def test_the_same_call_gives_the_same_images_and_other_seeds_others(spec: str) -> None:
    target, x, labels, seeds = case()
    attack = parse_attack(spec, 6 / 255)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        assert torch.equal(attack.run(target, x, labels, seeds), attacked(spec, 6 / 255))
    other = attack.run(target, x, labels, seeds + 1)
    assert not torch.equal(other, attacked(spec, 6 / 255))


@pytest.mark.parametrize("spec", QUICK)
def test_alone(spec: str) -> None:
    target, x, labels, seeds = case()
    for row in (slice(0, 1), slice(3, 4)):
        found = parse_attack(spec, 6 / 255).run(target, x[row], labels[row], seeds[row])
        assert found.shape == (1, 3, 64, 64)
        assert (found - x[row]).abs().max() <= 6 / 255 + 1e-6
    assert torch.equal(found, x[row])


def test_nothing_is_left_behind(capfd: Any, caplog: pytest.LogCaptureFixture) -> None:
    target, x, labels, seeds = case(2)
    torch.rand(3)
    np.random.rand(3)  # noqa: NPY002
    before, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    tracing = sys.gettrace()
    log = logging.getLogger("auto-attack")
    disabled = log.disabled

    def tracer(frame: Any, event: str, arg: Any) -> None:
        return None

    try:
        sys.settrace(tracer)
        with caplog.at_level(logging.DEBUG):
            parse_attack("autoattack:steps=2:queries=2", 1 / 255).run(target, x, labels, seeds)
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(tracing)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numbers)  # noqa: NPY002
    assert log.disabled is disabled
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_the_generators_come_back_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    target, x, labels, seeds = case(2)

    def fails(self: Any, x: Tensor, y: Tensor) -> Tensor:
        torch.manual_seed(1)
        raise RuntimeError("no more")

    monkeypatch.setattr("pyautoattack.autoattack.SquareAttack.perturb", fails)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no more"):
        parse_attack("square", 1 / 255).run(target, x, labels, seeds)
    assert torch.equal(torch.get_rng_state(), before)
    assert not logging.getLogger("auto-attack").disabled


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    for spec in QUICK:
        with pytest.raises(ImportError, match=r"pyautoattack: pip install 'scc_fast\[attacks\]'"):
            parse_attack(spec, 1 / 255).run(*case(2))


def settings_of(spec: str, count: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """pyautoattack's object as it is when it would start, for `count` classes."""
    seen: list[Any] = []

    def caught(self: Any, x: Tensor, y: Tensor, /, **options: Any) -> tuple[Tensor, Tensor]:
        seen.append(self)
        assert options == {"batch_size": len(x)}
        return x, y

    monkeypatch.setattr(pyautoattack.AutoAttack, "run_standard_evaluation", caught)
    target = target_of("open_clip", PROMPTS[:count])
    parse_attack(spec, 4 / 255).run(
        target, torch.rand(2, 3, 32, 32), torch.tensor([0, 1]), torch.tensor([1, 2])
    )
    return seen[0]


def test_the_published_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    standard = settings_of("autoattack", 11, monkeypatch)
    assert standard.attacks_to_run == ["apgd-ce", "apgd-t", "fab-t", "square"]
    aa = settings_of("aa", 11, monkeypatch)
    assert aa.attacks_to_run == ["apgd-ce", "apgd-dlr"]
    square = settings_of("square", 11, monkeypatch)
    assert square.attacks_to_run == ["square"]
    for found in (standard, aa, square):
        assert found.epsilon == 4 / 255
        assert found.norm == "Linf"
        assert found.apgd.n_iter == found.apgd_targeted.n_iter == found.fab.n_iter == 100
        assert found.apgd.n_restarts == found.apgd_targeted.n_restarts == found.fab.n_restarts == 1
        assert found.apgd_targeted.n_target_classes == found.fab.n_target_classes == 9
        assert found.square.n_queries == 5000
        assert not found.square.rescale_schedule
    quick = settings_of("autoattack7:queries=30", 11, monkeypatch)
    for part in (quick.apgd, quick.apgd_targeted):
        assert (part.n_iter, part.n_iter_2, part.n_restarts, part.eps) == (7, 1, 1, 4 / 255)
    assert (quick.fab.n_iter, quick.square.n_queries) == (7, 30)
    assert quick.apgd_targeted.n_target_classes == 9


@pytest.mark.parametrize(
    ("count", "parts"),
    [
        (2, ["apgd-ce", "fab-t", "square"]),
        (3, ["apgd-ce", "apgd-dlr", "fab-t", "square"]),
        (4, ["apgd-ce", "apgd-t", "fab-t", "square"]),
        (9, ["apgd-ce", "apgd-t", "fab-t", "square"]),
    ],
)
def test_few_classes(count: int, parts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        found = settings_of("autoattack", count, patch)
        assert found.attacks_to_run == parts
        assert found.apgd_targeted.n_target_classes == found.fab.n_target_classes == count - 1
    assert PaperAA().parts(count) == ["apgd-ce", "apgd-dlr"][: 1 + (count > 2)]
    assert Square().parts(count) == ["square"]
    target = target_of("open_clip", PROMPTS[:count])
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    labels, seeds = target(x, 0).labels, torch.arange(3)
    for spec in ("autoattack2:queries=2", "aa2"):
        images = parse_attack(spec, 0.2 / 255).run(target, x, labels, seeds)
        assert (images - x).abs().max() <= 0.2 / 255 + 1e-6


class Plain(nn.Module):
    """open_clip's own module as pyautoattack's users would wrap it."""

    def __init__(self, target: Defense) -> None:
        super().__init__()
        self.inner, self.text = [target.model], target.text_features

    def forward(self, pixels: Tensor) -> Tensor:
        return by_hand(self.inner[0], self.text, pixels)


def test_as_pyautoattack_called_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    target = target_of("open_clip", PROMPTS)
    x = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    labels, seeds = target(x, 0).labels, torch.arange(6)
    seeded: list[int] = []
    make = pyautoattack.AutoAttack.__init__

    def noted(self: Any, *given: Any, **options: Any) -> None:
        seeded.append(options["seed"])
        make(self, *given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pyautoattack.AutoAttack, "__init__", noted)
        found = parse_attack("aa20", 2 / 255).run(target, x, labels, seeds)
    assert 0 <= seeded[0] < 1 << 63
    with torch.random.fork_rng(devices=[]), autoattack.undisturbed():
        theirs = pyautoattack.AutoAttack(
            Plain(target),
            attacks=["apgd-ce", "apgd-dlr"],
            version="custom",
            eps=2 / 255,
            seed=seeded[0],
        )
        theirs.apgd = autopgd_base.APGDAttack(
            theirs.model, n_iter=20, eps=2 / 255, device="cpu", logger=theirs.logger
        )
        expected, _ = theirs.run_standard_evaluation(x, labels, batch_size=6)
    touched = (expected != x).flatten(1).any(dim=1)
    assert 1 < int(touched.sum()) < 6
    assert torch.equal((found != x).flatten(1).any(dim=1), touched)
    assert moved(found, expected) < 0.05
    assert model_of("open_clip") is target.model


def test_straight_at_a_defense() -> None:
    """Of a defense with an exact gradient: what comes back fools it, or is the picture itself."""
    x, labels = drawn(4)
    target = Defender(model_of("tiny"), tiny.prompts(), method="extrapolate", config={})
    attack = parse_attack("autoattack-through:steps=8:queries=5", 12 / 255)
    assert attack.aware
    assert attack.title == "AutoAttack on the defense, 5 queries, 8 steps"
    found = attack.run(target, x, labels, scc_fast.image_seeds(7, 4))
    assert (found - x).abs().max() <= 12 / 255 + 1e-6
    right = target(found, 0).labels == labels
    assert torch.equal(right, ~(found != x).flatten(1).any(dim=1) & (target(x, 0).labels == labels))
    assert not right.all()
    for method, suits in (("views", True), ("none", True), ("scc", False), ("rn", False)):
        other = Defender(model_of("tiny"), tiny.prompts(), method=method, config={})
        assert attack.suits(other) == suits
    rn = Defender(model_of("tiny"), tiny.prompts(), method="rn", config={})
    with pytest.raises(ValueError, match="needs a defense without draws or optimisation; rn is"):
        attack.run(rn, x, labels, scc_fast.image_seeds(7, 4))
