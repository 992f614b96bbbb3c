"""Our runner for vision transformers: features and input gradients are those of the modules."""

from __future__ import annotations

import warnings
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import scc_fast
from scc_fast.api import Defender
from scc_fast.engine import eager, vit
from scc_fast.engine.vit import Tower, tower_of

# Real widths, depth cut: (config name, layers kept).
NAMES = ["ViT-B-32-quickgelu", "ViT-B-32", "ViT-B-16", "ViT-L-14"]


def cut(name: str, layers: int = 2) -> Any:
    """An open_clip model of real width with random weights and few layers, as scc_fast holds it."""
    config = open_clip.get_model_config(name)
    config["vision_cfg"]["layers"] = layers
    config["text_cfg"]["layers"] = 1
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quick = bool(config.pop("quick_gelu", False))
        model = open_clip.CLIP(**config, quick_gelu=quick)
        return scc_fast.load_model(model, tokenizer=open_clip.get_tokenizer(name))


def rows_of(pixels: Tensor, size: int) -> Tensor:
    return F.unfold(pixels, size, stride=size).transpose(1, 2).contiguous()


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.detach().norm())


def check(model: Any, batch: int) -> None:
    tower = tower_of(model)
    assert isinstance(tower, Tower), tower
    generator = torch.Generator().manual_seed(batch)
    pixels = torch.randn(batch, 3, *model.image_size, generator=generator).requires_grad_()
    features = model.encode_image(pixels)
    slope = torch.randn(features.shape, generator=generator)
    (want,) = torch.autograd.grad(features, pixels, slope)
    with torch.no_grad():
        got, kept = tower(rows_of(pixels, tower.size))
        gradient = tower.back(slope, kept)
        again = tower.back(slope, kept)
    assert relative(got, features.detach()) < 1e-5
    assert relative(gradient, rows_of(want, tower.size)) < 1e-5
    assert torch.equal(gradient, again), "the way back changes what it reads"


@pytest.mark.parametrize("batch", [1, 17])
def test_the_bundled_model(batch: int) -> None:
    check(scc_fast.load_model("tiny"), batch)


@pytest.mark.parametrize("name", NAMES)
def test_real_widths(name: str) -> None:
    check(cut(name), 2)


def test_one_layer() -> None:
    check(cut("ViT-B-32", layers=1), 3)


def test_what_the_runner_does_not_know_is_left_to_the_modules() -> None:
    """And asking for it by name says why."""
    model = scc_fast.load_model("tiny")
    handle = model.module.visual.transformer.resblocks[0].register_forward_hook(lambda *_: None)
    try:
        assert "parts that the runner does not know" in str(tower_of(model))
        assert Defender(model, ["a", "b"]).engine == "eager"
        with pytest.raises(RuntimeError, match=r"engine='runner' cannot serve .*does not know"):
            Defender(model, ["a", "b"], engine="runner")
    finally:
        handle.remove()
    model.module.visual.transformer.resblocks[0].ls_1 = nn.Dropout(0.0)
    assert isinstance(tower_of(model), str)
    half = scc_fast.load_model("tiny", precision="bf16")
    assert tower_of(half) == "its weights are not float32"
    assert "is not open_clip's" in str(tower_of(object()))
    with pytest.raises(RuntimeError, match="backend='reference'"):
        eager.runner_of(scc_fast.load_model("tiny"), "runner", "reference")


def test_new_weights_are_seen_by_a_new_defender() -> None:
    """Nothing is kept of a model but its own storage."""
    model = scc_fast.load_model("tiny")
    tower = tower_of(model)
    assert isinstance(tower, Tower)
    weight = model.module.visual.transformer.resblocks[0].mlp.c_fc.weight
    assert tower.blocks[0].mlp.up.weight.data_ptr() == weight.data_ptr()


class Adapted(nn.Linear):
    """A linear layer with an adapter beside it, as LoRA has it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * x.mean()


def test_an_adapter_or_a_changed_forward_is_not_passed_over() -> None:
    model = scc_fast.load_model("tiny")
    mlp = model.module.visual.transformer.resblocks[1].mlp
    plain, mlp.c_fc = mlp.c_fc, Adapted(mlp.c_fc.in_features, mlp.c_fc.out_features)
    assert isinstance(tower_of(model), str)
    mlp.c_fc = plain
    assert isinstance(tower_of(model), Tower)
    plain.forward = lambda x: x
    assert isinstance(tower_of(model), str)


def test_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vit, "_has_onednn", lambda: False)
    check(scc_fast.load_model("tiny"), 2)
