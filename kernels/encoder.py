"""Norm and GELU of a vision transformer in Triton: twins of scc_fast.ops.encoder.

A norm is one program per row; up to _WIDEST numbers the row stays in registers. A GELU is
one program per piece of a row, or of the whole tensor without a bias.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from scc_fast.kernels._tiles import load_row

_WIDEST = 8192  # of a row held at once: sixteen numbers a thread
_PIECE = 1024


@triton.jit
def _stream(x_ptr, y_ptr, d, width):
    total = load_row(x_ptr, d, width)
    if y_ptr is not None:
        total += load_row(y_ptr, d, width)
    return total


# A norm stores nothing before its last loop: the compiler then sees that a tile loaded for the
# second time is unchanged, and does not load it where TILES is 1. Where it is more, the loops are
# not unrolled, as two tiles at once need more registers than there are.


@triton.jit
def _add_norm_kernel(
    x_ptr,  # (rows, W) float32
    y_ptr,  # (rows, W) of any format, or None
    weight_ptr,  # (W,) float32
    bias_ptr,  # (W,) float32
    total_ptr,  # (rows, W) float32, x + y; not written without y
    normed_ptr,  # (rows, W), (total − mean) · scale · weight + bias
    mean_ptr,  # (rows,) float32
    scale_ptr,  # (rows,) float32, 1/√(variance + ε)
    epsilon,
    width,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * width
    if y_ptr is not None:
        y_ptr += row * width
    count = tl.cast(width, tl.float32)
    parts = tl.zeros([BLOCK], dtype=tl.float32)
    for tile in range(TILES):
        parts += _stream(x_ptr, y_ptr, tile * BLOCK + tl.arange(0, BLOCK), width)
    guess = tl.div_rn(tl.sum(parts, axis=0), count)
    # The sum's rounding is taken off the mean, so that a great offset costs no accuracy.
    parts = tl.zeros([BLOCK], dtype=tl.float32)
    for tile in range(TILES):
        d = tile * BLOCK + tl.arange(0, BLOCK)
        parts += tl.where(d < width, _stream(x_ptr, y_ptr, d, width) - guess, 0.0)
    mean = guess + tl.div_rn(tl.sum(parts, axis=0), count)
    parts = tl.zeros([BLOCK], dtype=tl.float32)
    for tile in range(TILES):
        d = tile * BLOCK + tl.arange(0, BLOCK)
        off = tl.where(d < width, _stream(x_ptr, y_ptr, d, width) - mean, 0.0)
        parts += off * off
    variance = tl.div_rn(tl.sum(parts, axis=0), count)
    scale = tl.div_rn(1.0, tl.sqrt_rn(variance + epsilon))
    for tile in range(TILES):
        d = tile * BLOCK + tl.arange(0, BLOCK)
        total = _stream(x_ptr, y_ptr, d, width)
        normed = (total - mean) * scale * load_row(weight_ptr, d, width)
        normed += load_row(bias_ptr, d, width)
        if y_ptr is not None:
            tl.store(total_ptr + row * width + d, total, mask=d < width)
        out = normed.to(normed_ptr.dtype.element_ty)
        tl.store(normed_ptr + row * width + d, out, mask=d < width)
    tl.store(mean_ptr + row, mean)
    tl.store(scale_ptr + row, scale)


@triton.jit
def _add_norm_back_kernel(
    gradient_ptr,  # (rows, W), ∂J/∂normed
    total_ptr,  # (rows, W) float32
    mean_ptr,  # (rows,) float32
    scale_ptr,  # (rows,) float32
    weight_ptr,  # (W,) float32
    residual_ptr,  # (rows, W) float32, ∂J/∂total past the norm; or None
    whole_ptr,  # (rows, W) float32, ∂J/∂total
    low_ptr,  # (rows, W), the same; or None
    width,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    gradient_ptr += row * width
    total_ptr += row * width
    mean, scale = tl.load(mean_ptr + row), tl.load(scale_ptr + row)
    count = tl.cast(width, tl.float32)
    plain = tl.zeros([BLOCK], dtype=tl.float32)
    along = tl.zeros([BLOCK], dtype=tl.float32)
    for tile in range(TILES):
        d = tile * BLOCK + tl.arange(0, BLOCK)
        g = load_row(gradient_ptr, d, width) * load_row(weight_ptr, d, width)
        plain += g
        along += g * (load_row(total_ptr, d, width) - mean)  # g is 0 outside
    level = tl.div_rn(tl.sum(plain, axis=0), count)
    slope = tl.div_rn(tl.sum(along, axis=0) * scale, count)
    for tile in range(TILES):
        d = tile * BLOCK + tl.arange(0, BLOCK)
        g = load_row(gradient_ptr, d, width) * load_row(weight_ptr, d, width)
        unit = (load_row(total_ptr, d, width) - mean) * scale
        whole = scale * (g - level - unit * slope)
        if residual_ptr is not None:
            whole += load_row(residual_ptr + row * width, d, width)
        tl.store(whole_ptr + row * width + d, whole, mask=d < width)
        if low_ptr is not None:
            low = whole.to(low_ptr.dtype.element_ty)
            tl.store(low_ptr + row * width + d, low, mask=d < width)


@triton.jit
def _share(z, KIND: tl.constexpr):
    """GELU's factor of z, and its derivative; as in csrc/pixel_math.h."""
    if KIND == "erf":
        a = tl.abs(z)
        e = tl.exp2(-0.7213475108146667 * (a * a))
        t = tl.div_rn(1.0, 1.0 + 0.29750001430511475 * a)
        p = 0.037865474820137024 * t - 0.1709766685962677
        p = p * t + 0.23807796835899353
        p = p * t - 0.08248567581176758
        p = p * t + 0.14399702847003937
        p = p * t + 0.09440598636865616
        p = p * t + 0.12053654342889786
        p = p * t + 0.11857935041189194
        tail = e * (t * p)
        return tl.where(z < 0.0, tail, 1.0 - tail), 0.3989422804014327 * e
    else:
        # u is the logit times log2(e).
        if KIND == "quick":
            u = 2.455466985702514 * z
            slope = 1.702
        else:
            # The square is held where the sigmoid has long been 0 or 1. NaN stays.
            square = z * z
            square = tl.where(square > 1e4, 1e4, square)
            u = z * (2.302208185195923 + 0.10294324159622192 * square)
            slope = 1.5957691669464111 + 0.21406444907188416 * square
        e = tl.exp2(-tl.abs(u))
        r = tl.div_rn(1.0, 1.0 + e)
        return tl.where(u < 0.0, e * r, r), slope * (e * r * r)


@triton.jit
def _place(width, tiles, BLOCK: tl.constexpr):
    """Start of a program's row, and its elements of the row, in int64."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    first = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK
    return row * width, first + tl.arange(0, BLOCK)


@triton.jit
def _load_biased(x_ptr, bias_ptr, start, d, width):
    z = load_row(x_ptr + start, d, width)
    if bias_ptr is not None:
        z += load_row(bias_ptr, d, width)
    return z


@triton.jit
def _gelu_kernel(
    x_ptr,  # (rows, W)
    bias_ptr,  # (W,), or None
    out_ptr,  # (rows, W)
    width,
    tiles,  # pieces of a row
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start, d = _place(width, tiles, BLOCK)
    z = _load_biased(x_ptr, bias_ptr, start, d, width)
    share, _ = _share(z, KIND)
    tl.store(out_ptr + start + d, (z * share).to(out_ptr.dtype.element_ty), mask=d < width)


@triton.jit
def _gelu_back_kernel(
    gradient_ptr,  # (rows, W), ∂J/∂gelu
    x_ptr,  # (rows, W)
    bias_ptr,  # (W,), or None
    out_ptr,  # (rows, W), ∂J/∂x
    width,
    tiles,  # pieces of a row
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start, d = _place(width, tiles, BLOCK)
    z = _load_biased(x_ptr, bias_ptr, start, d, width)
    share, derivative = _share(z, KIND)
    out = load_row(gradient_ptr + start, d, width) * (share + z * derivative)
    tl.store(out_ptr + start + d, out.to(out_ptr.dtype.element_ty), mask=d < width)


def _row_tiles(width: int) -> dict[str, object]:
    block = min(triton.next_power_of_2(width), _WIDEST)
    return {"TILES": triton.cdiv(width, block), "BLOCK": block, **_options(block)}


def _options(block: int) -> dict[str, object]:
    # Fused or not: one answer everywhere.
    return {"num_warps": min(16, max(1, block // 256)), "enable_fp_fusion": False}


def _plain(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().contiguous()


def add_norm(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scc_fast.ops.add_norm by Triton, with the arguments of its schema."""
    width = x.shape[-1]
    total = x.new_empty(0) if y is None else x.new_empty(x.shape)
    normed = x.new_empty(x.shape, dtype=dtype)
    mean, scale = x.new_empty(x.shape[:-1]), x.new_empty(x.shape[:-1])
    if x.numel() == 0:
        return total, normed, mean, scale
    with torch.cuda.device(x.get_device()):  # -1, a CPU tensor's, changes nothing
        _add_norm_kernel[(mean.numel(),)](
            _plain(x), _plain(y), _plain(weight), _plain(bias),
            total, normed, mean, scale, epsilon, width, **_row_tiles(width),
        )  # fmt: skip
    return total, normed, mean, scale


def add_norm_back(
    gradient: Tensor,
    total: Tensor,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """scc_fast.ops.add_norm_back by Triton, with the arguments of its schema."""
    width, wide = total.shape[-1], dtype == torch.float32
    whole = total.new_empty(total.shape)
    low = total.new_empty((0,) if wide else total.shape, dtype=dtype)
    if total.numel() == 0:
        return whole, low
    with torch.cuda.device(total.get_device()):
        _add_norm_back_kernel[(mean.numel(),)](
            _plain(gradient), _plain(total), _plain(mean), _plain(scale), _plain(weight),
            _plain(residual), whole, None if wide else low, width, **_row_tiles(width),
        )  # fmt: skip
    return whole, low


def _pieces(x: Tensor, bias: Tensor | None) -> tuple[int, int, int]:
    """Number of programs, width of a row, pieces per row; one row without a bias."""
    width = x.numel() if bias is None else x.shape[-1]
    tiles = triton.cdiv(width, _PIECE)
    return x.numel() // width * tiles, width, tiles


def gelu(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """scc_fast.ops.gelu by Triton, with the arguments of its schema."""
    out = x.new_empty(x.shape)
    if x.numel() == 0:
        return out
    programs, width, tiles = _pieces(x, bias)
    with torch.cuda.device(x.get_device()):
        _gelu_kernel[(programs,)](
            _plain(x), _plain(bias), out, width, tiles,
            KIND=kind, BLOCK=_PIECE, **_options(_PIECE),
        )  # fmt: skip
    return out


def gelu_back(gradient: Tensor, x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """scc_fast.ops.gelu_back by Triton, with the arguments of its schema."""
    out = x.new_empty(x.shape)
    if x.numel() == 0:
        return out
    programs, width, tiles = _pieces(x, bias)
    with torch.cuda.device(x.get_device()):
        _gelu_back_kernel[(programs,)](
            _plain(gradient), _plain(x), _plain(bias), out, width, tiles,
            KIND=kind, BLOCK=_PIECE, **_options(_PIECE),
        )  # fmt: skip
    return out
