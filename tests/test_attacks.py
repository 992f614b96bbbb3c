"""Attacks: their budget, their start, their steps, whom they know, and what they leave behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_api import KINDS, defender_of, pictures
from torch import Tensor

import scc_fast
from scc_fast import Defender, View, attacks, tiny

ALL = (attacks.pgd, attacks.view_aware, attacks.adaptive)
Loss = Callable[[Tensor], Tensor]


def drawn(n: int) -> tuple[Tensor, Tensor]:
    return tiny.generate("test", range(n))


def setup(kind: str, n: int = 3) -> tuple[Defender, Tensor, Tensor, Tensor]:
    """A defender, images, the undefended predictions as labels, and seeds."""
    x = pictures(kind, n)
    labels = defender_of(kind, method="none")(x).labels
    return defender_of(kind), x, labels, scc_fast.image_seeds(11, n)


def bare_loss(defender: Defender, x: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        logits = defender.view_logits(x, torch.zeros_like(labels), (View(),))[0]
        return float(F.cross_entropy(logits, labels))


@pytest.mark.parametrize("attack", ALL)
@pytest.mark.parametrize("kind", KINDS)
def test_within_the_ball_and_the_box(kind: str, attack: Any) -> None:
    defender, x, labels, seeds = setup(kind, 2)
    before = x.clone()
    options = {"eot": 1} if attack is attacks.adaptive else {}
    attacked = attack(defender, x, labels, seeds, epsilon=3 / 255, steps=4, **options)
    assert torch.equal(x, before)
    assert attacked.shape == x.shape
    assert attacked.dtype == torch.float32
    assert not attacked.requires_grad
    assert 0 <= attacked.min() <= attacked.max() <= 1
    moved = (attacked - x).abs()
    assert moved.max() <= 3 / 255 + 1e-6
    assert (moved > 2.9 / 255).float().mean() > 0.2  # four steps of 1/255 use the budget
    module = defender.model.module  # type: ignore[attr-defined]
    assert all(p.grad is None and not p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("attack", ALL)
def test_same_seeds_same_attack_in_any_mode(attack: Any) -> None:
    defender, x, labels, seeds = setup("open_clip", 2)
    attacked = attack(defender, x, labels, seeds, epsilon=3 / 255, steps=4)
    assert torch.equal(attack(defender, x, labels, seeds, epsilon=3 / 255, steps=4), attacked)
    written = attack(defender, x, labels, seeds, epsilon="3/255", steps=4, alpha="1/255")
    assert torch.equal(written, attacked)
    for mode in (torch.inference_mode(), torch.no_grad()):
        with mode:
            inside = attack(defender, x.clone(), labels, seeds, epsilon=3 / 255, steps=4)
        assert torch.equal(inside, attacked)
        assert not inside.is_inference()


@pytest.mark.parametrize("attack", ALL)
def test_eight_seeds_start_in_eight_places(attack: Any) -> None:
    defender, x, labels, _ = setup("open_clip", 1)
    x, labels = 0.5 + 0 * x.expand(8, -1, -1, -1), labels.expand(8)
    seeds = torch.arange(8)
    start = attack(defender, x, labels, seeds, epsilon=8 / 255, steps=1, alpha=0.0) - x
    flat = start.flatten(1) * 255 / 8
    distances = torch.cdist(flat, flat, p=1) / flat.shape[1] + torch.eye(8)
    assert distances.min() > 0.5  # two independent uniforms on (-1, 1) are 2/3 apart
    assert flat.abs().max() > 0.99
    assert flat.mean().abs() < 0.02
    again = attack(defender, x, labels, seeds.flip(0), epsilon=8 / 255, steps=1, alpha=0.0) - x
    assert torch.equal(again, start.flip(0))
    # ... and not where the defense starts with the same seed
    noise = defender_of("open_clip", method="rn", config={"epsilon": 8 / 255})(x, seeds).delta
    assert F.cosine_similarity(noise.flatten(1), flat).abs().max() < 0.1


def ascend(
    loss: Loss, x: Tensor, start: Tensor, epsilon: float, alpha: float, steps: int
) -> Tensor:
    """Textbook PGD: the last iterate of sign steps from `start`."""
    point = start.clone()
    for _ in range(steps):
        leaf = point.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf), leaf)
        point = point + alpha * gradient.sign()
        point = torch.max(torch.min(point, x + epsilon), x - epsilon).clamp(0, 1)
    return point


@pytest.mark.parametrize("kind", KINDS)
def test_pgd_and_view_aware_are_textbook_pgd_on_their_losses(kind: str) -> None:
    defender, x, labels, seeds = setup(kind)
    settings = {"epsilon": 4 / 255, "alpha": 2 / 255}
    views = defender.views(x.shape[-1])

    def view_loss(p: Tensor) -> Tensor:
        losses = [
            F.cross_entropy(defender.view_logits(p, seeds, (v,))[0], labels, reduction="sum")
            for v in views
        ]
        return sum(losses, torch.zeros(())) / len(views)

    def loss(p: Tensor) -> Tensor:
        return F.cross_entropy(
            defender.view_logits(p, seeds, (View(),))[0], labels, reduction="sum"
        )

    for attack, target in ((attacks.pgd, loss), (attacks.view_aware, view_loss)):
        start = attack(defender, x, labels, seeds, epsilon=4 / 255, steps=1, alpha=0.0)
        for steps in (1, 3):
            found = attack(defender, x, labels, seeds, **settings, steps=steps)
            expected = ascend(target, x, start, **settings, steps=steps)
            assert ((found - expected).abs() > 1e-5).float().mean() < 2e-3
        assert target(found) > target(start) > 0


@pytest.mark.parametrize("attack", ALL)
def test_images_are_attacked_one_by_one(attack: Any) -> None:
    defender, x, labels, seeds = setup("open_clip", 4)
    whole = attack(defender, x, labels, seeds, epsilon=4 / 255, steps=3)
    for i in (0, 3):
        rows = slice(i, i + 1)
        alone = attack(defender, x[rows], labels[rows], seeds[rows], epsilon=4 / 255, steps=3)
        assert ((alone - whole[rows]).abs() > 1e-5).float().mean() < 5e-3


def test_more_budget_is_a_stronger_attack() -> None:
    x, labels = drawn(6)
    defender, seeds = defender_of("tiny", method="none"), scc_fast.image_seeds(1, 6)
    losses = [
        bare_loss(defender, attacks.pgd(defender, x, labels, seeds, epsilon=e, steps=5), labels)
        for e in (0, 1 / 255, 4 / 255)
    ]
    assert bare_loss(defender, x, labels) == pytest.approx(losses[0], rel=1e-4)
    assert losses[0] < losses[1] < losses[2]
    strong = attacks.pgd(defender, x, labels, seeds, epsilon=8 / 255, steps=10)
    before, after = (int((defender(p).labels == labels).sum()) for p in (x, strong))
    assert after <= before // 2


def test_who_knows_the_views_does_more_to_them() -> None:
    x, labels = drawn(4)
    defender, seeds = defender_of("tiny"), scc_fast.image_seeds(2, 4)
    views = defender.views(64)
    assert len(views) == 4

    def loss(p: Tensor) -> float:
        with torch.no_grad():
            each = [F.cross_entropy(defender.view_logits(p, seeds, (v,))[0], labels) for v in views]
        return float(sum(each, torch.zeros(()))) / len(views)

    options: dict[str, Any] = {"epsilon": 2 / 255, "steps": 6}
    oblivious = loss(attacks.pgd(defender, x, labels, seeds, **options))
    assert loss(attacks.view_aware(defender, x, labels, seeds, **options)) > oblivious > loss(x)


def test_who_knows_the_defense_does_more_to_it() -> None:
    x, labels = drawn(2)
    defender, seeds = defender_of("tiny"), scc_fast.image_seeds(2, 2)
    judge = scc_fast.image_seeds(3, 2)

    def loss(p: Tensor) -> float:
        return float(F.cross_entropy(defender(p, judge).logits, labels))

    options: dict[str, Any] = {"epsilon": 4 / 255, "steps": 5}
    oblivious = loss(attacks.pgd(defender, x, labels, seeds, **options))
    assert loss(attacks.adaptive(defender, x, labels, seeds, **options, eot=1)) > oblivious
    assert oblivious > loss(x)


@pytest.mark.parametrize("eot", [1, 3])
def test_the_adaptive_attackers_draws_are_its_own(eot: int) -> None:
    defender, x, labels, seeds = setup("open_clip", 2)
    drawn: list[int] = []
    points: list[Tensor] = []
    run = defender.run

    def spied(x: Tensor, keys: Tensor) -> Any:
        drawn.extend(keys.tolist())
        points.append(x.clone())
        return run(x, keys)

    defender.run = spied  # type: ignore[method-assign]
    # The same seeds for attacker and judge: a caller's slip that must not help the attacker
    attacked = attacks.adaptive(defender, x, labels, seeds, epsilon=4 / 255, steps=4, eot=eot)
    assert len(points) == 4 * eot
    assert len(set(drawn)) == len(drawn) == 4 * eot * 2
    assert not set(drawn) & set(seeds.tolist())
    assert not set(drawn) & set(range(-100, 100))
    assert not any(torch.equal(attacked, point) for point in points)  # one step beyond the last
    assert torch.equal(points[0], points[eot - 1])
    if eot == 1:  # every step runs the defense on the current point
        assert len({float(point.double().sum()) for point in points}) == 4


ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"epsilon": 1}, "epsilon.*4/255, got 1"),
    ({"epsilon": "4"}, "epsilon.*4/255, got 4"),
    ({"epsilon": "four"}, "epsilon.*'four'"),
    ({"epsilon": -0.1}, "epsilon.*-0.1"),
    ({"alpha": 2}, "alpha.*got 2"),
    ({"steps": 0}, "steps.*at least 1, got 0"),
    ({"labels": torch.tensor([1])}, r"labels.*\(2,\).*\(1,\)"),
    ({"labels": torch.tensor([0.0, 1.0])}, "labels.*int64.*float32"),
    ({"labels": torch.tensor([0, 5])}, "labels.*5"),
    ({"labels": torch.tensor([-1, 0])}, "labels.*-1"),
    ({"seeds": torch.tensor([1, 2, 3])}, r"seeds.*\(2,\).*\(3,\)"),
    ({"seeds": torch.tensor([1.0, 2.0])}, "seeds.*int64.*float32"),
]


@pytest.mark.parametrize("attack", ALL)
@pytest.mark.parametrize(("wrong", "message"), ERRORS)
def test_refusals(attack: Any, wrong: dict[str, Any], message: str) -> None:
    right = {
        "labels": torch.tensor([0, 1]),
        "seeds": torch.tensor([1, 2]),
        "epsilon": 4 / 255,
        "steps": 1,
    }
    with pytest.raises(ValueError, match=message):
        attack(defender_of("open_clip"), torch.rand(2, 3, 32, 32), **{**right, **wrong})


def test_refusal_of_no_draws() -> None:
    defender, x, labels, seeds = setup("open_clip", 2)
    with pytest.raises(ValueError, match=r"eot.*at least 1, got 0"):
        attacks.adaptive(defender, x, labels, seeds, epsilon=4 / 255, eot=0)


@pytest.mark.parametrize("attack", ALL)
def test_an_empty_batch(attack: Any) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    x = torch.zeros(0, 3, 32, 32)
    assert attack(defender_of("open_clip"), x, none, none, epsilon=0.1, steps=2).shape == x.shape


def test_each_noisy_view_has_its_own_noise_under_the_view_aware_attack() -> None:
    paper = defender_of("open_clip", config={"views": "paper", "sigma": 0.05})
    x = pictures("open_clip", 2)
    seeds = scc_fast.image_seeds(3, 2)
    logits = paper.view_logits(x, seeds)
    assert not torch.equal(logits[2], logits[3])


def test_labels_made_inside_inference_mode() -> None:
    defender, x, labels, seeds = setup("open_clip")
    expected = attacks.pgd(defender, x, labels, seeds, epsilon=4 / 255, steps=2)
    with torch.inference_mode():
        inside = labels + 0
        found = attacks.pgd(defender, x + 0, inside, seeds + 0, epsilon=4 / 255, steps=2)
    torch.testing.assert_close(found, expected)


def test_autocast_does_not_reach_an_attack() -> None:
    defender, x, labels, seeds = setup("open_clip")
    expected = attacks.adaptive(defender, x, labels, seeds, epsilon=4 / 255, steps=2, eot=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attacks.adaptive(defender, x, labels, seeds, epsilon=4 / 255, steps=2, eot=1)
    torch.testing.assert_close(found, expected)
