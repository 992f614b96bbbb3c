"""What a defense returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class DefenseResult:
    """The outcome for a batch of B images and K classes; everything is detached.

    Attributes:
        logits: (B, K) float32.
        delta: (B, 3, H, W) float32, what the defense added, pixel units.
        inputs: (B, 3, H, W) float32 in [0, 1], the images as they came in.
        drift: τ (B,) float32; NaN where the method does not measure it.
        flagged: (B,) bool, images taken as attacked and repaired.
        seeds: (B,) int64; passed back as `seeds=`, they give the identical result.
        method, backend, engine: what served the call.
        timings: seconds by stage; "total" is always there.
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
        """The defended pixels, (B, 3, H, W) float32 in [0, 1]."""
        return (self.inputs + self.delta).clamp(0, 1)

    @cached_property
    def probs(self) -> Tensor:
        """Softmax of the logits, (B, K) float32."""
        return self.logits.softmax(dim=-1)

    @cached_property
    def labels(self) -> Tensor:
        """Index of the predicted class, (B,) int64."""
        return self.logits.argmax(dim=-1)

    def __len__(self) -> int:
        return len(self.logits)

    def topk(self, k: int = 5) -> tuple[Tensor, Tensor]:
        """The k largest probabilities and their classes, (B, k) each; k is cut to K."""
        values, indices = self.probs.topk(min(k, self.logits.shape[-1]), dim=-1)
        return values, indices

    @staticmethod
    def concatenate(parts: list[DefenseResult]) -> DefenseResult:
        """One result from the results of consecutive pieces of a batch."""
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
