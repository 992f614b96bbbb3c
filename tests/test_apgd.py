"""Auto-PGD: its algorithm on paper, against a plain loop, and against pyautoattack's."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pyautoattack import autopgd_base
from torch import Tensor

import scc_fast
from attack_toys import drawn, target_of
from scc_fast.attacks import BareLogits, apgd, margin, parse_attack
from scc_fast.attacks.apgd import climb


def checkpoints(steps: int) -> list[int]:
    """⌈p_j N⌉ with p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j − p_{j−1} − 0.03, 0.06)."""
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return [math.ceil(round(share * steps, 6)) for share in shares[1:] if share <= 1]


def test_the_checkpoints_are_the_papers() -> None:
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    x, seen = torch.full((1, 1, 1, 1), 0.5), []

    def flat(point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen.append(float(point) - 0.5)
        return torch.zeros(1), torch.zeros(1, dtype=torch.bool), torch.ones_like(point)

    found = climb(flat, x, x - 0.05, epsilon=0.1, steps=100)
    # A loss that never rises: at every checkpoint the step is halved, and the image starts again
    # from its best iterate, which is the first. Between them it goes nowhere but up.
    assert len(seen) == 101
    fresh = [k - 1 for k in range(2, 101) if seen[k] < seen[k - 1] - 1e-6]
    assert fresh == checkpoints(100)
    for j, k in enumerate(fresh):
        step = min(0.2 / 2 ** (j + 1), 0.15)
        expected = -0.05 + 0.75 * step + 0.25 * (-0.05 - seen[k - 1])
        assert seen[k + 1] == pytest.approx(expected, abs=1e-6)
    assert torch.equal(found.images, x - 0.05)


def on_paper(
    loss: Callable[[np.ndarray], tuple[float, np.ndarray]],
    x: np.ndarray,
    start: np.ndarray,
    epsilon: float,
    steps: int,
) -> tuple[float, np.ndarray]:
    """Algorithm 1 of arXiv 2003.01690 for one image in float64; every iterate's loss is kept."""

    def inside(point: np.ndarray) -> np.ndarray:
        return np.clip(np.clip(point, x - epsilon, x + epsilon), 0, 1)

    points, values = [start], []
    value, slope = loss(start)
    values.append(value)
    best = (value, start, slope)
    size, marks = 2 * epsilon, [0, *checkpoints(steps)]
    was = (size, None)
    for k in range(steps):
        z = inside(points[k] + size * np.sign(slope))
        point = z
        if k:
            point = inside(points[k] + 0.75 * (z - points[k]) + 0.25 * (points[k] - points[k - 1]))
        value, slope = loss(point)
        values.append(value)
        if value > best[0]:
            best = (value, point, slope)
        if k + 1 in marks[1:]:
            stretch = range(marks[marks.index(k + 1) - 1], k + 1)
            rises = sum(values[i + 1] > values[i] for i in stretch)
            halve = rises <= 0.75 * len(stretch) or (was[0] == size and was[1] == best[0])
            was = (size, best[0])
            if halve:
                size, point, slope = size / 2, best[1], best[2]
        points.append(point)
    return best[0], best[1]


def test_the_algorithm_on_a_loss_with_its_top_inside_the_ball() -> None:
    rng = np.random.default_rng(1)
    n, epsilon, steps = 5, 0.1, 100
    x = rng.uniform(0.2, 0.8, (n, 3, 2, 2)).astype(np.float32)
    top = x + rng.uniform(-0.12, 0.12, x.shape).astype(np.float32)  # some of it outside
    weight = rng.uniform(0.5, 2, x.shape).astype(np.float32)
    start = x + rng.uniform(-epsilon, epsilon, x.shape).astype(np.float32)

    def evaluate(point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        away = point.double() - torch.tensor(top)
        loss = -(torch.tensor(weight) * away**2).flatten(1).sum(dim=1)
        return loss, loss > 1, (-2 * torch.tensor(weight) * away).float()

    found = climb(
        evaluate, torch.tensor(x).double(), torch.tensor(start).double(), epsilon=0.1, steps=steps
    )
    for i in range(n):

        def one(p: np.ndarray, i: int = i) -> tuple[float, np.ndarray]:
            away = p - top[i]
            return float(-(weight[i] * away**2).sum()), -2 * weight[i] * away

        value, image = on_paper(one, x[i].astype(float), start[i].astype(float), epsilon, steps)
        assert float(found.highest[i]) == pytest.approx(value, rel=1e-9, abs=1e-12)
        np.testing.assert_allclose(found.images[i].numpy(), image, atol=1e-9)
        reachable = np.clip(top[i], x[i] - epsilon, x[i] + epsilon)
        limit = float(-(weight[i] * (reachable - top[i]) ** 2).sum())
        assert limit - 0.01 < value <= limit + 1e-6


def test_the_best_iterate_is_a_wrong_one_where_there_is_one() -> None:
    """Three images; their losses and whether they are wrong, iterate by iterate."""
    losses = torch.tensor([[1.0, 5, 3, 4], [1.0, 5, 3, 4], [9.0, 2, 3, 2]])
    wrong = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]]).bool()
    points: list[Tensor] = []

    def scripted(point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        points.append(point)
        column = len(points) - 1
        return losses[:, column], wrong[:, column], torch.randn(point.shape, generator=noise)

    noise = torch.Generator().manual_seed(1)
    x = torch.full((3, 3, 4, 4), 0.5)
    found = climb(scripted, x, x, epsilon=0.1, steps=3)
    assert len(points) == 4
    for image, iterate in enumerate((3, 1, 3)):
        assert torch.equal(found.images[image], points[iterate][image])
    assert found.loss.tolist() == [4, 5, 2]
    assert found.fooled.tolist() == [True, False, True]
    assert found.highest.tolist() == [5, 5, 9]


# ------------------------------------------------------------------------- against pyautoattack


class Theirs(autopgd_base.APGDAttack_targeted):
    """pyautoattack's with x_0's loss where it reads the row before the first.

    It compares loss_steps[0] with loss_steps[-1], still zero at the first checkpoint; the paper
    compares f(x_1) with f(x_0).
    """

    first: Tensor | None = None

    def check_oscillation(self, x: Tensor, j: int, k: int, y5: Tensor, k3: float = 0.75) -> Any:
        if self.first is not None and j == k - 1:
            x = torch.cat([x[:-1], self.first[None]])
        return super().check_oscillation(x, j, k, y5, k3)


def both(name: str, epsilon: float, steps: int, exact: bool) -> tuple[Any, Any, Tensor]:
    """pyautoattack's run and ours from the same start on 4 pictures, and who is right clean."""
    x, labels = drawn(4)
    target = target_of()
    attack = parse_attack(f"{name}{steps}", epsilon)
    assert isinstance(attack, apgd.APGD)
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(4))
    start = (x + epsilon * (2 * noise - 1)).clamp(0, 1)
    classes = margin.Distinct.of(target, labels)
    goals = attack._goals(target, x, classes)[:, 0]
    evaluate = attack._evaluate(target, classes, goals)
    ours = climb(evaluate, x, start, epsilon=epsilon, steps=steps)
    module = BareLogits(target)
    theirs = Theirs(module, n_iter=steps, eps=epsilon, device="cpu")
    theirs.loss = {"apgd-ce": "ce", "apgd-dlr": "dlr", "apgd-t": "dlr-targeted"}[name]
    clean = module(x)
    if name == "apgd-t":
        theirs.y_target = clean.sort(dim=1)[1][:, -2]
        assert torch.equal(theirs.y_target, goals)  # all of them are right clean
    theirs.first = evaluate(start)[0] if exact else None
    theirs.init_hyperparam(x)
    with torch.random.fork_rng(devices=[]):
        found = theirs.attack_single_run(x, labels, x_init=start)
    return found, ours, clean.argmax(dim=1) == labels


@pytest.mark.parametrize("epsilon", [1 / 255, 3 / 255])
@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr", "apgd-t"])
def test_step_by_step_as_pyautoattack(name: str, epsilon: float) -> None:
    (best, right, loss, _), ours, clean = both(name, epsilon, 20, exact=True)
    assert clean.all()
    torch.testing.assert_close(ours.highest, loss, atol=1e-5, rtol=1e-4)
    assert torch.equal(ours.fooled, ~right)
    for i in torch.nonzero(ours.loss == ours.highest)[:, 0].tolist():
        assert ((ours.images[i] - best[i]).abs() > 1e-5).float().mean() < 1e-3


@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr"])
def test_as_strong_as_pyautoattack_unchanged(name: str) -> None:
    (_, right, loss, _), ours, _ = both(name, 2 / 255, 20, exact=False)
    torch.testing.assert_close(ours.highest, loss, atol=0.02, rtol=0.02)
    assert torch.equal(ours.fooled, ~right)


# ------------------------------------------------------------------------------ the attacks


def test_what_is_fooled_leaves_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = drawn(6)
    target, seeds = target_of(), scc_fast.image_seeds(3, 6)
    labels = labels.clone()
    labels[2] = (labels[2] + 1) % 201  # wrong from the start: attacked in the first run alone
    runs: list[tuple[Tensor, Tensor, apgd.Climb]] = []

    def spied(evaluate: Any, x: Tensor, start: Tensor, **options: Any) -> apgd.Climb:
        runs.append((x, start, climb(evaluate, x, start, **options)))
        return runs[-1][2]

    monkeypatch.setattr(apgd, "climb", spied)
    attack = parse_attack("apgd-ce5:restarts=3", 1.5 / 255)
    attacked = attack.run(target, x, labels, seeds)
    fooled = target(attacked, 0).labels != labels
    assert 1 <= int(fooled.sum()) < 6
    assert len(runs) == 3
    assert len(runs[0][0]) == 6
    for (_, _, found), (later, _, _) in itertools.pairwise(runs):
        assert len(later) == int((~found.fooled).sum())
    assert fooled[2]
    assert torch.equal(runs[0][2].images[2], attacked[2])
    last = runs[-1][0]
    starts = [start[-1] for _, start, _ in runs]
    assert torch.equal(last[-1], runs[0][0][5]) or fooled[5]
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(starts))
    # Of several runs without success the one of highest loss
    stays = int((~fooled).nonzero()[0])
    place = [int((run[0] == x[stays]).flatten(1).all(dim=1).nonzero()[0]) for run in runs]
    highest = [float(run[2].loss[i]) for run, i in zip(runs, place, strict=True)]
    kept = runs[int(np.argmax(highest))]
    assert torch.equal(attacked[stays], kept[2].images[place[int(np.argmax(highest))]])


def test_a_later_run_that_fools_counts_whatever_its_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Tensor] = []

    def scripted(evaluate: Any, x: Tensor, start: Tensor, **options: Any) -> apgd.Climb:
        runs.append((x + 0.01 * (1 + len(runs))).clamp(0, 1))
        loss = torch.tensor([3.0 - len(runs)])  # lower each time; the second run fools
        return apgd.Climb(runs[-1], loss, torch.tensor([len(runs) == 2]), loss)

    monkeypatch.setattr(apgd, "climb", scripted)
    attack = parse_attack("apgd-ce5:restarts=3", 8 / 255)
    attacked = attack.run(target_of(), *drawn(1), torch.tensor([50]))
    assert len(runs) == 2
    assert torch.equal(attacked, runs[1])


def test_the_goals_are_the_likeliest_wrong_classes() -> None:
    x, labels = drawn(3)
    labels = (labels + torch.tensor([0, 1, 0])) % 201
    target = target_of()
    attack = parse_attack("apgd-t:targets=4", 4 / 255)
    assert isinstance(attack, apgd.APGDT)
    goals = attack._goals(target, x, margin.Distinct.of(target, labels))
    for row, y, found in zip(target(x, 0).logits, labels.tolist(), goals.tolist(), strict=True):
        order = np.argsort(-row.numpy(), kind="stable").tolist()
        assert found == [k for k in order if k != y][:4]
    few = target_of("tiny", ("a cat", "a dog", "a bee", "an apple"))
    goals = parse_attack("apgd-t", 0.1)._goals(  # type: ignore[attr-defined]
        few, x, margin.Distinct.of(few, torch.tensor([0, 1, 2]))
    )
    assert [sorted(row) for row in goals.tolist()] == [[1, 2, 3], [0, 2, 3], [0, 1, 3]]


@pytest.mark.filterwarnings("ignore:classes has duplicates")
def test_the_dlr_needs_its_classes() -> None:
    prompts = ("a cat", "a dog", "a bee", "an apple")
    x, labels, seeds = torch.rand(1, 3, 64, 64), torch.tensor([0]), torch.tensor([1])
    for name, least in (("apgd-ce", 2), ("apgd-dlr", 3), ("apgd-t", 4)):
        attack = parse_attack(f"{name}2", 4 / 255)
        for count in (2, 3, 4):
            target = target_of("tiny", (*prompts[:count], prompts[0]))
            assert attack.suits(target) is (count >= least)
            if count >= least:
                assert attack.run(target, x, labels, seeds).shape == x.shape
            else:
                with pytest.raises(ValueError, match=f"{name} needs at least {least} .* {count}"):
                    attack.run(target, x, labels, seeds)


def test_stronger_than_pgd_with_the_same_passes() -> None:
    x, labels = drawn(8)
    target, seeds = target_of(), scc_fast.image_seeds(2, 8)

    def right(spec: str) -> int:
        attacked = parse_attack(spec, 1.5 / 255).run(target, x, labels, seeds)
        return int((target(attacked, 0).labels == labels).sum())

    assert right("apgd-t10:targets=3") <= right("apgd-ce10") <= right("pgd10") < 8
