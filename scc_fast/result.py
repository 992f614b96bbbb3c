"""DefenseResult: the result of a call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from scc_fast.config import whole


@dataclass(frozen=True, eq=False, repr=False)
class DefenseResult:
    """Result for B images and K classes; tensors are detached.

    Attributes:
        logits: (B, K) float32.
        delta: (B, 3, H, W) float32, perturbation of the defense, pixel units.
        inputs: (B, 3, H, W) float32 in [0, 1], the given images.
        drift: τ (B,) float32; NaN if the method does not measure it.
        flagged: (B,) bool, images that count as attacked.
        seeds: (B,) int64; passed as `seeds=`, they reproduce the result.
        method, backend, engine: of the call.
        timings: seconds by stage, including "total".
    """

    logits: Tensor
    delta: Tensor
    inputs: Tensor
    drift: Tensor
    flagged: Tensor
    seeds: Tensor
    method: str
    backend: str
    engine: str
    timings: dict[str, float] = field(default_factory=dict)

    @cached_property
    def images(self) -> Tensor:
        """Defended pixels, (B, 3, H, W) float32 in [0, 1]."""
        with _lasting():
            return (self.inputs + self.delta).clamp(0, 1)

    @cached_property
    def probs(self) -> Tensor:
        """Softmax of the logits, (B, K) float32."""
        with _lasting():
            return self.logits.softmax(dim=-1)

    @cached_property
    def labels(self) -> Tensor:
        """Index of the predicted class, (B,) int64."""
        with _lasting():
            return self.logits.argmax(dim=-1)

    def __repr__(self) -> str:
        images, classes = self.logits.shape
        height, width = self.inputs.shape[-2:]
        return (
            f"DefenseResult({images} images of {height}x{width}, {classes} classes, "
            f"method={self.method!r}, backend={self.backend!r}, engine={self.engine!r})"
        )

    def __len__(self) -> int:
        return len(self.logits)

    def topk(self, k: int = 5) -> tuple[Tensor, Tensor]:
        """Top-k probabilities and classes, (B, k) each, k <= K."""
        k = min(whole("k", k, 1), self.logits.shape[-1])
        values, indices = self.probs.topk(k, dim=-1)
        return values, indices

    @staticmethod
    def concatenate(parts: list[DefenseResult]) -> DefenseResult:
        """Join the results of consecutive pieces of a batch."""
        if len(parts) == 1:
            return parts[0]
        timings: dict[str, float] = {}
        for part in parts:
            for name, seconds in part.timings.items():
                timings[name] = timings.get(name, 0.0) + seconds
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in _PER_IMAGE}
        first = parts[0]
        return DefenseResult(
            **joined,
            method=first.method,
            backend=first.backend,
            engine=first.engine,
            timings=timings,
        )


_PER_IMAGE = ("logits", "delta", "inputs", "drift", "flagged", "seeds")


@contextlib.contextmanager
def _lasting() -> Iterator[None]:
    # A cached tensor must not be an inference tensor
    with torch.inference_mode(False), torch.no_grad():
        yield
