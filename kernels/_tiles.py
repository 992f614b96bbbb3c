"""Functions on tiles of rows, shared by the heads."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_row(ptr, d, width):
    return tl.load(ptr + d, mask=d < width, other=0.0).to(tl.float32)


@triton.jit
def load_tile(ptr, stride, v, k, views, width):
    """(LP, N) float32 of L rows `stride` (int64) apart; 0 outside."""
    mask = (v < views)[:, None] & (k < width)[None, :]
    return tl.load(ptr + v[:, None] * stride + k[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def norms(ptr, stride, v, views, width, LP: tl.constexpr, BLOCK: tl.constexpr):
    """(LP,) lengths of the L features of an image."""
    squares = tl.zeros([LP, BLOCK], dtype=tl.float32)
    for start in range(0, width, BLOCK):
        f = load_tile(ptr, stride, v, start + tl.arange(0, BLOCK), views, width)
        squares += f * f
    return tl.sqrt_rn(tl.sum(squares, axis=1))


@triton.jit
def first_maximiser(best, index):
    """Smallest index of the largest value, over the last axis."""
    axis: tl.constexpr = len(best.shape) - 1
    top = tl.max(best, axis=axis)
    is_top = best == (top[:, None] if axis == 1 else top)
    return top, tl.min(tl.where(is_top, index, 2147483647), axis=axis)


@triton.jit
def exp_sum(top, total, value, weight):
    """Online softmax per lane: largest value, and Σ weight · exp(value − top)."""
    new = tl.maximum(top, value)
    base = tl.where(new == float("-inf"), 0.0, new)  # −inf less −inf is NaN
    return new, total * tl.exp(top - base) + weight * tl.exp(value - base)
