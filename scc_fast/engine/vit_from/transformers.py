"""Towers of transformers 4 and 5: CLIPModel and SiglipModel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scc_fast.engine.vit import Block, FirstToken, Linear, Tower
from scc_fast.engine.vit_from.parts import (
    block_of,
    blocks_of,
    examine,
    expect,
    fits,
    joined,
    linear_of,
    norm_of,
    packed_of,
    patch_of,
    pool_of,
    require,
    scaled,
)

_CLIP = "transformers.models.clip.modeling_clip.CLIP"
_SIGLIP = "transformers.models.siglip.modeling_siglip.Siglip"
# Before 4.48: a class per attention implementation.
_ATTENTIONS = ("Attention", "SdpaAttention", "FlashAttention2")
# In transformers 4, and in 5.
_TOWERS = ("VisionTransformer", "VisionModel")
_PARTS = (*_TOWERS, *_ATTENTIONS, "VisionEmbeddings", "Encoder", "EncoderLayer", "MLP")


def clip_tower(module: Any, image_size: tuple[int, int], dtype: torch.dtype) -> Tower:
    """Tower of a CLIPModel.

    Raises:
        UnknownPartError: unsupported part.
    """
    vision = module.vision_model
    _examine(vision, _CLIP, ())
    examine(module.visual_projection, "visual_projection", ())
    side, patch, position = _embeddings(vision, image_size, 1, dtype)
    return Tower(
        size=side,
        patch=patch,
        prefix=vision.embeddings.class_embedding.detach().float() + position[:1],
        position=position[1:],
        start=norm_of(vision.pre_layrnorm, torch.float32),
        blocks=blocks_of(
            vision.encoder.layers,
            lambda layer, first: _block(layer, _CLIP, first, dtype),
            first_alone=True,
        ),
        end=FirstToken(
            norm_of(vision.post_layernorm, dtype), linear_of(module.visual_projection, dtype)
        ),
    )


def siglip_tower(module: Any, image_size: tuple[int, int], dtype: torch.dtype) -> Tower:
    """Tower of a SiglipModel of fixed picture size.

    Raises:
        UnknownPartError: unsupported part.
    """
    vision = module.vision_model
    _examine(vision, _SIGLIP, ("MultiheadAttentionPoolingHead",))
    side, patch, position = _embeddings(vision, image_size, 0, dtype)
    require(vision.use_head, "its tower has no attention pool")
    head = vision.head
    expect(head, f"{_SIGLIP}MultiheadAttentionPoolingHead")
    return Tower(
        size=side,
        patch=patch,
        prefix=position[:0],
        position=position,
        start=None,
        blocks=blocks_of(
            vision.encoder.layers,
            lambda layer, _: _block(layer, _SIGLIP, False, dtype),
            first_alone=False,
        ),
        end=pool_of(
            norms=(vision.post_layernorm, head.layernorm),
            probe=head.probe,
            qkv=packed_of(head.attention, batch_first=True),
            heads=head.attention.num_heads,
            out=head.attention.out_proj,
            mlp=_mlp(head.mlp, _SIGLIP),
            projection=None,
            dtype=dtype,
        ),
    )


def _examine(vision: Any, family: str, more: tuple[str, ...]) -> None:
    expect(vision, *(family + name for name in _TOWERS))
    examine(vision, "vision_model", (family + name for name in (*_PARTS, *more)))
    expect(vision.embeddings, f"{family}VisionEmbeddings")
    expect(vision.encoder, f"{family}Encoder")
    asked = vision.config.output_attentions
    require(not asked, "its config has output_attentions=True")


def _embeddings(
    vision: Any, image_size: tuple[int, int], prefix: int, dtype: torch.dtype
) -> tuple[int, Linear, Tensor]:
    """Side of a patch, patch embedding, and positions with `prefix` extra ones."""
    parts = vision.embeddings
    side, patch = patch_of(parts.patch_embedding, dtype)
    table = parts.position_embedding
    expect(table, "torch.nn.modules.sparse.Embedding")
    require(table.max_norm is None, "its position embedding has a max_norm")
    position = table.weight.detach()[parts.position_ids[0]].float()
    fits(image_size, side, len(position) - prefix)
    return side, patch, position


def _mlp(mlp: Any, family: str) -> tuple[Any, Any, Any]:
    expect(mlp, f"{family}MLP")
    return mlp.fc1, mlp.activation_fn, mlp.fc2


def _block(layer: Any, family: str, first: bool, dtype: torch.dtype) -> Block:
    expect(layer, f"{family}EncoderLayer")
    attention = layer.self_attn
    expect(attention, *(family + name for name in _ATTENTIONS))
    chosen = str(attention.config._attn_implementation)
    usual = chosen in ("eager", "sdpa") or chosen.startswith("flash_attention_")
    require(usual, f"its attention is implemented by {chosen!r}")
    require(not getattr(attention, "is_causal", False), "its attention is causal")
    qkv = joined((attention.q_proj, attention.k_proj, attention.v_proj))
    scaled(attention, attention.num_heads, len(qkv[0]) // 3)
    return block_of(
        norms=(layer.layer_norm1, layer.layer_norm2),
        qkv=qkv,
        heads=attention.num_heads,
        out=attention.out_proj,
        mlp=_mlp(layer.mlp, family),
        first=first,
        dtype=dtype,
    )
