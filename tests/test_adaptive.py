"""Attacks that know the defense: by hand on toys, and on the bundled model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import scc_fast
from attack_toys import FencedAndLabelled, Gated, Guessing, Labelled, Toy, images, weights
from scc_fast import Defender, attacks, tiny
from scc_fast.api import make_defense
from scc_fast.attacks import BPDA, PGD, Attack, GateEvasion, PseudoLabel, ViewAware
from scc_fast.attacks.adaptive import balanced, climb, cross_entropy, step_sizes
from scc_fast.engine.batch import Batch, uniform_start
from scc_fast.engine.session import Session
from scc_fast.reference import philox
from scc_fast.reference.heads import Classes

pytestmark = pytest.mark.slow  # together more than a minute

EPS = 8 / 255
ONE_STEP: dict[str, Any] = {"steps": 1, "alpha": 1 / 255, "momentum": 0}
PLAIN: dict[str, Any] = {"alpha": 1 / 255, "momentum": 0, "warmup": 0, "best": False}


def seeds(n: int) -> Tensor:
    return torch.arange(50, 50 + n)


def labels(n: int) -> Tensor:
    return torch.arange(n) % 3


def defense(spec: str, **options: Any) -> Defender:
    return make_defense(spec, scc_fast.load_model("tiny", device="cpu"), tiny.prompts(), **options)


def drawn(n: int) -> tuple[Tensor, Tensor]:
    return tiny.generate("test", range(n))


# ----------------------------------------------------------------------------------- the climb


def test_step_sizes_by_hand() -> None:
    assert step_sizes(3, 1 / 255, EPS) == [1 / 255] * 3
    sizes = np.array(step_sizes(20, None, EPS)) * 255
    np.testing.assert_allclose(sizes, [4] * 6 + [2] * 6 + [1] * 5 + [0.5] * 3)
    np.testing.assert_allclose(np.array(step_sizes(1, None, EPS)) * 255, [2])


def test_balanced_gradients_by_hand() -> None:
    gradient = torch.tensor([[3.0, -1.0, 2.0], [0.0, 0.0, 0.0], [torch.nan, 3.0, torch.inf]])
    found = balanced(gradient.view(3, 3, 1, 1)).flatten(1)
    torch.testing.assert_close(
        found, torch.tensor([[1.5, -0.5, 1.0], [0.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    )


def test_momentum_by_hand() -> None:
    x = torch.full((1, 3, 1, 1), 0.5)
    # Mean magnitudes 2 and 1: m is (1.5, -1, .5), then half of it plus (-.5, 2, -.5).
    given = [torch.tensor([3.0, -2.0, 1.0]), torch.tensor([-0.5, 2.0, -0.5])]
    found = climb(
        lambda _, at: (given[at].view(1, 3, 1, 1), None),
        x,
        torch.zeros_like(x),
        epsilon=0.2,
        sizes=[0.02, 0.01],
        momentum=0.5,
    )
    expected = 0.5 + torch.tensor([0.02 + 0.01, -0.02 + 0.01, 0.02 - 0.01])
    torch.testing.assert_close(found.flatten(), expected)


def test_the_point_with_the_largest_lead_is_returned_else_the_last() -> None:
    x = torch.full((3, 3, 1, 1), 0.5)
    leads = torch.tensor([[-1.0, -1.0, 2.0], [3.0, -0.5, 1.0], [1.0, -2.0, -1.0]])  # (step, image)
    found = climb(
        lambda _, at: (torch.ones_like(x), leads[at]),
        x,
        torch.zeros_like(x),
        epsilon=0.2,
        sizes=[0.01] * 3,
    )
    # Surveyed at 0, 1 and 2 steps; the last point is 3 steps away and was not.
    torch.testing.assert_close(found[:, 0, 0, 0], 0.5 + torch.tensor([0.01, 0.03, 0.0]))


# ------------------------------------------------------------------------------ gradients by hand


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def test_bpda_applies_the_gradient_at_the_repaired_picture_to_the_picture() -> None:
    toy, x = Toy(weights(), noise=0.5), images(4)
    start = uniform_start(x, seeds(4), EPS, philox.ATTACK_START)
    found = BPDA(EPS, **ONE_STEP, warmup=0, best=False).run(toy, x, labels(4), seeds(4))
    w = toy.w.double().numpy()
    (point,) = toy.points
    torch.testing.assert_close(point, x + start)
    repaired = toy.defense.repaired(Batch(point, torch.tensor(toy.keys)))[0]
    logits = repaired.flatten(1).double().numpy() @ w.T
    gradient = (softmax(logits) - np.eye(3)[labels(4)]) @ w
    here = (x + start).flatten(1).double().numpy() @ w.T
    elsewhere = (softmax(here) - np.eye(3)[labels(4)]) @ w
    expected = (start.flatten(1).numpy() + np.sign(gradient) / 255).clip(-EPS, EPS)
    np.testing.assert_allclose((found - x).flatten(1).numpy(), expected, atol=1e-6)
    assert (np.sign(gradient) != np.sign(elsewhere)).any()  # the repair made a difference


def test_a_certain_answer_still_has_a_slope() -> None:
    logits = torch.tensor([[30.0, 0.0, -1.0]], requires_grad=True)
    (slope,) = torch.autograd.grad(cross_entropy(logits, torch.tensor([0])).sum(), logits)
    assert slope[0, 0] < 0


def test_the_margin_loss_climbs_from_the_true_class_to_the_best_wrong_one() -> None:
    toy, x = Toy(weights()), images(4)
    start = uniform_start(x, seeds(4), EPS, philox.ATTACK_START)
    options: dict[str, Any] = {**ONE_STEP, "warmup": 0, "best": False, "loss": "margin"}
    found = BPDA(EPS, **options).run(toy, x, labels(4), seeds(4))
    logits = (x + start).flatten(1) @ toy.w.T
    logits[torch.arange(4), labels(4)] = -torch.inf
    gradient = toy.w[logits.argmax(dim=1)] - toy.w[labels(4)]
    expected = (start.flatten(1) + gradient.sign() / 255).clamp(-EPS, EPS)
    torch.testing.assert_close((found - x).flatten(1), expected, atol=1e-6, rtol=0)


def test_view_aware_on_each_view_and_on_their_mean() -> None:
    def views(x: Tensor) -> Tensor:
        return torch.stack([x, 3 * x.flip(-1)])

    toy, x = Toy(weights(seed=3), views=views), images(6)
    start = uniform_start(x, seeds(6), EPS, philox.ATTACK_START)
    w, target = toy.w.double().numpy(), np.eye(3)[labels(6)]
    mirrored = weights(seed=3).view(3, 3, 2, 2).flip(-1).flatten(1).double().numpy()
    point = (x + start).flatten(1).double().numpy()
    first, second = point @ w.T, 3 * point @ mirrored.T
    gradient = (softmax(first) - target) @ w + (softmax(second) - target) @ (3 * mirrored)
    of_mean = (softmax((first + second) / 2) - target) @ (w + 3 * mirrored)
    assert (np.sign(of_mean) != np.sign(gradient)).any()
    kinds: list[tuple[Literal["each", "mean"], np.ndarray]] = [
        ("each", gradient),
        ("mean", of_mean),
    ]
    for of, slope in kinds:
        found = ViewAware(EPS, **ONE_STEP, of=of).run(toy, x, labels(6), seeds(6))
        expected = (start.flatten(1).numpy() + np.sign(slope) / 255).clip(-EPS, EPS)
        np.testing.assert_allclose((found - x).flatten(1).numpy(), expected, atol=1e-6)


def test_the_pseudo_label_attack_climbs_at_the_guess() -> None:
    toy, x = Guessing(weights()), images(4)
    start = uniform_start(x, seeds(4), EPS, philox.ATTACK_START)
    found = PseudoLabel(EPS, **ONE_STEP).run(toy, x, labels(4), seeds(4))
    logits = (1 - (x + start).flip(-1)).flatten(1) @ toy.w.T
    logits[torch.arange(4), labels(4)] = -torch.inf
    up = toy.w[logits.argmax(dim=1)] - toy.w[labels(4)]
    gradient = -up.view(4, 3, 2, 2).flip(-1).flatten(1)
    expected = (start.flatten(1) + gradient.sign() / 255).clamp(-EPS, EPS)
    torch.testing.assert_close((found - x).flatten(1), expected, atol=1e-6, rtol=0)
    assert len(toy.keys) == 4
    assert not toy.points  # it never ran the rest of the defense


def test_a_class_with_the_true_ones_embedding_is_not_wrong() -> None:
    toy, x = Toy(weights(4)), images(2)
    toy.w[3] = toy.w[0]
    text = torch.eye(4)[torch.tensor([0, 1, 2, 0])]
    toy.session = replace(toy.session, classes=Classes(text, 1.0))
    options: dict[str, Any] = {**ONE_STEP, "warmup": 0, "best": False, "loss": "margin"}
    found = BPDA(EPS, **options).run(toy, x, torch.zeros(2).long(), seeds(2))
    start = uniform_start(x, seeds(2), EPS, philox.ATTACK_START)
    logits = ((x + start).flatten(1) @ toy.w.T)[:, 1:3]
    gradient = toy.w[1 + logits.argmax(dim=1)] - toy.w[0]
    expected = (start.flatten(1) + gradient.sign() / 255).clamp(-EPS, EPS)
    torch.testing.assert_close((found - x).flatten(1), expected, atol=1e-6, rtol=0)


def test_gate_evasion_shuts_a_gate_that_bpda_leaves_open() -> None:
    n = 16
    gated = Gated(weights())
    x, y = images(n), torch.zeros(n).long()
    x = x - x.mean(dim=(1, 2, 3), keepdim=True) + gated.tau - 0.02  # open by 0.02, budget 0.03
    flagged, right = {}, {}
    for attack in (BPDA(EPS, warmup=0), GateEvasion(EPS, warmup=0)):
        found = gated.live(attack.run(gated, x, y, seeds(n)), seeds(n))
        flagged[attack.name] = int(found.flagged.sum())
        right[attack.name] = int((found.logits.argmax(dim=1) == y).sum())
    assert flagged == {"bpda": n, "gate": 0}  # no gradient passes an open gate
    assert right["bpda"] == n
    assert right["gate"] < n


def test_the_gates_term_is_as_large_as_the_losss() -> None:
    gated, x = Gated(weights()), images(2)
    x = x - x.mean(dim=(1, 2, 3), keepdim=True) + torch.tensor([0.4, 0.6]).view(2, 1, 1, 1)
    logits, found = GateEvasion(EPS).through(gated, x, labels(2), seeds(2))
    assert logits.shape == (2, 3)
    # Open: the repaired answer is a constant, and the gate's slope is −1/12 of each pixel.
    torch.testing.assert_close(found[0], torch.ones(3, 2, 2))
    _, plain = BPDA(EPS).through(gated, x, labels(2), seeds(2))
    torch.testing.assert_close(found[1], plain[1] / plain[1].abs().mean())
    _, heavy = GateEvasion(EPS, weight=3.0).through(gated, x, labels(2), seeds(2))
    torch.testing.assert_close(heavy[0], torch.full((3, 2, 2), 3.0))


# ----------------------------------------------------------------------- draws, batches, the start


@pytest.mark.parametrize("eot", [1, 3])
def test_the_attackers_draws_are_its_own(eot: int) -> None:
    toy, x = Toy(weights(), noise=0.1), images(2)
    BPDA(EPS, steps=4, eot=eot, warmup=2).run(toy, x, labels(2), seeds(2))
    assert len(toy.points) == 4 * eot  # every step runs the defense, on the current point
    assert len(set(toy.keys)) == len(toy.keys) == 4 * eot * 2
    assert not set(toy.keys) & set(range(-1000, 1000))  # the attacker's own seeds among them
    steps = [toy.points[at * eot : (at + 1) * eot] for at in range(4)]
    assert all(torch.equal(one, points[0]) for points in steps for one in points)
    assert not any(torch.equal(a[0], b[0]) for a, b in itertools.pairwise(steps))


def test_views_and_guesses_are_drawn_anew_in_every_step() -> None:
    class Noted(Labelled):
        def pictures(self, session: Session, batch: Batch) -> Tensor:
            self.keys += batch.seeds.tolist()
            return super().pictures(session, batch)

    class Noting(Guessing):
        kind = Noted

    for attack, draws in ((ViewAware(EPS, steps=4), 4), (PseudoLabel(EPS, steps=3, eot=2), 3 * 2)):
        toy = Noting(weights())
        attack.run(toy, images(2), labels(2), seeds(2))
        assert len(set(toy.keys)) == len(toy.keys) == draws * 2


def test_eot_averages_over_the_draws() -> None:
    toy, x = Toy(weights(), noise=0.5), images(3)
    attack = BPDA(EPS, eot=3)
    gradient, lead = attack.survey(toy, x, labels(3), seeds(3), 5)
    assert lead is not None
    parts, ahead = torch.zeros_like(x), torch.zeros(3)
    for draw in range(3):
        keys = torch.tensor(toy.keys[3 * draw : 3 * draw + 3])
        logits, part = attack.through(toy, x, labels(3), keys)
        parts += part
        own = logits[torch.arange(3), labels(3)]
        logits[torch.arange(3), labels(3)] = -torch.inf
        ahead += (logits.amax(dim=1) - own) / 3
    torch.testing.assert_close(gradient, parts)
    torch.testing.assert_close(lead, ahead)


ALL = (ViewAware, BPDA, GateEvasion, PseudoLabel)


class Everything(Gated):
    """A toy with a gate and a pseudo-label."""

    kind = FencedAndLabelled


@pytest.mark.parametrize("kind", ALL)
def test_a_batch_is_attacked_as_its_images_one_by_one(kind: type[Attack]) -> None:
    x, y = images(3), labels(3)
    attack = kind(EPS, steps=5)  # type: ignore[call-arg]
    whole = attack.run(Everything(weights(), noise=0.1), x, y, seeds(3))
    for i in range(3):
        rows = slice(i, i + 1)
        alone = attack.run(Everything(weights(), noise=0.1), x[rows], y[rows], seeds(3)[rows])
        torch.testing.assert_close(alone, whole[rows], atol=1e-6, rtol=0)


def test_the_pieces_of_a_batch_keep_their_own_seeds() -> None:
    class Pieced(Toy):
        def pieces(self, x: Tensor, seeds: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
            yield from zip(x.split(2), seeds.split(2), strict=True)

    x, y, keys, attack = images(5), labels(5), seeds(5), BPDA(EPS, steps=3)
    whole = attack.run(Toy(weights(), noise=0.1), x, y, keys)
    torch.testing.assert_close(attack.run(Pieced(weights(), noise=0.1), x, y, keys), whole)


@pytest.mark.parametrize("kind", ALL)
def test_an_empty_batch_and_any_mode(kind: type[Attack]) -> None:
    toy, attack = Everything(weights(), noise=0.1), kind(EPS, steps=2)  # type: ignore[call-arg]
    x, y, keys = images(2), labels(2), seeds(2)
    assert attack.run(toy, x[:0], y[:0], keys[:0]).shape == (0, 3, 2, 2)
    found = attack.run(toy, x, y, keys)
    with torch.inference_mode():
        inside = attack.run(toy, x + 0, y + 0, keys + 0)
    assert torch.equal(found, inside)
    assert not inside.is_inference()
    assert not found.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attack.run(toy, x, y, keys), found)


@pytest.mark.parametrize("options", [{}, {"alpha": 1 / 255}, {"momentum": 0.0}])
def test_bpda_begins_where_the_view_aware_attack_ends(options: dict[str, Any]) -> None:
    toy, x = Toy(weights(), views=lambda x: torch.stack([x, x.flip(-1)])), images(3)
    warm = ViewAware(EPS, steps=7, of="mean", **options).run(toy, x, labels(3), seeds(3))
    BPDA(EPS, steps=1, warmup=7, **options).run(toy, x, labels(3), seeds(3))
    torch.testing.assert_close(toy.points[0], warm, atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------ the bundled model


def test_bpda_at_no_defense_is_pgd() -> None:
    x, y = drawn(4)
    bare = defense("none")
    expected = PGD(4 / 255, steps=3).run(bare, x, y, seeds(4))
    for attack in (
        BPDA(4 / 255, steps=3, **PLAIN),
        ViewAware(4 / 255, steps=3, alpha=1 / 255, momentum=0),
    ):
        found = attack.run(bare, x, y, seeds(4))
        assert ((found - expected).abs() > 1e-6).float().mean() < 2e-3


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("epsilon", [1 / 255, 8 / 255])
def test_within_the_ball_and_the_box(kind: type[Attack], epsilon: float) -> None:
    x, y = drawn(2)
    before = x.clone()
    found = kind(epsilon, steps=3).run(defense("scc"), x, y, seeds(2))  # type: ignore[call-arg]
    assert torch.equal(x, before)
    assert found.shape == x.shape
    assert found.dtype == torch.float32
    assert 0 <= found.min() <= found.max() <= 1
    moved = (found - x).abs()
    assert moved.max() <= epsilon + 1e-6
    assert (moved > 0.4 * epsilon).float().mean() > 0.3


@pytest.mark.slow
def test_who_knows_the_defense_does_more_to_it() -> None:
    x, y = drawn(4)
    scc = defense("scc")

    def loss(p: Tensor) -> float:
        return float(F.cross_entropy(scc(p, 3).logits, y))

    oblivious = loss(PGD(4 / 255, steps=5).run(scc, x, y, seeds(4)))
    views = loss(ViewAware(4 / 255, steps=10).run(scc, x, y, seeds(4)))
    whole = loss(BPDA(4 / 255, steps=5, warmup=5).run(scc, x, y, seeds(4)))
    assert whole > oblivious > loss(x)
    assert views > oblivious


def test_the_suite_of_a_defense() -> None:
    full = ["view-aware", "pseudo", "bpda", "gate", "unrolled"]
    expected = {
        "none": ["view-aware", "bpda"],
        "views": ["view-aware", "bpda"],
        "ttc": ["view-aware", "bpda", "gate", "unrolled"],
        "scc": full,
        "scc:gate=false": [name for name in full if name != "gate"],
        "scc:semantic=false": [name for name in full if name != "pseudo"],
        "scc:warmup_steps=7": full[:-1],
    }
    for spec, names in expected.items():
        target = defense(spec)
        suite = attacks.adaptive_suite(target, 2 / 255)
        assert [one.name for one in suite] == names
        assert all(one.aware and one.epsilon == 2 / 255 for one in suite)
        assert [attacks.parse_attack(one.spec, 2 / 255) for one in suite] == suite
    specs = [one.spec for one in attacks.adaptive_suite(defense("scc"), 2 / 255)]
    assert specs == ["view-aware:steps=30", *full[1:]]


def test_an_attack_that_does_not_suit_says_why() -> None:
    toy, x = Toy(weights()), images(1)
    for attack, message in (
        (GateEvasion(EPS), "gate.*toy has none"),
        (PseudoLabel(EPS), "pseudo-label; toy has none"),
    ):
        assert not attack.suits(toy)
        with pytest.raises(ValueError, match=message):
            attack.run(toy, x, labels(1), seeds(1))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bpda:eot=0", "eot.*>= 1, got 0"),
        ("bpda:loss=dlr", "loss.*margin.*'dlr'"),
        ("bpda:warmup=-1", "warmup.*-1"),
        ("bpda:best=1", "best.*true or false, got 1"),
        ("bpda:momentum=1.5", "momentum.*1.5"),
        ("gate:weight=-1", "weight.*-1"),
        ("view-aware:of=best", "of.*each.*'best'"),
        ("view-aware:steps=0", "steps.*got 0"),
        ("pseudo:alpha=2", "alpha.*got 2"),
    ],
)
def test_refusals(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attacks.parse_attack(spec, 4 / 255)
