"""Encoders: the model's modules, the same compiled, or our runner.

Each gives features of pictures and a backward closure to the pictures.
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
    """Backward closure of a forward pass: ∂J/∂f (n, D) to ∂J/∂pictures.

    A call frees the kept state, like an autograd graph, unless `retain`.

    Args:
        back: (slope, retain) -> gradient.
        rows: closure of some of the pictures; None: their forward pass must be repeated.
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
        """Another closure over the same state."""
        return Backward(*self._kept)

    def then(self, undo: Callable[[Tensor, bool], Tensor]) -> Backward:
        """Composition with `undo` after it."""
        return Backward(lambda slope, retain: undo(self.again()(slope, retain), retain))

    def rows(self, index: Tensor) -> Backward | None:
        """Closure of some of the pictures, or None; consumes this one."""
        (_, rows), self._kept = self._kept, None
        return None if rows is None else rows(index)


# Features of pictures, features of pictures `beside`, backward closure of the former.
Found = tuple[Tensor, Tensor | None, Backward]


class Encoder(Protocol):
    """Frozen image encoder f.

    Input layout: pictures (n, 3, h, w) for `patch` 0, else rows of patches of side `patch`,
    (n, N, 3·patch²), as made by ops.make_views. `dtype` is the input's.
    """

    name: str
    patch: int
    dtype: torch.dtype
    products: torch.dtype  # dtype of its products: under autocast not `dtype`

    def forward(self, pictures: Tensor) -> Tensor:
        """Features (n, D) float32."""
        ...

    def vjp(self, pictures: Tensor, beside: Tensor | None) -> Found:
        """Features of `pictures` and `beside`, and the former's backward closure."""
        ...


class Modules:
    """The model's modules under autograd, with autocast for another `dtype`."""

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
    """The model's modules through torch.compile."""

    name = "compile"

    def __init__(self, model: VisionLanguage, dtype: torch.dtype) -> None:
        super().__init__(model, dtype)

        def encode(pictures: Tensor) -> Tensor:
            return model.encode_image(pictures)

        # Dynamo limits recompilations per code object: each encoder gets its own.
        own = encode.__code__.replace(co_name=f"encode_{next(_NUMBER)}")
        named = types.FunctionType(own, encode.__globals__, closure=encode.__closure__)
        self._encode = torch.compile(named, fullgraph=True)


class Runner:
    """Our runner of a standard vision transformer.

    Args:
        tower: forward and backward.
        trust: proof that it computes what the modules do.
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
