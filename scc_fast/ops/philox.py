"""Random numbers from per-image seeds (METHOD.md, "Random numbers").

Stateless: a number depends on (seed, purpose, view, element) alone, and is equal on every device
and backend, in any batch, and in a CUDA graph.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from scc_fast.config import shown
from scc_fast.ops import define
from scc_fast.reference import philox as reference


def philox_uniform(
    seeds: Tensor, purpose: int, view: int, numel: int, *, backend: str | None = None
) -> Tensor:
    """Uniform numbers in [0, 1), one stream per image, bit-equal on every backend.

    u = (w >> 8) · 2^-24, with w word e mod 4 of the Philox 4x32-10 block e div 4 for element e.

    Args:
        seeds: (B,) int64, any values; one per image.
        purpose: stream of a use, in [0, 2^32).
        view: stream of a view, in [0, 2^32).
        numel: numbers per image, >= 0.
        backend: "reference", "cpp", "triton"; None: the device's best.

    Returns:
        (B, numel) float32 on the device of seeds.

    Raises:
        TypeError: seeds is not an int64 tensor, or purpose, view or numel not an int.
        ValueError: seeds is not (B,), an int is out of range, or the backend is unknown.
        RuntimeError: the requested backend is not available.

    Example:
        >>> philox_uniform(torch.tensor([0, 1]), purpose=0, view=0, numel=3).shape
        torch.Size([2, 3])
    """
    _check("philox_uniform", seeds, purpose, view, numel)
    return _uniform(seeds.device, backend, seeds, purpose, view, numel)


def philox_normal(
    seeds: Tensor, purpose: int, view: int, numel: int, *, backend: str | None = None
) -> Tensor:
    """Standard normal numbers, one stream per image, within 4 ulp on every backend.

    Box-Muller on words (w0, w1) and (w2, w3) of each Philox block: sqrt(-2 ln u) times the cosine
    (even element) and the sine (odd element) of 2π·a, with u = ((w0 >> 8) + 1) · 2^-24 in (0, 1]
    and a = (w1 >> 8) · 2^-24.

    Args, Returns, Raises: as philox_uniform.

    Example:
        >>> philox_normal(torch.tensor([0, 1]), purpose=0, view=0, numel=3).dtype
        torch.float32
    """
    _check("philox_normal", seeds, purpose, view, numel)
    return _normal(seeds.device, backend, seeds, purpose, view, numel)


def _check(op: str, seeds: Tensor, purpose: int, view: int, numel: int) -> None:
    if not isinstance(seeds, Tensor):
        raise TypeError(f"{op}: seeds must be an int64 tensor, got {type(seeds).__name__}")
    if seeds.dtype != torch.int64:
        raise TypeError(f"{op}: seeds must be int64, got {seeds.dtype}")
    if seeds.dim() != 1:
        raise ValueError(f"{op}: seeds must be (B,), got shape {tuple(seeds.shape)}")
    for name, value in (("purpose", purpose), ("view", view), ("numel", numel)):
        if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
            raise TypeError(f"{op}: {name} must be an int, got {shown(value)}")
        if value < 0:
            raise ValueError(f"{op}: {name} must be >= 0, got {value}")
    for name, value in (("purpose", purpose), ("view", view)):
        if value >= 2**32:
            raise ValueError(f"{op}: {name} must be below 2^32, got {value}")


def _fake(seeds: Tensor, purpose: int, view: int, numel: int) -> Tensor:
    return seeds.new_empty((seeds.shape[0], numel), dtype=torch.float32)


def _triton() -> ModuleType:
    from scc_fast.kernels import philox

    return philox


_uniform = define(
    "philox_uniform(Tensor seeds, int purpose, int view, SymInt numel) -> Tensor",
    reference=reference.uniform,
    fake=_fake,
    triton=_triton,
)
_normal = define(
    "philox_normal(Tensor seeds, int purpose, int view, SymInt numel) -> Tensor",
    reference=reference.normal,
    fake=_fake,
    triton=_triton,
)
