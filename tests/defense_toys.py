"""An encoder whose gradient is known by hand, and what holds for every defense on it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scc_fast import Defender, image_seeds, tiny
from scc_fast.defenses import Defense
from scc_fast.engine.batch import Batch
from scc_fast.ops import ClassTable
from scc_fast.reference.heads import Classes
from scc_fast.reference.ttc import Outcome
from toys import FIVE, assert_same, model_of

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
    """A Defender with the toy for an encoder, and random classes of its width."""
    defender = Defender(model_of("tiny"), FIVE, method=kind.name, config=config)
    text = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(seed + 1))
    classes = Classes(F.normalize(text, dim=-1), scale, 0.5)
    held = {"classes": classes, "table": ClassTable.of(classes)}
    defender.session = replace(defender.session, encoded=Toy(seed), **held)
    return defender


@torch.no_grad()
def ran(defender: Any, x: Tensor, seeds: Tensor) -> Outcome:
    """The method without gradients, as a call runs it."""
    return defender.run(x, seeds)


def looked_at(defender: Any, x: Tensor, seeds: Tensor) -> Tensor:
    """The pictures that the method would look at if it repaired nothing, (L, B, 3, H, W)."""
    return defender.defense.pictures(defender.session, Batch(x, seeds))


def dots(n: int = 3, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """(n, 3, H, W) with some pixels at 0 and at 1, so that the box matters."""
    x = torch.rand(n, *shape, generator=torch.Generator().manual_seed(n))
    return (1.4 * x - 0.2).clamp(0, 1)


def exact_logits(defense: Any, pixels: np.ndarray) -> np.ndarray:
    """scale·cos + bias in float64."""
    f = defense.session.encode.exact(pixels)
    text = np.float64(defense.table.text.numpy())
    unit = f / np.linalg.norm(f, axis=1, keepdims=True)
    return defense.table.scale * unit @ text.T + defense.table.bias


def exact_gradient(defense: Any, pixels: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """From ∂/∂logits to ∂/∂x: ∂cos(f, t)/∂f = (t − (u·t) u)/‖f‖."""
    f = defense.session.encode.exact(pixels)
    norm = np.linalg.norm(f, axis=1, keepdims=True)
    unit = f / norm
    mixed = slope @ np.float64(defense.table.text.numpy())
    across = mixed - (unit * mixed).sum(axis=1, keepdims=True) * unit
    return defense.session.encode.pull(defense.table.scale * across / norm, pixels)


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
        found = defense.live(leaf, seeds)
        (got,) = torch.autograd.grad((found.logits * out).sum(), leaf)
    assert not found.delta.requires_grad
    where = np.float64((x + found.delta).numpy())
    want = exact_gradient(defense, where, np.float64(out.numpy()))
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-3, atol=1e-5 * np.abs(want).max())
    assert np.abs(want).max() > 0.01


def check_own_result(kind: type[Defense], **config: Any) -> None:
    """On the bundled model: a seed gives the result again, and no image sees its batch."""
    defense = Defender(model_of("tiny"), tiny.prompts(), method=kind.name, config=config)
    x = tiny.generate("test", range(3))[0]
    state = torch.get_rng_state()
    whole = defense(x, 7)
    assert torch.equal(torch.get_rng_state(), state)
    again = defense(x, whole.seeds)
    assert torch.equal(again.logits, whole.logits)
    assert torch.equal(again.delta, whole.delta)
    for i in range(3):
        assert_same(defense(x[i : i + 1], whole.seeds[i : i + 1]), whole, [i])
    for run in (ran, Defender.run):
        nothing = run(defense, x[:0], whole.seeds[:0])
        assert nothing.logits.shape == (0, len(defense.text_features))


def check_costs(defense: Any, n: int = 3) -> None:
    """Traits against what the encoder saw."""
    ran(defense, dots(n), image_seeds(0, n))
    traits, toy = defense.traits, defense.session.encode
    assert (toy.forward, toy.backward) == (n * traits.forward, n * traits.backward)
