"""Pictures seen through projective maps of the plane: crops, zooms, turns, perspectives."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_SAMPLES = 8  # along a side of an output pixel
_PROBES = 9  # points along a side where the shrinking of a map is looked at


def warp_views(
    x: Tensor,
    matrix: Tensor,
    size: tuple[int, int],
    *,
    mode: str = "bilinear",
    box: Tensor | None = None,
    fill: Sequence[float] | None = None,
    samples: Tensor | None = None,
) -> Tensor:
    """Each view of each picture, in pixels; differentiable with respect to x.

    Coordinates are (x, y, 1) from a picture's upper left corner, right and down; the centre of a
    pixel lies at a half. Cubic weights are those with which Pillow turns pictures, a = −1 (torch's
    have a = −0.75); what they put outside [0, 1] is clamped, its gradient passed straight through.

    Args:
        x: (B, 3, H, W) in [0, 1].
        matrix: (V, B, 3, 3), from a place in the view to that in the picture.
        size: (height, width) of the views.
        mode: "bilinear" or "bicubic".
        box: (V, B, 4) int64, top, left, height, width: what a view may see; None: all.
        fill: what lies outside of that, three numbers; None: its border goes on.
        samples: (V, B) int64, n: an output pixel is the mean of n x n points. None: of its centre.

    Returns:
        (V, B, 3, *size).
    """
    shade = None if fill is None else x.new_tensor(fill).view(3, 1, 1)
    pixels = (x if shade is None else x - shade).flatten(2)
    seen = []
    for v, maps in enumerate(matrix):
        limits = _limits(x, None if box is None else box[v])

        def mean(rows: Tensor | slice, n: int, maps: Tensor = maps, limits: Any = limits) -> Tensor:
            within = limits[0][rows], limits[1][rows], fill is not None
            return _mean(pixels[rows], x.shape[-1], maps[rows], size, mode, within, n)

        view = mean(slice(None), 1)
        if samples is not None:
            for n in range(2, MOST_SAMPLES + 1):
                rows = torch.eq(samples[v], n).nonzero()[:, 0]
                view = view.index_copy(0, rows, mean(rows, n)) if len(rows) else view
        seen.append(view)
    value = torch.stack(seen)
    value = value if shade is None else value + shade
    # An exact clamp forward; backward, that of an overshoot would stop white and black pixels too.
    return value.clamp(0, 1).detach() + (value - value.detach()) if mode == "bicubic" else value


def bilinear(
    x: Tensor,
    matrix: Tensor,
    size: tuple[int, int],
    *,
    box: Tensor | None = None,
    fill: Sequence[float] | None = None,
) -> Tensor:
    """warp_views by grid_sample, within rounding, and faster under autograd.

    For maps without a horizon, and a box or a fill but not both.
    """
    m, pictures = matrix.flatten(0, 1)[..., None, None], x.expand(len(matrix), *x.shape)
    pictures = pictures.flatten(0, 1)
    first, last = _limits(pictures, None if box is None else box.flatten(0, 1))
    down, right = (torch.arange(side, dtype=matrix.dtype, device=x.device) + 0.5 for side in size)
    depth, places = _along(m, 2, down[:, None], right), []
    for axis, side in ((0, x.shape[-1]), (1, x.shape[-2])):
        place = _along(m, axis, down[:, None], right) / depth - 0.5
        if fill is None:
            low, high = (end[:, 1 - axis, None, None].to(place) for end in (first, last))
            place = place.maximum(low).minimum(high)
        places.append((2 * place + 1) / side - 1)
    grid = torch.stack(places, dim=-1)
    if fill is None:
        seen = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    else:
        shade = x.new_tensor(fill).view(3, 1, 1)
        seen = F.grid_sample(pictures - shade, grid, align_corners=False) + shade
    return seen.unflatten(0, matrix.shape[:2])


def shrinking(matrix: Tensor, picture: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The samples (V, B) that each map needs: ⌈s⌉, at most 8.

    s is the largest step in the picture from one pixel of the view to the next, of 9 x 9 places of
    the view that show something of the picture.
    """
    m = matrix[..., None, None]
    down, right = (
        torch.linspace(0.5, side - 0.5, _PROBES, dtype=matrix.dtype, device=matrix.device)
        for side in size
    )
    depth = _along(m, 2, down[:, None], right)
    steps, shown = [], torch.ones_like(depth, dtype=torch.bool)
    for axis, side in ((0, picture[1]), (1, picture[0])):
        place = _along(m, axis, down[:, None], right) / depth
        shown = shown & (place > -1) & (place < side + 1)
        steps.append([(m[..., axis, k, :, :] - place * m[..., 2, k, :, :]) / depth for k in (0, 1)])
    step = torch.stack([torch.hypot(x, y) for x, y in zip(*steps, strict=True)]).amax(dim=0)
    most = torch.where(shown, step, 0.0).amax(dim=(-2, -1))
    # A map of scale 1 is often a rounding above it.
    return torch.ceil(most - 1e-3).clamp(1, MOST_SAMPLES).long()


def _limits(x: Tensor, box: Tensor | None) -> tuple[Tensor, Tensor]:
    """The first and the last row and column that may be seen, (B, 2) each."""
    last = torch.tensor([x.shape[-2] - 1, x.shape[-1] - 1], device=x.device).expand(len(x), 2)
    if box is None:
        return torch.zeros_like(last), last
    first = box[:, :2].clamp_min(0).minimum(last)
    return first, (box[:, :2] + box[:, 2:] - 1).minimum(last).maximum(first)


def _mean(
    pixels: Tensor,
    width: int,
    matrix: Tensor,
    size: tuple[int, int],
    mode: str,
    within: tuple[Tensor, Tensor, bool],
    n: int,
) -> Tensor:
    """One view of pixels (b, 3, H·W), each of its pixels the mean of n x n points."""
    m, (first, last, filled) = matrix[..., None, None], within
    total = pixels.new_zeros(())
    for at in itertools.product(range(n), range(n)):
        down, right = (
            torch.arange(side, dtype=matrix.dtype, device=matrix.device) + (k + 0.5) / n
            for side, k in zip(size, at, strict=True)
        )
        depth = _along(m, 2, down[:, None], right)
        across, along = (
            _taps(
                _along(m, axis, down[:, None], right) / depth - 0.5,
                first[:, 1 - axis, None, None],
                last[:, 1 - axis, None, None],
                mode == "bicubic",
                filled,
            )
            for axis in (0, 1)
        )
        total = total + _blend(pixels, width, along, across).unflatten(-1, size)
    return total * (1 / n**2)


def _along(m: Tensor, row: int, down: Tensor, right: Tensor) -> Tensor:
    """A coordinate of the map: row of m (..., 3, 3, 1, 1) times (right, down, 1)."""
    return m[..., row, 0, :, :] * right + (m[..., row, 1, :, :] * down + m[..., row, 2, :, :])


Taps = list[tuple[Tensor, Tensor]]  # index and weight of each


def _taps(position: Tensor, first: Tensor, last: Tensor, cubic: bool, filled: bool) -> Taps:
    """The pixels along one axis that a position (B, h, w) lies between."""
    # Three pixels outside nothing changes any more; a place at infinity, or none, is out there.
    low, high = (first - 3).to(position), (last + 3).to(position)
    position = torch.where(position > low, position, low)
    position = torch.where(position < high, position, high)
    start = torch.floor(position)
    t = position - start
    weights = [_far(t + 1), _near(t), _near(1 - t), _far(2 - t)] if cubic else [1 - t, t]
    found = []
    for k, weight in enumerate(weights):
        index = start.long() + (k - 1 if cubic else k)
        if filled:
            weight = torch.where((index >= first) & (index <= last), weight, 0.0)
        found.append((index.maximum(first).minimum(last), weight))
    return found


def _near(t: Tensor) -> Tensor:
    return (t - 2) * t * t + 1


def _far(t: Tensor) -> Tensor:
    return ((5 - t) * t - 8) * t + 4


def _blend(pixels: Tensor, width: int, along: Taps, across: Taps) -> Tensor:
    """(B, 3, h·w): columns first, as the kernels do."""
    total = pixels.new_zeros(())
    for column, share in across:
        part = pixels.new_zeros(())
        for row, weight in along:
            index = (row * width + column).flatten(1)[:, None].expand(-1, 3, -1)
            part = part + weight.flatten(1)[:, None] * pixels.gather(2, index)
        total = total + share.flatten(1)[:, None] * part
    return total
