"""Pictures of the bundled model: emoji artworks on procedural backgrounds.

Random choices of picture i are Philox numbers keyed by (split, i): a split needs no files and no
global generator. Labels are the same on every machine; a pixel may differ by 1/255 by rounding.
All splits show the same artworks, at other places, sizes and colours.
"""

from __future__ import annotations

import json
import math
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from scc_fast.config import shown
from scc_fast.reference import philox

ASSETS = Path(__file__).parent / "assets"
SIZE = 64
TILE = 72  # side of one artwork in the sheet
COLUMNS = 16
SPLITS = ("train", "validation", "test", "samples")


@lru_cache
def class_names() -> tuple[str, ...]:
    """The K class names, by label."""
    return tuple(json.loads((ASSETS / "classes.json").read_text())["classes"].values())


@lru_cache
def artworks() -> Tensor:
    """All artworks, (K, 4, 72, 72) float32 in [0, 1], colour premultiplied by alpha."""
    import numpy as np
    from PIL import Image

    sheet = torch.from_numpy(np.array(Image.open(ASSETS / "artwork.png").convert("RGBA")))
    tiles = sheet.unfold(0, TILE, TILE).unfold(1, TILE, TILE)  # (rows, columns, 4, TILE, TILE)
    tiles = tiles.flatten(0, 1)[: len(class_names())].float() / 255
    return torch.cat([tiles[:, :3] * tiles[:, 3:], tiles[:, 3:]], dim=1)


def seeds(split: str, indices: Tensor) -> Tensor:
    """Philox keys of pictures of a split; splits share no key."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {shown(split)}")
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < 1 << 40:
        raise ValueError(f"indices must be in [0, 2^40), got {indices.min()} to {indices.max()}")
    return indices.to(torch.int64) + (SPLITS.index(split) << 40)


def generate(split: str, indices: range | Tensor) -> tuple[Tensor, Tensor]:
    """Pictures (n, 3, 64, 64) float32 in [0, 1] on the 8-bit grid, and labels (n,) int64."""
    keys = seeds(split, torch.as_tensor(indices, device="cpu"))
    u = philox.uniform(keys, philox.DATA, 0, 32)
    labels = (u[:, 0] * len(class_names())).long()
    if len(labels) == 0:
        return artworks().new_zeros(0, 3, SIZE, SIZE), labels
    foreground = _place(artworks()[labels], u[:, 1:6])
    picture = foreground[:, :3] + (1 - foreground[:, 3:]) * _background(keys, u[:, 6:20])
    return (_jitter(picture, u[:, 20:23]) * 255).round() / 255, labels


def _place(artwork: Tensor, u: Tensor) -> Tensor:
    """Scale 0.55-0.98, rotate +-14 degrees, flip half the time, shift: one affine resampling."""
    scale = 0.55 + 0.43 * u[:, 0]
    angle = (2 * u[:, 1] - 1) * math.radians(14)
    mirror = 1 - 2 * (u[:, 2] < 0.5).float()
    room = (1.12 - scale).clamp(min=0.06)[:, None]
    shift = (2 * u[:, 3:5] - 1) * room
    cos, sin = angle.cos() / scale, angle.sin() / scale
    linear = torch.stack([cos * mirror, sin * mirror, -sin, cos], dim=1).view(-1, 2, 2)
    theta = torch.cat([linear, -(linear @ shift[..., None])], dim=2)
    grid = F.affine_grid(theta, [len(u), 4, SIZE, SIZE], align_corners=False)
    return F.grid_sample(artwork, grid, align_corners=False)


def _background(keys: Tensor, u: Tensor) -> Tensor:
    """Plain, gradient, stripes, checks or blurred colour noise, a fifth each: (n, 3, 64, 64)."""
    u = u[..., None, None]
    kind = (u[:, 0] * 5).long()
    angle = u[:, 1] * 2 * math.pi
    period, phase = 6 + 14 * u[:, 2], u[:, 3]
    first, second = u[:, 4:7], u[:, 7:10]
    side = torch.arange(SIZE, dtype=torch.float32, device=keys.device) + 0.5
    y, x = torch.meshgrid(side, side, indexing="ij")
    along = x * angle.cos() + y * angle.sin()
    across = y * angle.cos() - x * angle.sin()
    ramp = (along / (SIZE * math.sqrt(2)) + 0.5).clamp(0, 1)
    stripe = ((along / period + phase) % 1 < 0.5).float()
    check = (stripe - ((across / period) % 1 < 0.5).float()).abs()
    mix = torch.zeros_like(ramp)
    for index, pattern in ((1, ramp), (2, stripe), (3, check)):
        mix = torch.where(kind == index, pattern, mix)
    flat = first + (second - first) * mix[:, None]
    coarse = philox.uniform(keys, philox.DATA, 1, 3 * 7 * 7).view(-1, 3, 7, 7)
    noise = F.interpolate(coarse, (SIZE, SIZE), mode="bicubic", align_corners=False).clamp(0, 1)
    return torch.where(kind[:, None] == 4, noise, flat)


def _jitter(picture: Tensor, u: Tensor) -> Tensor:
    """Saturation 0.75-1.25, contrast 0.35-0.9, brightness +-0.12: hazy."""
    u = u[..., None, None, None]
    grey = picture.mean(dim=1, keepdim=True)
    picture = grey + (picture - grey) * (0.75 + 0.5 * u[:, 0])
    picture = 0.5 + (picture - 0.5) * (0.35 + 0.55 * u[:, 1])
    return (picture + 0.24 * u[:, 2] - 0.12).clamp(0, 1)
