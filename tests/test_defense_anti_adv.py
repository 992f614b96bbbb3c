"""Anti-adv on an encoder whose gradient is known by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from defense_toys import (
    CLASSES,
    check_bpda,
    check_costs,
    check_own_result,
    confined,
    dots,
    exact_gradient,
    exact_logits,
    ran,
    softmax,
    toyed,
)
from scc_fast import image_seeds, tiny
from scc_fast.defenses.anti_adv import AntiAdv, AntiAdvConfig
from scc_fast.defenses.scc import Undefended
from scc_fast.engine import drive
from scc_fast.engine.batch import Batch
from toys import defender_of


def by_hand(defense: Any, x: Tensor, alpha: float, epsilon: float | None) -> np.ndarray:
    """γ of the card in float64; epsilon None: neither ball nor box."""
    pixels = np.float64(x.numpy())
    label = exact_logits(defense, pixels).argmax(axis=1)
    gamma = np.zeros_like(pixels)
    for _ in range(defense.config.steps):
        slope = softmax(exact_logits(defense, pixels + gamma)) - np.eye(CLASSES)[label]
        gamma = gamma - alpha * np.sign(exact_gradient(defense, pixels + gamma, slope))
        if epsilon is not None:
            gamma = confined(gamma, pixels, epsilon)
    return gamma


@pytest.mark.parametrize(
    ("config", "alpha", "epsilon"),
    [
        ({}, 2 / 255, 4 / 255),
        ({"steps": 3, "alpha": "3/255", "epsilon": "5/255"}, 3 / 255, 5 / 255),
        ({"published": True}, 0.15, None),
        ({"published": True, "alpha": 0.2, "steps": 1}, 0.2, None),
    ],
)
def test_steps_by_hand(config: dict[str, Any], alpha: float, epsilon: float | None) -> None:
    defense, x = toyed(AntiAdv, **config), dots()
    outcome = ran(defense, x, image_seeds(0, 3))
    want = by_hand(defense, x, alpha, epsilon)
    np.testing.assert_allclose(outcome.delta.numpy(), want, atol=1e-6)
    logits = exact_logits(defense, np.float64(x.numpy()) + want)
    np.testing.assert_allclose(outcome.logits.numpy(), logits, atol=1e-4)
    reach = np.abs(want).max()
    assert reach == pytest.approx(defense.config.epsilon)  # the budget is used, and no more
    assert outcome.drift.isnan().all()
    assert outcome.flagged.all()
    last = defense.session.encode.seen[-1]
    outside = bool((last < -1e-6).any()) and bool((last > 1 + 1e-6).any())
    assert outside == (epsilon is None)


def test_it_grows_surer_of_the_first_guess() -> None:
    defense, x = toyed(AntiAdv), dots(8)
    guess, batch = defense.defense.guess, Batch(x, image_seeds(0, 8))
    first = drive.live(defense.session, guess, batch).logits
    last = ran(defense, x, image_seeds(0, 8)).logits
    label = first.argmax(dim=-1)
    before, after = (F.cross_entropy(logits, label, reduction="none") for logits in (first, last))
    assert (after < before).all()
    assert isinstance(guess, Undefended)
    assert torch.equal(guess.pictures(defense.session, batch), x[None])
    assert torch.equal(defense.session.encode.seen[0], x)


def test_a_guess_that_is_lost_on_the_way_is_still_pursued() -> None:
    config: dict[str, Any] = {"alpha": 0.1, "epsilon": 0.3}
    defense, x = toyed(AntiAdv, steps=3, **config), dots(8)
    # The encoder's gradient gets the wrong sign: the first guess grows less sure
    want = by_hand(defense, x, -0.1, 0.3)
    one = by_hand(toyed(AntiAdv, steps=1, **config), x, -0.1, 0.3)
    first, then = (exact_logits(defense, x.numpy() + gamma).argmax(1) for gamma in (0, one))
    assert (first != then).any()
    toy = defense.session.encode
    defense.session = replace(
        defense.session, encoded=lambda pixels: 2 * toy(pixels).detach() - toy(pixels)
    )
    np.testing.assert_allclose(ran(defense, x, image_seeds(0, 8)).delta.numpy(), want, atol=1e-6)


def test_certainty_does_not_hide_the_gradient() -> None:
    """Where float32 says p = 1, the slope of the label's own logit would be lost."""
    defense, x = toyed(AntiAdv, scale=120.0), dots(6)
    sure = torch.from_numpy(softmax(exact_logits(defense, x.numpy()))).float().amax(dim=1) == 1
    assert sure.any()
    got = ran(defense, x, image_seeds(0, 6)).delta.numpy()
    np.testing.assert_allclose(got, by_hand(defense, x, 2 / 255, 4 / 255), atol=1e-6)


def test_config() -> None:
    assert AntiAdvConfig() == AntiAdvConfig(epsilon=4 / 255, alpha=2 / 255, steps=2)
    assert AntiAdvConfig(steps=4, epsilon=8 / 255).alpha == 2 / 255
    published = AntiAdvConfig(published=True)
    assert (published.alpha, published.epsilon, published.steps) == (0.15, 0.3, 2)
    for config in (AntiAdvConfig(steps=0), published, AntiAdvConfig(alpha=0.1)):
        assert AntiAdvConfig.from_json(config.to_json()) == config
    for wrong, told in [
        (
            {"published": True, "epsilon": 8 / 255},
            "epsilon must be None where published.*reach 0.3",
        ),
        ({"published": True, "steps": 7}, r"steps \* alpha, where published,"),
        ({"published": "yes"}, "published must be True or False, got 'yes'"),
        ({"steps": -1}, "steps must be a whole number"),
        ({"alpha": 3}, "alpha must be in"),
        ({"epsilon": "4"}, "epsilon must be in"),
    ]:
        with pytest.raises(ValueError, match=told):
            AntiAdvConfig(**wrong)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_cost(steps: int) -> None:
    check_costs(toyed(AntiAdv, steps=steps))
    assert toyed(AntiAdv).traits.forward == 3  # the first pass gives label and gradient


def test_what_an_attacker_differentiates() -> None:
    check_bpda(toyed(AntiAdv), dots(), image_seeds(0, 3))


def test_a_result_is_the_image_s_own() -> None:
    check_own_result(AntiAdv)


def test_on_the_bundled_model() -> None:
    x, labels = tiny.generate("test", range(20))
    result = defender_of(method="anti_adv")(x, 0)
    assert (result.labels == labels).float().mean() >= 0.9
    assert result.delta.abs().max() <= 4 / 255 + 1e-6
    assert -1e-6 <= (x + result.delta).min() <= (x + result.delta).max() <= 1 + 1e-6
