"""Our runner for vision transformers: features and input gradients are those of the modules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import scc_fast
from scc_fast.engine import vit
from scc_fast.engine.vit import FirstAttention, Tower, narrow
from scc_fast.engine.vit_from import tower_of
from tower_models import (
    FAMILIES,
    clip_model,
    load,
    open_clip_model,
    perturbed,
    relative,
    rows_of,
    timm_model,
)

# What two layers cost in half precision: relative errors of features and of gradients. Measured
# are at most 0.0066 and 0.011 in bfloat16, 0.0008 and 0.0014 in float16.
HALF = {torch.bfloat16: (1.5e-2, 2.5e-2), torch.float16: (2e-3, 4e-3)}


def taken(model: Any, dtype: torch.dtype = torch.float32) -> Tower:
    tower = tower_of(model, dtype)
    assert isinstance(tower, Tower), tower
    return tower


def modules(model: Any, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels, a gradient of features, and what the modules make of them."""
    generator = torch.Generator().manual_seed(batch)
    pixels = torch.randn(batch, 3, *model.image_size, generator=generator).requires_grad_()
    features = model.encode_image(pixels)
    slope = torch.randn(features.shape, generator=generator)
    (gradient,) = torch.autograd.grad(features, pixels, slope)
    return pixels.detach(), slope, features.detach(), gradient


def leaves(kept: Any) -> list[Tensor]:
    return [kept] if isinstance(kept, Tensor) else [leaf for part in kept for leaf in leaves(part)]


def check(model: Any, batch: int, first: int = 1) -> None:
    """All that is asked of a runner in float32; `first` images are gone back for alone, too."""
    tower = taken(model)
    pixels, slope, features, gradient = modules(model, batch)
    rows = rows_of(pixels, tower.size)
    with torch.no_grad():
        got, kept = tower(rows)
        before = [leaf.clone() for leaf in (rows, slope, *leaves(kept))]
        back = tower.back(slope, kept)
        some = tower.back(slope[:first], narrow(kept, first))
        again = tower.back(slope, kept)
        alone, nothing = tower(rows, keep=False)
    assert relative(got, features) < 1e-5
    assert relative(back, rows_of(gradient, tower.size)) < 1e-5
    assert relative(some, back[:first]) < 2e-6
    after = (rows, slope, *leaves(kept))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "back writes"
    assert torch.equal(back, again)
    assert torch.equal(alone, got)
    assert nothing == ()


REAL = {
    "ViT-B-32-quickgelu": (open_clip_model, 224),
    "ViT-B-32": (open_clip_model, 224),
    "ViT-B-16": (open_clip_model, 224),
    "ViT-L-14": (open_clip_model, 224),
    "vit_base_patch16_siglip_224": (timm_model, 224),  # open_clip's ViT-B-16-SigLIP
    "vit_so400m_patch14_siglip_224": (timm_model, 224),  # ViT-SO400M-14-SigLIP
    "vit_base_patch32_siglip_256": (timm_model, 256),  # ViT-B-32-SigLIP2-256
}


@pytest.mark.parametrize("name", REAL)
def test_real_widths(name: str) -> None:
    make, side = REAL[name]
    model = load(perturbed(make(name)))
    assert model.image_size == (side, side)
    check(model, 2)


@pytest.mark.parametrize("batch", [1, 2, 17])
@pytest.mark.parametrize("family", FAMILIES)
def test_small_ones(family: str, batch: int) -> None:
    check(load(perturbed(FAMILIES[family]())), batch, first=(batch + 1) // 2)


@pytest.mark.parametrize("batch", [1, 17])
def test_the_bundled_model(batch: int) -> None:
    check(scc_fast.load_model("tiny"), batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_layer(family: str) -> None:
    check(load(perturbed(FAMILIES[family](layers=1))), 3)


def test_the_last_block_of_clip_is_for_one_token() -> None:
    for family, make in FAMILIES.items():
        kinds = [type(block.attention) is FirstAttention for block in taken(load(make())).blocks]
        assert kinds == [False, family in ("open_clip", "clip")]


VARIANTS: dict[str, Any] = {
    "no norm before": lambda: open_clip_model(no_ln_pre=True),
    "norm after pool": lambda: open_clip_model(final_ln_after_pool=True),
    "oblong": lambda: open_clip_model(image_size=(32, 48)),
    "sines": lambda: open_clip_model(pos_embed_type="sin_cos_2d"),
    "tanh": lambda: timm_model(act_layer="gelu_tanh"),
    "quick in timm": lambda: timm_model(act_layer="quick_gelu"),
    "no bias of q, k, v": lambda: timm_model(qkv_bias=False),
    "projection": lambda: timm_model(proj="linear", embed_dim=24),
    "classifier": lambda: timm_model(num_classes=24, embed_dim=24),
    "gelu": lambda: clip_model(hidden_act="gelu"),
    "gelu_new": lambda: clip_model(hidden_act="gelu_new"),
    "gelu_pytorch_tanh": lambda: clip_model(hidden_act="gelu_pytorch_tanh"),
}


@pytest.mark.parametrize("name", list(VARIANTS))
def test_variants(name: str) -> None:
    model = VARIANTS[name]()
    if name == "projection":
        width = model.visual.trunk.embed_dim
        model.visual.head.proj = torch.nn.Linear(width, 24, bias=False)
    check(load(perturbed(model)), 2)


def test_without_a_projection() -> None:
    model = perturbed(open_clip_model(embed_dim=64))
    model.visual.proj = None  # type: ignore[union-attr]
    check(load(model), 2)


@pytest.mark.parametrize("chosen", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_implementations_of_attention(family: str, chosen: str) -> None:
    model: Any = perturbed(FAMILIES[family]())
    model.set_attn_implementation(chosen)
    check(load(model), 2)


@pytest.mark.parametrize("dtype", list(HALF))
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision(family: str, dtype: torch.dtype) -> None:
    model = load(perturbed(FAMILIES[family]()))
    tower = taken(model, dtype)
    pixels, slope, features, gradient = modules(model, 17)
    with torch.no_grad():
        got, kept = tower(rows_of(pixels, tower.size).to(dtype))
        back = tower.back(slope, kept)
        some = tower.back(slope[:4], narrow(kept, 4))
    assert (got.dtype, back.dtype, tower.dtype) == (torch.float32, dtype, dtype)
    want = rows_of(gradient, tower.size)
    cosine = F.cosine_similarity(back.double().flatten(1), want.double().flatten(1))
    assert relative(got, features) < HALF[dtype][0]
    assert relative(back, want) < HALF[dtype][1]
    assert cosine.min() > 0.999
    assert relative(some, back[:4]) < HALF[dtype][1]


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_weights_in_a_float32_runner(family: str) -> None:
    """Only the weights are rounded."""
    original = perturbed(FAMILIES[family]())
    half = original.bfloat16()
    wide = load(copy.deepcopy(half).float())
    tower = taken(load(half))
    pixels, _, features, _ = modules(wide, 2)
    with torch.no_grad():
        got, _ = tower(rows_of(pixels, tower.size))
    assert relative(got, features) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_without_onednn_and_with_plain_attention(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a device that has neither it, nor our op, nor flash kernels."""
    monkeypatch.setattr(vit, "has_onednn", lambda dtype: False)
    monkeypatch.setattr(vit, "kernel_of", lambda *_: "plain")
    check(load(perturbed(FAMILIES[family]())), 2)
