"""Small and cut models of the families that the runner serves, with no trivial weight."""

from __future__ import annotations

import warnings
from typing import Any

import open_clip
import timm
import torch
import torch.nn.functional as F
import transformers
from open_clip.timm_model import TimmModel
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import scc_fast
from scc_fast.engine.vit_from import tower_of

SIDE = 32  # of the small models' pictures, in patches of 8
_TEXT = {"context_length": 8, "vocab_size": 300, "width": 32, "heads": 2, "layers": 1}
_VISION = {"image_size": SIDE, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8}
_HF_TEXT = {"vocab_size": 300, "max_position_embeddings": 8}
_HF_TEXT |= {"bos_token_id": 298, "eos_token_id": 299}
_HF_SMALL = {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2}
_HF_SMALL |= {"num_attention_heads": 4}


class Tokens:
    """A tokenizer as open_clip and transformers call theirs; the text is not looked at."""

    def __call__(self, prompts: list[str], **options: Any) -> Any:
        ids = torch.ones(len(prompts), 8, dtype=torch.long)
        return {"input_ids": ids} if options else ids


def load(model: nn.Module) -> Any:
    """As scc_fast holds it."""
    if not isinstance(model, transformers.PreTrainedModel):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return scc_fast.load_model(model, tokenizer=Tokens())
    side = model.config.vision_config.image_size
    size = {"height": side, "width": side}
    images: Any = transformers.SiglipImageProcessor(size=size)
    if isinstance(model, transformers.CLIPModel):
        images = transformers.CLIPImageProcessor(size={"shortest_edge": side}, crop_size=size)
    return scc_fast.load_model(model, processor=(images, Tokens()))


def perturbed(model: nn.Module) -> nn.Module:
    """Zero biases, unit norms and equal epsilons would hide a part that is left out or swapped."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.2 if parameter.ndim < 2 else 0.5 * float(parameter.std()) + 0.01
            parameter.add_(spread * torch.randn_like(parameter))
    norms = [part for part in model.modules() if isinstance(part, nn.LayerNorm)]
    for i, norm in enumerate(norms):
        norm.eps = 1e-3 * (1 + i % 5)
    return model


def open_clip_model(
    name: str = "", layers: int = 2, *, embed_dim: int = 48, **vision: Any
) -> nn.Module:
    """By its name a model of real width, cut; without, a small one."""
    config: dict[str, Any] = {"embed_dim": embed_dim, "vision_cfg": dict(_VISION)}
    config["quick_gelu"] = True
    if name:
        config = open_clip.get_model_config(name)
    config["vision_cfg"] |= {"layers": layers, **vision}
    return open_clip.CLIP(**{**config, "text_cfg": _TEXT})


def timm_model(
    name: str = "", layers: int = 2, *, proj: str = "none", embed_dim: int = 0, **trunk: Any
) -> nn.Module:
    """The same for SigLIP in timm."""
    options = {"num_classes": 0, "global_pool": "map", "depth": layers, **trunk}
    if name:
        made = timm.create_model(name, **options)
    else:
        small = {"img_size": SIDE, "patch_size": 8, "embed_dim": 64, "num_heads": 4}
        made = VisionTransformer(**{**small, "class_token": False, **options})
    vision = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": proj}
    model = open_clip.CustomTextCLIP(
        embed_dim or made.embed_dim, vision, _TEXT, init_logit_bias=-10.0
    )
    visual = model.visual
    assert isinstance(visual, TimmModel)
    visual.trunk, visual.image_size = made, made.patch_embed.img_size
    return model


def clip_model(layers: int = 2, **vision: Any) -> nn.Module:
    """transformers' CLIPModel, small."""
    sizes = {**_HF_SMALL, "num_hidden_layers": layers, "image_size": SIDE, "patch_size": 8}
    return transformers.CLIPModel(
        transformers.CLIPConfig(
            vision_config={**sizes, **vision},
            text_config={**_HF_SMALL, **_HF_TEXT},
            projection_dim=48,
        )
    )


def siglip_model(layers: int = 2, **vision: Any) -> nn.Module:
    """transformers' SiglipModel, small."""
    sizes = {**_HF_SMALL, "num_hidden_layers": layers, "image_size": SIDE, "patch_size": 8}
    return transformers.SiglipModel(
        transformers.SiglipConfig(
            vision_config={**sizes, **vision}, text_config={**_HF_SMALL, **_HF_TEXT}
        )
    )


FAMILIES: dict[str, Any] = {
    "open_clip": open_clip_model,
    "timm": timm_model,
    "clip": clip_model,
    "siglip": siglip_model,
}


def rows_of(pixels: Tensor, size: int) -> Tensor:
    """Patches as the runner takes them."""
    return F.unfold(pixels, size, stride=size).transpose(1, 2).contiguous()


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.detach().double().norm())


def refused(model: Any, *why: str) -> None:
    """The runner does not take it, and says all of this."""
    reason = tower_of(model)
    assert isinstance(reason, str), "taken"
    for word in why:
        assert word in reason, reason
