"""Norm and GELU of a vision transformer, forward and backward.

The residual stream is float32; inputs and outputs of matrix products are float32, float16 or
bfloat16. All arithmetic is float32. Weights are frozen: backward is with respect to the input
alone, and no op builds an autograd graph.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from scc_fast.config import shown
from scc_fast.ops import define

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Gelu = Literal["quick", "erf", "tanh"]
KINDS = ("quick", "erf", "tanh")


def add_norm(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    *,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum of x and y, and its LayerNorm: (total − mean) · scale · weight + bias.

    scale = 1/√(variance + epsilon), with the biased variance of a row. Rows are independent.

    Args:
        x: the residual stream, (…, W) float32, W >= 1.
        y: residual, like x, float32, float16 or bfloat16; None for zero.
        weight, bias: (W,) float32.
        epsilon: >= 0.
        dtype: of normed: float32, float16 or bfloat16.
        backend: "reference", "cpp", "triton"; None: the device's best.

    Returns:
        total: (…, W) float32; x itself if y is None.
        normed: (…, W) in dtype.
        mean, scale: (…) float32, for add_norm_back.

    Raises:
        TypeError, ValueError: an invalid argument.
        RuntimeError: the requested backend is not available.
    """
    arguments = (x, y, weight, bias, epsilon, dtype)
    _check_add_norm(*arguments)
    total, normed, mean, scale = _add_norm(x.device, backend, *arguments)
    return x if y is None else total, normed, mean, scale


def add_norm_back(
    gradient: Tensor,
    total: Tensor,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """∂J/∂total from ∂J/∂normed, plus the residual's gradient.

    With g = gradient · weight, x̂ = (total − mean) · scale and means over the W numbers of a row,
    scale · (g − mean(g) − x̂ · mean(g · x̂)) + residual.

    Args:
        gradient: ∂J/∂normed, (…, W), float32, float16 or bfloat16.
        total, mean, scale: from add_norm.
        weight: (W,) float32.
        residual: ∂J/∂total around the norm, (…, W) float32; None for zero.
        dtype: of low: float32, float16 or bfloat16.
        backend: as add_norm.

    Returns:
        whole: (…, W) float32.
        low: whole in dtype; whole itself for float32.

    Raises:
        as add_norm.
    """
    arguments = (gradient, total, mean, scale, weight, residual, dtype)
    _check_add_norm_back(*arguments)
    whole, low = _add_norm_back(total.device, backend, *arguments)
    return whole, whole if dtype == torch.float32 else low


def gelu(
    x: Tensor, bias: Tensor | None = None, *, kind: Gelu = "erf", backend: str | None = None
) -> Tensor:
    """GELU of z = x + bias: z · share(z).

    "quick": z · sigmoid(1.702 z). "erf": z · (1 + erf(z/√2)) / 2. "tanh": its approximation
    z · (1 + tanh(√(2/π) (z + 0.044715 z³))) / 2.

    Args:
        x: any shape, float32, float16 or bfloat16.
        bias: (W,), W being the last dimension of x, float32 or in the dtype of x; None for zero.
        kind: of GELU.
        backend: as add_norm.

    Returns:
        like x.

    Raises:
        as add_norm.
    """
    _check_gelu(x, bias, kind)
    return _gelu(x.device, backend, x, bias, kind)


def gelu_back(
    gradient: Tensor,
    x: Tensor,
    bias: Tensor | None = None,
    *,
    kind: Gelu = "erf",
    backend: str | None = None,
) -> Tensor:
    """∂J/∂x from ∂J/∂gelu(x + bias): gradient times the derivative of gelu at x + bias.

    Args:
        gradient: like x.
        x, bias, kind: as in gelu.
        backend: as add_norm.

    Returns:
        like x.

    Raises:
        as add_norm.
    """
    _check_gelu_back(gradient, x, bias, kind)
    return _gelu_back(x.device, backend, gradient, x, bias, kind)


# ---- Checks --------------------------------------------------------------------------------------


def _check_dtype(op: str, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        rule = dtypes[0] if len(dtypes) == 1 else f"one of {dtypes}"
        raise TypeError(f"{op}: {name} must be {rule}, got {tensor.dtype}")


def _check_tensor(
    op: str,
    name: str,
    tensor: Tensor,
    like: Tensor,
    shape: torch.Size,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    _check_dtype(op, name, tensor, dtypes)
    if tensor.shape != shape:
        raise ValueError(f"{op}: {name} must be {tuple(shape)}, got shape {tuple(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device}, got {tensor.device}")


def _check_stream(op: str, name: str, stream: Tensor, dtype: torch.dtype) -> None:
    _check_dtype(op, name, stream, DTYPES[:1])
    if stream.dim() < 1 or stream.shape[-1] < 1:
        shape = tuple(stream.shape)
        raise ValueError(f"{op}: {name} must be (..., W) with W >= 1, got shape {shape}")
    if dtype not in DTYPES:
        raise TypeError(f"{op}: dtype must be one of {DTYPES}, got {dtype}")


def _check_add_norm(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    dtype: torch.dtype,
) -> None:
    _check_stream("add_norm", "x", x, dtype)
    if y is not None:
        _check_tensor("add_norm", "y", y, x, x.shape, DTYPES)
    for name, tensor in (("weight", weight), ("bias", bias)):
        _check_tensor("add_norm", name, tensor, x, x.shape[-1:], DTYPES[:1])
    if not isinstance(epsilon, int | float) or not 0 <= epsilon < math.inf:
        raise ValueError(f"add_norm: epsilon must be a finite number >= 0, got {shown(epsilon)}")


def _check_add_norm_back(
    gradient: Tensor,
    total: Tensor,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> None:
    op, single = "add_norm_back", DTYPES[:1]
    _check_stream(op, "total", total, dtype)
    _check_tensor(op, "gradient", gradient, total, total.shape, DTYPES)
    _check_tensor(op, "mean", mean, total, total.shape[:-1], single)
    _check_tensor(op, "scale", scale, total, total.shape[:-1], single)
    _check_tensor(op, "weight", weight, total, total.shape[-1:], single)
    if residual is not None:
        _check_tensor(op, "residual", residual, total, total.shape, single)


def _check_gelu(x: Tensor, bias: Tensor | None, kind: str, op: str = "gelu") -> None:
    _check_dtype(op, "x", x, DTYPES)
    if bias is not None:
        width = x.shape[-1:]
        if not width:
            raise ValueError(f"{op}: x must have a dimension for the bias, got shape ()")
        _check_tensor(op, "bias", bias, x, width, (x.dtype, torch.float32))
    if kind not in KINDS:
        raise ValueError(f"{op}: kind must be one of {KINDS}, got {shown(kind)}")


def _check_gelu_back(gradient: Tensor, x: Tensor, bias: Tensor | None, kind: str) -> None:
    _check_gelu(x, bias, kind, "gelu_back")
    _check_tensor("gelu_back", "gradient", gradient, x, x.shape, (x.dtype,))


# ---- Reference: in float32, or in float64 where the tests give it that ---------------------------
# The same limits as the C++ kernels, also on devices without them.


def norm_of(total: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, ...]:
    """normed, mean and scale in the dtype of total."""
    mean = total.mean(dim=-1)
    off = total - mean[..., None]
    scale = (off.square().mean(dim=-1) + epsilon).rsqrt()
    return off * scale[..., None] * weight + bias, mean, scale


def norm_back_of(
    gradient: Tensor, total: Tensor, mean: Tensor, scale: Tensor, weight: Tensor
) -> Tensor:
    """∂/∂total through the norm, in the dtype of total."""
    g = gradient * weight
    unit = (total - mean[..., None]) * scale[..., None]
    along = unit * (g * unit).mean(dim=-1, keepdim=True)
    return scale[..., None] * (g - g.mean(dim=-1, keepdim=True) - along)


def gelu_of(z: Tensor, kind: str) -> Tensor:
    """GELU in the dtype of z."""
    if kind == "quick":
        return z * torch.sigmoid(1.702 * z)
    return F.gelu(z, approximate="tanh" if kind == "tanh" else "none")


def slope_of(z: Tensor, kind: str) -> Tensor:
    """The derivative of gelu_of."""
    if kind == "quick":
        share = torch.sigmoid(1.702 * z)
        return share + 1.702 * z * share * torch.sigmoid(-1.702 * z)
    approximate = "tanh" if kind == "tanh" else "none"
    return torch.ops.aten.gelu_backward(torch.ones_like(z), z, approximate=approximate)


def _reference_add_norm(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_add_norm(x, y, weight, bias, epsilon, dtype)
    total = x.contiguous() if y is None else (x + y).contiguous()
    normed, mean, scale = norm_of(total, weight, bias, epsilon)
    return x.new_empty(0) if y is None else total, normed.to(dtype), mean, scale


def _reference_add_norm_back(
    gradient: Tensor,
    total: Tensor,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    _check_add_norm_back(gradient, total, mean, scale, weight, residual, dtype)
    wide, total = gradient.float().contiguous(), total.contiguous()
    whole = norm_back_of(wide, total, mean, scale, weight)
    whole = (whole if residual is None else whole + residual).contiguous()
    return whole, total.new_empty(0) if dtype == torch.float32 else whole.to(dtype)


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    wide = x.float().contiguous()
    return wide if bias is None else wide + bias.float()


def _reference_gelu(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    _check_gelu(x, bias, kind)
    return gelu_of(_biased(x, bias), kind).to(x.dtype)


def _reference_gelu_back(gradient: Tensor, x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    _check_gelu_back(gradient, x, bias, kind)
    slope = slope_of(_biased(x, bias), kind)
    return (gradient.float().contiguous() * slope).to(x.dtype)


# ---- Fakes and definitions -----------------------------------------------------------------------


def _fake_add_norm(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = x.new_empty(0) if y is None else x.new_empty(x.shape)
    mean, scale = x.new_empty(x.shape[:-1]), x.new_empty(x.shape[:-1])
    return total, x.new_empty(x.shape, dtype=dtype), mean, scale


def _fake_add_norm_back(
    gradient: Tensor,
    total: Tensor,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    shape = (0,) if dtype == torch.float32 else total.shape
    return total.new_empty(total.shape), total.new_empty(shape, dtype=dtype)


def _fake_gelu(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    return x.new_empty(x.shape)


def _fake_gelu_back(gradient: Tensor, x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    return x.new_empty(x.shape)


def _triton() -> ModuleType:
    from scc_fast.kernels import encoder

    return encoder


_add_norm = define(
    "add_norm(Tensor x, Tensor? y, Tensor weight, Tensor bias, float epsilon, ScalarType dtype) "
    "-> (Tensor total, Tensor normed, Tensor mean, Tensor scale)",
    reference=_reference_add_norm,
    fake=_fake_add_norm,
    triton=_triton,
)
_add_norm_back = define(
    "add_norm_back(Tensor gradient, Tensor total, Tensor mean, Tensor scale, Tensor weight, "
    "Tensor? residual, ScalarType dtype) -> (Tensor whole, Tensor low)",
    reference=_reference_add_norm_back,
    fake=_fake_add_norm_back,
    triton=_triton,
)
_gelu = define(
    "gelu(Tensor x, Tensor? bias, str kind) -> Tensor",
    reference=_reference_gelu,
    fake=_fake_gelu,
    triton=_triton,
)
_gelu_back = define(
    "gelu_back(Tensor gradient, Tensor x, Tensor? bias, str kind) -> Tensor",
    reference=_reference_gelu_back,
    fake=_fake_gelu_back,
    triton=_triton,
)
