"""Attention of short sequences, forward and backward, without quadratic memory.

All arithmetic is float32. Backward is an op; no op builds an autograd graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scc_fast.ops import define

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ / √d) v per image and head.

    Args:
        q: (B, H, Tq, d), d >= 1, float32, float16 or bfloat16. Any strides; a
            non-contiguous last dimension costs a copy.
        k, v: (B, H, Tk, d), in the dtype of q.
        backend: "reference", "cpp"; None: the device's best.

    Returns:
        o: (B, H, Tq, d) in the dtype of q; o.transpose(1, 2) is contiguous. Zero for Tk = 0.
        lse: (B, H, Tq) float32, log-sum-exp of a row.

    Raises:
        TypeError, ValueError: an invalid argument.
        RuntimeError: the requested backend is not available.
    """
    _check("attention", q, k, v)
    o, lse = _attention(q.device, backend, q, k, v)
    return o.transpose(1, 2), lse


def attention_back(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """∂J/∂q, ∂J/∂k and ∂J/∂v from ∂J/∂o.

    Args:
        gradient: ∂J/∂o, like q.
        q, k, v: as in attention.
        lse: from attention.
        backend: as attention.

    Returns:
        dq, dk, dv: like q, k and v; transpose(1, 2) of each is contiguous.

    Raises:
        as attention.
    """
    _check_back(gradient, q, k, v, lse)
    dq, dk, dv = _attention_back(q.device, backend, gradient, q, k, v, lse)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


# ---- Checks --------------------------------------------------------------------------------------


def _check_tensor(
    op: str, name: str, tensor: Tensor, q: Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype != dtype:
        raise TypeError(f"{op}: {name} must be {dtype}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{op}: {name} must be {tuple(shape)}, got shape {tuple(tensor.shape)}")
    if tensor.device != q.device:
        raise ValueError(f"{op}: {name} must be on {q.device}, got {tensor.device}")


def _check(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    if not isinstance(q, Tensor):
        raise TypeError(f"{op}: q must be a tensor, got {type(q).__name__}")
    if q.dtype not in DTYPES:
        raise TypeError(f"{op}: q must be one of {DTYPES}, got {q.dtype}")
    if q.dim() != 4 or q.shape[3] < 1:
        raise ValueError(f"{op}: q must be (B, H, Tq, d) with d >= 1, got shape {tuple(q.shape)}")
    batch, heads, _, width = q.shape
    if isinstance(k, Tensor) and k.dim() != 4:
        raise ValueError(f"{op}: k must be (B, H, Tk, d), got shape {tuple(k.shape)}")
    keys = k.shape[2] if isinstance(k, Tensor) else 0
    for name, tensor in (("k", k), ("v", v)):
        _check_tensor(op, name, tensor, q, (batch, heads, keys, width), q.dtype)


def _check_back(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor) -> None:
    op = "attention_back"
    _check(op, q, k, v)
    _check_tensor(op, "gradient", gradient, q, q.shape, q.dtype)
    _check_tensor(op, "lse", lse, q, q.shape[:3], torch.float32)


# ---- Reference: in float32, or in float64 where the tests give it that ---------------------------
# The same limits as the C++ kernels, also on devices without them.


def attention_of(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """o and lse in the dtype of q."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return scores.softmax(dim=-1) @ v, scores.logsumexp(dim=-1)


def attention_back_of(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv in the dtype of q."""
    scale = q.shape[-1] ** -0.5
    weights = (q @ k.mT * scale - lse[..., None]).exp()
    # normalised again: lse is rounded, and the error would not cancel below
    weights = weights / weights.sum(dim=-1, keepdim=True)
    slope = gradient @ v.mT
    slope = scale * weights * (slope - (weights * slope).sum(dim=-1, keepdim=True))
    return slope @ k, slope.mT @ q, weights.mT @ gradient


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, H, T, d) → (B, T, H, d), contiguous."""
    return x.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format, copy=True)


def _reference_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    _check("attention", q, k, v)
    o, lse = attention_of(q.float(), k.float(), v.float())
    return _rows(o, q.dtype), lse.contiguous()


def _reference_attention_back(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    _check_back(gradient, q, k, v, lse)
    found = attention_back_of(gradient.float(), q.float(), k.float(), v.float(), lse)
    dq, dk, dv = (_rows(each, q.dtype) for each in found)
    return dq, dk, dv


# ---- Fakes and definitions -----------------------------------------------------------------------


def _fake_rows(x: Tensor) -> Tensor:
    batch, heads, tokens, width = x.shape
    return x.new_empty(batch, tokens, heads, width)


def _fake_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _fake_rows(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _fake_attention_back(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_rows(q), _fake_rows(k), _fake_rows(v)


_attention = define(
    "attention(Tensor q, Tensor k, Tensor v) -> (Tensor o, Tensor lse)",
    reference=_reference_attention,
    fake=_fake_attention,
)
_attention_back = define(
    "attention_back(Tensor gradient, Tensor q, Tensor k, Tensor v, Tensor lse) "
    "-> (Tensor dq, Tensor dk, Tensor dv)",
    reference=_reference_attention_back,
    fake=_fake_attention_back,
)
