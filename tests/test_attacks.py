"""Attacks that do not know the defense: budget, start, losses, steps, and how they are named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import scc_fast
from attack_toys import by_hand, drawn, moved, target_of
from scc_fast import attacks, tiny
from scc_fast.api import make_defense
from scc_fast.attacks import ATTACKS, BareLogits, margin, parse_attack
from scc_fast.attacks.leakage import wrong_classes
from scc_fast.defenses import Defense
from scc_fast.reference import philox
from toys import FIVE, KINDS, model_of, pictures

OWN = ("pgd4", "cw4", "apgd-ce4", "apgd-dlr4", "apgd-t4:targets=2", "pgd-own4", "pgd-random4")
SPECS = (*OWN, "transfer:source=tiny:steps=4")
PACKAGED = ("aa:steps=2", "autoattack:steps=2:queries=3", "square:queries=3")
Loss = Callable[[Tensor], Tensor]


def setup(kind: str, n: int = 3) -> tuple[Defense, Tensor, Tensor, Tensor]:
    """A target, images, its own predictions as labels, and seeds."""
    x, target = pictures(kind, n), target_of(kind)
    return target, x, target(x, 0).labels, scc_fast.image_seeds(11, n)


def bare_loss(target: Defense, x: Tensor, labels: Tensor) -> float:
    return float(F.cross_entropy(target(x, 0).logits, labels))


# ------------------------------------------------------------------------- what holds for all


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", KINDS)
def test_within_the_ball_and_the_box(kind: str, spec: str) -> None:
    target, x, labels, seeds = setup(kind, 2)
    before = x.clone()
    attacked = parse_attack(spec, 3 / 255).run(target, x, labels, seeds)
    assert torch.equal(x, before)
    assert attacked.shape == x.shape
    assert attacked.dtype == torch.float32
    assert not attacked.requires_grad
    assert 0 <= attacked.min() <= attacked.max() <= 1
    change = (attacked - x).abs()
    assert change.max() <= 3 / 255 + 1e-6
    assert (change > 2.9 / 255).float().mean() > 0.2  # the budget is used
    module = target.model.module  # type: ignore[attr-defined]
    assert all(p.grad is None and not p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("spec", SPECS)
def test_an_image_depends_on_its_pixels_and_its_seed_alone(spec: str) -> None:
    target, x, labels, seeds = setup("open_clip", 3)
    attack = parse_attack(spec, 4 / 255)
    whole = attack.run(target, x, labels, seeds)
    assert torch.equal(attack.run(target, x, labels, seeds), whole)
    for i in range(3):
        rows = slice(i, i + 1)
        alone = attack.run(target, x[rows], labels[rows], seeds[rows])
        assert moved(alone, whole[rows]) < 5e-3
    other = attack.run(target, x, labels, seeds + 1)
    assert not torch.equal(other, whole)


@pytest.mark.parametrize("spec", SPECS)
def test_the_callers_modes_do_not_reach_it(spec: str) -> None:
    target, x, labels, seeds = setup("open_clip", 2)
    attack = parse_attack(spec, 3 / 255)
    expected = attack.run(target, x, labels, seeds)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    for mode in (torch.inference_mode(), torch.no_grad(), autocast):
        with mode:
            found = attack.run(target, x + 0, labels + 0, seeds + 0)
        assert torch.equal(found, expected)
        assert not found.is_inference()


@pytest.mark.parametrize("spec", [*SPECS, *PACKAGED])
def test_no_image_and_no_budget(spec: str) -> None:
    target, x, labels, seeds = setup("open_clip", 1)
    empty = parse_attack(spec, 4 / 255).run(target, x[:0], labels[:0], seeds[:0])
    assert empty.shape == (0, 3, 32, 32)
    assert empty.dtype == torch.float32
    nothing = parse_attack(spec, 0).run(target, x, labels, seeds)
    assert (nothing - x).abs().max() <= 1e-6


@pytest.mark.parametrize("spec", [*SPECS, "aa:steps=2"])
def test_whose_defense_it_is_makes_no_difference(spec: str) -> None:
    target, x, labels, seeds = setup("open_clip", 2)
    defended = make_defense("scc", model_of("open_clip"), FIVE)
    attack = parse_attack(spec, 4 / 255)
    assert torch.equal(attack.run(defended, x, labels, seeds), attack.run(target, x, labels, seeds))


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": np.zeros((2, 3, 32, 32))}, TypeError, "x must be a tensor, got ndarray"),
    ({"x": torch.zeros(2, 3, 32, 32).byte()}, ValueError, "x must be float32.*uint8"),
    ({"x": torch.zeros(2, 1, 32, 32)}, ValueError, r"x must be.*\(B, 3, H, W\).*\(2, 1, 32, 32\)"),
    ({"x": torch.full((2, 3, 32, 32), 2.0)}, ValueError, r"x must be in \[0, 1\], got 2 to 2"),
    ({"x": torch.full((2, 3, 32, 32), torch.nan)}, ValueError, r"x must be in \[0, 1\], got nan"),
    ({"labels": [0, 1]}, TypeError, "labels must be a tensor, got list"),
    ({"labels": torch.tensor([1])}, ValueError, r"labels.*\(2,\).*\(1,\)"),
    ({"labels": torch.tensor([0.0, 1.0])}, ValueError, "labels.*int64.*float32"),
    ({"labels": torch.tensor([0, 5])}, ValueError, r"labels must be in \[0, 5\), got 0 to 5"),
    ({"labels": torch.tensor([-1, 0])}, ValueError, "labels.*got -1 to 0"),
    ({"seeds": torch.tensor([1, 2, 3])}, ValueError, r"seeds.*\(2,\).*\(3,\)"),
    ({"seeds": torch.tensor([1.0, 2.0])}, ValueError, "seeds.*int64.*float32"),
]


@pytest.mark.parametrize("spec", [*SPECS, *PACKAGED, "damaged"])
def test_refusals(spec: str) -> None:
    right = {
        "x": torch.rand(2, 3, 32, 32),
        "labels": torch.tensor([0, 1]),
        "seeds": torch.tensor([1, 2]),
    }
    attack, target = parse_attack(spec, 4 / 255), target_of("open_clip")
    for wrong, kind, message in WRONG:
        with pytest.raises(kind, match=message):
            attack.run(target, **{**right, **wrong})


# --------------------------------------------------------------------------- PGD and its losses


def test_eight_seeds_start_in_eight_places() -> None:
    target, x, labels, _ = setup("open_clip", 1)
    x, labels, seeds = 0.5 + 0 * x.expand(8, -1, -1, -1), labels.expand(8), torch.arange(8)
    still = parse_attack("pgd1:alpha=0", 8 / 255)
    start = still.run(target, x, labels, seeds) - x
    flat = start.flatten(1) * 255 / 8
    distances = torch.cdist(flat, flat, p=1) / flat.shape[1] + torch.eye(8)
    assert distances.min() > 0.5  # two independent uniforms on (-1, 1) are 2/3 apart
    assert flat.abs().max() > 0.99
    assert flat.mean().abs() < 0.02
    # ... and not where a defense starts with the same seed
    noise = make_defense("rn:epsilon=8/255", model_of("open_clip"), FIVE)(x, seeds).delta
    assert F.cosine_similarity(noise.flatten(1), flat).abs().max() < 0.1


def textbook(
    loss: Loss, x: Tensor, start: Tensor, epsilon: float, alpha: float, steps: int
) -> Tensor:
    """The last iterate of sign steps from `start`."""
    point = start.clone()
    for _ in range(steps):
        leaf = point.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf), leaf)
        point = point + alpha * gradient.sign()
        point = torch.max(torch.min(point, x + epsilon), x - epsilon).clamp(0, 1)
    return point


def slow_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Σ −relu(l_y − max_{k≠y} l_k + 50), image by image."""
    total = logits.new_zeros(())
    for row, y in zip(logits, labels.tolist(), strict=True):
        others = [row[k] for k in range(len(row)) if k != y]
        total = total - torch.relu(row[y] - torch.stack(others).max() + 50)
    return total


@pytest.mark.parametrize("name", ["pgd", "cw", "pgd-own", "pgd-random"])
def test_textbook_pgd_on_each_loss(name: str) -> None:
    target, x, own, seeds = setup("open_clip")
    labels = (own + torch.tensor([0, 1, 3])) % 5  # right, and wrong twice
    u = philox.uniform(seeds, 161, 0, 1)[:, 0].numpy().astype(np.float64)
    goals = torch.tensor(
        [
            [k for k in range(5) if k != y][int(v * 4)]
            for y, v in zip(labels.tolist(), u, strict=True)
        ]
    )
    losses: dict[str, Loss] = {
        "pgd": lambda z: F.cross_entropy(z, labels, reduction="sum"),
        "cw": lambda z: slow_margin(z, labels),
        "pgd-own": lambda z: F.cross_entropy(z, own, reduction="sum"),
        "pgd-random": lambda z: -F.cross_entropy(z, goals, reduction="sum"),
    }

    def loss(pixels: Tensor) -> Tensor:
        return losses[name](by_hand(target.model, target.text_features, pixels))

    settings = {"epsilon": 4 / 255, "alpha": 2 / 255}
    kind = ATTACKS[name]
    start = kind(epsilon=4 / 255, steps=1, alpha=0.0).run(target, x, labels, seeds)
    noise = 2 * philox.uniform_like(x, seeds, philox.ATTACK_START) - 1
    torch.testing.assert_close(start, (x + noise * 4 / 255).clamp(0, 1), atol=1e-6, rtol=0)
    for steps in (1, 3):
        found = kind(**settings, steps=steps).run(target, x, labels, seeds)
        assert moved(found, textbook(loss, x, start, **settings, steps=steps)) < 2e-3
    assert loss(found) > loss(start)


def test_more_budget_is_a_stronger_attack() -> None:
    x, labels = drawn(6)
    target, seeds = target_of(), scc_fast.image_seeds(1, 6)
    losses = [
        bare_loss(target, parse_attack("pgd5", e).run(target, x, labels, seeds), labels)
        for e in (0, 1 / 255, 4 / 255)
    ]
    assert bare_loss(target, x, labels) == pytest.approx(losses[0], rel=1e-4)
    assert losses[0] < losses[1] < losses[2]
    for spec in ("pgd10", "cw10"):
        strong = parse_attack(spec, 8 / 255).run(target, x, labels, seeds)
        before, after = (int((target(p, 0).labels == labels).sum()) for p in (x, strong))
        assert after <= before // 2


def test_losses_by_hand() -> None:
    logits = torch.tensor([[3.0, 1.0, -1.0, 0.5, 2.0], [3.0, 1.0, -1.0, 0.5, 2.0]])
    labels, goals = torch.tensor([0, 1]), torch.tensor([2, 3])
    # In order: 3, 2, 1, 0.5, -1. Rivals: 2 of class 0, 3 of class 1.
    torch.testing.assert_close(margin.margin(logits, labels), torch.tensor([1.0, -2.0]))
    torch.testing.assert_close(margin.dlr(logits, labels), torch.tensor([-1 / 2, 2 / 2]))
    expected = torch.tensor([-(3 + 1) / (3 - 0.75), -(1 - 0.5) / (3 - 0.75)])
    torch.testing.assert_close(margin.targeted_dlr(logits, labels, goals), expected)
    torch.testing.assert_close(
        margin.dlr(7 * logits + 4, labels), margin.dlr(logits, labels), atol=1e-5, rtol=0
    )


@pytest.mark.filterwarnings("ignore:classes has duplicates")
@pytest.mark.parametrize("spec", ["cw3", "apgd-ce3", "apgd-dlr3", "apgd-t3", "square:queries=20"])
def test_a_prompt_that_is_there_twice_is_one_class(spec: str) -> None:
    """Else the margin of the class is always zero, and the attack does nothing."""
    _, x, _, seeds = setup("open_clip")
    once, twice = target_of("open_clip", FIVE), target_of("open_clip", (FIVE[1], *FIVE))
    labels = torch.tensor([1, 1, 0])
    attack = parse_attack(spec, 4 / 255)
    expected = attack.run(once, x, labels, seeds)
    for shown in (torch.tensor([0, 0, 1]), torch.tensor([2, 2, 1])):
        assert moved(attack.run(twice, x, shown, seeds), expected) < 5e-3


@pytest.mark.filterwarnings("ignore:classes has duplicates")
def test_cw_has_no_rival_with_the_words_of_the_true_class() -> None:
    x, own = drawn(1)
    few = (tiny.prompts()[int(own)], "a map", "a boat")
    labels, seeds, attack = torch.tensor([0]), torch.tensor([50]), parse_attack("cw3", 4 / 255)
    once = attack.run(target_of("tiny", few), x, labels, seeds)
    twice = attack.run(target_of("tiny", (*few, few[0])), x, labels, seeds)
    assert moved(once, twice) < 1e-2


# --------------------------------------------------------------------------------- the controls


def test_own_predictions_stand_in_for_the_labels() -> None:
    target, x, own, seeds = setup("open_clip")
    expected = parse_attack("pgd3", 4 / 255).run(target, x, own, seeds)
    found = parse_attack("pgd-own3", 4 / 255).run(target, x, (own + 1) % 5, seeds)
    assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore:classes has duplicates")
def test_wrong_classes_are_wrong_and_evenly_drawn() -> None:
    labels, seeds = torch.arange(4000) % 5, scc_fast.image_seeds(2, 4000)
    goals = wrong_classes(margin.Distinct.of(target_of("open_clip"), labels), seeds)
    counts = torch.zeros(5, 5).index_put((labels, goals), torch.ones(4000), accumulate=True)
    assert counts.diagonal().sum() == 0
    assert counts[~torch.eye(5, dtype=torch.bool)].min() > 140  # of 200 each; 5 deviations are 61
    some = margin.Distinct.of(target_of("open_clip"), labels[7:9])
    assert torch.equal(wrong_classes(some, seeds[7:9]), goals[7:9])
    twice = target_of("open_clip", (FIVE[1], *FIVE))
    for label in (0, 2):
        rows = margin.Distinct.of(twice, torch.full((50,), label))
        assert set(wrong_classes(rows, seeds[:50]).tolist()) == {1, 3, 4, 5}


def test_the_random_target_is_approached() -> None:
    x, labels = drawn(4)
    target, seeds = target_of(), scc_fast.image_seeds(5, 4)
    goals = wrong_classes(margin.Distinct.of(target, labels), seeds)
    attacked = parse_attack("pgd-random10", 8 / 255).run(target, x, labels, seeds)
    assert bare_loss(target, attacked, goals) < bare_loss(target, x, goals) - 1


# ------------------------------------------------------------------------------------- transfer


def test_transfer_of_a_model_to_itself_is_pgd() -> None:
    target, x, labels, seeds = setup("tiny")
    found = parse_attack("transfer:source=tiny:steps=3", 4 / 255).run(target, x, labels, seeds)
    expected = parse_attack("pgd3", 4 / 255).run(target, x, labels, seeds)
    assert moved(found, expected) < 2e-3


def test_transfer_goes_through_the_sources_resize() -> None:
    target, x, labels, seeds = setup("open_clip")  # 32 pixels; the bundled model takes 64
    source = scc_fast.Defender(model_of("tiny"), FIVE, method="none")
    identity = (scc_fast.View(),)

    def loss(pixels: Tensor) -> Tensor:
        logits = source.view_logits(pixels, seeds, identity)[0]
        return F.cross_entropy(logits, labels, reduction="sum")

    settings = {"epsilon": 4 / 255, "alpha": 1 / 255}
    still = attacks.Transfer(epsilon=4 / 255, steps=1, alpha=0.0, source="tiny")
    start = still.run(target, x, labels, seeds)
    found = attacks.Transfer(**settings, steps=3, source="tiny").run(target, x, labels, seeds)
    assert moved(found, textbook(loss, x, start, **settings, steps=3)) < 2e-3
    assert loss(found) > loss(start)


@pytest.mark.filterwarnings("ignore:classes has duplicates")
def test_a_random_class_needs_a_second_one() -> None:
    attack = parse_attack("pgd-random10", 4 / 255)
    assert attack.suits(make_defense("none", model_of("tiny"), ("a cat", "a dog")))
    assert not attack.suits(make_defense("none", model_of("tiny"), ("a cat", "A  cat")))


def test_transfer_needs_the_prompts() -> None:
    features = target_of("open_clip").text_features
    target = make_defense("none", model_of("open_clip"), text_features=features)
    attack = parse_attack("transfer:source=tiny", 4 / 255)
    assert attack.suits(target_of("open_clip"))
    assert not attack.suits(target)
    with pytest.raises(ValueError, match=r"transfer.*prompts.*classes="):
        attack.run(target, pictures("open_clip", 1), torch.tensor([0]), torch.tensor([0]))


def test_folders_bring_their_weights(tmp_path: Any) -> None:
    for source in (str(tmp_path), f"local-dir:{tmp_path}/clip@mine"):
        attack = parse_attack(f"transfer:source={source}", 4 / 255)
        assert attack.source == source  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------ the module


def test_the_module_gives_the_models_logits_and_their_gradient() -> None:
    target, x, labels, _ = setup("open_clip")
    module = BareLogits(target)
    assert not module.train().training
    assert list(module.parameters()) == list(module.buffers()) == []
    torch.testing.assert_close(module(x), target(x, 0).logits, atol=1e-4, rtol=1e-4)
    leaf, hand = (x.clone().requires_grad_() for _ in range(2))
    logits = module(leaf)
    F.cross_entropy(logits, labels, reduction="sum").backward()
    expected = by_hand(target.model, target.text_features, hand)
    F.cross_entropy(expected, labels, reduction="sum").backward()
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-4)
    assert leaf.grad is not None
    assert hand.grad is not None
    assert F.cosine_similarity(leaf.grad.flatten(), hand.grad.flatten(), dim=0) > 0.9999
    assert torch.equal(BareLogits(target, torch.tensor([3, 1]))(x), module(x)[:, [3, 1]])
