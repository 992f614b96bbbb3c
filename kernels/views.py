"""Views of a batch and their adjoint in Triton: twins of scc_fast.ops.views.

Views, σ and picture sizes are compile-time constants: index arithmetic is cheap, and a view
without noise, shift or flip pays nothing for them. x and δ are read from memory by the first
view of a block; the other views of the same block find them in the caches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from scc_fast.kernels.philox import box_muller, random_words

# Contracting a * b + c would round differently from the reference.
EXACT = {"num_warps": 4, "enable_fp_fusion": False}

_PURPOSE = tl.constexpr(2)  # VIEW_NOISE of scc_fast.reference.philox
_BLOCK = 1024  # elements per program: eight per thread, 16 bytes of a half type
_PIXEL_BLOCK = 512  # where float32 is written: four per thread


@triton.jit
def _normal_at(seed, view: tl.constexpr, element):
    """Normals of arbitrary elements, one Philox block per thread."""
    w0, w1, w2, w3 = random_words(seed, (element >> 2).to(tl.int64), view, _PURPOSE)
    second = (element & 2) != 0
    cosine, sine = box_muller(tl.where(second, w2, w0), tl.where(second, w3, w1))
    return tl.where((element & 1) != 0, sine, cosine)


@triton.jit
def _normal_run(seed, view: tl.constexpr, block):
    """Normals (4 N,) of whole Philox blocks (N,), in order."""
    w0, w1, w2, w3 = random_words(seed, block.to(tl.int64), view, _PURPOSE)
    x0, x1 = box_muller(w0, w1)
    x2, x3 = box_muller(w2, w3)
    return tl.interleave(tl.interleave(x0, x2), tl.interleave(x1, x3))


@triton.jit
def _place(e, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, PATCH: tl.constexpr):
    """Colour, row and column of a view's e-th element in memory."""
    if PATCH == 0:
        return e // (HEIGHT * WIDTH), (e // WIDTH) % HEIGHT, e % WIDTH
    else:
        patch = e // (3 * PATCH * PATCH)
        inner = e % (3 * PATCH * PATCH)
        row = patch // (WIDTH // PATCH) * PATCH + inner // PATCH % PATCH
        column = patch % (WIDTH // PATCH) * PATCH + inner % PATCH
        return inner // (PATCH * PATCH), row, column


@triton.jit
def by_colour(c, v0, v1, v2):
    return tl.where(c == 0, v0, tl.where(c == 1, v1, v2))


@triton.jit
def load_pixels(x_ptr, delta_ptr, offset, mask):
    """x + δ; δ may be None."""
    pixel = tl.load(x_ptr + offset, mask=mask, other=0.0)
    if delta_ptr is not None:
        pixel += tl.load(delta_ptr + offset, mask=mask, other=0.0)
    return pixel


@triton.jit
def _gather(
    x_ptr,
    delta_ptr,
    first,
    fill0,
    fill1,
    fill2,
    FLIP: tl.constexpr,
    DOWN: tl.constexpr,
    RIGHT: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PATCH: tl.constexpr,
    NUMEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Pixels (BLOCK,) of x + δ at a view's elements from `first`."""
    # A column, so that a warp loads 32 neighbours: a row Triton would load as it is stored, several
    # neighbours per thread, which without alignment takes as many times the cache lines.
    e = (first + tl.arange(0, BLOCK))[:, None]
    colour, row, column = _place(e, HEIGHT, WIDTH, PATCH)
    row = row - DOWN
    column = (WIDTH - 1 - column if FLIP else column) - RIGHT
    inside = (row >= 0) & (row < HEIGHT) & (column >= 0) & (column < WIDTH)
    offset = (colour * HEIGHT + row) * WIDTH + column
    pixel = load_pixels(x_ptr, delta_ptr, offset, inside & (e < NUMEL))
    return tl.reshape(tl.where(inside, pixel, by_colour(colour, fill0, fill1, fill2)), [BLOCK])


@triton.jit(do_not_specialize=["batch"])
def _views_kernel(
    x_ptr,  # (B, 3, H, W) float32
    delta_ptr,  # like x, or None
    seeds_ptr,  # (B,) int64
    out_ptr,  # (L, B, NUMEL), the views
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
    PLAN: tl.constexpr,  # L times flip, down, right
    NOISE: tl.constexpr,  # L times σ
    VIEWS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PATCH: tl.constexpr,
    NUMEL: tl.constexpr,  # elements of one view of one image
    BLOCK: tl.constexpr,
):
    TILES: tl.constexpr = (NUMEL + BLOCK - 1) // BLOCK
    image = (tl.program_id(0) // TILES).to(tl.int64)
    first = (tl.program_id(0) % TILES) * BLOCK
    e = first + tl.arange(0, BLOCK)
    live = e < NUMEL
    colour, row, column = _place(e, HEIGHT, WIDTH, PATCH)
    at = e if PATCH == 0 else (colour * HEIGHT + row) * WIDTH + column
    mean = by_colour(colour, mean0, mean1, mean2)
    std = by_colour(colour, std0, std1, std2)
    seed = tl.load(seeds_ptr + image)
    x_ptr += image * (3 * HEIGHT * WIDTH)
    if delta_ptr is not None:
        delta_ptr += image * (3 * HEIGHT * WIDTH)
    if PATCH % 4 == 0:
        plain = load_pixels(x_ptr, delta_ptr, at, live)
    else:
        plain = _gather(
            x_ptr, delta_ptr, first, fill0, fill1, fill2, 0, 0, 0,
            HEIGHT, WIDTH, PATCH, NUMEL, BLOCK,
        )  # fmt: skip

    for view in tl.static_range(VIEWS):
        pixel = plain
        if PLAN[3 * view] != 0 or PLAN[3 * view + 1] != 0 or PLAN[3 * view + 2] != 0:
            pixel = _gather(
                x_ptr, delta_ptr, first, fill0, fill1, fill2,
                PLAN[3 * view], PLAN[3 * view + 1], PLAN[3 * view + 2],
                HEIGHT, WIDTH, PATCH, NUMEL, BLOCK,
            )  # fmt: skip
        if NOISE[view] > 0:
            if PATCH == 0:
                normal = _normal_run(seed, view, first // 4 + tl.arange(0, BLOCK // 4))
            elif PATCH % 4 == 0 and WIDTH % 4 == 0:
                head = first + 4 * tl.arange(0, BLOCK // 4)
                c, i, j = _place(head, HEIGHT, WIDTH, PATCH)
                normal = _normal_run(seed, view, ((c * HEIGHT + i) * WIDTH + j) // 4)
            else:
                normal = _normal_at(seed, view, at)
            pixel = pixel + NOISE[view] * normal
            pixel = tl.where(pixel < 0.0, 0.0, tl.where(pixel > 1.0, 1.0, pixel))
        # Plain / is approximate.
        value = tl.div_rn(pixel - mean, std)
        out = out_ptr + (view * batch.to(tl.int64) + image) * NUMEL + e
        tl.store(out, value.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def sum_over_views(
    gradient_ptr,  # (L, B, view's elements), ∂/∂views
    seed,  # of the image
    pixel,  # x + δ at e; read where there is noise
    e,  # elements of a picture, BLOCK from `first` on
    first,
    image,  # int64
    batch,
    PLAN: tl.constexpr,
    NOISE: tl.constexpr,
    VIEWS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Σ_l of the gradients with respect to picture elements e, in the order of the views."""
    TALL: tl.constexpr = HEIGHT if PATCH == 0 else HEIGHT // PATCH * PATCH
    WIDE: tl.constexpr = WIDTH if PATCH == 0 else WIDTH // PATCH * PATCH
    live = e < 3 * HEIGHT * WIDTH
    colour, row, column = _place(e, HEIGHT, WIDTH, 0)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for view in tl.static_range(VIEWS):
        # The element of the view that shows element e of the picture.
        i = row + PLAN[3 * view + 1]
        shifted = column + PLAN[3 * view + 2]
        j = WIDTH - 1 - shifted if PLAN[3 * view] else shifted
        seen = live & (i >= 0) & (i < TALL) & (j >= 0) & (j < WIDE)
        if PATCH == 0:
            offset = (colour * HEIGHT + i) * WIDTH + j
        else:
            patch = i // PATCH * (WIDTH // PATCH) + j // PATCH
            offset = ((patch * 3 + colour) * PATCH + i % PATCH) * PATCH + j % PATCH
        start = (view * batch.to(tl.int64) + image) * (3 * TALL * WIDE)
        part = tl.load(gradient_ptr + start + offset, mask=seen, other=0.0).to(tl.float32)
        if NOISE[view] > 0:
            if PLAN[3 * view] == 0 and PLAN[3 * view + 1] == 0 and PLAN[3 * view + 2] == 0:
                normal = _normal_run(seed, view, first // 4 + tl.arange(0, BLOCK // 4))
            else:
                normal = _normal_at(seed, view, (colour * HEIGHT + i) * WIDTH + j)
            noisy = pixel + NOISE[view] * normal
            part = tl.where((noisy >= 0.0) & (noisy <= 1.0), part, 0.0)
        total = total + part
    return total


@triton.jit(do_not_specialize=["batch"])
def _adjoint_kernel(
    gradient_ptr,  # (L, B, view's elements), ∂/∂views
    x_ptr,  # (B, 3, H, W) float32
    delta_ptr,  # like x, or None
    seeds_ptr,  # (B,) int64
    out_ptr,  # like x, ∂/∂x
    batch,
    std0,
    std1,
    std2,
    PLAN: tl.constexpr,
    NOISE: tl.constexpr,
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
    if delta_ptr is not None:
        delta_ptr += image * NUMEL
    pixel = load_pixels(x_ptr + image * NUMEL, delta_ptr, e, live)  # unused without noise
    seed = tl.load(seeds_ptr + image)
    total = sum_over_views(
        gradient_ptr, seed, pixel, e, first, image, batch,
        PLAN, NOISE, VIEWS, HEIGHT, WIDTH, PATCH, BLOCK,
    )  # fmt: skip
    std = by_colour(e // (HEIGHT * WIDTH), std0, std1, std2)
    tl.store(out_ptr + image * NUMEL + e, tl.div_rn(total, std), mask=live)


def geometry(
    op: str, x: Tensor, plan: Sequence[int], noise: Sequence[float], patch: int
) -> dict[str, object]:
    """Compile-time constants of the kernels of this file and of the step."""
    height, width = x.shape[-2:]
    if 3 * height * width >= 2**31 - _BLOCK:
        raise ValueError(f"{op}: x must have fewer than 2^31 elements an image, got {x.shape}")
    # A shift past the picture shows as much of it as a shift by its size: nothing.
    size = (1, height, width)
    return {
        "PLAN": tuple(max(-size[k % 3], min(size[k % 3], int(n))) for k, n in enumerate(plan)),
        "NOISE": tuple(float(sigma) for sigma in noise),
        "VIEWS": len(noise),
        "HEIGHT": height,
        "WIDTH": width,
        "PATCH": patch,
    }


def pixel_tiles(x: Tensor) -> tuple[int, int]:
    """Programs per image and elements per program, for kernels over pixels."""
    return triton.cdiv(x[0].numel(), _PIXEL_BLOCK), _PIXEL_BLOCK


def make_views(
    x: Tensor,
    delta: Tensor | None,
    seeds: Tensor,
    plan: Sequence[int],
    noise: Sequence[float],
    fill: Sequence[float],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    patch: int,
) -> Tensor:
    """scc_fast.ops.make_views by Triton, with the arguments of its schema."""
    sizes = geometry("make_views", x, plan, noise, patch)
    batch, colours, height, width = x.shape
    shape: tuple[int, ...] = (colours, height, width)
    if patch:
        shape = ((height // patch) * (width // patch), colours * patch * patch)
    out = x.new_empty((len(noise) * batch, *shape), dtype=dtype)
    if out.numel() == 0:
        return out
    numel = out[0].numel()
    # Noise that is not drawn in runs takes four times the registers.
    runs = patch == 0 or (patch % 4 == 0 and width % 4 == 0)
    block = _BLOCK if runs or not any(noise) else _BLOCK // 2
    delta = None if delta is None else delta.contiguous()
    with torch.cuda.device(x.get_device()):  # -1, a CPU tensor's, changes nothing
        _views_kernel[(batch * triton.cdiv(numel, block),)](
            x.contiguous(), delta, seeds.contiguous(), out, batch, *fill, *mean, *std,
            **sizes, NUMEL=numel, BLOCK=block, **EXACT,
        )  # fmt: skip
    return out


def make_views_adjoint(
    gradient: Tensor,
    x: Tensor,
    delta: Tensor | None,
    seeds: Tensor,
    plan: Sequence[int],
    noise: Sequence[float],
    std: Sequence[float],
    patch: int,
) -> Tensor:
    """scc_fast.ops.make_views_adjoint by Triton, with the arguments of its schema."""
    sizes = geometry("make_views_adjoint", x, plan, noise, patch)
    out = x.new_empty(x.shape)
    if out.numel() == 0:
        return out
    tiles, block = pixel_tiles(x)
    delta = None if delta is None else delta.contiguous()
    with torch.cuda.device(x.get_device()):
        _adjoint_kernel[(len(x) * tiles,)](
            gradient.contiguous(), x.contiguous(), delta, seeds.contiguous(), out, len(x), *std,
            **sizes, BLOCK=block, **EXACT,
        )  # fmt: skip
    return out
