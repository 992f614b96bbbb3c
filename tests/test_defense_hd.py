"""HD: its closed form, its steps by hand, its start, its budgets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

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
from scc_fast.defenses.hd import HD, HDConfig, hedge
from toys import defender_of


def test_the_closed_form_is_the_sum_over_classes() -> None:
    logits = 5 * torch.randn(4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    each = [F.cross_entropy(logits, torch.full((4,), c), reduction="none") for c in range(9)]
    torch.testing.assert_close(hedge(logits), sum(each) / 9)
    # two classes, by hand: ln(1 + e) - 1/2
    assert hedge(torch.tensor([[0.0, 1.0]])).item() == pytest.approx(0.8132617)


def test_a_thousand_classes_do_not_overflow_half_precision() -> None:
    logits = torch.zeros(1, 1000, dtype=torch.float16)
    logits[0, 0] = 100.0
    assert hedge(logits).item() == pytest.approx(100 - 0.1, abs=0.1)


@pytest.mark.parametrize(
    ("config", "epsilon", "alpha"),
    [
        ({"steps": 3}, 4 / 255, 2 / 255),
        ({"steps": 2, "epsilon": "6/255", "alpha": "1/255"}, 6 / 255, 1 / 255),
        ({"steps": 0}, 4 / 255, 2 / 255),
    ],
)
def test_steps_by_hand(config: dict[str, Any], epsilon: float, alpha: float) -> None:
    defense, x, seeds = toyed(HD, **config), dots(), image_seeds(4, 3)
    start = ran(toyed(HD, **{**config, "steps": 0}), x, seeds).delta
    pixels, delta = np.float64(x.numpy()), np.float64(start.numpy())
    for _ in range(config["steps"]):
        slope = softmax(exact_logits(defense, pixels + delta)) - 1 / CLASSES
        ascent = np.sign(exact_gradient(defense, pixels + delta, slope))
        delta = confined(delta + alpha * ascent, pixels, epsilon)
    outcome = ran(defense, x, seeds)
    np.testing.assert_allclose(outcome.delta.numpy(), delta, atol=1e-6)
    np.testing.assert_allclose(
        outcome.logits.numpy(), exact_logits(defense, pixels + delta), atol=1e-4
    )
    assert outcome.flagged.all()
    assert outcome.drift.isnan().all()


def test_the_released_code_by_hand() -> None:
    """Of δ⁰ … δ⁴ it looks at δ¹, δ² and δ³ together."""
    defense, x, seeds = toyed(HD, steps=4, published=True), dots(), image_seeds(4, 3)
    ran(defense, dots().requires_grad_(), seeds)
    assert defense.session.encode.forward == 12  # what is kept is not looked at again
    start = ran(toyed(HD, steps=0, epsilon=0.031), x, seeds).delta
    pixels, delta = np.float64(x.numpy()), np.float64(start.numpy())
    path = [delta]
    for _ in range(4):
        slope = softmax(exact_logits(defense, pixels + delta)) - 1 / CLASSES
        ascent = np.sign(exact_gradient(defense, pixels + delta, slope))
        delta = confined(delta + 0.007 * ascent, pixels, 0.031)
        path.append(delta)
    outcome = ran(defense, x, seeds)
    np.testing.assert_allclose(outcome.delta.numpy(), path[3], atol=1e-6)
    together = np.mean([exact_logits(defense, pixels + path[at]) for at in (1, 2, 3)], axis=0)
    np.testing.assert_allclose(outcome.logits.numpy(), together, atol=1e-4)
    live = x.clone().requires_grad_()
    logits = defense.live(live, seeds).logits
    np.testing.assert_allclose(logits.detach().numpy(), together, atol=1e-4)


def test_it_evens_the_classes_out() -> None:
    x, seeds = dots(8), image_seeds(0, 8)
    losses = [hedge(ran(toyed(HD, steps=steps), x, seeds).logits) for steps in (0, 20)]
    assert (losses[1] > losses[0]).all()  # it is KL(uniform || p) up to a constant


@pytest.mark.parametrize("epsilon", [4 / 255, 0.1])
def test_it_starts_where_random_noise_ends(epsilon: float) -> None:
    x = tiny.generate("test", range(2))[0]
    noise = defender_of(method="rn", config={"epsilon": epsilon})
    start = defender_of(method="hd", config={"epsilon": epsilon, "steps": 0})
    assert torch.equal(start(x, 3).delta, noise(x, 3).delta)
    assert not torch.equal(start(x, 4).delta, noise(x, 3).delta)


def test_config() -> None:
    assert HDConfig() == HDConfig(epsilon=4 / 255, alpha=2 / 255, steps=20)
    original = HDConfig(published=True)
    assert (original.epsilon, original.alpha, original.steps) == (0.031, 0.007, 20)
    assert HDConfig(epsilon="2/255").alpha == 1 / 255  # type: ignore[arg-type]
    assert HDConfig(epsilon=0.0).alpha == 0
    for config in (HDConfig(), original, HDConfig(alpha=1 / 255)):
        assert HDConfig.from_json(config.to_json()) == config
    for wrong, told in [
        ({"published": 1}, "published must be True or False, got 1"),
        ({"steps": 2.0}, "steps must be a whole number"),
        ({"epsilon": -0.1}, "epsilon must be in"),
        ({"alpha": "big"}, "alpha must be a number"),
        ({"steps": 1, "published": True}, "steps must be at least 2 where published, got 1"),
    ]:
        with pytest.raises(ValueError, match=told):
            HDConfig(**wrong)


@pytest.mark.parametrize(
    "config", [{"steps": 0}, {"steps": 1}, {"steps": 5}, {"steps": 5, "published": True}]
)
def test_cost(config: dict[str, Any]) -> None:
    check_costs(toyed(HD, **config))


def test_what_an_attacker_differentiates() -> None:
    check_bpda(toyed(HD, steps=2), dots(), image_seeds(0, 3))


def test_a_result_is_the_image_s_own() -> None:
    check_own_result(HD, steps=2)


def test_on_the_bundled_model() -> None:
    x, labels = tiny.generate("test", range(20))
    result = defender_of(method="hd", config={"steps": 5})(x, 0)
    assert (result.labels == labels).float().mean() >= 0.9
    assert result.delta.abs().max() <= 4 / 255 + 1e-6
    assert -1e-6 <= (x + result.delta).min() <= (x + result.delta).max() <= 1 + 1e-6
