"""Projected sign step in Triton: twin of scc_fast.ops.step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from scc_fast.kernels.views import EXACT, geometry, pixel_tiles, sum_over_views


@triton.jit
def _clamp(value, low, high):
    # NaN stays, as in torch.clamp.
    return tl.where(value < low, low, tl.where(value > high, high, value))


@triton.jit(do_not_specialize=["batch"])
def _pgd_step_kernel(
    delta_ptr,  # (B, 3, H, W) float32, δ, overwritten
    weighted_ptr,  # like delta, Σ_t w_t δᵗ, overwritten; or None
    gradient_ptr,  # (L, B, view's elements), ∂/∂views
    x_ptr,  # like delta
    seeds_ptr,  # (B,) int64
    batch,
    alpha,
    epsilon,
    weight,
    PLAN: tl.constexpr,  # L times flip, down, right
    NOISE: tl.constexpr,  # L times σ
    VIEWS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    NUMEL: tl.constexpr = 3 * HEIGHT * WIDTH
    TILES: tl.constexpr = (NUMEL + BLOCK - 1) // BLOCK
    image = (tl.program_id(0) // TILES).to(tl.int64)
    first = (tl.program_id(0) % TILES) * BLOCK
    e = first + tl.arange(0, BLOCK)
    live = e < NUMEL
    x = tl.load(x_ptr + image * NUMEL + e, mask=live, other=0.0)
    delta = tl.load(delta_ptr + image * NUMEL + e, mask=live, other=0.0)
    seed = tl.load(seeds_ptr + image)
    total = sum_over_views(
        gradient_ptr, seed, x + delta, e, first, image, batch,
        PLAN, NOISE, VIEWS, HEIGHT, WIDTH, PATCH, BLOCK,
    )  # fmt: skip
    sign = (total > 0.0).to(tl.float32) - (total < 0.0).to(tl.float32)
    delta = _clamp(delta + alpha * sign, -epsilon, epsilon)
    delta = _clamp(x + delta, 0.0, 1.0) - x
    tl.store(delta_ptr + image * NUMEL + e, delta, mask=live)
    if weighted_ptr is not None:
        so_far = tl.load(weighted_ptr + image * NUMEL + e, mask=live, other=0.0)
        tl.store(weighted_ptr + image * NUMEL + e, so_far + weight * delta, mask=live)


def pgd_step_(
    delta: Tensor,
    weighted: Tensor | None,
    gradient: Tensor,
    x: Tensor,
    seeds: Tensor,
    plan: Sequence[int],
    noise: Sequence[float],
    alpha: float,
    epsilon: float,
    weight: float,
    patch: int,
) -> None:
    """scc_fast.ops.pgd_step_ by Triton, with the arguments of its schema."""
    sizes = geometry("pgd_step_", x, plan, noise, patch)
    if delta.numel() == 0:
        return
    tiles, block = pixel_tiles(delta)
    with torch.cuda.device(delta.get_device()):  # -1, a CPU tensor's, changes nothing
        _pgd_step_kernel[(len(delta) * tiles,)](
            delta, weighted, gradient.contiguous(), x.contiguous(), seeds.contiguous(),
            len(delta), alpha, epsilon, weight, **sizes, BLOCK=block, **EXACT,
        )  # fmt: skip
