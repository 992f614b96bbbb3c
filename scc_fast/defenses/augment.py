"""Random crops and mild augmentations, per image, for a whole batch.

torchvision's transforms on float tensors: no rounding to 8 bits, and zeros beyond the border are
blended in by bilinear weights. Differentiable with respect to the pixels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from scc_fast.engine.batch import warped
from scc_fast.reference import philox

BOX_DRAWS = 22  # uniforms per random box
_TRIES = 10
_GRAY = (0.2989, 0.587, 0.114)
_ORDERS = tuple(itertools.permutations(range(4)))


def straight(x: Tensor, changed: Tensor) -> Tensor:
    """`changed` with the gradient of x (straight-through)."""
    return x + (changed - x).detach()


def only(x: Tensor, rows: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """x (n, ...) with masked rows replaced by `change(x[i], i)`, i their indices."""
    index = rows.nonzero()[:, 0]
    return x.index_copy(0, index, change(x[index], index)) if len(index) else x


# ---------------------------------------------------------------------------------------- crops


def random_boxes(
    draws: Tensor,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """Boxes of RandomResizedCrop: (..., 22) uniforms → (..., 4) top, left, height, width.

    Up to ten draws of an area in `scale` and a log-uniform width/height in `ratio`, until they fit
    into (height, width); then the largest centred box.
    """
    height, width = size
    tries = draws[..., : 2 * _TRIES].double().unflatten(-1, (_TRIES, 2))
    area = height * width * (scale[0] + (scale[1] - scale[0]) * tries[..., 0])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(low + (high - low) * tries[..., 1])
    wide = torch.round(torch.sqrt(area * aspect))
    tall = torch.round(torch.sqrt(area / aspect))
    fits = (wide > 0) & (wide <= width) & (tall > 0) & (tall <= height)
    first = fits.int().argmax(dim=-1, keepdim=True)
    wide, tall = (side.gather(-1, first)[..., 0] for side in (wide, tall))
    found = fits.any(dim=-1)
    at = draws[..., 2 * _TRIES :].double()
    top = torch.floor(at[..., 0] * (height - tall + 1))
    left = torch.floor(at[..., 1] * (width - wide + 1))
    middle = draws.new_tensor(_middle_box(height, width, ratio)).double()
    box = torch.stack([top, left, tall, wide], dim=-1)
    return torch.where(found[..., None], box, middle).float()


def _middle_box(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    tall, wide = height, width
    if width / height < ratio[0]:
        tall = round(width / ratio[0])
    elif width / height > ratio[1]:
        wide = round(height * ratio[1])
    return (height - tall) // 2, (width - wide) // 2, tall, wide


def crop_resize(x: Tensor, boxes: Tensor, flip: Tensor, backend: str | None = None) -> Tensor:
    """Crop boxes and resize them bilinearly to the image's size.

    Args:
        x: (B, 3, H, W).
        boxes: (B, V, 4) top, left, height, width in whole pixels, within the image.
        flip: (B, V) bool, mirrored left to right.
        backend: of ops.warp_views.

    Returns:
        (V, B, 3, H, W).
    """
    boxes, flip = boxes.transpose(0, 1), flip.T
    top, left, tall, wide = boxes.unbind(dim=-1)
    down, right, none = tall / x.shape[-2], wide / x.shape[-1], torch.zeros_like(top)
    right, left = torch.where(flip, -right, right), torch.where(flip, left + wide, left)
    rows = (right, none, left, none, down, top, none, none, none + 1)
    matrix = torch.stack(rows, dim=-1).unflatten(-1, (3, 3))
    return warped(x, matrix, backend, box=boxes.long())


# ----------------------------------------------------------------------------------- geometry


def warp(x: Tensor, matrix: Tensor, backend: str | None = None) -> Tensor:
    """Affine map, bilinear, zeros beyond the border.

    Args:
        x: (n, 3, H, W).
        matrix: (n, 2, 3), output (x, y, 1) -> input position, in pixels right and down from the
            centre.
        backend: of ops.warp_views.
    """
    half = x.new_tensor([x.shape[-1] / 2, x.shape[-2] / 2])
    turn = matrix[..., :2]
    shift = matrix[..., 2] + half - (turn * half).sum(dim=-1)
    last = matrix.new_tensor([0.0, 0.0, 1.0]).expand(len(matrix), 1, 3)
    whole = torch.cat([torch.cat([turn, shift[..., None]], dim=-1), last], dim=-2)
    return warped(x, whole[None], backend, fill=(0.0, 0.0, 0.0))[0]


def perspectives(draws: Tensor, size: tuple[int, int], distortion: float) -> Tensor:
    """Maps of torchvision's RandomPerspective: (..., 8) uniforms -> (..., 3, 3) for warped.

    Each corner of the picture goes to a whole pixel within `distortion` of half a side from its
    own; the map back, from the view to the picture, is solved in closed form (Heckbert, 1989).
    """
    height, width = size
    u = draws.double().unflatten(-1, (4, 2))
    sides = u.new_tensor([width, height])
    reach = torch.floor(distortion * torch.floor(sides / 2))
    inwards = torch.floor(u * (reach + 1))
    far = u.new_tensor([[0, 0], [1, 0], [1, 1], [0, 1]]) > 0  # from the upper left, clockwise
    corners = torch.where(far, sides - 1 - inwards, inwards)
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = (c.unbind(dim=-1) for c in corners.unbind(dim=-2))
    ax, bx, sx = x1 - x2, x3 - x2, x0 - x1 + x2 - x3
    ay, by, sy = y1 - y2, y3 - y2, y0 - y1 + y2 - y3
    whole = ax * by - bx * ay
    g, h = (sx * by - bx * sy) / whole, (ax * sy - sx * ay) / whole
    # The unit square to the corners; its adjugate is the way back, up to a factor.
    a, b, c = x1 - x0 + g * x1, x3 - x0 + h * x3, x0
    d, e, f = y1 - y0 + g * y1, y3 - y0 + h * y3, y0
    rows = (e - f * h, c * h - b, b * f - c * e, f * g - d, a - c * g, c * d - a * f)
    back = torch.stack([*rows, d * h - e * g, b * g - a * h, a * e - b * d], dim=-1)
    scale = torch.cat([sides - 1, sides.new_ones(1)])
    return (back.unflatten(-1, (3, 3)) * scale[:, None]).float()


def rotation(angle: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Matrix (n, 2, 3) for warp: rotate clockwise, scale, shift.

    Args:
        angle: (n,) radians. scale: (n,). shift: (n, 2) pixels to the right and down.
    """
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    back = torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)], -2)
    return torch.cat([back, -(back @ shift[..., None])], dim=-1)


# --------------------------------------------------------------------------------- colour, blur


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with black: (n, 3, H, W), factor (n,)."""
    return (x * _wide(factor)).clamp(0, 1)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the picture's mean gray."""
    return _blend(x, _gray(x).mean(dim=(1, 2, 3), keepdim=True), factor)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with each pixel's gray."""
    return _blend(x, _gray(x), factor)


def hue(x: Tensor, turn: Tensor) -> Tensor:
    """Rotate the hue by turn (n,); 1 is the whole circle."""
    red, green, blue = x.unbind(dim=1)
    value = x.amax(dim=1)
    chroma = value - x.amin(dim=1)
    safe = torch.where(chroma > 0, chroma, torch.ones_like(chroma))
    sixth = torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    sixth = torch.where(value == red, (green - blue) / safe, sixth) + 6 * turn[:, None, None]
    parts = []
    for offset in (5, 3, 1):
        k = torch.remainder(offset + sixth, 6)
        parts.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(parts, dim=1).clamp(0, 1)


def weighted_blur(x: Tensor, weights: Tensor, padding: str = "reflect") -> Tensor:
    """Separable blur with each picture's own weights (n, 2r + 1) in both directions.

    Raises:
        ValueError: a side of r pixels or fewer, too small for reflection.
    """
    reach = weights.shape[1] // 2
    height, width = x.shape[-2:]
    if padding == "reflect" and min(height, width) <= reach:
        raise ValueError(
            f"pictures must be larger than {reach}x{reach} to be blurred over {2 * reach + 1} "
            f"pixels, got {height}x{width}"
        )
    wide = F.pad(x, (reach,) * 4, mode=padding)
    taps = range(weights.shape[1])
    factors = weights.T[..., None, None, None]
    across = (factors * torch.stack([wide[..., k : k + width] for k in taps])).sum(dim=0)
    return (factors * torch.stack([across[..., k : k + height, :] for k in taps])).sum(dim=0)


def gaussian_blur(x: Tensor, sigma: Tensor, size: int = 5) -> Tensor:
    """Gaussian blur with sigma (n,) pixels, `size` pixels wide, reflected at the border."""
    offset = torch.arange(size, device=x.device) - size // 2
    weights = torch.exp(-0.5 * (offset / sigma[:, None]) ** 2)
    return weighted_blur(x, weights / weights.sum(dim=1, keepdim=True))


def jitter(x: Tensor, factors: Sequence[Tensor], order: Tensor) -> Tensor:
    """Colour jitter, in a random order per picture.

    Args:
        x: (n, 3, H, W).
        factors: of brightness, contrast, saturation and hue, (n,) each.
        order: (n,) int64 in [0, 24), index of the permutation.
    """
    changes = (brightness, contrast, saturation, hue)
    table = torch.tensor(_ORDERS, device=x.device)[order]
    for place, which in itertools.product(range(4), range(4)):

        def change(part: Tensor, index: Tensor, which: int = which) -> Tensor:
            return changes[which](part, factors[which][index])

        x = only(x, table[:, place] == which, change)
    return x


def mild(x: Tensor, seeds: Tensor, purpose: int, view: int, backend: str | None = None) -> Tensor:
    """MAC's augmentation (arXiv 2606.06938): x (B, 3, H, W) in [0, 1] → the same.

    Rotation up to 5 degrees, shift up to 4 % (whole pixels), scale up to 8 %; each with probability
    one half: colour jitter 0.08/0.08/0.08/0.02, a 5x5 Gaussian blur of
    sigma 0.5 to 1.2, Gaussian noise of a sigma up to 0.02. Draws from `purpose` and the next one.
    """
    if len(x) == 0:
        return x
    u = philox.uniform(seeds, purpose, view, 16).T
    signed = 2 * u - 1
    size = u.new_tensor([x.shape[-1], x.shape[-2]])
    shift = torch.round(0.04 * size * signed[1:3].T)
    x = warp(x, rotation(torch.deg2rad(5 * signed[0]), 1 + 0.08 * signed[3], shift), backend)
    factors = (*(1 + 0.08 * signed[4:7]), 0.02 * signed[7])
    order = (24 * u[8]).long()
    x = only(x, u[9] < 0.5, lambda part, i: jitter(part, [f[i] for f in factors], order[i]))
    x = only(x, u[10] < 0.5, lambda part, i: gaussian_blur(part, 0.5 + 0.7 * u[11][i]))

    def noisy(part: Tensor, index: Tensor) -> Tensor:
        noise = philox.normal(seeds[index], purpose + 1, view, part[0].numel()).view_as(part)
        return (part + 0.02 * _wide(u[13][index]) * noise).clamp(0, 1)

    return only(x, u[12] < 0.5, noisy)


def _wide(rows: Tensor) -> Tensor:
    """(n,) → (n, 1, 1, 1)."""
    return rows[:, None, None, None]


def _gray(x: Tensor) -> Tensor:
    """(n, 3, H, W) → (n, 1, H, W)."""
    weights = x.new_tensor(_GRAY)
    return (x * weights[:, None, None]).sum(dim=1, keepdim=True)


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (_wide(factor) * x + (1 - _wide(factor)) * other).clamp(0, 1)
