"""Counter-based random numbers, one stream per image (METHOD.md, "Random numbers").

Philox 4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), keyed by
a 64-bit seed and addressed by (purpose, view, element). Element e is word e % 4 of block e // 4,
and block b of (purpose, view) has the counter (b mod 2^32, b div 2^32, view, purpose).
"""

from __future__ import annotations

import math
import secrets

import torch
from torch import Tensor

# Purposes: separate streams.
SEEDS, DELTA, VIEW_NOISE, ATTACK_START, EOT, DATA = range(6)

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox4x32_10(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Ten rounds on four 32-bit counter words and two key words, all held in int64 tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap modulo 2^64, so both halves are exact once masked.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, low0 = (p0 >> 32) & _MASK, p0 & _MASK
        high1, low1 = (p1 >> 32) & _MASK, p1 & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def words(seeds: Tensor, purpose: int, view: int, blocks: int) -> Tensor:
    """Raw 32-bit words of `blocks` blocks: (B, blocks, 4) int64, for seeds (B,) int64."""
    block = torch.arange(blocks, device=seeds.device).expand(len(seeds), blocks)
    seed = seeds[:, None].expand_as(block)
    counter = (
        block & _MASK,
        block >> 32,
        torch.full_like(block, view),
        torch.full_like(block, purpose),
    )
    return torch.stack(philox4x32_10(counter, (seed & _MASK, (seed >> 32) & _MASK)), dim=-1)


def uniform(seeds: Tensor, purpose: int, view: int, numel: int) -> Tensor:
    """`numel` uniforms in [0, 1) per seed, exact multiples of 2^-24: (B, numel) float32."""
    bits = words(seeds, purpose, view, -(-numel // 4)) >> 8
    return bits.flatten(1)[:, :numel].float() * 2.0**-24


def normal(seeds: Tensor, purpose: int, view: int, numel: int) -> Tensor:
    """`numel` standard normals per seed by Box-Muller on word pairs: (B, numel) float32.

    Computed in float64 and rounded once.
    """
    bits = (words(seeds, purpose, view, -(-numel // 4)) >> 8).double()
    radius = torch.sqrt(-2.0 * torch.log((bits[..., 0::2] + 1.0) * 2.0**-24))
    angle = bits[..., 1::2] * (2.0**-24 * 2.0 * math.pi)
    pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return pairs.flatten(1)[:, :numel].float()


def image_seeds(
    seeds: int | Tensor | None, batch: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Seeds (B,) int64: drawn from the OS (None), hashed from (int, i), or as given.

    The hash is Philox: neighbouring ints give unrelated streams.
    """
    if isinstance(seeds, Tensor):
        return seeds.to(device=device, dtype=torch.int64)
    if seeds is None:
        seeds = secrets.randbits(64)
    key = torch.tensor([seeds & _MASK, (seeds >> 32) & _MASK], device=device)
    index = torch.arange(batch, device=device)
    zero = torch.zeros_like(index)
    low, high, _, _ = philox4x32_10(
        (index, zero, zero, zero + SEEDS), (key[0].expand_as(index), key[1].expand_as(index))
    )
    return low | (high << 32)


def uniform_like(x: Tensor, seeds: Tensor, purpose: int, view: int = 0) -> Tensor:
    """uniform() in the shape of a batch x (B, ...)."""
    return uniform(seeds, purpose, view, x[0].numel()).view_as(x) if len(x) else x.clone()


def derive(seeds: Tensor, purpose: int, view: int) -> Tensor:
    """New seeds (B,) int64 derived from seeds (B,)."""
    bits = words(seeds, purpose, view, 1)[:, 0]
    return bits[:, 0] | (bits[:, 1] << 32)
