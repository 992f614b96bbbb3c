"""Undefended model, or defense with an exact gradient, as a module for other libraries."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scc_fast.api import Defender
from scc_fast.attacks.base import bare_logits


class BareLogits(nn.Module):
    """Pixels (B, 3, H, W) in [0, 1] to the undefended model's logits (B, K).

    Runs on the defense's engine; differentiable once with respect to the pixels. Without
    parameters; train() has no effect.

    Args:
        target: the defense of the model.
        columns: (U,) int64, classes of the logits; None: all K.
    """

    def __init__(self, target: Defender, columns: Tensor | None = None) -> None:
        super().__init__()
        self._target, self._columns = target, columns
        self.training = False

    def train(self, mode: bool = True) -> BareLogits:
        return self

    def forward(self, pixels: Tensor) -> Tensor:
        logits = self.logits(self._target, pixels)
        return logits if self._columns is None else logits[:, self._columns]

    @staticmethod
    def logits(target: Defender, pixels: Tensor) -> Tensor:
        """(B, K)."""
        return bare_logits(target, pixels)


class DefendedLogits(BareLogits):
    """Pixels (B, 3, H, W) in [0, 1] to the logits of a defense that draws nothing."""

    @staticmethod
    def logits(target: Defender, pixels: Tensor) -> Tensor:
        seeds = torch.zeros(len(pixels), dtype=torch.int64, device=pixels.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and pixels.requires_grad):
            run = target.live if torch.is_grad_enabled() else target.run
            parts = [run(*part).logits for part in target.pieces(pixels, seeds)]
        return torch.cat(parts)
