"""Views v_1…v_L of an image, and the encoder's preprocessing φ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from scc_fast.config import View
from scc_fast.reference import philox


def make_views(pixels: Tensor, seeds: Tensor, views: Sequence[View], fill: Tensor) -> Tensor:
    """Views of a batch in pixel space, before φ.

    Args:
        pixels: (B, 3, H, W) in [0, 1].
        seeds: (B,) int64; noise is a function of (seed, view), equal in every step.
        views: L views.
        fill: (3,) of uncovered pixels: the normalisation mean, which is zero after φ.

    Returns:
        (L, B, 3, H, W).
    """
    seen = [_view(pixels, seeds, index, view, fill) for index, view in enumerate(views)]
    return torch.stack(seen)


def _view(pixels: Tensor, seeds: Tensor, index: int, view: View, fill: Tensor) -> Tensor:
    if view.shift != (0, 0):
        pixels = _shift(pixels, _pixels(view), fill)
    if view.flip:
        pixels = pixels.flip(-1)
    if view.noise > 0 and len(pixels):
        noise = philox.normal(seeds, philox.VIEW_NOISE, index, pixels[0].numel())
        pixels = (pixels + view.noise * noise.view_as(pixels)).clamp(0, 1)
    return pixels


def _pixels(view: View) -> tuple[int, int]:
    down, right = map(int, view.shift)
    return down, right


def _shift(pixels: Tensor, shift: tuple[int, int], fill: Tensor) -> Tensor:
    down, right = shift
    row = torch.arange(pixels.shape[-2], device=pixels.device) - down
    column = torch.arange(pixels.shape[-1], device=pixels.device) - right
    from_inside = ((row >= 0) & (row < len(row)))[:, None] & (column >= 0) & (column < len(column))
    return torch.where(from_inside, pixels.roll(shift, dims=(-2, -1)), fill.view(3, 1, 1))


def make_views_adjoint(
    gradient: Tensor, pixels: Tensor, seeds: Tensor, views: Sequence[View]
) -> Tensor:
    """∂/∂pixels from ∂/∂views (L, B, 3, H, W), summed over the views in order.

    Pixels shifted out of the picture, or clamped, have no gradient.
    """
    whole = torch.zeros_like(pixels)
    zero = pixels.new_zeros(3)
    for index, view in enumerate(views):
        part = gradient[index]
        if view.noise > 0 and len(pixels):
            noise = philox.normal(seeds, philox.VIEW_NOISE, index, pixels[0].numel())
            bare = _view(pixels, seeds, index, View(view.flip, view.shift), zero)
            noisy = bare + view.noise * noise.view_as(pixels)
            part = torch.where((noisy >= 0) & (noisy <= 1), part, 0.0)
        if view.flip:
            part = part.flip(-1)
        down, right = _pixels(view)
        whole = whole + _shift(part, (-down, -right), zero)
    return whole


def to_patches(pixels: Tensor, size: int) -> Tensor:
    """(B, 3, H, W) → (B, N, 3·size²): rows for a patch embedding, (c, i, j) each."""
    return F.unfold(pixels, size, stride=size).transpose(1, 2).contiguous()


def from_patches(patches: Tensor, size: int, picture: tuple[int, int]) -> Tensor:
    """Adjoint of to_patches; uncovered pixels are zero."""
    return F.fold(patches.transpose(1, 2), picture, size, stride=size)


def preprocess(pixels: Tensor, size: tuple[int, int], mean: Tensor, std: Tensor) -> Tensor:
    """φ: bicubic resize to the encoder's size if different, then (· − mean)/std.

    The resize is antialiased.
    """
    if pixels.shape[-2:] != size:
        pixels = F.interpolate(pixels, size, mode="bicubic", align_corners=False, antialias=True)
    return (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)
