"""Defenses small enough to attack by hand: no encoder, a linear head, and what a test adds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scc_fast import tiny
from scc_fast.config import NoneConfig
from scc_fast.defenses import make_defense
from scc_fast.defenses.base import Defense, Look, Repair, Traits, none_found
from scc_fast.reference import heads, philox
from toys import FIVE, model_of

SIDE = 2  # pictures are (3, 2, 2), 12 numbers


def weights(classes: int = 3, seed: int = 0) -> Tensor:
    """(K, 12): what a class's logit is of the pixels."""
    return torch.randn(classes, 3 * SIDE * SIDE, generator=torch.Generator().manual_seed(seed))


def images(n: int, seed: int = 1) -> Tensor:
    """(n, 3, 2, 2), away from the box."""
    drawn = torch.rand(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    return 0.3 + 0.4 * drawn


class Toy(Defense):
    """Features are the pixels, logits are linear in them; what it was asked is noted.

    Args:
        w: (K, 12).
        noise: the repair adds noise of this size.
        views: the views of x (B, 3, 2, 2), (L, B, 3, 2, 2).
    """

    name, Config = "toy", NoneConfig

    def __init__(
        self,
        w: Tensor,
        noise: float = 0.0,
        views: Callable[[Tensor], Tensor] = lambda x: x[None],
    ) -> None:
        self.w, self.noise, self._seen = w, noise, views
        self.config = NoneConfig()
        device = torch.device("cpu")
        self.model: Any = SimpleNamespace(device=device, image_size=(SIDE, SIDE), mean=(0, 0, 0))
        self.text_features = torch.eye(len(w))
        self.table = heads.Classes(self.text_features, 1.0)
        self.encode: Any = lambda pixels: pixels.flatten(1)
        self.keys: list[int] = []
        self.points: list[Tensor] = []

    def pieces(self, x: Tensor, seeds: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        yield x, seeds

    @property
    def traits(self) -> Traits:
        return Traits(1, 0, True, False, False, False, "a toy")

    def logits(self, features: Tensor) -> Tensor:
        return features @ self.w.T

    def repair(self, x: Tensor, seeds: Tensor) -> Repair:
        self.keys += seeds.tolist()
        self.points.append(x.detach().clone())
        noise = self.noise * (2 * philox.uniform_like(x, seeds, philox.DELTA) - 1)
        return Repair((x + noise)[None], self.mean_logits, **{**none_found(x), "delta": noise})

    def views(self, x: Tensor, seeds: Tensor) -> Look:
        return Look(self._seen(x), self.mean_logits)


class Gated(Toy):
    """Where the gate is open it answers from a picture that no attacker can change.

    The gate opens where the mean pixel is below `tau`.
    """

    tau = 0.5

    def repair(self, x: Tensor, seeds: Tensor) -> Repair:
        plain = super().repair(x, seeds)
        flagged = x.mean(dim=(1, 2, 3)) < self.tau
        safe = 10 * self.w[0].view(3, SIDE, SIDE)  # class 0, beyond doubt
        pictures = torch.where(flagged[:, None, None, None], safe, plain.pictures)
        return Repair(pictures, plain.read, plain.delta, plain.drift, flagged)

    def gate(self, x: Tensor, seeds: Tensor) -> Look | None:
        return Look(x[None], lambda features: self.tau - features[0].mean(dim=1))


class Guessing(Toy):
    """Its pseudo-label is read off the mirrored negative of the picture."""

    def guess(self, x: Tensor, seeds: Tensor) -> Look | None:
        self.keys += seeds.tolist()
        return Look(1 - x.flip(-1)[None], self.mean_logits)


def target_of(kind: str = "tiny", classes: Any = None) -> Defense:
    prompts = classes or (tiny.prompts() if kind == "tiny" else FIVE)
    return make_defense("none", model_of(kind), prompts)


@functools.cache
def drawn(n: int) -> tuple[Tensor, Tensor]:
    return tiny.generate("test", range(n))


def by_hand(model: Any, text: Tensor, pixels: Tensor) -> Tensor:
    """Logits of open_clip's own module under autograd: nothing of the engine's."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (model.mean, model.std))
    features = F.normalize(model.module.encode_image((pixels - mean) / std), dim=-1)
    return model.logit_scale * features @ text.T + model.logit_bias


def moved(a: Tensor, b: Tensor) -> float:
    """Share of pixels that differ: the sign of a gradient near zero may turn."""
    return float(((a - b).abs() > 1e-5).float().mean())
