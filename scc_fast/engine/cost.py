"""Cost of an encoder: FLOPs and weights of its products, and memory of a pass."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from scc_fast.engine.vit import (
    AttentionPool,
    FirstAttention,
    FirstToken,
    Linear,
    Mlp,
    Tower,
    kernel_of,
)
from scc_fast.models import VisionLanguage


@dataclass(frozen=True)
class Cost:
    """Cost of one picture, and weights read by a pass of any batch.

    Args:
        forward, backward: FLOPs of products; backward to the input alone.
        weights: bytes of the products' weights.
        kept: bytes kept for the backward pass, per picture.
        working: other bytes during a pass, per picture, estimated.
    """

    forward: int
    backward: int
    weights: int
    kept: int
    working: int


def cost_of(model: VisionLanguage, tower: Tower | None, dtype: torch.dtype) -> Cost:
    """Cost of an encoder: of the runner's products, else measured on the modules.

    Raises:
        RuntimeError: the modules do not run on fake tensors.
    """
    return _of_modules(model, dtype) if tower is None else _of_tower(tower)


# ------------------------------------------------------------------------------------- the runner


@dataclass
class _Sum:
    """Running sums of FLOPs and weights."""

    forward: int = 0
    backward: int = 0
    weights: int = 0

    def product(self, linear: Linear | None, rows: int, once: bool = False) -> None:
        """Add a linear layer on `rows` rows; forward alone if `once` (constant input)."""
        if linear is not None:
            out, width = linear.shape
            self.forward += 2 * rows * out * width
            self.backward += 0 if once else 2 * rows * out * width
            self.weights += out * width

    def attention(self, queries: int, tokens: int, width: int, of_query: bool = True) -> None:
        """Add two products forward and four backward, or three for a constant query."""
        pair = 2 * queries * tokens * width
        self.forward += 2 * pair
        self.backward += (4 if of_query else 3) * pair

    def mlp(self, mlp: Mlp, rows: int) -> None:
        self.product(mlp.up, rows)
        self.product(mlp.down, rows)


def _of_tower(tower: Tower) -> Cost:
    patches, width = tower.position.shape
    tokens, size = patches + len(tower.prefix), tower.dtype.itemsize
    total = _Sum()
    total.product(tower.patch, patches)
    kept = 4 * tokens * width if tower.start is not None else 0
    for block in tower.blocks:
        attention, wide = block.attention, block.mlp.up.shape[0]
        rows = tokens
        if isinstance(attention, FirstAttention):
            rows = 1
            total.product(attention.q, 1)
            total.product(attention.kv, tokens)
        else:
            total.product(attention.qkv, tokens)
        total.attention(rows, tokens, width)
        total.product(attention.out, rows)
        total.mlp(block.mlp, rows)
        # Two sums of the stream; q, k, v and o; the MLP's hidden layer.
        kept += 4 * width * (tokens + rows) + size * width * 2 * (tokens + rows)
        kept += size * rows * wide
        device, heads = tower.prefix.device, attention.heads
        if kernel_of(device, tower.dtype, width // heads) == "plain":
            kept += size * heads * rows * tokens
    end = tower.end
    if isinstance(end, AttentionPool):
        total.product(end.kv, tokens)
        total.attention(1, tokens, width, of_query=False)
        total.product(end.out, 1)
        total.mlp(end.mlp, 1)
        kept += (4 + 2 * size) * tokens * width
    else:
        assert isinstance(end, FirstToken)
    total.product(end.projection, 1)
    # Temporaries of one block: activations, their gradients, and the stream.
    wide = max(block.mlp.up.shape[0] for block in tower.blocks)
    working = tokens * (3 * wide * size + width * (16 + 6 * size))
    working += 2 * tower.patch.shape[1] * patches * size
    return Cost(total.forward, total.backward, total.weights * size, kept, working)


# ------------------------------------------------------------------------------------ the modules


def _of_modules(model: VisionLanguage, dtype: torch.dtype) -> Cost:
    """Cost by FLOP counter and saved-tensor hooks, on fake tensors."""
    module: Any = getattr(model, "module", None)
    visual: Any = getattr(module, "visual", getattr(module, "vision_model", module))
    weights = 0 if visual is None else sum(p.numel() for p in visual.parameters())
    try:
        (forward, backward, one), (_, _, two) = (_counted(model, dtype, n) for n in (1, 2))
    except Exception as error:
        raise RuntimeError(
            f"the cost of {model.name} cannot be counted: its encode_image does not work on "
            f"torch's fake tensors ({type(error).__name__}: {error})"
        ) from error
    grown = (two - one).elements()  # without the weights, whose size is constant
    largest = max(grown, default=0) // 2
    kept = _bytes(two) - _bytes(one)
    return Cost(forward, backward, weights * dtype.itemsize, kept, 4 * largest)


def _counted(
    model: VisionLanguage, dtype: torch.dtype, pictures: int
) -> tuple[int, int, Counter[int]]:
    """FLOPs forward and backward for `pictures` pictures, and sizes of saved tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    saved: dict[int, Tensor] = {}  # by storage; held against reuse

    def keep(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    reduced = dtype != getattr(model, "dtype", torch.float32)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(model.device.type, dtype=dtype, enabled=reduced, cache_enabled=False),
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        pixels = torch.empty(pictures, 3, *model.image_size, device=model.device)
        with FlopCounterMode(display=False) as forward:
            features = model.encode_image(pixels.requires_grad_())
        with FlopCounterMode(display=False) as backward:
            torch.autograd.grad(features.sum(), pixels)
    sizes = Counter[int]()
    for tensor in saved.values():
        sizes[tensor.untyped_storage().nbytes()] += 1
    return forward.get_total_flops(), backward.get_total_flops(), sizes


def _bytes(sizes: Counter[int]) -> int:
    return sum(size * count for size, count in sizes.items())
