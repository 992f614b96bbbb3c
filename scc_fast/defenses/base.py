"""What every defense is to an evaluation and to an attacker.

A method says how it repairs a picture (`repair`) and what it then looks at; the encoder, the
classes, seeds, checks and the result are the same for all. An attacker gets the same looks with
gradients: through what is differentiable, and past the rest as if it were the identity (BPDA).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from scc_fast._plain import plain
from scc_fast.api import Defender
from scc_fast.config import MethodConfig, method_config
from scc_fast.engine import calls
from scc_fast.engine.calls import Seeds
from scc_fast.engine.differentiable import Encode
from scc_fast.reference import heads
from scc_fast.reference.ttc import Outcome
from scc_fast.result import DefenseResult


@dataclass(frozen=True)
class Traits:
    """What a defense costs and needs.

    Args:
        forward, backward: pictures through the image encoder, and of these back to the pixels,
            for one image that it repairs: F and B.
        random: draws noise, so that seeds matter.
        dynamic: optimises at inference.
        text: needs the classes for more than the final prediction.
        gradients: needs the encoder's gradient.
        source: paper, and where a switch departs from it.
    """

    forward: float
    backward: float
    random: bool
    dynamic: bool
    text: bool
    gradients: bool
    source: str


@dataclass(frozen=True, eq=False)
class Look:
    """Pictures that go to the encoder, and what is read off their features.

    Args:
        pictures: (L, B, 3, H, W) float32 in [0, 1], L views of B images; with gradients on they
            are differentiable with respect to the image.
        read: from features (L, B, D), not normalised, to logits (B, K), or to the gate's (B,);
            differentiable.
    """

    pictures: Tensor
    read: Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Repair(Look):
    """The look that decides, and what the repair did to each image.

    Args:
        delta: (B, 3, H, W), what was added to x; zero for a method that only looks.
        drift: (B,) the gate's measure, NaN without one.
        flagged: (B,) bool, taken as attacked and repaired.
    """

    delta: Tensor
    drift: Tensor
    flagged: Tensor


class Defense(ABC):
    """A defense prepared for a model and its classes.

    Args:
        model, classes, config, text_features, precision, engine, backend: as for
            scc_fast.Defender.
        bare: the undefended model, where the caller has prepared it with these options.
    """

    name: ClassVar[str]
    Config: ClassVar[type[MethodConfig]]
    width: int = 1  # pictures of one image that are held together

    def __init__(
        self,
        model: Any,
        classes: Sequence[str] | None = None,
        *,
        config: MethodConfig | dict[str, Any] | None = None,
        bare: Defender | None = None,
        **options: Any,
    ) -> None:
        self.bare = Defender(model, classes, method="none", **options) if bare is None else bare
        self.config: Any = method_config(self.bare.model.defaults, self.name, config, self.Config)
        self.model, self.classes = self.bare.model, self.bare.classes
        self.text_features = self.bare.text_features
        self.table = self.bare.table
        self.encode = Encode(self.bare.setting)

    # -------------------------------------------------------------- what a method says of itself

    @property
    @abstractmethod
    def traits(self) -> Traits:
        """Cost and needs with this config."""

    @abstractmethod
    def repair(self, x: Tensor, seeds: Tensor) -> Repair:
        """The method on x (B, 3, H, W) in [0, 1] with seeds (B,) int64.

        What it optimises it finds from x.detach(); `pictures` are then live in x where gradients
        are on. An image's result depends on its pixels and its seed alone.
        """

    def views(self, x: Tensor, seeds: Tensor) -> Look:
        """The pictures the method would look at if it repaired nothing: x itself, or its views."""
        return Look(x[None], self.mean_logits)

    def gate(self, x: Tensor, seeds: Tensor) -> Look | None:
        """What the gate measures, read as a margin (B,): positive where the repair is on.

        None for a method without a gate.
        """
        return None

    def guess(self, x: Tensor, seeds: Tensor) -> Look | None:
        """What a pseudo-label is taken from, read as logits (B, K); None for a method without."""
        return None

    # ------------------------------------------------------------------------- the same for all

    def run(self, x: Tensor, seeds: Tensor) -> Outcome:
        """The defense on x (B, 3, H, W) in [0, 1], unchecked, without gradients or autocast."""
        with plain(x.device):
            found = self.repair(x, seeds)
            logits = found.read(self.features(found))
        return Outcome(logits, found.delta, found.drift, found.flagged)

    def features(self, look: Look) -> Tensor:
        """Features of a look's pictures (L, B, D), differentiable where gradients are on."""
        views, batch = look.pictures.shape[:2]
        return self.encode(look.pictures.flatten(0, 1)).unflatten(0, (views, batch))

    def answer(self, look: Look) -> Tensor:
        """What is read off a look: logits (B, K), or a gate's margin (B,)."""
        return look.read(self.features(look))

    def logits(self, features: Tensor) -> Tensor:
        """s·cos(f, t_k) + b: (..., D) → (..., K)."""
        return heads.logits(features, self.table)

    def mean_logits(self, features: Tensor) -> Tensor:
        """Mean over the views: (L, B, D) → (B, K)."""
        return self.logits(features).mean(dim=0)

    def __call__(
        self,
        images: Any,
        seeds: Seeds = None,
        *,
        is_normalized: bool = False,
        clamp: bool = False,
    ) -> DefenseResult:
        """Defend a batch; arguments and result as for scc_fast.Defender."""
        return calls.call(self, images, seeds, is_normalized=is_normalized, clamp=clamp)

    @property
    def method(self) -> str:
        """The method's name, as results have it."""
        return self.name

    @property
    def precision(self) -> str:
        """That of the encoder's products."""
        return self.bare.precision

    @property
    def backend(self) -> str:
        """Who serves the ops."""
        return self.bare.backend

    def serves(self, size: tuple[int, int]) -> str:
        """The engine that serves pictures (height, width); none is captured as a graph."""
        served = self.bare.serves(size)
        return "runner" if served == "graph" else served

    def pieces(self, x: Tensor, seeds: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """x and seeds in pieces of at most max_batch pictures, but at least one image."""
        size = max(1, self.bare.max_batch // self.width)
        return zip(x.split(size), seeds.split(size), strict=True)

    def out_of_memory(self, x: Tensor) -> RuntimeError:
        """What a call raises where x, one of its pieces, did not fit."""
        return RuntimeError(
            f"{self.name}: {len(x)} images of {x.shape[-2]}x{x.shape[-1]}, {self.width} pictures "
            f"each, did not fit into the memory of {x.device}; give a smaller max_batch"
        )


def none_found(x: Tensor) -> dict[str, Tensor]:
    """The fields of a Repair that changes no pixel and has no gate."""
    rows = x.new_full((len(x),), torch.nan)
    return {
        "delta": torch.zeros_like(x),
        "drift": rows,
        "flagged": torch.zeros_like(rows, dtype=torch.bool),
    }
