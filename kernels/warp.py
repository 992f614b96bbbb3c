"""Views through projective maps in Triton: the twin of scc_fast.ops.warp_views."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from scc_fast.kernels.views import EXACT, by_colour

_BLOCK = 256  # elements per program, two a thread
_MOST = 8  # MOST_SAMPLES of scc_fast.reference.warp


@triton.jit
def _held(position, first, last):
    """Three pixels outside nothing changes any more; what is no number is out there as well."""
    low = first.to(tl.float32) - 3.0
    high = last.to(tl.float32) + 3.0
    position = tl.where(position > low, position, low)
    return tl.where(position < high, position, high)


@triton.jit
def _whole_below(position):
    """floor() of a position that is held; Triton's own flushes to zero."""
    cut = position.to(tl.int32)
    return cut - (cut.to(tl.float32) > position).to(tl.int32)


@triton.jit
def _weight(t, K: tl.constexpr, CUBIC: tl.constexpr):
    """Of the K-th pixel at a distance t past the one below."""
    if not CUBIC:
        return 1.0 - t if K == 0 else t
    elif K == 0 or K == 3:
        s = t + 1.0 if K == 0 else 2.0 - t
        return ((5.0 - s) * s - 8.0) * s + 4.0
    else:
        s = t if K == 1 else 1.0 - t
        return (s - 2.0) * s * s + 1.0


@triton.jit
def _sampled(
    x_ptr,  # of the image and the colours
    across,
    along,  # (BLOCK,) places
    left,
    top,
    right,
    bottom,
    fill,
    live,
    WIDTH: tl.constexpr,
    CUBIC: tl.constexpr,
    FILLED: tl.constexpr,
):
    """The picture, less the fill, at places (BLOCK,): down first."""
    across = _held(across, left, right)
    along = _held(along, top, bottom)
    column = _whole_below(across)
    row = _whole_below(along)
    s = across - column.to(tl.float32)
    t = along - row.to(tl.float32)
    TAPS: tl.constexpr = 4 if CUBIC else 2
    total = tl.zeros_like(across)
    for j in tl.static_range(TAPS):
        x = column + (j - TAPS // 2 + 1)
        share = _weight(s, j, CUBIC)
        if FILLED:
            share = tl.where((x >= left) & (x <= right), share, 0.0)
        x = tl.minimum(tl.maximum(x, left), right)
        part = tl.zeros_like(across)
        for r in tl.static_range(TAPS):
            y = row + (r - TAPS // 2 + 1)
            weight = _weight(t, r, CUBIC)
            if FILLED:
                weight = tl.where((y >= top) & (y <= bottom), weight, 0.0)
            y = tl.minimum(tl.maximum(y, top), bottom)
            part += weight * (tl.load(x_ptr + (y * WIDTH + x), mask=live, other=0.0) - fill)
        total += share * part
    return total


@triton.jit
def _limit(value, low, high):
    """A whole number of a box, held to the picture."""
    return tl.minimum(tl.maximum(value, low), high).to(tl.int32)


@triton.jit(do_not_specialize=["batch"])
def _warp_kernel(
    x_ptr,  # (B, 3, H, W) float32
    matrix_ptr,  # (V, B, 3, 3) float32
    box_ptr,  # (V, B, 4) int64, or None
    samples_ptr,  # (V, B) int64, or None
    out_ptr,  # (V, B, NUMEL)
    batch,
    fill0,
    fill1,
    fill2,
    mean0,
    mean1,
    mean2,
    std0,
    std1,
    std2,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CELL_HEIGHT: tl.constexpr,  # a view is cells row by row: its patches, or one that is all of it
    CELL_WIDTH: tl.constexpr,
    ACROSS: tl.constexpr,  # cells in a row
    CUBIC: tl.constexpr,
    FILLED: tl.constexpr,
    MOST: tl.constexpr,
    NUMEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    TILES: tl.constexpr = (NUMEL + BLOCK - 1) // BLOCK
    PLANE: tl.constexpr = CELL_HEIGHT * CELL_WIDTH
    pair = (tl.program_id(0) // TILES).to(tl.int64)
    e = (tl.program_id(0) % TILES) * BLOCK + tl.arange(0, BLOCK)
    live = e < NUMEL
    cell = e // (3 * PLANE)
    colour = e // PLANE % 3
    inner = e % PLANE
    i = (cell // ACROSS * CELL_HEIGHT + inner // CELL_WIDTH).to(tl.float32)
    j = (cell % ACROSS * CELL_WIDTH + inner % CELL_WIDTH).to(tl.float32)
    x_ptr += pair % batch * (3 * HEIGHT * WIDTH) + colour * (HEIGHT * WIDTH)

    matrix_ptr += pair * 9
    m00 = tl.load(matrix_ptr)
    m01 = tl.load(matrix_ptr + 1)
    m02 = tl.load(matrix_ptr + 2)
    m10 = tl.load(matrix_ptr + 3)
    m11 = tl.load(matrix_ptr + 4)
    m12 = tl.load(matrix_ptr + 5)
    m20 = tl.load(matrix_ptr + 6)
    m21 = tl.load(matrix_ptr + 7)
    m22 = tl.load(matrix_ptr + 8)
    if box_ptr is None:
        left = tl.full([], 0, tl.int32)
        top = left
        right = left + (WIDTH - 1)
        bottom = left + (HEIGHT - 1)
    else:
        box_ptr += pair * 4
        up = tl.load(box_ptr)
        start = tl.load(box_ptr + 1)
        top = _limit(up, 0, HEIGHT - 1)
        left = _limit(start, 0, WIDTH - 1)
        bottom = _limit(up + tl.load(box_ptr + 2) - 1, top, HEIGHT - 1)
        right = _limit(start + tl.load(box_ptr + 3) - 1, left, WIDTH - 1)
    n = tl.full([], 1, tl.int32)
    if samples_ptr is not None:
        n = _limit(tl.load(samples_ptr + pair), 1, MOST)

    fill = by_colour(colour, fill0, fill1, fill2)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for at in range(0, n * n):
        down = i + tl.div_rn((at // n).to(tl.float32) + 0.5, n.to(tl.float32))
        over = j + tl.div_rn((at % n).to(tl.float32) + 0.5, n.to(tl.float32))
        depth = m20 * over + (m21 * down + m22)
        across = tl.div_rn(m00 * over + (m01 * down + m02), depth) - 0.5
        along = tl.div_rn(m10 * over + (m11 * down + m12), depth) - 0.5
        total += _sampled(
            x_ptr, across, along, left, top, right, bottom, fill, live, WIDTH, CUBIC, FILLED
        )
    value = total * tl.div_rn(1.0, (n * n).to(tl.float32)) + fill
    if CUBIC:
        value = tl.where(value < 0.0, 0.0, tl.where(value > 1.0, 1.0, value))
    mean = by_colour(colour, mean0, mean1, mean2)
    std = by_colour(colour, std0, std1, std2)
    value = tl.div_rn(value - mean, std)
    tl.store(out_ptr + pair * NUMEL + e, value.to(out_ptr.dtype.element_ty), mask=live)


def warp_views(
    x: Tensor,
    matrix: Tensor,
    box: Tensor | None,
    samples: Tensor | None,
    size: Sequence[int],
    cubic: bool,
    fill: Sequence[float],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    patch: int,
) -> Tensor:
    """scc_fast.ops.warp_views by Triton, with the arguments of its schema."""
    batch, _, height, width = x.shape
    tall, wide = (patch, patch) if patch else (size[0], size[1])
    across, pairs = size[1] // wide, len(matrix) * batch
    cells = size[0] // tall * across
    shape = (cells, 3 * patch * patch) if patch else (3, *size)
    out = x.new_empty((pairs, *shape), dtype=dtype)
    if out.numel() == 0:
        return out
    numel = out[0].numel()
    if max(numel, 3 * height * width) >= 2**31 - _BLOCK:
        raise ValueError(
            f"warp_views: x must have fewer than 2^31 elements an image, got {x.shape}"
        )
    around = fill or (0.0, 0.0, 0.0)
    with torch.cuda.device(x.get_device()):  # -1, a CPU tensor's, changes nothing
        _warp_kernel[(pairs * triton.cdiv(numel, _BLOCK),)](
            x.contiguous(), matrix.contiguous(), None if box is None else box.contiguous(),
            None if samples is None else samples.contiguous(), out, batch,
            *around, *mean, *std, HEIGHT=height, WIDTH=width, CELL_HEIGHT=tall, CELL_WIDTH=wide,
            ACROSS=across, CUBIC=cubic, FILLED=bool(fill), MOST=_MOST, NUMEL=numel,
            BLOCK=_BLOCK, **EXACT,
        )  # fmt: skip
    return out
