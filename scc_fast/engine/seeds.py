"""Seeds of a call: one 64-bit number per image."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scc_fast.config import python_number, shown, whole
from scc_fast.images import check_dense
from scc_fast.reference import philox

Seeds = int | Sequence[int] | np.ndarray | Tensor | None


def image_seeds(seeds: Seeds, batch: int, device: torch.device | str = "cpu") -> Tensor:
    """Seeds (B,) int64 of a call.

    Args:
        seeds: None: fresh; a whole number: image i has (seed, i); B whole numbers (tensor, array
            or sequence): used modulo 2^64.
        batch: B.
        device: of the result.

    Raises:
        TypeError, ValueError: not whole numbers, beyond 64 bits, or not one per image.
    """
    batch = whole("batch", batch, 0)
    if seeds is None or (isinstance(seeds, Integral) and not isinstance(seeds, bool)):
        seed = None if seeds is None else int(seeds)
        if seed is not None and not -(1 << 63) <= seed < 1 << 64:
            raise ValueError(f"seeds must fit into 64 bits, got {shown(seeds)}")
        # On the host, then one copy: the hash is 165 launches on a GPU.
        return _host_seeds(seed, batch).to(device, copy=True)
    keys = _given_seeds(seeds)
    if keys.shape != (batch,):
        raise ValueError(
            f"seeds must be one whole number or {batch}, one per image, got {shown(seeds)}"
            + ("" if isinstance(seeds, Tensor | np.ndarray) else f", which holds {len(keys)}")
        )
    return philox.image_seeds(keys, batch, device)


def _given_seeds(seeds: Any) -> Tensor:
    """int64 tensor of whole numbers in any container."""
    wrong = f"seeds must be None, a whole number or one for each image, got {shown(seeds)}"
    if isinstance(seeds, Tensor):
        check_dense("seeds", seeds)
        if seeds.is_floating_point() or seeds.is_complex() or seeds.dtype == torch.bool:
            raise TypeError(wrong)
        return seeds.to(torch.int64)
    if isinstance(seeds, list | tuple | range):
        numbers = [python_number(seed) for seed in seeds]
        if not all(type(number) is int for number in numbers):
            raise TypeError(wrong)
        if not all(-(1 << 63) <= number < 1 << 64 for number in numbers):
            raise ValueError(f"seeds must fit into 64 bits, got {shown(seeds)}")
        half = 1 << 63
        signed = [(n + half) % (2 * half) - half for n in numbers]
        return torch.tensor(signed, dtype=torch.int64, device="cpu")
    array = np.asarray(seeds) if hasattr(seeds, "__array__") else np.empty(0, object)
    if array.dtype.kind not in "iu":
        raise TypeError(wrong)
    return torch.from_numpy(array.astype(np.int64))


def _host_seeds(seeds: int | None, batch: int) -> Tensor:
    if not batch:  # frombuffer() needs a byte
        return torch.empty(0, dtype=torch.int64, device="cpu")
    if seeds is None:
        return torch.frombuffer(bytearray(secrets.token_bytes(8 * batch)), dtype=torch.int64)
    return _hashed(seeds, batch)


@functools.lru_cache(maxsize=32)
def _hashed(seeds: int, batch: int) -> Tensor:
    # Kept beyond the call, so of no mode or functorch level that it was first made in.
    with torch.inference_mode(False), torch._C._DisableFuncTorch():
        return philox.image_seeds(seeds, batch)
