"""View extrapolation against METHOD.md by hand, and what a caller and an attacker see of it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import scc_fast
from defense_toys import check_own_result, looked_at
from scc_fast import DefendedCLIP, Defender, View, tiny
from scc_fast.attacks import parse_attack
from scc_fast.config import IDENTITY, SCCConfig, ViewsConfig
from scc_fast.defenses.extrapolate import LEAST_BETA, Extrapolate, ExtrapolateConfig
from toys import FIVE, defender_of, model_of, pictures

RULES: tuple[dict[str, Any], ...] = (
    {},
    {"rule": "constant", "strength": 1.5},
    {"rule": "geodesic", "strength": 2.25},
    {"slope": 8.0, "threshold": 0.5},
)


def by_hand(units: np.ndarray, config: ExtrapolateConfig) -> tuple[np.ndarray, ...]:
    """z, a and r of one picture's unit features (L, D), in float64, as METHOD.md writes them."""
    own, others = units[0], units[1:]
    count = len(others)
    mean = others.mean(axis=0)
    cosine = float((others @ own).mean())
    drifts = others - own
    towards = drifts.mean(axis=0)
    norms = np.linalg.norm(drifts, axis=1) * np.linalg.norm(towards)
    r = float((drifts @ towards / norms).mean())
    if config.rule == "geodesic":
        anchor = mean / np.linalg.norm(mean)
        between = [others[i] @ others[j] for i in range(count) for j in range(count) if i != j]
        o, t = np.clip(1 - cosine, 0, 1), np.clip((np.mean(between) + 1) / 2, 0, 1)
        beta = LEAST_BETA + (config.strength - LEAST_BETA) * np.clip(o**0.9 * t, 0, 1)
        theta = np.arccos(own @ anchor)
        side = anchor - (own @ anchor) * own
        side /= np.linalg.norm(side)
        return np.cos(beta * theta) * own + np.sin(beta * theta) * side, cosine, r
    c = config.strength
    if config.rule == "agreement":
        part = float(r > config.threshold)
        if config.slope is not None:
            part = 1 / (1 + math.exp(-config.slope * (r - config.threshold)))
        c = 1 + (config.strength - 1) * part
    return own + c * (mean - own), cosine, r


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("options", [{}, {"engine": "eager"}, {"backend": "reference"}], ids=str)
def test_as_method_md_has_it(rule: dict[str, Any], options: dict[str, Any]) -> None:
    x = pictures("tiny", 5)
    defender = defender_of("tiny", method="extrapolate", config=rule, **options)
    found = defender(x, 0)
    shown = looked_at(defender, x, found.seeds)
    assert shown.shape[0] == 4
    with torch.no_grad():
        features = torch.stack([defender.session.encode(view) for view in shown])
    units = torch.nn.functional.normalize(features.double(), dim=-1).numpy()
    text = defender.text_features.double().numpy()
    for i in range(5):
        z, cosine, r = by_hand(units[:, i], ExtrapolateConfig(**rule))
        want = defender.table.scale * (text @ (z / np.linalg.norm(z))) + defender.table.bias
        np.testing.assert_allclose(found.logits[i].numpy(), want, atol=2e-3)
        assert float(found.drift[i]) == pytest.approx(cosine, abs=1e-5)
        assert bool(found.flagged[i]) == (
            defender.has_gate and r > ExtrapolateConfig(**rule).threshold
        )


def test_it_adds_nothing_and_draws_nothing() -> None:
    x, defender = pictures("tiny", 3), defender_of("tiny", method="extrapolate", config={})
    first, second = defender(x, 1), defender(x, 2)
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.images, x)
    assert first.delta.abs().max() == 0
    assert not defender.is_randomized
    plan = defender.plan()
    assert (plan.forward, plan.backward, len(plan.passes)) == (4, 0, 1)
    check_own_result(Extrapolate)


def test_the_switch() -> None:
    """One side of θ is the mean of the views, the other goes on; the constant rule is either."""
    x = pictures("tiny", 4)

    def logits(**config: Any) -> Tensor:
        return defender_of("tiny", method="extrapolate", config=config)(x, 0).logits

    mean, far = (logits(rule="constant", strength=c) for c in (1.0, 2.5))
    torch.testing.assert_close(logits(threshold=1.0), mean)
    torch.testing.assert_close(logits(threshold=-1.0), far)
    mixed = defender_of("tiny", method="extrapolate", config={"threshold": 0.6})(x, 0)
    torch.testing.assert_close(mixed.logits, torch.where(mixed.flagged[:, None], far, mean))
    own = logits(rule="constant", strength=0.0)
    torch.testing.assert_close(own, defender_of("tiny", method="none", config={})(x, 0).logits)
    assert not torch.allclose(mean, far)


def test_shares_of_the_side_serve_every_size() -> None:
    share = View(flip=True, shift=(1 / 32, -0.07))
    assert share.at(64) == View(flip=True, shift=(2, -4))
    assert share.at(224) == View(flip=True, shift=(7, -16))
    assert share.at(8).shift == (1, -1)
    assert View(shift=(0.0, 0.5)).at(10).shift == (0, 5)
    assert IDENTITY.at(64) is IDENTITY
    with pytest.raises(ValueError, match=r"shares of the shorter side in \(-1, 1\), got \(1\.0"):
        View(shift=(1.0, 0))
    views = (IDENTITY, View(flip=True), View(shift=(1 / 32, 1 / 32)))
    config = ExtrapolateConfig(views=views, strength=1.5)
    assert ExtrapolateConfig.from_json(config.to_json()) == config
    x = pictures("tiny", 2)
    whole = (IDENTITY, View(flip=True), View(shift=(2, 2)))
    for method in ("extrapolate", "views", "scc"):
        found = [
            defender_of("tiny", method=method, config={"views": kind})(x, 0).logits
            for kind in (views, whole)
        ]
        assert torch.equal(*found)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"views": "paper"}, "views must be without noise"),
        ({"views": [IDENTITY, View(noise=0.1)]}, "views must be without noise"),
        ({"views": [IDENTITY]}, "views must be at least 3 for rule='agreement'"),
        ({"views": [IDENTITY, View(flip=True)]}, "views must be at least 3"),
        ({"views": [IDENTITY], "rule": "constant"}, "views must be at least 2"),
        ({"rule": "geodesic", "strength": 0.1}, r"strength must be a number in \[0.45, 1000\]"),
        ({"rule": "agree"}, "rule must be one of agreement, constant, geodesic; got 'agree'"),
        ({"strength": -1}, r"strength must be a number in \[0, 1000\], got -1"),
        ({"threshold": 2}, r"threshold must be a number in \[-1, 1\], got 2"),
        ({"slope": 0}, "slope must be a number in"),
    ],
)
def test_configs_that_cannot_be(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExtrapolateConfig(**config)


# ---- Strength of the last mean -------------------------------------------------------------------


@pytest.mark.parametrize("method", ["views", "scc"])
@pytest.mark.parametrize("options", [{}, {"engine": "eager"}])
def test_strength_of_the_mean(method: str, options: dict[str, Any]) -> None:
    """c = 1 is as published to the bit; beyond, the reference and the engine agree."""
    x, seeds = pictures("tiny", 4), 3
    plain = defender_of("tiny", method=method, config={}, **options)(x, seeds)
    one = defender_of("tiny", method=method, config={"strength": 1}, **options)(x, seeds)
    assert torch.equal(plain.logits, one.logits)
    config = {"strength": 2.0}
    far = defender_of("tiny", method=method, config=config, **options)(x, seeds)
    want = defender_of("tiny", method=method, config=config, backend="reference")(x, seeds)
    torch.testing.assert_close(far.logits, want.logits, rtol=1e-3, atol=2e-2)
    assert (far.logits - plain.logits).abs().max() > 0.1
    if method == "views":  # z = u_1 + c (mean of all − u_1), and logits are linear in it
        own = defender_of("tiny", method="none", config={})(x, seeds).logits
        torch.testing.assert_close(far.logits, own + 2 * (plain.logits - own), atol=2e-3, rtol=1e-4)
    assert (SCCConfig().strength, ViewsConfig().strength) == (1.0, 1.0)


# ---- The attacker's side -------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_gradient_is_exact(rule: dict[str, Any]) -> None:
    """Of DefendedCLIP and of the attackers' live pass: as central differences have it."""
    x = 0.8 * pictures("tiny", 1) + 0.1
    defender = Defender(model_of("tiny"), FIVE, method="extrapolate", config=rule)
    robust = DefendedCLIP(defender)
    upstream = torch.randn(1, 5, generator=torch.Generator().manual_seed(1))
    slopes = []
    for call in (robust, lambda pixels: defender.live(pixels, torch.zeros(1).long()).logits):
        leaf = x.clone().requires_grad_()
        slopes.append(torch.autograd.grad((call(leaf) * upstream).sum(), leaf)[0])
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-3 * float(slopes[0].abs().max()))
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    step = 2e-3

    def value(at: float) -> float:
        with torch.no_grad():
            return float((robust(x + at * direction) * upstream).sum())

    want = (value(step) - value(-step)) / (2 * step)
    got = float((slopes[0] * direction).sum())
    assert got == pytest.approx(want, rel=0.03, abs=0.02 * float(slopes[0].norm()))


def test_its_surrogates() -> None:
    def forms(**config: Any) -> list[tuple[str, float, float | None]]:
        defender = defender_of("tiny", method="extrapolate", config=config)
        return [
            (one.config.rule, one.config.strength, one.config.slope)
            for one in defender.defense.surrogates
        ]

    assert forms() == [
        ("agreement", 2.5, 20.0), ("agreement", 2.5, 5.0), ("constant", 2.5, None),
        ("constant", 1.0, None),
    ]  # fmt: skip
    assert forms(rule="constant", strength=1.5) == [("constant", 1.0, None)]
    assert forms(rule="constant", strength=1.0) == []
    assert forms(rule="constant", strength=1.0, slope=5.0) == []
    assert forms(strength=1.0) == []  # the mean, whatever agrees
    assert forms(slope=5.0)[0] == ("agreement", 2.5, 20.0)
    assert ("agreement", 2.5, 5.0) not in forms(slope=5.0)  # itself
    assert defender_of("tiny", method="scc", config={}).defense.surrogates == ()


def test_the_surrogates_attack_finds_the_best_of_all() -> None:
    """It fools at least as much as through each alone, by the defense's own answer."""
    x, labels = tiny.generate("test", range(6))
    target = Defender(model_of("tiny"), tiny.prompts(), method="extrapolate", config={})
    attack = parse_attack("surrogate3:warmup=0", 4 / 255)
    found = attack.run(target, x, labels, scc_fast.image_seeds(1, 6))
    assert (found - x).abs().max() <= 4 / 255 + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1

    def lead(pixels: Tensor) -> Tensor:
        logits = target(pixels, 0).logits
        own = logits.gather(1, labels[:, None])[:, 0]
        return logits.scatter(1, labels[:, None], -math.inf).amax(dim=1) - own

    assert (lead(found) > lead(x)).all()
    assert not attack.suits(Defender(model_of("tiny"), tiny.prompts(), method="none", config={}))
    with pytest.raises(ValueError, match="needs a defense with surrogates; none has none"):
        attack.run(defender_of("tiny", method="none", config={}), x, labels, x.new_zeros(6).long())


def test_the_gate_is_the_switch() -> None:
    """Its margin is live, so that an attacker can keep the switch off."""
    x = pictures("tiny", 2)
    target = defender_of("tiny", method="extrapolate", config={"threshold": 0.5})
    leaf = x.clone().requires_grad_()
    margin = target.live(leaf, torch.zeros(2).long()).margin
    assert margin is not None
    assert torch.equal(margin.detach() > 0, target(x, 0).flagged)
    assert torch.autograd.grad(margin.sum(), leaf)[0].abs().max() > 0
