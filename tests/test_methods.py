"""What every method promises: ball and box, the gate, the cost, one result per image and seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reference_toys import GEOMETRIC, HEIGHT, PAPER, ROUNDING, images, middle, setting
from scc_fast.config import (
    IDENTITY,
    RNConfig,
    SCCConfig,
    TTCConfig,
    resolve_views,
)
from scc_fast.reference import baselines, heads, philox, step
from scc_fast.reference.scc import scc
from scc_fast.reference.ttc import Outcome, look, merge, ttc
from scc_fast.reference.views import make_views

VIEWS = pytest.mark.parametrize("views", [GEOMETRIC, PAPER], ids=["geometric", "paper"])
FIELDS = ("logits", "delta", "drift", "flagged")
# Where a gradient is rounding noise its sign may follow the batch's layout: so many of the pixels.
FREE_SIGNS = 0.01


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def gate_in_the_middle(x: Tensor, seeds: Tensor, epsilon: float = 4 / 255) -> float:
    return middle(ttc(setting(), x, seeds, TTCConfig(epsilon=epsilon)).drift)


def assert_identical(first: Outcome, second: Outcome, rows: Any = slice(None)) -> None:
    for name in FIELDS:
        torch.testing.assert_close(
            getattr(first, name)[rows], getattr(second, name)[rows], rtol=0, atol=0, equal_nan=True
        )


METHODS: dict[str, Callable[[Tensor, Tensor], Outcome]] = {
    "none": lambda x, seeds: baselines.none(setting(), x, seeds),
    "rn": lambda x, seeds: baselines.rn(setting(), x, seeds, RNConfig()),
    "views": lambda x, seeds: baselines.views(setting(), x, seeds, PAPER),
    "ttc": lambda x, seeds: ttc(setting(), x, seeds, TTCConfig(tau=0.03)),
    "scc": lambda x, seeds: scc(setting(), x, seeds, GEOMETRIC, SCCConfig(tau=0.03)),
    "scc paper": lambda x, seeds: scc(setting(), x, seeds, PAPER, SCCConfig(gate=False)),
}
EVERY = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@pytest.mark.parametrize("tau", ["middle", 0.0, 10.0])
@VIEWS
def test_scc_without_its_two_parts_is_ttc(views, tau: float | str) -> None:
    """The paper's ablation, to the bit; images on both sides of the gate, and on one alone."""
    x, seeds = images(9), philox.image_seeds(0, 9)
    tau = gate_in_the_middle(x, seeds) if tau == "middle" else tau
    config = SCCConfig(semantic=False, spatial=False, tau=tau)
    bare, want = (
        scc(setting(), x, seeds, views, config),
        ttc(setting(), x, seeds, TTCConfig(tau=tau)),
    )
    assert_identical(bare, want)
    assert want.flagged.sum().item() in {0.0: [0], 10.0: [9]}.get(tau, range(1, 9))
    for part in ({"semantic": True}, {"spatial": True}):  # either part alone is not
        other = scc(setting(), x, seeds, views, SCCConfig(**{**vars(config), **part, "tau": 10.0}))
        assert not torch.equal(other.delta, want.delta)


def test_rn_is_ttc_without_steps() -> None:
    x, seeds = images(5), philox.image_seeds(0, 5)
    noise = baselines.rn(setting(), x, seeds, RNConfig())
    still = ttc(setting(), x, seeds, TTCConfig(steps=0))
    assert torch.equal(noise.delta, still.delta)
    torch.testing.assert_close(noise.logits, still.logits)
    assert noise.drift.isnan().all()
    assert not noise.flagged.any()


def test_none_and_views_add_nothing() -> None:
    x, seeds = images(5), philox.image_seeds(0, 5)
    toy = setting()
    want = torch.stack(
        [
            8 * heads.cosines(toy.encode(v), toy.classes)
            for v in make_views(x, seeds, PAPER, toy.fill)
        ]
    )
    for outcome, logits in (
        (baselines.none(toy, x, seeds), want[0]),
        (baselines.views(toy, x, seeds, PAPER), want.mean(dim=0)),
    ):
        assert not outcome.delta.any()
        torch.testing.assert_close(outcome.logits, logits)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    method=st.sampled_from(["rn", "ttc", "scc"]),
    content=st.integers(0, 1000),
    seed=st.integers(-(2**63), 2**63 - 1),
    epsilon=st.floats(0, 0.5),
    alpha=st.floats(0, 0.5),
    steps=st.integers(0, 4),
    semantic_steps=st.integers(0, 3),
    beta=st.floats(-10, 10),
    temperature=st.floats(0.01, 1),
    preset=st.sampled_from(["geometric", "paper"]),
    switches=st.tuples(*[st.booleans()] * 4),
)
def test_every_delta_stays_in_ball_and_box(
    method: str,
    content: int,
    seed: int,
    epsilon: float,
    alpha: float,
    steps: int,
    semantic_steps: int,
    beta: float,
    temperature: float,
    preset: str,
    switches: tuple[bool, ...],
) -> None:
    """To the rounding of x + δ and of the weighted sum (ROUNDING)."""
    x, seeds, (semantic, spatial, gate, flip) = (
        images(2, content),
        torch.tensor([seed, 1]),
        switches,
    )
    shared = {"epsilon": epsilon, "alpha": alpha, "beta": beta, "tau": 0.1}
    if method == "rn":
        outcome = baselines.rn(setting(), x, seeds, RNConfig(epsilon))
    elif method == "ttc":
        outcome = ttc(setting(), x, seeds, TTCConfig(steps=steps, **shared))
    else:
        config = SCCConfig(
            **shared,
            warmup_steps=steps,
            temperature=temperature,
            semantic_steps=semantic_steps,
            semantic=semantic,
            spatial=spatial,
            gate=gate,
        )
        views = resolve_views(preset, HEIGHT, flip=flip, sigma=0.1)
        outcome = scc(setting(), x, seeds, views, config)
    assert outcome.delta.dtype == torch.float32
    assert outcome.delta.shape == x.shape
    assert outcome.delta.abs().max().item() <= epsilon + ROUNDING
    defended = x + outcome.delta
    assert -ROUNDING <= defended.min().item() <= defended.max().item() <= 1 + ROUNDING
    assert outcome.logits.isfinite().all()
    assert outcome.logits.shape == (2, 7)


@VIEWS
def test_the_gate(views) -> None:
    """A clean image keeps δ⁰ and is predicted from it over the views; gate=False repairs it too."""
    x, seeds, toy = images(9), philox.image_seeds(0, 9), setting()
    config = SCCConfig(tau=gate_in_the_middle(x, seeds))
    gated = scc(toy, x, seeds, views, config)
    assert torch.equal(gated.flagged, gated.drift < config.tau)
    assert 0 < gated.flagged.sum() < 9
    start = step.initial_delta(x, seeds, config.epsilon)
    over_views = heads.mean_logits(look(toy, x + start, seeds, views), toy.classes)
    clean = ~gated.flagged
    assert torch.equal(gated.delta[clean], start[clean])
    torch.testing.assert_close(gated.logits[clean], over_views[clean])

    repaired = scc(toy, x, seeds, views, SCCConfig(gate=False))
    assert repaired.flagged.all()
    assert torch.equal(repaired.drift, gated.drift)
    wrong = (repaired.delta != gated.delta).flatten(1).float().mean(dim=1)
    assert (wrong[gated.flagged] <= FREE_SIGNS).all()
    assert (wrong[clean] > 0.1).all()

    nobody = scc(toy, x, seeds, views, SCCConfig(tau=0.0))
    assert not nobody.flagged.any()
    assert torch.equal(nobody.delta, start)
    torch.testing.assert_close(nobody.logits, over_views)


def test_the_gate_is_strict() -> None:
    """τ = τ* is a clean image."""
    x, seeds = images(3), philox.image_seeds(0, 3)
    drift = ttc(setting(), x, seeds, TTCConfig()).drift
    outcome = ttc(setting(), x, seeds, TTCConfig(tau=drift[1].item()))
    assert torch.equal(outcome.flagged, drift < drift[1])
    assert not outcome.flagged[1]


@pytest.mark.parametrize(("warm_up", "semantic"), [(2, 2), (1, 3), (3, 1), (2, 0)])
@VIEWS
def test_cost_in_forward_passes(views, warm_up: int, semantic: int) -> None:
    """METHOD.md's cost lines, in images that the encoder sees."""
    x, seeds, count = images(6), philox.image_seeds(0, 6), len(views)
    tau = gate_in_the_middle(x, seeds)

    def seen(run: Callable[[Any], Outcome]) -> tuple[int, int, int]:
        toy = setting()
        flagged = run(toy).flagged.sum().item()
        return sum(toy.encode.batches), flagged, len(toy.encode.batches)

    for gate in (0.0, tau, 10.0):
        total, flagged, _ = seen(
            lambda toy, g=gate: ttc(toy, x, seeds, TTCConfig(steps=warm_up, tau=g))
        )
        assert total == flagged * (warm_up + 2) + (6 - flagged) * 2
        config = SCCConfig(warmup_steps=warm_up, semantic_steps=semantic, tau=gate)
        total, flagged, calls = seen(lambda toy, c=config: scc(toy, x, seeds, views, c))
        repaired = 1 + count * (warm_up + semantic + 1)
        assert total == flagged * repaired + (6 - flagged) * (1 + count)
        if flagged:  # f₀ is a pass of its own here
            assert calls == warm_up + semantic + 2


@EVERY
def test_a_seed_gives_the_result_again(method) -> None:
    x = images(4)
    first = method(x, philox.image_seeds(5, 4))
    assert_identical(method(x, philox.image_seeds(5, 4)), first)


@pytest.mark.parametrize("name", ["rn", "views", "ttc", "scc", "scc paper"])
def test_another_seed_gives_another_result(name: str) -> None:
    x = images(4)
    first, second = (METHODS[name](x, philox.image_seeds(seed, 4)) for seed in (5, 6))
    assert not (first.logits == second.logits).all(dim=1).any()


@EVERY
def test_a_result_is_the_image_s_own(method) -> None:
    """Alone, in a batch of 17, and in another order: the same but for free signs and rounding."""
    x, seeds = images(17), philox.image_seeds(5, 17)
    together = method(x, seeds)
    order = torch.randperm(17, generator=torch.Generator().manual_seed(0))
    shuffled = method(x[order], seeds[order])
    alone = [method(x[i : i + 1], seeds[i : i + 1]) for i in range(17)]
    for other in (
        Outcome(*(torch.cat([getattr(one, name) for one in alone]) for name in FIELDS)),
        Outcome(*(getattr(shuffled, name)[order.argsort()] for name in FIELDS)),
    ):
        assert torch.equal(other.flagged, together.flagged)
        assert torch.equal(other.logits.argmax(dim=1), together.logits.argmax(dim=1))
        differs = (other.delta - together.delta).abs() > ROUNDING
        assert differs.float().mean() <= FREE_SIGNS
        torch.testing.assert_close(other.logits, together.logits, rtol=0, atol=1e-3)
        torch.testing.assert_close(other.drift, together.drift, equal_nan=True)


def test_equal_images_with_one_seed_are_equal() -> None:
    x, seeds = images(1).expand(3, -1, -1, -1), torch.tensor([7, 7, 8])
    delta = scc(setting(), x, seeds, PAPER, SCCConfig(gate=False)).delta
    assert ((delta[0] - delta[1]).abs() > ROUNDING).float().mean() <= FREE_SIGNS
    assert ((delta[0] - delta[2]).abs() > ROUNDING).float().mean() > 0.5


def test_noise_is_the_same_in_every_step() -> None:
    """The encoder's inputs, from which δ is taken off: one noise per image and view."""
    x, seeds, toy = images(3, low=0.4, high=0.6), philox.image_seeds(5, 3), setting()
    inputs, encode = [], toy.encode
    object.__setattr__(toy, "encode", lambda pixels: inputs.append(pixels) or encode(pixels))
    views = resolve_views("paper", HEIGHT, sigma=0.01)
    scc(toy, x, seeds, views, SCCConfig(gate=False))
    batches = [pixels.unflatten(0, (4, 3)) for pixels in inputs if len(pixels) == 12]
    assert len(batches) == 5
    for batch in batches:
        torch.testing.assert_close(batch[1], batch[0].flip(-1))
        for view in (2, 3):
            noise = batches[0][view] - batches[0][0]
            torch.testing.assert_close(batch[view] - batch[0], noise, rtol=0, atol=2e-7)
    assert (batches[0][2] - batches[0][3]).std() > 0.01  # sqrt(2) sigma: not one noise twice


def test_image_seeds() -> None:
    ten = philox.image_seeds(5, 10)
    assert torch.equal(philox.image_seeds(5, 3), ten[:3])
    assert torch.equal(philox.image_seeds(ten, 10), ten)
    many = torch.cat([philox.image_seeds(seed, 50) for seed in (*range(-20, 20), 2**32, 2**63)])
    assert len(many.unique()) == len(many)  # (5, 1) is not (6, 0)
    assert not torch.isin(philox.image_seeds(None, 4), philox.image_seeds(None, 4)).any()


def test_derived_seeds_are_new() -> None:
    seeds = philox.image_seeds(5, 20)
    drawn = [philox.derive(seeds, philox.EOT, view) for view in range(20)]
    drawn += [philox.derive(seeds, philox.DATA, 0), seeds]
    assert len(torch.cat(drawn).unique()) == 22 * 20
    assert drawn[0].dtype == torch.int64
    assert torch.equal(philox.derive(seeds[3:4], philox.EOT, 1), drawn[1][3:4])


def test_noise_does_not_repeat_across_purposes_and_views() -> None:
    seeds, seen = philox.image_seeds(5, 4), []
    for purpose in range(6):
        for view in range(4):
            seen.append(philox.uniform(seeds, purpose, view, 64))
    stacked = torch.stack(seen).flatten(0, 1)  # purposes, views and images: one stream each
    assert len(stacked.unique(dim=0)) == len(stacked)
    correlation = torch.corrcoef(stacked) - torch.eye(len(stacked))
    assert correlation.abs().max() < 0.65  # 4560 pairs of 64 numbers: 5 standard errors


@pytest.mark.parametrize("name", ["scc", "scc paper", "ttc", "gated"])
def test_gradient_through_the_defense(name: str) -> None:
    """With gradients on: that of the prediction at x + δ, where no projection meets the box."""
    x, seeds, toy = images(6), philox.image_seeds(5, 6), setting()
    tau = gate_in_the_middle(x, seeds) if name == "gated" else 10.0
    views = {"scc paper": PAPER, "ttc": (IDENTITY,)}.get(name, GEOMETRIC)

    def run(pixels: Tensor) -> Outcome:
        if name == "ttc":
            return ttc(toy, pixels, seeds, TTCConfig(tau=tau))
        return scc(toy, pixels, seeds, views, SCCConfig(tau=tau))

    without = run(x)
    out = torch.randn(6, 7, generator=torch.Generator().manual_seed(3))
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        outcome = run(leaf)
        (got,) = torch.autograd.grad(outcome.logits, leaf, out)
        leaf = (x + outcome.delta).detach().requires_grad_()
        logits = heads.mean_logits(look(toy, leaf, seeds, views), toy.classes)
        (want,) = torch.autograd.grad(logits, leaf, out)
    torch.testing.assert_close(outcome.logits, logits)
    torch.testing.assert_close(outcome.logits.detach(), without.logits)
    assert torch.equal(outcome.flagged, without.flagged)
    assert outcome.flagged.sum() == (3 if name == "gated" else 6)
    inside = (x > 4 / 255) & (x < 1 - 4 / 255)
    assert 0.5 < inside.float().mean() < 1
    torch.testing.assert_close(got[inside], want[inside])
    assert want.flatten(1).norm(dim=1).min() > 0.01
    assert got.isfinite().all()


def test_no_weight_gets_a_gradient() -> None:
    """Only the encoder's input needs a backward pass, whatever the weights would like."""
    toy = setting()
    for weight in (toy.encode.first, toy.encode.second):
        weight.requires_grad_()
    outcome = scc(toy, images(2), philox.image_seeds(5, 2), GEOMETRIC, SCCConfig(gate=False))
    assert toy.encode.first.grad is None
    assert toy.encode.second.grad is None
    assert not any(getattr(outcome, name).requires_grad for name in FIELDS)


def test_merge_replaces_the_flagged_rows() -> None:
    rows = merge(torch.zeros(4, 2), torch.tensor([True, False, False, True]), torch.ones(2, 2))
    assert rows.tolist() == [[1, 1], [0, 0], [0, 0], [1, 1]]
