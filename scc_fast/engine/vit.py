"""Runner of the standard vision transformer: forward, and backward to its input, without autograd.

Products and attention are in the runner's precision, the residual stream and its norms in float32.
A residual is added by the norm that reads it.

`Kept` is the state for a backward pass: nested tuples of tensors whose first dimension is the
image, so that `narrow` and `take` can select images.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scc_fast import ops
from scc_fast.ops.encoder import Gelu

_aten = torch.ops.aten

Kept = tuple[Any, ...]


def narrow(kept: Any, images: int) -> Any:
    """Kept state of the first `images` images."""
    if isinstance(kept, Tensor):
        # Unused random state of attention has no image dimension.
        return kept[:images] if kept.dim() > 1 else kept
    return tuple(narrow(part, images) for part in kept)


def take(kept: Any, index: Tensor) -> Any:
    """Kept state of some of the images."""
    if isinstance(kept, Tensor):
        return kept[index] if kept.dim() > 1 else kept
    return tuple(take(part, index) for part in kept)


# ---------------------------------------------------------------------------------------- products


@functools.cache
def has_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN has products in a dtype here; torch's own choice is slower on AMD."""
    library = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(library, "_linear_pointwise"):
        return False
    if dtype == torch.bfloat16:
        return library._is_mkldnn_bf16_supported()
    return dtype == torch.float32 or library._is_mkldnn_fp16_supported()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.device.type == "cpu" and has_onednn(x.dtype):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


@dataclass(frozen=True, eq=False)
class Linear:
    """Frozen linear layer; converted weights are in oneDNN's layout."""

    weight: Tensor  # (out, in)
    bias: Tensor | None  # (out,)
    transposed: Tensor  # (in, out), for the backward
    shape: tuple[int, int]  # (out, in); a packed weight has another

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Linear:
        """Layer in `dtype`; shares the model's storage if that is the weight's dtype."""
        bias = None if bias is None else bias.detach().to(dtype)
        out, width = weight.shape
        if weight.dtype == dtype:
            shared = weight.detach()
            return cls(shared, bias, shared.T, (out, width))
        own = weight.detach().to(dtype)
        if own.device.type != "cpu" or not has_onednn(dtype):
            return cls(own, bias, own.T, (out, width))
        packed, transposed = (
            torch.ops.mkldnn._reorder_linear_weight(w.contiguous()) for w in (own, own.T)
        )
        return cls(packed, bias, transposed, (out, width))

    def __call__(self, x: Tensor) -> Tensor:
        return _product(x, self.weight, self.bias)

    def product(self, x: Tensor) -> Tensor:
        """Product without the bias."""
        return _product(x, self.weight, None)

    def back(self, gradient: Tensor) -> Tensor:
        """∂/∂x from ∂/∂y."""
        return _product(gradient, self.transposed, None)


# ------------------------------------------------------------------------------------------- norms


@dataclass(frozen=True, eq=False)
class Norm:
    """Frozen LayerNorm of the residual stream, with output in `dtype`."""

    weight: Tensor  # (W,) float32
    bias: Tensor
    epsilon: float
    dtype: torch.dtype

    @classmethod
    def of(cls, norm: nn.LayerNorm, dtype: torch.dtype) -> Norm:
        weight, bias = norm.weight.detach().float(), norm.bias.detach().float()
        return cls(weight, bias, float(norm.eps), dtype)

    def __call__(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor, Kept]:
        """x + y, its norm, and the state for `back`."""
        total, normed, mean, scale = ops.add_norm(
            x, y, self.weight, self.bias, self.epsilon, dtype=self.dtype
        )
        return total, normed, (total, mean, scale)

    def back(self, gradient: Tensor, kept: Kept, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """∂/∂(x + y), including the residual's gradient, in float32 and in `dtype`."""
        total, mean, scale = kept
        return ops.add_norm_back(
            gradient, total, mean, scale, self.weight, residual, dtype=self.dtype
        )


# --------------------------------------------------------------------------------------- attention


def kernel_of(device: torch.device, dtype: torch.dtype, width: int) -> str:
    """Attention kernel for heads of a width: "op" (CPU), "flash" (torch's) or "plain"."""
    if device.type == "cpu":
        return "op"
    fits = dtype.itemsize == 2 and width in range(8, 257, 8)
    return "flash" if fits and _is_ampere(device) else "plain"


@functools.cache
def _is_ampere(device: torch.device) -> bool:
    """Whether a CUDA device supports the flash kernels."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Kept]:
    """Scaled dot-product attention of (B, H, T, d) tensors, and the state for its backward."""
    kernel = kernel_of(q.device, q.dtype, q.shape[-1])
    if kernel == "op":
        o, lse = ops.attention(q, k, v)
        return o, (q, k, v, lse)
    if kernel == "plain":
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1)
        return weights @ v, (q, k, v, weights)
    found = _aten._scaled_dot_product_flash_attention(q, k, v)
    return found[0], (q, k, v, found[0], found[1], found[6], found[7])


def attend_back(gradient: Tensor, kept: Kept) -> tuple[Tensor, Tensor, Tensor]:
    """∂/∂q, ∂/∂k, ∂/∂v."""
    kernel = kernel_of(gradient.device, gradient.dtype, gradient.shape[-1])
    if kernel == "op":
        return ops.attention_back(gradient, *kept)
    if kernel == "plain":
        q, k, v, weights = kept
        slope = _aten._softmax_backward_data(gradient @ v.mT, weights, -1, weights.dtype)
        slope = slope * q.shape[-1] ** -0.5
        return slope @ k, slope.mT @ q, weights.mT @ gradient
    q, k, v, o, lse, *state = kept
    return _aten._scaled_dot_product_flash_attention_backward(
        gradient, q, k, v, o, lse, None, None, q.shape[2], k.shape[2], 0.0, False, *state
    )


def _heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, W) → (B, H, T, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """n tensors (B, H, T, d) → (B, T, n·W)."""
    return torch.stack([part.transpose(1, 2) for part in parts], dim=2).flatten(2)


@dataclass(frozen=True, eq=False)
class Attention:
    """Self-attention of all tokens."""

    heads: int
    qkv: Linear
    out: Linear

    def __call__(self, x: Tensor) -> tuple[Tensor, Kept]:
        q, k, v = (_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        o, kept = attend(q, k, v)
        return self.out(o.transpose(1, 2).flatten(2)), kept

    def back(self, gradient: Tensor, kept: Kept) -> Tensor:
        """∂/∂x from ∂/∂y."""
        return self.qkv.back(
            _joined(attend_back(_heads(self.out.back(gradient), self.heads), kept))
        )


@dataclass(frozen=True, eq=False)
class FirstAttention:
    """Self-attention with the first token as the only query."""

    heads: int
    q: Linear
    kv: Linear
    out: Linear

    def __call__(self, x: Tensor) -> tuple[Tensor, Kept]:
        q = _heads(self.q(x[:, :1].contiguous()), self.heads)
        k, v = (_heads(part, self.heads) for part in self.kv(x).chunk(2, dim=-1))
        o, kept = attend(q, k, v)
        return self.out(o.transpose(1, 2).flatten(2)), kept

    def back(self, gradient: Tensor, kept: Kept) -> Tensor:
        """∂/∂x, for all tokens, from ∂/∂y of the first."""
        dq, dk, dv = attend_back(_heads(self.out.back(gradient), self.heads), kept)
        whole = self.kv.back(_joined((dk, dv)))
        whole[:, :1] += self.q.back(dq.transpose(1, 2).flatten(2))
        return whole


@dataclass(frozen=True, eq=False)
class Mlp:
    """Two linear layers and a GELU, which adds the first layer's bias."""

    up: Linear
    down: Linear
    kind: Gelu

    def __call__(self, x: Tensor) -> tuple[Tensor, Kept]:
        wide = self.up.product(x)
        return self.down(ops.gelu(wide, self.up.bias, kind=self.kind)), (wide,)

    def back(self, gradient: Tensor, kept: Kept) -> Tensor:
        """∂/∂x from ∂/∂y."""
        (wide,) = kept
        slope = ops.gelu_back(self.down.back(gradient), wide, self.up.bias, kind=self.kind)
        return self.up.back(slope)


# --------------------------------------------------------------------------------------- the tower


@dataclass(frozen=True, eq=False)
class Block:
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    before: Norm
    attention: Attention | FirstAttention
    between: Norm
    mlp: Mlp

    def __call__(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor, Kept]:
        """New stream, as a sum of two, from the stream x + y."""
        x, normed, first = self.before(x, y)
        y, second = self.attention(normed)
        if isinstance(self.attention, FirstAttention):
            x = x[:, :1].contiguous()
        x, normed, third = self.between(x, y)
        z, fourth = self.mlp(normed)
        return x, z, (first, second, third, fourth)

    def back(self, whole: Tensor, low: Tensor, kept: Kept) -> tuple[Tensor, Tensor]:
        """∂/∂stream before from ∂/∂stream after, each as in Norm.back."""
        first, second, third, fourth = kept
        whole, low = self.between.back(self.mlp.back(low, fourth), third, whole)
        gradient = self.attention.back(low, second)
        if isinstance(self.attention, FirstAttention):
            whole = F.pad(whole, (0, 0, 0, gradient.shape[1] - 1))
        return self.before.back(gradient, first, whole)


@dataclass(frozen=True, eq=False)
class FirstToken:
    """CLIP's end: norm and projection of the first token."""

    norm: Norm
    projection: Linear | None

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Kept]:
        _, normed, kept = self.norm(x[:, :1].contiguous(), y[:, :1].contiguous())
        return (normed if self.projection is None else self.projection(normed))[:, 0], kept

    def back(self, gradient: Tensor, kept: Kept) -> tuple[Tensor, Tensor]:
        """∂/∂ of the stream's first token, as in Norm.back."""
        gradient = gradient[:, None]
        if self.projection is not None:
            gradient = self.projection.back(gradient)
        return self.norm.back(gradient, kept, None)


@dataclass(frozen=True, eq=False)
class AttentionPool:
    """SigLIP's end: attention pool with a learnt query, then a residual MLP.

    `query` is the probe after its linear layer, (1, H, 1, d).
    """

    norm: Norm
    query: Tensor
    kv: Linear
    out: Linear
    between: Norm
    mlp: Mlp
    projection: Linear | None

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Kept]:
        _, normed, first = self.norm(x, y)
        heads = self.query.shape[1]
        k, v = (_heads(part, heads) for part in self.kv(normed).chunk(2, dim=-1))
        o, second = attend(self.query.expand(len(x), -1, -1, -1), k, v)
        pooled = self.out(o.transpose(1, 2).flatten(2)).float()
        _, normed, third = self.between(pooled, None)
        z, fourth = self.mlp(normed)
        features = pooled + z
        if self.projection is not None:
            features = self.projection(features.to(z.dtype))
        return features[:, 0], (first, second, third, fourth)

    def back(self, gradient: Tensor, kept: Kept) -> tuple[Tensor, Tensor]:
        """∂/∂stream, as in Norm.back."""
        first, second, third, fourth = kept
        gradient = gradient[:, None]
        if self.projection is not None:
            gradient = self.projection.back(gradient)
        _, low = self.between.back(self.mlp.back(gradient, fourth), third, gradient.float())
        _, dk, dv = attend_back(_heads(self.out.back(low), self.query.shape[1]), second)
        return self.norm.back(self.kv.back(_joined((dk, dv))), first, None)


@dataclass(frozen=True, eq=False)
class Tower:
    """Vision transformer.

    Args:
        size: side of a patch.
        patch: the patch embedding, on the rows (c, i, j) of patches.
        prefix: (P, W) float32, tokens before the patches, with position; P >= 0.
        position: (N, W) float32, added to the embedded patches.
        start: the norm before the blocks, or None.
        blocks: only the last may have FirstAttention.
        end: stream to features.
    """

    size: int
    patch: Linear
    prefix: Tensor
    position: Tensor
    start: Norm | None
    blocks: Sequence[Block]
    end: FirstToken | AttentionPool

    @property
    def dtype(self) -> torch.dtype:
        """Precision of products and input rows."""
        return self.blocks[0].before.dtype

    def __call__(self, rows: Tensor, keep: bool = True) -> tuple[Tensor, Kept]:
        """Features (B, D) float32 of patch rows (B, N, 3·size²), and the state for `back`."""
        extra, tokens = len(self.prefix), len(self.prefix) + len(self.position)
        x = self.prefix.new_empty(len(rows), tokens, self.prefix.shape[1])
        x[:, :extra] = self.prefix
        torch.add(self.patch(rows), self.position, out=x[:, extra:])
        kept: list[Kept] = []
        if self.start is not None:
            _, x, saved = self.start(x, None)
            kept.append(saved)
        y: Tensor | None = None
        for block in self.blocks:
            x, y, saved = block(x, y)
            if keep:
                kept.append(saved)
            del saved  # free during the next block
        assert y is not None
        features, saved = self.end(x, y)
        return features.float(), (*kept, saved) if keep else ()

    def back(self, gradient: Tensor, kept: Kept) -> Tensor:
        """∂/∂rows (B, N, 3·size²), in `dtype`, from ∂/∂features (B, D)."""
        *middle, last = kept
        whole, low = self.end.back(gradient.to(self.dtype), last)
        first = middle.pop(0) if self.start is not None else None
        for block, saved in zip(reversed(self.blocks), reversed(middle), strict=True):
            whole, low = block.back(whole, low, saved)
        if self.start is not None:
            assert first is not None
            _, low = self.start.back(whole, first, None)
        return self.patch.back(low[:, len(self.prefix) :].to(self.dtype).contiguous())
