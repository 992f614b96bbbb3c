"""The encoder as a function of pixels that autograd can differentiate once, on any engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scc_fast import ops
from scc_fast.config import IDENTITY
from scc_fast.engine.methods import Setting, Sight
from scc_fast.engine.opaque import opaque, transformed


class Encode:
    """f after φ: pixels (n, 3, H, W) float32 in [0, 1] to embeddings (n, D), not normalised.

    The forward and the backward pass are the encoder's own (our runner has no autograd graph);
    around it stands plain autograd, once: a second derivative raises.

    Args:
        setting: of the encoder and the ops; the classes are not used.
        at_once: pictures that go through the encoder together.
    """

    def __init__(self, setting: Setting, at_once: int = 256) -> None:
        self._setting, self._at_once = setting, at_once

    def __call__(self, pixels: Tensor) -> Tensor:
        if transformed():
            unused = torch.zeros(len(pixels), dtype=torch.int64, device=pixels.device)
            return opaque(lambda pixels, _: self(pixels), pixels, unused)
        parts, setting = pixels.split(self._at_once), self._setting.now()
        if torch.is_grad_enabled() and pixels.requires_grad:
            return torch.cat([_Encoded.apply(part, setting) for part in parts])
        with torch.no_grad():
            return torch.cat([_sight(setting, part).look(None)[0] for part in parts])


def _sight(setting: Setting, pixels: Tensor) -> Sight:
    pixels = pixels.detach().float()
    seeds = torch.zeros(len(pixels), dtype=torch.int64, device=pixels.device)  # no noise is drawn
    return Sight(setting, pixels, seeds, (IDENTITY,))


class _Encoded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pixels: Tensor, setting: Setting) -> Tensor:
        ctx.sight = _sight(setting, pixels)
        features, _, ctx.way = ctx.sight.look_at(None)
        return features[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        sight, setting = ctx.sight, ctx.sight.setting
        # Half precision would lose the gradients of small losses: each picture's is lifted by a
        # power of two, and lowered again in float32.
        largest = slope.abs().amax(dim=1).clamp_min(1e-30)
        lift = torch.exp2(-torch.floor(torch.log2(largest)))
        gradient = ctx.way.back(slope * lift[:, None])
        if sight.fits:
            gradient = ops.make_views_adjoint(
                gradient,
                sight.x,
                None,
                sight.seeds,
                sight.views,
                std=setting.std,
                patch=setting.encoder.patch,
                backend=setting.backend,
            )
        return gradient.float() / lift[:, None, None, None], None
