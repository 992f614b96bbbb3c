"""DOC held to Algorithm 1 of its paper: probes, gate, turns, momentum and last iterate by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from defense_toys import (
    SHAPE,
    WIDTH,
    check_bpda,
    check_costs,
    check_own_result,
    confined,
    dots,
    exact_logits,
    ran,
    toyed,
)
from scc_fast import image_seeds, tiny
from scc_fast.config import TTCConfig
from scc_fast.defenses.doc import DOC, PROBES, TURNS, DOCConfig, sensitivity, unit
from scc_fast.reference import philox, ttc
from toys import defender_of

SEEDS = image_seeds(4, 3)
OPEN = {"tau": 2.0, "gamma": 1e6}  # a gate that no image can shut: the cosine distance ends at 2


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def uniform(seeds: Tensor, purpose: int, at: int, x: np.ndarray) -> np.ndarray:
    """U(−1, 1) in the shape of x."""
    return 2.0 * philox.uniform(seeds, purpose, at, x[0].size).numpy().reshape(x.shape) - 1


def sensitivity_by_hand(defense: Any, x: np.ndarray, seeds: Tensor) -> np.ndarray:
    config, toy = defense.config, defense.session.encode
    found = []
    for probe in range(config.probes):
        noise = uniform(seeds, PROBES, probe, x)
        if config.probe_noise == "sign":
            noise = np.where(noise < 0, -1, 1)
        found.append(cosine(toy.exact(x + config.epsilon * noise), toy.exact(x)))
    return 1 - np.mean(found, axis=0)


def by_hand(defense: Any, x: Tensor, seeds: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """δ and τ̂ of Algorithm 1, in float64, an image at a time."""
    config, toy = defense.config, defense.session.encode
    pixels = np.float64(x.numpy())
    drift = sensitivity_by_hand(defense, pixels, seeds)
    noise = config.epsilon * uniform(seeds, philox.DELTA, 0, pixels)
    start = confined(noise, pixels, config.epsilon)
    turns = [
        np.float64(philox.normal(seeds, TURNS, at, pixels[0].size).numpy()).reshape(pixels.shape)
        for at in range(config.steps)
    ]
    deltas = []
    for b in range(len(pixels)):
        one, delta = pixels[b : b + 1], start[b : b + 1]
        heading = np.zeros_like(delta)
        for at in range(config.steps):
            g = toy.pull(2 * (toy.exact(one + delta) - toy.exact(one)), one)
            g /= np.linalg.norm(g)
            r = turns[at][b : b + 1]
            r = r - (r * g).sum() * g
            d = g + config.orthogonal * r / np.linalg.norm(r)
            heading = config.momentum * heading + (1 - config.momentum) * d
            delta = confined(delta + config.alpha * np.sign(heading), one, config.epsilon)
        on = 1 / (1 + math.exp(-config.gamma * (config.tau - drift[b])))
        deltas.append(on * delta + (1 - on) * start[b : b + 1])
    return np.concatenate(deltas), drift


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"orthogonal": 1.0, "momentum": 0.3, "steps": 3, "alpha": 1 / 255},
        {"orthogonal": 0.5, "epsilon": 0.1, "tau": 0.001, "gamma": 800.0, "probes": 2},
        {"momentum": 0.9, "epsilon": 0.2, "alpha": 0.05, "probe_noise": "uniform"},
        {"tau": 0.0, "probes": 1},
        {"steps": 0},
    ],
)
def test_steps_by_hand(config: dict[str, Any]) -> None:
    defense, x = toyed(DOC, **config), dots()
    outcome = ran(defense, x, SEEDS)
    delta, drift = by_hand(defense, x, SEEDS)
    np.testing.assert_allclose(outcome.drift.numpy(), drift, atol=1e-6)
    np.testing.assert_allclose(outcome.delta.numpy(), delta, atol=3e-5)
    logits = exact_logits(defense, np.float64(x.numpy()) + delta)
    np.testing.assert_allclose(outcome.logits.numpy(), logits, atol=3e-3)
    assert torch.equal(outcome.flagged, outcome.drift < defense.config.tau)


def test_momentum_starts_at_zero() -> None:
    """After two steps the weights of d¹ and d² are μ : 1.

    d¹ = (0.6, 0.8), d² = (−0.6, 0.8): m² = 0.25·(0.75·d¹ + d²) = (−0.0375, 0.35). A momentum that
    starts at d¹ has 0.75·d¹ + 0.25·d² = (0.3, 0.8), and the other sign.
    """
    defense = toyed(DOC, orthogonal=0.0)
    first, second = torch.zeros(2, 1, *SHAPE)
    first[0, 0, 0, :2] = torch.tensor([3.0, 4.0])
    second[0, 0, 0, :2] = torch.tensor([-30.0, 40.0])
    heading = torch.zeros_like(first)
    for at, gradient in enumerate((first, second)):
        heading = defense.defense._heading(defense.session, gradient, SEEDS[:1], at, heading)
    torch.testing.assert_close(heading[0, 0, 0, :2], torch.tensor([-0.0375, 0.35]))
    assert heading.count_nonzero() == 2


def test_the_last_iterate_is_returned() -> None:
    """Every feature along one line w, no turns: all steps go one way, sign((δ⁰·w) w).

    Four of them, 3/255 each, cross the whole ball of 4/255: the last δ is on its edge, or on the
    box's; a mean over the iterates would be inside.
    """
    defense, x = toyed(DOC, orthogonal=0.0, **OPEN), dots()
    w = torch.randn(x[0].numel(), generator=torch.Generator().manual_seed(3))
    defense.session.encode.weight = torch.outer(w, torch.linspace(0.5, 1.5, WIDTH)).numpy()
    start = ran(toyed(DOC, steps=0), x, SEEDS).delta
    way = (start.flatten(1) @ w)[:, None] * w
    edge = torch.where(way > 0, 4 / 255, -4 / 255).view_as(x)
    want = (x + edge).clamp(0, 1) - x
    torch.testing.assert_close(ran(defense, x, SEEDS).delta, want, atol=1e-6, rtol=0)


def test_sensitivity_by_hand() -> None:
    """cos((3, 4), (1, 0)) = 0.6 and cos((0, 2), (1, 0)) = 0: τ̂ = 1 − 0.6/2 = 0.7."""
    features = torch.tensor([[[1.0, 0.0]], [[3.0, 4.0]], [[0.0, 2.0]]])
    torch.testing.assert_close(sensitivity(features), torch.tensor([0.7]))


def test_probes() -> None:
    """±ε by a coin, or anything between; neither is kept in the box."""
    x = dots()
    for kind, inside in (("sign", False), ("uniform", True)):
        defense = toyed(DOC, epsilon=0.1, probe_noise=kind)
        defense.live(x, SEEDS)
        noise = defense.session.encode.seen[0].unflatten(0, (6, 3)) - x
        assert torch.equal(noise[0], torch.zeros_like(x))
        size = noise[1:].abs()
        assert size.max() <= 0.1 + 1e-6
        assert bool((size < 0.099).any()) == inside
        assert abs(noise[1:].mean()) < 0.02
        spread = 0.1 / math.sqrt(3) if inside else 0.1
        assert noise[1:].std().item() == pytest.approx(spread, rel=0.05)
        assert (x + noise).min() < -0.05
        assert (x + noise).max() > 1.05


def test_the_gate_as_printed() -> None:
    """w = σ(γ(τ − τ̂)): 3/4 where γ(τ − τ̂) = ln 3, the less the higher τ̂; 1/2 is not flagged."""
    x = dots()
    shared = {"epsilon": 0.2, "gamma": 50.0}
    drift = ran(toyed(DOC, **shared), x, SEEDS).drift
    start = ran(toyed(DOC, **shared, steps=0), x, SEEDS).delta
    attack = ran(toyed(DOC, **{**shared, **OPEN}), x, SEEDS).delta
    assert (attack - start).abs().amax(dim=(1, 2, 3)).min() > 0.02
    for image in range(len(x)):
        for odds in (3.0, 1.0, 1 / 3):
            tau = max(0.0, drift[image].item() + math.log(odds) / 50)
            outcome = ran(toyed(DOC, **shared, tau=tau), x, SEEDS)
            share = 1 / (1 + math.exp(-50 * (tau - drift[image].item())))
            want = share * attack[image] + (1 - share) * start[image]
            torch.testing.assert_close(outcome.delta[image], want, atol=1e-5, rtol=0)
            assert outcome.flagged[image] == (odds > 1)
            if tau:
                assert share == pytest.approx(odds / (1 + odds))


@pytest.mark.parametrize("steps", [1, 3])
def test_without_its_own_parts_it_is_ttc_s_last_iterate(steps: int) -> None:
    """No turn, no momentum, the gate wide open: the counterattack of the reference."""
    shared = {"epsilon": 0.1, "alpha": 0.02, "steps": steps}
    defense, x = toyed(DOC, **shared, orthogonal=0.0, momentum=0.0, **OPEN), dots()
    setting = ttc.Setting(defense.session.encode, defense.table, torch.zeros(3))
    want = ttc.ttc(setting, x, SEEDS, TTCConfig(**shared, tau=100.0, beta=100.0))
    got = ran(defense, x, SEEDS)
    torch.testing.assert_close(got.delta, want.delta, atol=1e-6, rtol=0)
    torch.testing.assert_close(got.logits, want.logits, atol=1e-4, rtol=0)


def test_the_turn_is_orthogonal_and_of_length_lambda() -> None:
    defense = toyed(DOC, orthogonal=0.4, momentum=0.0)
    gradient = torch.randn(3, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    # Neither small nor zero gradients may give NaN, or lose their direction.
    gradient *= torch.tensor([1.0, 1e-30, 0.0])[:, None, None, None]
    still = torch.zeros_like(gradient)
    heading = defense.defense._heading(defense.session, gradient, SEEDS, 0, still)
    along = unit(gradient)
    lengths = along.flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.tensor([1.0, 1.0, 0.0]))
    turn = (heading - along).flatten(1)
    torch.testing.assert_close(turn.norm(dim=1), torch.full((3,), 0.4))
    assert (turn * along.flatten(1)).sum(dim=1).abs().max() < 1e-6
    later = defense.defense._heading(defense.session, gradient, SEEDS, 1, still)
    assert not torch.equal(later, heading)  # a new turn


def test_the_gate_an_attacker_looks_at() -> None:
    defense, x = toyed(DOC, epsilon=0.1, tau=0.002), dots()
    found = ran(defense, x, SEEDS)
    leaf = x.clone().requires_grad_()
    defense.session.encode.seen.clear()
    margin = defense.live(leaf, SEEDS).margin
    assert defense.session.encode.seen[0].shape == (6 * 3, *x.shape[1:])
    torch.testing.assert_close(margin.detach(), 0.002 - found.drift)
    assert torch.equal(margin > 0, found.flagged)
    (gradient,) = torch.autograd.grad(margin.sum(), leaf)
    nudge = (1e-3 * gradient / gradient.abs().max()).double().numpy()
    pixels = np.float64(x.numpy())
    ahead, behind = (sensitivity_by_hand(defense, pixels + sign * nudge, SEEDS) for sign in (1, -1))
    slope = (behind - ahead).sum() / 2  # of the margin
    assert slope == pytest.approx((gradient.double().numpy() * nudge).sum(), rel=0.05)
    assert slope > 0


def test_config() -> None:
    assert DOCConfig() == DOCConfig(
        4 / 255,
        3 / 255,
        4,
        tau=0.3,
        gamma=20.0,
        probes=5,
        probe_noise="sign",
        orthogonal=0.05,
        momentum=0.75,
    )
    assert DOCConfig.from_json(DOCConfig(probes=2).to_json()) == DOCConfig(probes=2)
    for wrong, told in [
        ({"probes": 0}, r"probes must be a whole number in \[1, 1000\], got 0"),
        ({"momentum": 1.5}, r"momentum must be a number in \[0, 1\], got 1.5"),
        ({"momentum": 1.0}, "momentum must be below 1"),
        ({"probe_noise": "normal"}, 'probe_noise must be "sign" or "uniform", got .normal'),
        ({"orthogonal": math.nan}, "orthogonal must be a number"),
        ({"gamma": math.inf}, "gamma must be a number"),
        ({"gamma": True}, "gamma must be a number"),
        ({"tau": -1}, "tau must be a number"),
        ({"steps": 1.0}, "steps must be a whole number"),
    ]:
        with pytest.raises(ValueError, match=told):
            DOCConfig(**wrong)


@pytest.mark.parametrize(
    ("config", "forward", "backward"),
    [({}, 11, 4), ({"probes": 1, "steps": 1}, 4, 1), ({"steps": 0}, 7, 0)],
)
def test_cost(config: dict[str, Any], forward: int, backward: int) -> None:
    defense = toyed(DOC, **config)
    assert (defense.traits.forward, defense.traits.backward) == (forward, backward)
    assert defense.defense.width(defense.session, SHAPE[1:]) == 1 + defense.config.probes
    check_costs(defense)


def test_what_an_attacker_differentiates() -> None:
    check_bpda(toyed(DOC), dots(), SEEDS)


def test_a_result_is_the_image_s_own() -> None:
    check_own_result(DOC, steps=2)
    x = dots(1).expand(3, -1, -1, -1)
    delta = ran(toyed(DOC, steps=1), x, torch.tensor([5, 5, 6])).delta
    assert torch.equal(delta[0], delta[1])
    assert ((delta[0] - delta[2]).abs() > 1e-6).float().mean() > 0.5


def test_on_the_bundled_model() -> None:
    """τ was chosen for CLIP; a clean image that the gate knows is left at random noise."""
    x, labels = tiny.generate("test", range(20))
    shut = defender_of(method="doc", config={"tau": 0.0, "gamma": 1e6})(x, 0)
    noise = defender_of(method="rn")(x, 0)
    assert not shut.flagged.any()
    torch.testing.assert_close(shut.delta, noise.delta, atol=1e-7, rtol=0)
    assert (shut.labels == labels).float().mean() >= 0.9
    result = defender_of(method="doc")(x, 0)
    assert result.flagged.all()
    assert result.delta.abs().max() <= 4 / 255 + 1e-6
    assert -1e-6 <= (x + result.delta).min() <= (x + result.delta).max() <= 1 + 1e-6
