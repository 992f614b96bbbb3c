"""DOC: probes, gate, turns, momentum and blend by hand; without its own parts it is TTC."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from test_api import model_of
from test_defense_anti_adv import (
    check_bpda,
    check_costs,
    check_own_result,
    confined,
    dots,
    exact_logits,
    toyed,
)
from torch import Tensor

from scc_fast import Defender, image_seeds, tiny
from scc_fast.config import TTCConfig
from scc_fast.defenses.doc import DOC, PROBES, TURNS, DOCConfig, unit
from scc_fast.reference import philox, step, ttc

SEEDS = image_seeds(4, 3)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def sensitivity_by_hand(defense: Any, x: np.ndarray, seeds: Tensor) -> np.ndarray:
    config, toy = defense.config, defense.encode
    found = []
    for probe in range(config.probes):
        coin = philox.uniform(seeds, PROBES, probe, x[0].size).numpy().reshape(x.shape)
        noisy = np.clip(x + np.where(coin < 0.5, -config.epsilon, config.epsilon), 0, 1)
        found.append(cosine(toy.exact(noisy), toy.exact(x)))
    return 1 - np.mean(found, axis=0)


def by_hand(defense: Any, x: Tensor, seeds: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """δ and τ̂ of the card, in float64, an image at a time."""
    config, toy = defense.config, defense.encode
    pixels = np.float64(x.numpy())
    drift = sensitivity_by_hand(defense, pixels, seeds)
    noise = philox.uniform(seeds, philox.DELTA, 0, pixels[0].size).numpy().reshape(pixels.shape)
    start = confined(config.epsilon * (2.0 * noise - 1), pixels, config.epsilon)
    turns = [
        np.float64(philox.normal(seeds, TURNS, at, pixels[0].size).numpy()).reshape(pixels.shape)
        for at in range(config.steps)
    ]
    weights = np.exp(config.beta * np.arange(config.steps + 1))
    weights /= weights.sum()
    deltas = []
    for b in range(len(pixels)):
        one, delta, heading = pixels[b : b + 1], start[b : b + 1], np.zeros(0)
        blend = weights[0] * delta
        for at in range(config.steps):
            g = toy.pull(2 * (toy.exact(one + delta) - toy.exact(one)), one)
            g /= np.linalg.norm(g)
            r = turns[at][b : b + 1]
            r = r - (r * g).sum() * g
            d = g + config.orthogonal * r / np.linalg.norm(r)
            heading = d if at == 0 else config.momentum * heading + (1 - config.momentum) * d
            delta = confined(delta + config.alpha * np.sign(heading), one, config.epsilon)
            blend = blend + weights[at + 1] * delta
        on = 1 / (1 + math.exp(-config.gamma * (config.tau - drift[b])))
        deltas.append(on * blend + (1 - on) * start[b : b + 1])
    return np.concatenate(deltas), drift


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"orthogonal": 1.0, "momentum": 0.3, "steps": 3, "alpha": 1 / 255},
        {"orthogonal": 0.5, "epsilon": 0.1, "tau": 0.001, "gamma": 800.0, "probes": 2},
        {"tau": 0.0, "beta": -1.0, "probes": 1},
        {"steps": 0},
    ],
)
def test_steps_by_hand(config: dict[str, Any]) -> None:
    defense, x = toyed(DOC, **config), dots()
    outcome = defense.run(x, SEEDS)
    delta, drift = by_hand(defense, x, SEEDS)
    np.testing.assert_allclose(outcome.drift.numpy(), drift, atol=1e-6)
    np.testing.assert_allclose(outcome.delta.numpy(), delta, atol=3e-5)
    logits = exact_logits(defense, np.float64(x.numpy()) + delta)
    np.testing.assert_allclose(outcome.logits.numpy(), logits, atol=3e-3)
    assert torch.equal(outcome.flagged, outcome.drift < defense.config.tau)


def test_both_sides_of_the_gate_and_the_tie() -> None:
    """A low sensitivity is an attacked image; at τ itself half of each, and not flagged."""
    x = dots()
    drift = toyed(DOC, epsilon=0.2).run(x, SEEDS).drift
    start = toyed(DOC, epsilon=0.2, steps=0).run(x, SEEDS).delta
    attack = toyed(DOC, epsilon=0.2, tau=2.0, gamma=1e6).run(x, SEEDS).delta
    order = drift.argsort()
    middle = drift[order[1]].item()
    outcome = toyed(DOC, epsilon=0.2, tau=middle, gamma=1e6).run(x, SEEDS)
    want = {0: attack, 1: (attack + start) / 2, 2: start}
    for rank, image in enumerate(order.tolist()):
        torch.testing.assert_close(outcome.delta[image], want[rank][image], atol=1e-6, rtol=0)
    assert outcome.flagged[order].tolist() == [True, False, False]
    assert (attack - start).abs().amax(dim=(1, 2, 3)).min() > 0.02


@pytest.mark.parametrize("steps", [1, 3])
def test_without_its_own_parts_it_is_ttc(steps: int) -> None:
    """No turn, no momentum, the gate wide open: the counterattack of the reference."""
    shared = {"epsilon": 0.1, "alpha": 0.02, "steps": steps, "beta": 0.7}
    plain = {"orthogonal": 0.0, "momentum": 0.0, "tau": 2.0, "gamma": 1e6}
    defense, x = toyed(DOC, **shared, **plain), dots()
    setting = ttc.Setting(defense.encode, defense.table, torch.zeros(3))
    want = ttc.ttc(setting, x, SEEDS, TTCConfig(**shared, tau=100.0))
    got = defense.run(x, SEEDS)
    torch.testing.assert_close(got.delta, want.delta, atol=1e-6, rtol=0)
    torch.testing.assert_close(got.logits, want.logits, atol=1e-4, rtol=0)


def test_the_turn_is_orthogonal_and_of_length_lambda() -> None:
    defense = toyed(DOC, orthogonal=0.4)
    gradient = torch.randn(3, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    # Neither small nor zero gradients may give NaN, or lose their direction.
    gradient *= torch.tensor([1.0, 1e-30, 0.0])[:, None, None, None]
    heading = defense._heading(gradient, SEEDS, 0, None)
    along = unit(gradient)
    lengths = along.flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.tensor([1.0, 1.0, 0.0]))
    turn = (heading - along).flatten(1)
    torch.testing.assert_close(turn.norm(dim=1), torch.full((3,), 0.4))
    assert (turn * along.flatten(1)).sum(dim=1).abs().max() < 1e-6
    other = defense._heading(gradient, SEEDS, 1, None)
    assert not torch.equal(other, heading)  # a new turn in every step
    mixed = defense._heading(gradient, SEEDS, 1, heading)
    torch.testing.assert_close(mixed, 0.75 * heading + 0.25 * other)


def test_beta_of_100_leaves_the_last_iterate() -> None:
    x = dots()
    open_gate = {"tau": 2.0, "gamma": 1e6}
    last = toyed(DOC, beta=100.0, **open_gate).run(x, SEEDS).delta
    inside = np.abs(last.numpy()) < 4 / 255 - 1e-6
    box = (x + last).numpy()
    assert ((box[inside] < 1e-6) | (box[inside] > 1 - 1e-6)).mean() > 0.5
    torch.testing.assert_close(step.iterate_weights(4, 100.0)[-1], torch.tensor(1.0))


def test_the_gate_an_attacker_looks_at() -> None:
    defense, x = toyed(DOC, epsilon=0.1, tau=0.002), dots()
    found = defense.run(x, SEEDS)
    leaf = x.clone().requires_grad_()
    look = defense.gate(leaf, SEEDS)
    assert look.pictures.shape == (6, 3, *x.shape[1:])
    assert 0 <= look.pictures.min() <= look.pictures.max() <= 1
    margin = defense.answer(look)
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
        4 / 255, 3 / 255, 4, 2.0, tau=0.3, gamma=20.0, probes=5, orthogonal=0.05, momentum=0.75
    )
    assert DOCConfig.from_json(DOCConfig(probes=2).to_json()) == DOCConfig(probes=2)
    for wrong, told in [
        ({"probes": 0}, r"probes must be a whole number in \[1, 1000\], got 0"),
        ({"momentum": 1.5}, r"momentum must be a number in \[0, 1\], got 1.5"),
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
    assert defense.width == 1 + defense.config.probes
    check_costs(defense)


def test_what_an_attacker_differentiates() -> None:
    check_bpda(toyed(DOC), dots(), SEEDS)


def test_a_result_is_the_image_s_own() -> None:
    check_own_result(DOC, steps=2)
    x = dots(1).expand(3, -1, -1, -1)
    delta = toyed(DOC).run(x, torch.tensor([5, 5, 6])).delta
    assert torch.equal(delta[0], delta[1])
    assert ((delta[0] - delta[2]).abs() > 1e-6).float().mean() > 0.9


def test_on_the_bundled_model() -> None:
    """τ was chosen for CLIP; a clean image that the gate knows is left at random noise."""
    x, labels = tiny.generate("test", range(20))
    model, prompts = model_of("tiny"), tiny.prompts()
    shut = DOC(model, prompts, config={"tau": 0.0, "gamma": 1e6})(x, 0)
    noise = Defender(model, prompts, method="rn")(x, 0)
    assert not shut.flagged.any()
    torch.testing.assert_close(shut.delta, noise.delta, atol=1e-7, rtol=0)
    assert (shut.labels == labels).float().mean() >= 0.9
    result = DOC(model, prompts)(x, 0)
    assert result.flagged.all()
    assert result.delta.abs().max() <= 4 / 255 + 1e-6
    assert -1e-6 <= (x + result.delta).min() <= (x + result.delta).max() <= 1 + 1e-6
