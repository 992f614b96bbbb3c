"""Towers of open_clip: VisionTransformer, and timm's for SigLIP."""

from __future__ import annotations

from typing import Any

import torch

from scc_fast.engine.vit import Block, FirstToken, Linear, Tower
from scc_fast.engine.vit_from.parts import (
    absent,
    block_of,
    blocks_of,
    does_nothing,
    examine,
    expect,
    fits,
    joined,
    name_of,
    norm_of,
    packed_of,
    patch_of,
    pool_of,
    require,
    scaled,
    weights_of,
)

_OWN = "open_clip.transformer.VisionTransformer"
_TIMM = "open_clip.timm_model.TimmModel"
_BLOCK = "open_clip.transformer.ResidualAttentionBlock"
_LAYERS = "open_clip.transformer.Transformer"
_PARTS = (_OWN, _BLOCK, _LAYERS)
_TIMM_TRUNK = "timm.models.vision_transformer.VisionTransformer"
_TIMM_BLOCK = "timm.models.vision_transformer.Block"
_TIMM_ATTENTION = (  # newer and older timm
    "timm.layers.attention.Attention",
    "timm.models.vision_transformer.Attention",
)
_TIMM_POOL = "timm.layers.attention_pool.AttentionPoolLatent"
_TIMM_MLP = "timm.layers.mlp.Mlp"
_TIMM_PATCHES = "timm.layers.patch_embed.PatchEmbed"
_TIMM_PARTS = (
    _TIMM,
    _TIMM_TRUNK,
    _TIMM_BLOCK,
    *_TIMM_ATTENTION,
    _TIMM_POOL,
    _TIMM_MLP,
    _TIMM_PATCHES,
)


def open_clip_tower(module: Any, image_size: tuple[int, int], dtype: torch.dtype) -> Tower:
    """Tower of a CLIP or CustomTextCLIP.

    Raises:
        UnknownPartError: unsupported part.
    """
    visual = module.visual
    expect(visual, _OWN, _TIMM)
    if name_of(visual) == _TIMM:
        return _timm_tower(visual, image_size, dtype)
    examine(visual, "visual", _PARTS)
    expect(visual.transformer, _LAYERS)
    absent(visual, "attn_pool", "patch_dropout")
    tokens = f"pool_type={visual.pool_type!r}, output_tokens={visual.output_tokens}"
    require(visual.pool_type == "tok" and not visual.output_tokens, f"its tower has {tokens}")
    side, patch = patch_of(visual.conv1, dtype)
    position = visual.positional_embedding.detach().float()
    fits(image_size, side, len(position) - 1)
    batch_first = visual.transformer.batch_first
    projection = None if visual.proj is None else Linear.of(visual.proj.detach().T, None, dtype)
    return Tower(
        size=side,
        patch=patch,
        prefix=visual.class_embedding.detach().float() + position[:1],
        position=position[1:],
        start=None if does_nothing(visual.ln_pre) else norm_of(visual.ln_pre, torch.float32),
        blocks=blocks_of(
            visual.transformer.resblocks,
            lambda block, first: _block(block, batch_first, first, dtype),
            first_alone=True,
        ),
        end=FirstToken(norm_of(visual.ln_post, dtype), projection),
    )


def _block(block: Any, batch_first: bool, first: bool, dtype: torch.dtype) -> Block:
    expect(block, _BLOCK)
    absent(block, "ls_1", "ls_2", "ln_1_kv")
    layers = list(block.mlp.named_children())
    names = [name for name, _ in layers]
    require(names == ["c_fc", "gelu", "c_proj"], f"an mlp is made of {', '.join(names)}")
    qkv = packed_of(block.attn, batch_first)
    return block_of(
        norms=(block.ln_1, block.ln_2),
        qkv=qkv,
        heads=block.attn.num_heads,
        out=block.attn.out_proj,
        mlp=(block.mlp.c_fc, block.mlp.gelu, block.mlp.c_proj),
        first=first,
        dtype=dtype,
    )


# ------------------------------------------------------------------------------------------- timm


def _timm_tower(visual: Any, image_size: tuple[int, int], dtype: torch.dtype) -> Tower:
    examine(visual, "visual", _TIMM_PARTS)
    trunk = visual.trunk
    expect(trunk, _TIMM_TRUNK)
    expect(trunk.patch_embed, _TIMM_PATCHES)
    absent(trunk, "cls_token", "reg_token", "pos_drop", "patch_drop", "norm_pre")
    absent(trunk, "fc_norm", "head_drop")
    absent(trunk.patch_embed, "norm")
    require(trunk.pos_embed is not None, "its trunk adds no position embedding")
    fixed = not trunk.dynamic_img_size and trunk.patch_embed.flatten
    require(fixed, "its trunk resizes the position embedding")
    require(trunk.attn_pool is not None, f"its trunk has global_pool={trunk.global_pool!r}")
    side, patch = patch_of(trunk.patch_embed.proj, dtype)
    position = trunk.pos_embed[0].detach().float()
    fits(image_size, side, len(position))
    pool = trunk.attn_pool
    expect(pool, _TIMM_POOL)
    absent(pool, "pos_embed", "q_norm", "k_norm", "proj_drop")
    require(pool.pool == "token", f"its attention pool has pool={pool.pool!r}")
    scaled(pool, pool.num_heads, weights_of(pool.kv)[0].shape[0] // 2)
    return Tower(
        size=side,
        patch=patch,
        prefix=position[:0],
        position=position,
        start=None,
        blocks=blocks_of(
            trunk.blocks, lambda block, _: _timm_block(block, dtype), first_alone=False
        ),
        end=pool_of(
            norms=(trunk.norm, pool.norm),
            probe=pool.latent,
            qkv=joined((pool.q, pool.kv)),
            heads=pool.num_heads,
            out=pool.proj,
            mlp=_timm_mlp(pool.mlp),
            projection=_timm_projection(visual),
            dtype=dtype,
        ),
    )


def _timm_projection(visual: Any) -> Any:
    """Linear layer after the pool, or None."""
    expect(visual.head, "torch.nn.modules.container.Sequential")
    parts = (visual.trunk.head, *visual.head)
    found = [part for part in parts if not does_nothing(part)]
    require(len(found) < 2, f"its head is made of {', '.join(map(name_of, found))}")
    return found[0] if found else None


def _timm_mlp(mlp: Any) -> tuple[Any, Any, Any]:
    expect(mlp, _TIMM_MLP)
    absent(mlp, "drop1", "norm", "drop2")
    return mlp.fc1, mlp.act, mlp.fc2


def _timm_block(block: Any, dtype: torch.dtype) -> Block:
    expect(block, _TIMM_BLOCK)
    absent(block, "ls1", "ls2", "drop_path1", "drop_path2")
    attention = block.attn
    expect(attention, *_TIMM_ATTENTION)
    absent(attention, "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj_drop")
    qkv = weights_of(attention.qkv)
    scaled(attention, attention.num_heads, len(qkv[0]) // 3)
    return block_of(
        norms=(block.norm1, block.norm2),
        qkv=qkv,
        heads=attention.num_heads,
        out=attention.proj,
        mlp=_timm_mlp(block.mlp),
        first=False,
        dtype=dtype,
    )
