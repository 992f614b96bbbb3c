"""Random numbers in Triton: twins of scc_fast.ops.philox."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 512  # Philox blocks of four numbers per program


@triton.jit
def random_words(seed, block, view, purpose):
    """Four uint32 words of each block (int64), for an int64 seed."""
    # Widened before they are cut: a view or purpose may come as constant, int32 or int64.
    zero = block * 0
    # tl.philox takes the key as (seed low, seed high) and runs Salmon's ten rounds: our contract.
    return tl.philox(
        seed,
        block.to(tl.uint32),
        (block >> 32).to(tl.uint32),
        (zero + view).to(tl.uint32),
        (zero + purpose).to(tl.uint32),
    )


@triton.jit
def uniform01(word):
    """Uniform in [0, 1), an exact multiple of 2^-24."""
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def box_muller(radius_word, angle_word):
    """Two standard normals within 4 ulp; explained in csrc/pixel_math.h, box_muller."""
    u = ((radius_word >> 8) + 1).to(tl.float32) * 5.9604644775390625e-08
    radius = tl.sqrt_rn(-2.0 * tl.log(u))
    angle = (angle_word >> 8).to(tl.int32)
    quadrant = (angle + 2097152) >> 22
    t = (angle - (quadrant << 22)).to(tl.float32) * 2.384185791015625e-07
    z = t * t
    small = -4.371139e-08 + z * (
        -0.645964086 + z * (0.0796925873 + z * (-0.00468129246 + z * 0.000158251481))
    )
    s = t * 1.57079637 + t * small
    c = 1.0 + z * (-1.23370051 + z * (0.253669232 + z * (-0.0208601654 + z * 0.000903766486)))
    odd = (quadrant & 1) == 1
    cosine = tl.where(odd, s, c)
    sine = tl.where(odd, c, s)
    cosine = tl.where(((quadrant + 1) & 2) == 2, -cosine, cosine)
    sine = tl.where((quadrant & 2) == 2, -sine, sine)
    return radius * cosine, radius * sine


@triton.jit(do_not_specialize=["purpose", "view"])
def _philox_kernel(
    seeds_ptr,  # (B,) int64
    seeds_stride,
    out_ptr,  # (B, numel) float32
    numel,
    purpose,
    view,
    tiles,  # programs per image
    NORMAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    image = program // tiles
    block = (program % tiles) * BLOCK + tl.arange(0, BLOCK)
    w0, w1, w2, w3 = random_words(tl.load(seeds_ptr + image * seeds_stride), block, view, purpose)
    if NORMAL:
        x0, x1 = box_muller(w0, w1)
        x2, x3 = box_muller(w2, w3)
    else:
        x0, x1, x2, x3 = uniform01(w0), uniform01(w1), uniform01(w2), uniform01(w3)
    # A thread then holds its four neighbours in order and stores 16 bytes at once.
    values = tl.interleave(tl.interleave(x0, x2), tl.interleave(x1, x3))
    element = (program % tiles) * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    tl.store(out_ptr + image * numel + element, values, mask=element < numel)


def philox_uniform(seeds: Tensor, purpose: int, view: int, numel: int) -> Tensor:
    """scc_fast.ops.philox_uniform by Triton: (B,) int64 -> (B, numel) float32."""
    return _generate(seeds, purpose, view, numel, normal=False)


def philox_normal(seeds: Tensor, purpose: int, view: int, numel: int) -> Tensor:
    """scc_fast.ops.philox_normal by Triton: (B,) int64 -> (B, numel) float32."""
    return _generate(seeds, purpose, view, numel, normal=True)


def _generate(seeds: Tensor, purpose: int, view: int, numel: int, *, normal: bool) -> Tensor:
    out = seeds.new_empty((seeds.shape[0], numel), dtype=torch.float32)
    if out.numel() == 0:
        return out
    tiles = triton.cdiv(numel, 4 * _BLOCK)
    with torch.cuda.device(seeds.get_device()):  # -1, a CPU tensor's, changes nothing
        _philox_kernel[(seeds.shape[0] * tiles,)](
            seeds, seeds.stride(0), out, numel, purpose, view, tiles, NORMAL=normal, BLOCK=_BLOCK
        )
    return out
