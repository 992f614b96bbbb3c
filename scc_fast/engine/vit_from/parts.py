"""Checks and conversions common to all families of towers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from scc_fast import ops
from scc_fast.engine.vit import (
    Attention,
    AttentionPool,
    Block,
    FirstAttention,
    Linear,
    Mlp,
    Norm,
)

# A weight (out, in) and its bias (out,).
Weights = tuple[Tensor, Tensor | None]


class UnknownPartError(Exception):
    """Part of a model that the runner does not support."""


def require(holds: bool, reason: str) -> None:
    """Raise UnknownPartError unless `holds`."""
    if not holds:
        raise UnknownPartError(reason)


def name_of(thing: object) -> str:
    """Full name of an object's class."""
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def expect(part: object, *names: str) -> None:
    """Require a part of exactly one of these classes."""
    require(name_of(part) in names, f"{name_of(part)} is not {' or '.join(names)}")


_LINEARS = (
    "torch.nn.modules.linear.Linear",
    "torch.nn.modules.linear.NonDynamicallyQuantizableLinear",
)
_NORMS = (
    "torch.nn.modules.normalization.LayerNorm",
    "open_clip.transformer.LayerNorm",
    "open_clip.transformer.LayerNormFp32",
    "timm.layers.norm.LayerNorm",
)
_ACTIVATIONS = (
    "torch.nn.modules.activation.GELU",
    "open_clip.transformer.QuickGELU",
    "timm.layers.activations.GELU",
    "timm.layers.activations.GELUTanh",
    "timm.layers.activations.QuickGELU",
    "transformers.activations.GELUActivation",
    "transformers.activations.GELUTanh",
    "transformers.activations.NewGELUActivation",
    "transformers.activations.PytorchGELUTanh",
    "transformers.activations.QuickGELUActivation",
)
_CONVOLUTION = "torch.nn.modules.conv.Conv2d"
_ATTENTION = "torch.nn.modules.activation.MultiheadAttention"
_NOTHING = (  # in eval mode
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.dropout.Dropout",
)
_COMMON = {
    *_LINEARS,
    *_NORMS,
    *_ACTIVATIONS,
    *_NOTHING,
    _CONVOLUTION,
    _ATTENTION,
    "torch.nn.modules.container.ModuleList",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.sparse.Embedding",
}

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS: list[dict[int, Any]] = [getattr(torch_module, f"_global{name}") for name in HOOKS]


def unchanged(part: nn.Module, path: str) -> None:
    """Require that no method was replaced on the object."""
    for key in vars(part):
        changed = callable(getattr(type(part), key, None))
        require(not changed, f"{path}.{key} was replaced on its {name_of(part)}")


def examine(tower: nn.Module, path: str, own: Iterable[str]) -> None:
    """Require known, unmodified classes for all modules of a tower; `own` are its family's.

    A subclass or wrapper may compute something else, and the runner calls no hooks.
    """
    known = _COMMON.union(own)
    for below, part in tower.named_modules():
        where = f"{path}.{below}".rstrip(".")
        name = name_of(part)
        require(name in known, f"{where} is a {name}, which the runner does not know")
        unchanged(part, where)
        require(not any(getattr(part, key) for key in HOOKS), f"{where} ({name}) has a hook")
        require(not part.training, f"{where} ({name}) is in training mode")
    for below, tensor in tower.named_parameters():
        where = f"{path}.{below}"
        plain = type(tensor.data) is Tensor and tensor.is_floating_point()
        require(plain, f"{where} is a {name_of(tensor.data)} of {tensor.dtype}")
        require(not tensor.is_meta, f"{where} is on the meta device")


def does_nothing(part: object) -> bool:
    """Whether a part is the identity in eval mode."""
    return part is None or name_of(part) in _NOTHING


def absent(part: object, *names: str) -> None:
    """Require that optional parts are missing or do nothing."""
    for name in names:
        found = getattr(part, name, None)
        require(does_nothing(found), f"{name_of(part)} has {name}: {name_of(found)}")


def fits(image_size: tuple[int, int], side: int, positions: int) -> None:
    """Require as many patches as positions."""
    height, width = image_size
    whole = height % side == 0 and width % side == 0
    require(
        whole and (height // side) * (width // side) == positions,
        f"image_size {height}x{width} is not {positions} patches of side {side}",
    )


# ----------------------------------------------------------------------------------- single parts


def weights_of(part: Any) -> Weights:
    """Weight and bias of a linear layer."""
    expect(part, *_LINEARS)
    return part.weight.detach(), None if part.bias is None else part.bias.detach()


def linear_of(part: Any, dtype: torch.dtype) -> Linear:
    """Convert a linear layer."""
    return Linear.of(*weights_of(part), dtype)


def norm_of(part: Any, dtype: torch.dtype) -> Norm:
    """Convert a LayerNorm of the last dimension, with output in `dtype`."""
    expect(part, *_NORMS)
    complete = part.weight is not None and part.bias is not None
    require(complete, f"a {name_of(part)} has no weight or no bias")
    require(len(part.normalized_shape) == 1, f"a {name_of(part)} is over several dimensions")
    return Norm.of(part, dtype)


def patch_of(part: Any, dtype: torch.dtype) -> tuple[int, Linear]:
    """Side of a patch, and the patch convolution as a linear layer on rows of patches."""
    expect(part, _CONVOLUTION)
    side = part.kernel_size[0]
    plain = (
        part.kernel_size == part.stride == (side, side)
        and part.padding in ((0, 0), "valid")
        and part.dilation == (1, 1)
        and part.groups == 1
        and part.in_channels == 3
    )
    require(plain, f"its patch embedding, {part}, is not one product per patch")
    bias = None if part.bias is None else part.bias.detach()
    return side, Linear.of(part.weight.detach().flatten(1), bias, dtype)


_KINDS: tuple[Literal["quick", "erf", "tanh"], ...] = ("quick", "erf", "tanh")


def _kind_of(activation: Any) -> Literal["quick", "erf", "tanh"]:
    """Kind of GELU, by its values."""
    expect(activation, *_ACTIVATIONS)
    x = torch.linspace(-6, 6, 97, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        for kind in _KINDS:
            ours = ops.gelu(x, None, kind=kind)
            if torch.allclose(activation(x.clone()), ours, rtol=0, atol=1e-5):
                return kind
    raise UnknownPartError(f"a {name_of(activation)} computes none of the three GELUs")


def mlp_of(up: Any, activation: Any, down: Any, dtype: torch.dtype) -> Mlp:
    """Convert an MLP."""
    return Mlp(linear_of(up, dtype), linear_of(down, dtype), _kind_of(activation))


# -------------------------------------------------------------------------------------- attention


def packed_of(part: Any, batch_first: bool) -> Weights:
    """Packed q, k and v of torch's MultiheadAttention, (3·W, W)."""
    expect(part, _ATTENTION)
    plain = (
        part.in_proj_weight is not None
        and part.bias_k is None
        and not part.add_zero_attn
        and part.batch_first == batch_first
    )
    require(plain, "an attention has separate widths, a bias of keys, or another order of tokens")
    bias = part.in_proj_bias
    return part.in_proj_weight.detach(), None if bias is None else bias.detach()


def joined(parts: Sequence[Any]) -> Weights:
    """Concatenate linear layers with a common input."""
    pairs = [weights_of(part) for part in parts]
    biases = [bias for _, bias in pairs if bias is not None]
    require(len(biases) in (0, len(pairs)), "of q, k and v some have a bias and some have none")
    return torch.cat([weight for weight, _ in pairs]), torch.cat(biases) if biases else None


def scaled(part: Any, heads: int, inner: int) -> None:
    """Require the usual scale of attention, for `heads` heads of total width `inner`."""
    plain = inner % heads == 0 and abs(part.scale - (inner // heads) ** -0.5) < 1e-6
    require(plain, f"a {name_of(part)} has {heads} heads and scale {part.scale} at width {inner}")


def _split(qkv: Weights, first: int) -> tuple[Weights, Weights]:
    weight, bias = qkv
    upper, lower = (None, None) if bias is None else (bias[:first], bias[first:])
    return (weight[:first], upper), (weight[first:], lower)


def _attention(
    qkv: Weights, heads: int, out: Linear, first: bool, dtype: torch.dtype
) -> Attention | FirstAttention:
    if not first:
        return Attention(heads, Linear.of(*qkv, dtype), out)
    q, kv = _split(qkv, len(qkv[0]) // 3)
    return FirstAttention(heads, Linear.of(*q, dtype), Linear.of(*kv, dtype), out)


def block_of(
    norms: tuple[Any, Any],
    qkv: Weights,
    heads: int,
    out: Any,
    mlp: tuple[Any, Any, Any],
    first: bool,
    dtype: torch.dtype,
) -> Block:
    """Make a block; `first`: only the first token is a query."""
    before, between = (norm_of(norm, dtype) for norm in norms)
    attention = _attention(qkv, heads, linear_of(out, dtype), first, dtype)
    return Block(before, attention, between, mlp_of(*mlp, dtype))


def blocks_of(
    layers: Iterable[Any], make: Callable[[Any, bool], Block], first_alone: bool
) -> list[Block]:
    """Make all blocks; in the last, only the first token may be a query."""
    parts = list(layers)
    require(bool(parts), "its transformer has no blocks")
    return [make(part, first_alone and i == len(parts)) for i, part in enumerate(parts, 1)]


def pool_of(
    norms: tuple[Any, Any],
    probe: Tensor,
    qkv: Weights,
    heads: int,
    out: Any,
    mlp: tuple[Any, Any, Any],
    projection: Any,
    dtype: torch.dtype,
) -> AttentionPool:
    """Make SigLIP's attention pool; `probe` is (1, 1, W)."""
    require(probe.shape[:2] == (1, 1), f"its attention pool has {probe.shape[1]} queries")
    (weight, bias), kv = _split(qkv, len(qkv[0]) // 3)
    query = nn.functional.linear(
        probe.detach().float(), weight.float(), None if bias is None else bias.float()
    )
    return AttentionPool(
        norm=norm_of(norms[0], dtype),
        query=query.unflatten(-1, (heads, -1)).transpose(1, 2).to(dtype),
        kv=Linear.of(*kv, dtype),
        out=linear_of(out, dtype),
        between=norm_of(norms[1], dtype),
        mlp=mlp_of(*mlp, dtype),
        projection=None if projection is None else linear_of(projection, dtype),
    )
