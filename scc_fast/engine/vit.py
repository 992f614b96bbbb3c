"""Our runner for the standard vision transformer on a CPU: forward, and backward to its input.

No autograd: the forward pass keeps what the backward pass reads, the weights are the model's own,
and the gradient goes to the rows of the patches, never to a weight. The features are read from the
first token, so the last block computes that token alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_aten = torch.ops.aten


Kept = tuple[Tensor, ...]  # what a backward pass reads


@dataclass(frozen=True, eq=False)
class Linear:
    """A frozen linear layer."""

    weight: Tensor  # (out, in)
    bias: Tensor | None  # (out,)

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> Linear:
        return cls(weight.detach(), None if bias is None else bias.detach())

    def outputs(self, first: int, last: int) -> Linear:
        """The part that computes some of the outputs."""
        bias = None if self.bias is None else self.bias[first:last]
        return Linear(self.weight[first:last], bias)

    def __call__(self, x: Tensor) -> Tensor:
        return _product(x, self.weight, self.bias)

    def back(self, gradient: Tensor) -> Tensor:
        """∂/∂x from ∂/∂y."""
        return _product(gradient, self.weight.T, None)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if _has_onednn():
        # By name: torch's own choice, MKL, is half as fast on AMD processors.
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


@functools.cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@dataclass(frozen=True, eq=False)
class Norm:
    """A frozen LayerNorm over the last dimension."""

    weight: Tensor
    bias: Tensor
    epsilon: float

    @classmethod
    def of(cls, norm: nn.LayerNorm) -> Norm:
        return cls(norm.weight.detach(), norm.bias.detach(), norm.eps)

    def __call__(self, x: Tensor) -> tuple[Tensor, Kept]:
        y, mean, scale = _aten.native_layer_norm(
            x, self.weight.shape, self.weight, self.bias, self.epsilon
        )
        return y, (x, mean, scale)

    def back(self, gradient: Tensor, kept: Kept) -> Tensor:
        """∂/∂x from ∂/∂y."""
        shape, only_input = self.weight.shape, [True, False, False]
        return _aten.native_layer_norm_backward(
            gradient, kept[0], shape, kept[1], kept[2], self.weight, self.bias, only_input
        )[0]


# ------------------------------------------------------------------------------------- activations
# Each: (y, what the way back reads), and ∂/∂x from ∂/∂y.


def _quick_gelu(x: Tensor) -> tuple[Tensor, Kept]:
    gate = torch.sigmoid(1.702 * x)
    return x * gate, (x, gate)


def _quick_gelu_back(gradient: Tensor, kept: Kept) -> Tensor:
    x, gate = kept
    return gradient * (gate * (1 + 1.702 * x * (1 - gate)))


def _gelu(x: Tensor) -> tuple[Tensor, Kept]:
    return F.gelu(x), (x,)


def _gelu_back(gradient: Tensor, kept: Kept) -> Tensor:
    return _aten.gelu_backward(gradient, kept[0])


def _gelu_tanh(x: Tensor) -> tuple[Tensor, Kept]:
    return F.gelu(x, approximate="tanh"), (x,)


def _gelu_tanh_back(gradient: Tensor, kept: Kept) -> Tensor:
    return _aten.gelu_backward(gradient, kept[0], approximate="tanh")


Activation = tuple[Callable[[Tensor], tuple[Tensor, Kept]], Callable[[Tensor, Kept], Tensor]]
ACTIVATIONS: dict[str, Activation] = {
    "quick_gelu": (_quick_gelu, _quick_gelu_back),
    "gelu": (_gelu, _gelu_back),
    "gelu_tanh": (_gelu_tanh, _gelu_tanh_back),
}


# --------------------------------------------------------------------------------------- attention


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Kept]:
    """Scaled dot-product attention of (B, H, T, d) tensors, by torch's kernel for CPUs."""
    o, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return o, (q, k, v, o, lse)


def attend_back(gradient: Tensor, kept: Kept) -> tuple[Tensor, Tensor, Tensor]:
    """∂/∂q, ∂/∂k, ∂/∂v."""
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward(gradient, *kept, 0.0, False)


@dataclass(frozen=True, eq=False)
class Attention:
    """Self-attention; `first` computes the first token's output alone."""

    heads: int
    qkv: Linear
    out: Linear
    first: tuple[Linear, Linear] | None = None  # of q, and of k and v

    def __call__(self, x: Tensor) -> tuple[Tensor, Kept]:
        batch, tokens, width = x.shape
        shape = (self.heads, width // self.heads)
        if self.first is None:
            qkv = self.qkv(x).view(batch, tokens, 3, *shape).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind(0)
        else:
            only_q, both = self.first
            q = only_q(x[:, :1].contiguous()).view(batch, 1, *shape).transpose(1, 2)
            kv = both(x).view(batch, tokens, 2, *shape).permute(2, 0, 3, 1, 4)
            k, v = kv.unbind(0)
        o, kept = attend(q, k, v)
        return self.out(o.transpose(1, 2).reshape(batch, -1, width)), kept

    def back(self, gradient: Tensor, kept: Kept) -> Tensor:
        """∂/∂x from ∂/∂y."""
        batch, tokens, width = gradient.shape
        shape = (batch, tokens, self.heads, width // self.heads)
        dq, dk, dv = attend_back(self.out.back(gradient).view(shape).transpose(1, 2), kept)
        if self.first is None:
            packed = torch.stack([dq, dk, dv]).permute(1, 3, 0, 2, 4)
            return self.qkv.back(packed.reshape(batch, tokens, 3 * width))
        only_q, both = self.first
        packed = torch.stack([dk, dv]).permute(1, 3, 0, 2, 4)
        whole = both.back(packed.reshape(batch, -1, 2 * width))
        whole[:, :1] += only_q.back(dq.transpose(1, 2).reshape(batch, 1, width))
        return whole


@dataclass(frozen=True, eq=False)
class Mlp:
    """Two linear layers with an activation between."""

    up: Linear
    down: Linear
    activation: str

    def __call__(self, x: Tensor) -> tuple[Tensor, Kept]:
        y, kept = ACTIVATIONS[self.activation][0](self.up(x))
        return self.down(y), kept

    def back(self, gradient: Tensor, kept: Kept) -> Tensor:
        """∂/∂x from ∂/∂y."""
        return self.up.back(ACTIVATIONS[self.activation][1](self.down.back(gradient), kept))


# ------------------------------------------------------------------------------------ the tower


@dataclass(frozen=True, eq=False)
class Block:
    """x + attention(norm(x)), then x + mlp(norm(x)); pre-norm, as CLIP and SigLIP have it."""

    before: Norm
    attention: Attention
    between: Norm
    mlp: Mlp

    def __call__(self, x: Tensor) -> tuple[Tensor, tuple[Kept, ...]]:
        normed, first = self.before(x)
        y, second = self.attention(normed)
        y = y + (x if self.attention.first is None else x[:, :1])
        normed, third = self.between(y)
        z, fourth = self.mlp(normed)
        return z.add_(y), (first, second, third, fourth)

    def back(self, gradient: Tensor, kept: tuple[Kept, ...]) -> Tensor:
        """∂/∂x from ∂/∂y."""
        first, second, third, fourth = kept
        middle = self.between.back(self.mlp.back(gradient, fourth), third).add_(gradient)
        whole = self.before.back(self.attention.back(middle, second), first)
        if self.attention.first is None:
            return whole.add_(middle)
        whole[:, :1] += middle
        return whole


@dataclass(frozen=True, eq=False)
class Tower:
    """A vision transformer whose features are those of its first token.

    Args:
        size: a patch's side.
        patch: the patch embedding, on the rows (c, i, j) of patches.
        prefix: (1, width), the class token plus its position.
        position: (N, width), added to the embedded patches.
        start, end: the norms before the blocks and after the pooling.
        blocks: in order; the last computes the first token alone.
        projection: to the embedding.
    """

    size: int
    patch: Linear
    prefix: Tensor
    position: Tensor
    start: Norm
    blocks: Sequence[Block]
    end: Norm
    projection: Linear

    def __call__(self, rows: Tensor) -> tuple[Tensor, list[Any]]:
        """Features (B, D) of patch rows (B, N, 3·size²), and what `back` reads."""
        embedded = self.patch(rows).add_(self.position)
        first = self.prefix.expand(len(rows), *self.prefix.shape)
        x, saved = self.start(torch.cat([first, embedded], dim=1))
        kept: list[Any] = [saved]
        for block in self.blocks:
            x, parts = block(x)
            kept.append(parts)
        pooled, saved = self.end(x[:, 0])
        return self.projection(pooled), [*kept, saved]

    def back(self, gradient: Tensor, kept: list[Any]) -> Tensor:
        """∂/∂rows (B, N, 3·size²) from ∂/∂features (B, D)."""
        start, end, middle = kept[0], kept[-1], kept[1:-1]
        g = self.end.back(self.projection.back(gradient), end)[:, None]
        for block, saved in zip(reversed(self.blocks), reversed(middle), strict=True):
            g = block.back(g, saved)
        return self.patch.back(self.start.back(g, start)[:, 1:].contiguous())


def tower_of(model: Any) -> Tower | str:
    """The runner of a model's image tower, or why it has none.

    So far open_clip's VisionTransformer as CLIP has it, in float32.
    """
    module: Any = getattr(model, "module", None)
    visual: Any = getattr(module, "visual", None)
    known = ("CLIP", "CustomTextCLIP")  # whose encode_image is the tower and nothing else
    for part, names in ((module, known), (visual, ("VisionTransformer",))):
        kind = type(part)
        if kind.__name__ not in names or not kind.__module__.startswith("open_clip."):
            return f"{kind.__module__}.{kind.__name__} is not open_clip's {' or '.join(names)}"
    if any(parameter.dtype != torch.float32 for parameter in visual.parameters()):
        return "its weights are not float32"
    blocks = list(visual.transformer.resblocks)
    plain = (
        visual.attn_pool is None
        and visual.pool_type == "tok"
        and visual.proj is not None
        and isinstance(visual.ln_pre, nn.LayerNorm)
        and isinstance(visual.patch_dropout, nn.Identity)
        and visual.conv1.kernel_size == visual.conv1.stride
        and visual.conv1.kernel_size[0] == visual.conv1.kernel_size[1]
        and bool(blocks)
        and all(_is_plain(block) for block in blocks)
        and not _has_hooks(module)
        and "encode_image" not in vars(module)
        and all(map(_is_known, visual.modules()))
    )
    if not plain:
        return "its transformer has parts that the runner does not know"
    made = [_block(block, block is blocks[-1]) for block in blocks]
    position = visual.positional_embedding.detach()
    return Tower(
        visual.conv1.kernel_size[0],
        Linear.of(visual.conv1.weight.flatten(1), visual.conv1.bias),
        visual.class_embedding.detach() + position[:1],
        position[1:],
        Norm.of(visual.ln_pre),
        made,
        Norm.of(visual.ln_post),
        Linear.of(visual.proj.T, None),
    )


def _has_hooks(module: nn.Module) -> bool:
    """Hooks are the user's: a runner would not call them."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(part, name) for part in module.modules() for name in names)


# A subclass or a wrapper, such as an adapter on a linear layer, may compute something else.
_KNOWN = {"Conv2d", "Linear", "NonDynamicallyQuantizableLinear", "MultiheadAttention", "GELU"}
_KNOWN |= {"LayerNorm", "LayerNormFp32", "QuickGELU", "Identity", "Sequential", "ModuleList"}
_KNOWN |= {"VisionTransformer", "Transformer", "ResidualAttentionBlock"}


def _is_known(part: nn.Module) -> bool:
    kind = type(part)
    ours = kind.__module__.startswith(("torch.nn.modules.", "open_clip."))
    return ours and kind.__name__ in _KNOWN and "forward" not in vars(part)


def _activation_of(module: nn.Module) -> str | None:
    if type(module).__name__ == "QuickGELU":
        return "quick_gelu"
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return None


def _is_plain(block: Any) -> bool:
    attention = getattr(block, "attn", None)
    return (
        type(block).__name__ == "ResidualAttentionBlock"
        and type(attention) is nn.MultiheadAttention
        and attention.in_proj_weight is not None
        and attention.in_proj_bias is not None
        and attention.bias_k is None
        and not attention.add_zero_attn
        and isinstance(block.ls_1, nn.Identity)
        and isinstance(block.ls_2, nn.Identity)
        and isinstance(block.ln_1, nn.LayerNorm)
        and isinstance(block.ln_2, nn.LayerNorm)
        and _activation_of(block.mlp.gelu) is not None
    )


def _block(block: Any, last: bool) -> Block:
    attention, width = block.attn, block.attn.embed_dim
    qkv = Linear.of(attention.in_proj_weight, attention.in_proj_bias)
    out = Linear.of(attention.out_proj.weight, attention.out_proj.bias)
    first = (qkv.outputs(0, width), qkv.outputs(width, 3 * width)) if last else None
    up = Linear.of(block.mlp.c_fc.weight, block.mlp.c_fc.bias)
    down = Linear.of(block.mlp.c_proj.weight, block.mlp.c_proj.bias)
    kind = _activation_of(block.mlp.gelu)
    assert kind is not None
    return Block(
        Norm.of(block.ln_1),
        Attention(attention.num_heads, qkv, out, first),
        Norm.of(block.ln_2),
        Mlp(up, down, kind),
    )
