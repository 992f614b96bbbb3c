"""Who runs the encoder: the model's own modules, these compiled, or our runner.

Each gives features of pictures, and with them the backward closure to the pictures; nothing else of
a defense knows which it is.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from scc_fast.engine.trust import Trust
from scc_fast.engine.vit import Tower, narrow, take
from scc_fast.models import VisionLanguage


class Backward:
    """The backward closure of a forward pass: from ∂J/∂f (n, D) to ∂J/∂pictures.

    As autograd frees a graph, a call frees what the forward pass kept, unless told to retain it.

    Args:
        back: of a slope, and whether it is to be called again.
        rows: the closure of some of its pictures; None where their pass has to be made again.
    """

    def __init__(
        self,
        back: Callable[[Tensor, bool], Tensor],
        rows: Callable[[Tensor], Backward] | None = None,
    ) -> None:
        self._kept: Any = back, rows

    def __call__(self, slope: Tensor, retain: bool = False) -> Tensor:
        back, rows = self._kept
        self._kept = (back, rows) if retain else None
        return back(slope, retain)

    def again(self) -> Backward:
        """Another closure over what this one holds; each call then frees its own."""
        return Backward(*self._kept)

    def then(self, undo: Callable[[Tensor, bool], Tensor]) -> Backward:
        """This one and another after it."""
        return Backward(lambda slope, retain: undo(self.again()(slope, retain), retain))

    def rows(self, index: Tensor) -> Backward | None:
        """That of some of its pictures, which uses this one up; None where there is none."""
        (_, rows), self._kept = self._kept, None
        return None if rows is None else rows(index)


# Features of pictures, of those beside them, and the closure back to the former.
Found = tuple[Tensor, Tensor | None, Backward]


class Encoder(Protocol):
    """f, frozen.

    `patch` is the layout that it takes: 0 pictures (n, 3, h, w), else rows of patches of this side
    (n, N, 3·patch²), as ops.make_views gives them. `dtype` is what they come in.
    """

    name: str
    patch: int
    dtype: torch.dtype
    products: torch.dtype  # what its products are in: under autocast not what it takes

    def forward(self, pictures: Tensor) -> Tensor:
        """Features (n, D) float32."""
        ...

    def vjp(self, pictures: Tensor, beside: Tensor | None) -> Found:
        """Features of the pictures, of those beside them, and the former's backward closure."""
        ...


class Modules:
    """The model's own modules, under autograd; under autocast where `dtype` is not theirs."""

    name = "eager"
    patch = 0

    def __init__(self, model: VisionLanguage, dtype: torch.dtype | None = None) -> None:
        self.dtype = held = getattr(model, "dtype", torch.float32)
        self._autocast = None if dtype in (None, held) else dtype
        self.products = dtype or held
        self.model = model
        self._encode: Callable[[Tensor], Tensor] = model.encode_image

    def forward(self, pictures: Tensor) -> Tensor:
        if self._autocast is None:
            return self._encode(pictures)
        with torch.autocast(pictures.device.type, dtype=self._autocast, cache_enabled=False):
            return self._encode(pictures)

    def vjp(self, pictures: Tensor, beside: Tensor | None) -> Found:
        with torch.enable_grad():
            leaf = pictures.detach().requires_grad_()
            features = self.forward(leaf)
        if not features.requires_grad:
            raise RuntimeError(
                f"model: encode_image of {self.model.name} passes no gradient to its pixels, which "
                f"scc and ttc need; is there a no_grad or a detach() in it?"
            )
        other = None if beside is None else self.forward(beside)

        def back(slope: Tensor, retain: bool) -> Tensor:
            slope = slope.to(features.dtype)
            return torch.autograd.grad(features, leaf, slope, retain_graph=retain)[0]

        return features.detach(), other, Backward(back)


_NUMBER = itertools.count()


class Compiled(Modules):
    """The modules through torch.compile, forward and backward."""

    name = "compile"

    def __init__(self, model: VisionLanguage, dtype: torch.dtype) -> None:
        super().__init__(model, dtype)

        def encode(pictures: Tensor) -> Tensor:
            return model.encode_image(pictures)

        # Dynamo counts what it compiled per code object: one of its own for each encoder.
        own = encode.__code__.replace(co_name=f"encode_{next(_NUMBER)}")
        named = types.FunctionType(own, encode.__globals__, closure=encode.__closure__)
        self._encode = torch.compile(named, fullgraph=True)


class Runner:
    """Our runner, where the model has a standard vision transformer.

    Args:
        tower: the runner itself.
        trust: whether it stands for the model's modules.
    """

    name = "runner"

    def __init__(self, tower: Tower, trust: Trust) -> None:
        self.tower, self.trust, self.patch = tower, trust, tower.size
        self.dtype = self.products = tower.dtype

    def forward(self, pictures: Tensor) -> Tensor:
        return self.tower(pictures, keep=False)[0]

    def vjp(self, pictures: Tensor, beside: Tensor | None) -> Found:
        count = len(pictures)
        features, kept = self.tower(pictures if beside is None else torch.cat([pictures, beside]))
        if beside is None:
            return features, None, self._backward(kept)
        return features[:count], features[count:], self._backward(narrow(kept, count))

    def _backward(self, kept: Any) -> Backward:
        return Backward(
            lambda slope, retain: self.tower.back(slope, kept),
            lambda index: self._backward(take(kept, index)),
        )
