"""What open_clip, timm and transformers offer besides: the runner leaves it to the modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import torch
from timm.layers import AttentionPoolLatent
from torch import nn

from scc_fast.engine.vit import Tower
from scc_fast.engine.vit_from import tower_of
from tower_models import clip_model, load, open_clip_model, refused, siglip_model, timm_model


@pytest.mark.parametrize(
    ("vision", "why"),
    [
        ({"ls_init_value": 0.1}, "LayerScale"),
        ({"patch_dropout": 0.5}, "PatchDropout"),
        ({"pool_type": "avg"}, "pool_type='avg'"),
        ({"attentional_pool": True}, "AttentionalPooler"),
        ({"block_type": "custom"}, "CustomResidualAttentionBlock"),
        ({"qk_norm": True}, "CustomResidualAttentionBlock"),
        ({"layers": 0}, "no blocks"),
        ({"layers": [1, 1, 1, 1]}, "open_clip.modified_resnet.ModifiedResNet is not"),
    ],
)
def test_open_clip_variants(vision: dict[str, Any], why: str) -> None:
    refused(load(open_clip_model(**vision)), why)


def test_open_clip_parts() -> None:
    model = load(open_clip_model())
    visual = model.module.visual
    visual.output_tokens = True
    refused(model, "output_tokens=True")
    visual.output_tokens = False
    block = visual.transformer.resblocks[0]
    for owner, name, new in (
        (visual, "conv1", nn.Conv2d(3, 64, 8, stride=8, padding=4)),
        (visual, "conv1", nn.Conv2d(3, 64, 8, stride=4)),
        (visual, "conv1", nn.Identity()),
        (visual, "transformer", nn.Identity()),
        (block, "ls_1", nn.Linear(64, 64)),
        (block, "mlp", nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))),
        (block, "attn", nn.MultiheadAttention(64, 4, batch_first=False)),
        (block, "attn", nn.MultiheadAttention(64, 4, add_bias_kv=True, batch_first=True)),
        (block, "attn", nn.MultiheadAttention(64, 4, add_zero_attn=True, batch_first=True)),
        (block, "attn", nn.MultiheadAttention(64, 4, kdim=32, batch_first=True)),
    ):
        plain = getattr(owner, name)
        setattr(owner, name, new.eval())
        refused(model)
        setattr(owner, name, plain)
        assert isinstance(tower_of(model), Tower)


@pytest.mark.parametrize(
    ("trunk", "why"),
    [
        ({"qk_norm": True}, "q_norm"),
        ({"scale_attn_norm": True}, "has norm"),
        ({"scale_mlp_norm": True}, "Mlp has norm"),
        ({"init_values": 0.1}, "LayerScale"),
        ({"drop_path_rate": 0.1}, "DropPath"),
        ({"patch_drop_rate": 0.1}, "PatchDropout"),
        ({"class_token": True}, "cls_token"),
        ({"reg_tokens": 2}, "reg_token"),
        ({"pre_norm": True}, "norm_pre"),
        ({"pos_embed": "none"}, "no position embedding"),
        ({"dynamic_img_size": True}, "resizes the position embedding"),
        ({"global_pool": "avg"}, "fc_norm"),
        ({"global_pool": "avg", "fc_norm": False}, "global_pool='avg'"),
        ({"final_norm": False}, "Identity is not "),
        ({"act_layer": "silu"}, "SiLU"),
    ],
)
def test_timm_variants(trunk: dict[str, Any], why: str) -> None:
    refused(load(timm_model(**trunk)), why)


def test_timm_parts() -> None:
    refused(load(timm_model(proj="mlp")), "Mlp")
    two = load(timm_model(proj="linear"))
    two.module.visual.trunk.head = nn.Linear(64, 64).eval()
    refused(two, "its head is made of ")
    for options, why in (
        ({"latent_len": 2}, "2 queries"),
        ({"qk_norm": True}, "q_norm"),
        ({"pos_embed": "abs", "feat_size": 16}, "pos_embed"),
        ({"pool_type": "avg"}, "pool='avg'"),
        ({"num_heads": 4, "out_features": 0}, "NoneType is not "),
    ):
        model: Any = timm_model()
        full = {"num_heads": 4, "norm_layer": nn.LayerNorm, **options}
        model.visual.trunk.attn_pool = AttentionPoolLatent(64, **full)
        refused(load(model), why)
    model = timm_model()
    model.visual.trunk.blocks[0].attn.scale = 0.5
    refused(load(model), "scale 0.5")
    model = timm_model()
    model.visual.head = nn.Linear(64, 64)
    refused(load(model), "Linear is not torch.nn.modules.container.Sequential")
    model = timm_model()
    model.visual.trunk.blocks[0].attn.gate = nn.Linear(64, 64)
    refused(load(model), "has gate")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("", "pos_drop"),
        ("", "head_drop"),
        ("blocks.0.attn", "attn_drop"),
        ("blocks.0.attn", "proj_drop"),
        ("blocks.0.mlp", "drop1"),
        ("blocks.0.mlp", "drop2"),
        ("attn_pool", "proj_drop"),
    ],
)
def test_timm_dropouts(path: str, name: str) -> None:
    """They are known, and something else in their place is not passed over."""
    model = load(timm_model())
    part = model.module.visual.trunk.get_submodule(path)
    assert type(getattr(part, name)) is nn.Dropout
    setattr(part, name, nn.Linear(64, 64).eval())
    refused(model, f"has {name}: torch.nn.modules.linear.Linear")


@pytest.mark.parametrize("make", [clip_model, siglip_model])
def test_transformers_parts(make: Any) -> None:
    for activation, why in (("relu", "ReLU"), ("gelu_10", "ClippedGELUActivation")):
        refused(load(make(hidden_act=activation)), why)
    refused(load(make(num_hidden_layers=0)), "no blocks")

    def changed(change: Callable[[Any], None], why: str) -> None:
        model = load(make())
        change(model.module.vision_model)
        refused(model, why)

    def flexible(tower: Any) -> None:
        tower.config._attn_implementation = "flex_attention"

    def set_attention(key: str, value: Any) -> Callable[[Any], None]:
        return lambda tower: setattr(tower.encoder.layers[1].self_attn, key, value)

    def without_bias(tower: Any) -> None:
        tower.encoder.layers[0].self_attn.k_proj.bias = None

    def attentions_asked_for(tower: Any) -> None:
        tower.config._attn_implementation = "eager"
        tower.config.output_attentions = True

    def without_encoder(tower: Any) -> None:
        tower.encoder = nn.Sequential().eval()

    def without_scale(tower: Any) -> None:
        del tower.encoder.layers[1].self_attn.scale

    def with_max_norm(tower: Any) -> None:
        tower.embeddings.position_embedding.max_norm = 1.0

    changed(flexible, "'flex_attention'")
    changed(attentions_asked_for, "output_attentions=True")
    changed(set_attention("scale", 1.0), "scale 1.0")
    changed(set_attention("is_causal", True), "causal")
    changed(set_attention("q_norm", nn.RMSNorm(16).eval()), "RMSNorm")
    changed(without_bias, "some have none")
    changed(without_encoder, "Sequential is not ")
    changed(without_scale, "no attribute 'scale'")
    changed(with_max_norm, "max_norm")


def test_siglip_without_its_head() -> None:
    model = load(siglip_model())
    model.module.vision_model.use_head = False
    refused(model, "no attention pool")
    model = load(siglip_model())
    model.module.vision_model.head.probe = nn.Parameter(torch.zeros(1, 2, 64))
    refused(model, "2 queries")


def test_other_models() -> None:
    coca = {"image_size": 32, "layers": 1, "width": 64, "head_width": 16, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 300, "width": 32, "heads": 2, "layers": 1}
    model = open_clip.CoCa(
        48,
        {"width": 48, "heads": 2, "layers": 1, "context_length": 8, "vocab_size": 300},
        text,
        coca,
    )
    at = load(open_clip_model())
    at.module = model.eval()
    refused(at, "open_clip.coca_model.CoCa is not")
