"""Anti-adv on an encoder whose gradient is known by hand, and the toy its neighbours share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_api import FIVE, assert_same, model_of
from torch import Tensor

import scc_fast
from scc_fast import image_seeds, tiny
from scc_fast.defenses.anti_adv import AntiAdv, AntiAdvConfig
from scc_fast.defenses.base import Defense
from scc_fast.reference.heads import Classes

SHAPE = (3, 4, 5)
CLASSES, WIDTH = 6, 7


class Toy:
    """f(x) = x·W + c on the pixels of a small picture, and how many went through it."""

    def __init__(self, seed: int = 0, offset: float = 1.0, shape: tuple[int, ...] = SHAPE) -> None:
        rng = np.random.default_rng(seed)
        numel = int(np.prod(shape))
        self.weight = rng.normal(size=(numel, WIDTH)).astype(np.float32) / numel**0.5
        self.offset = (offset * rng.normal(size=WIDTH)).astype(np.float32)
        self.forward = self.backward = 0
        self.seen: list[Tensor] = []

    def __call__(self, pixels: Tensor) -> Tensor:
        self.forward += len(pixels)
        self.seen.append(pixels.detach().clone())
        weight = torch.from_numpy(self.weight).to(pixels)
        features = pixels.flatten(1) @ weight + torch.from_numpy(self.offset).to(pixels)
        if features.requires_grad:
            features.register_hook(self._back)
        return features

    def _back(self, slope: Tensor) -> None:
        self.backward += len(slope)

    def exact(self, pixels: np.ndarray) -> np.ndarray:
        """f in float64."""
        rows = np.asarray(pixels, np.float64).reshape(len(pixels), -1)
        return rows @ np.float64(self.weight) + np.float64(self.offset)

    def pull(self, slope: np.ndarray, like: np.ndarray) -> np.ndarray:
        """From ∂/∂f to ∂/∂x, float64."""
        return (slope @ np.float64(self.weight).T).reshape(like.shape)


def toyed(kind: type[Defense], *, scale: float = 9.0, seed: int = 0, **config: Any) -> Any:
    """A defense with the toy for an encoder, and random classes of its width."""
    defense: Any = kind(model_of("tiny"), FIVE, config=config)
    defense.encode = Toy(seed)
    text = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(seed + 1))
    defense.table = Classes(F.normalize(text, dim=-1), scale, 0.5)
    return defense


def dots(n: int = 3, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """(n, 3, H, W) with some pixels at 0 and at 1, so that the box matters."""
    x = torch.rand(n, *shape, generator=torch.Generator().manual_seed(n))
    return (1.4 * x - 0.2).clamp(0, 1)


def exact_logits(defense: Any, pixels: np.ndarray) -> np.ndarray:
    """scale·cos + bias in float64."""
    f = defense.encode.exact(pixels)
    text = np.float64(defense.table.text.numpy())
    unit = f / np.linalg.norm(f, axis=1, keepdims=True)
    return defense.table.scale * unit @ text.T + defense.table.bias


def exact_gradient(defense: Any, pixels: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """From ∂/∂logits to ∂/∂x: ∂cos(f, t)/∂f = (t − (u·t) u)/‖f‖."""
    f = defense.encode.exact(pixels)
    norm = np.linalg.norm(f, axis=1, keepdims=True)
    unit = f / norm
    mixed = slope @ np.float64(defense.table.text.numpy())
    across = mixed - (unit * mixed).sum(axis=1, keepdims=True) * unit
    return defense.encode.pull(defense.table.scale * across / norm, pixels)


def softmax(logits: np.ndarray) -> np.ndarray:
    grown = np.exp(logits - logits.max(axis=1, keepdims=True))
    return grown / grown.sum(axis=1, keepdims=True)


def confined(delta: np.ndarray, x: np.ndarray, epsilon: float) -> np.ndarray:
    return np.clip(np.clip(delta, -epsilon, epsilon), -x, 1 - x)


def check_bpda(defense: Any, x: Tensor, seeds: Tensor) -> None:
    """The gradient an attacker gets is that of the answer at x + δ, with δ held."""
    out = torch.randn(len(x), CLASSES, generator=torch.Generator().manual_seed(5))
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        found = defense.repair(leaf, seeds)
        (got,) = torch.autograd.grad((defense.answer(found) * out).sum(), leaf)
    assert not found.delta.requires_grad
    where = np.float64((x + found.delta).numpy())
    want = exact_gradient(defense, where, np.float64(out.numpy()))
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-3, atol=1e-5 * np.abs(want).max())
    assert np.abs(want).max() > 0.01


def check_own_result(kind: type[Defense], **config: Any) -> None:
    """On the bundled model: a seed gives the result again, and no image sees its batch."""
    defense = kind(model_of("tiny"), tiny.prompts(), config=config)
    x = tiny.generate("test", range(3))[0]
    state = torch.get_rng_state()
    whole = defense(x, 7)
    assert torch.equal(torch.get_rng_state(), state)
    again = defense(x, whole.seeds)
    assert torch.equal(again.logits, whole.logits)
    assert torch.equal(again.delta, whole.delta)
    for i in range(3):
        assert_same(defense(x[i : i + 1], whole.seeds[i : i + 1]), whole, [i])
    assert defense.run(x[:0], whole.seeds[:0]).logits.shape == (0, len(defense.text_features))


def check_costs(defense: Any, n: int = 3) -> None:
    """Traits against what the encoder saw."""
    defense.run(dots(n), image_seeds(0, n))
    traits, toy = defense.traits, defense.encode
    assert (toy.forward, toy.backward) == (n * traits.forward, n * traits.backward)


# ------------------------------------------------------------------------------------ Anti-adv


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
    outcome = defense.run(x, image_seeds(0, 3))
    want = by_hand(defense, x, alpha, epsilon)
    np.testing.assert_allclose(outcome.delta.numpy(), want, atol=1e-6)
    logits = exact_logits(defense, np.float64(x.numpy()) + want)
    np.testing.assert_allclose(outcome.logits.numpy(), logits, atol=1e-4)
    reach = np.abs(want).max()
    assert reach == pytest.approx(defense.config.epsilon)  # the budget is used, and no more
    assert outcome.drift.isnan().all()
    assert outcome.flagged.all()
    last = defense.encode.seen[-1]
    outside = bool((last < -1e-6).any()) and bool((last > 1 + 1e-6).any())
    assert outside == (epsilon is None)


def test_it_grows_surer_of_the_first_guess() -> None:
    defense, x = toyed(AntiAdv), dots(8)
    first = defense.answer(defense.guess(x, image_seeds(0, 8)))
    last = defense.run(x, image_seeds(0, 8)).logits
    label = first.argmax(dim=-1)
    before, after = (F.cross_entropy(logits, label, reduction="none") for logits in (first, last))
    assert (after < before).all()
    assert torch.equal(defense.guess(x, image_seeds(0, 8)).pictures[0], x)


def test_a_guess_that_is_lost_on_the_way_is_still_pursued() -> None:
    config: dict[str, Any] = {"alpha": 0.1, "epsilon": 0.3}
    defense, x = toyed(AntiAdv, steps=3, **config), dots(8)
    # The encoder's gradient gets the wrong sign: the first guess grows less sure
    want = by_hand(defense, x, -0.1, 0.3)
    one = by_hand(toyed(AntiAdv, steps=1, **config), x, -0.1, 0.3)
    first, then = (exact_logits(defense, x.numpy() + gamma).argmax(1) for gamma in (0, one))
    assert (first != then).any()
    toy = defense.encode
    defense.encode = lambda pixels: 2 * toy(pixels).detach() - toy(pixels)
    np.testing.assert_allclose(defense.run(x, image_seeds(0, 8)).delta.numpy(), want, atol=1e-6)


def test_certainty_does_not_hide_the_gradient() -> None:
    """Where float32 says p = 1, the slope of the label's own logit would be lost."""
    defense, x = toyed(AntiAdv, scale=120.0), dots(6)
    sure = torch.from_numpy(softmax(exact_logits(defense, x.numpy()))).float().amax(dim=1) == 1
    assert sure.any()
    got = defense.run(x, image_seeds(0, 6)).delta.numpy()
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
    defense = AntiAdv(scc_fast.load_model("tiny", device="cpu"), tiny.prompts())
    result = defense(x, 0)
    assert (result.labels == labels).float().mean() >= 0.9
    assert result.delta.abs().max() <= 4 / 255 + 1e-6
    assert -1e-6 <= (x + result.delta).min() <= (x + result.delta).max() <= 1 + 1e-6
