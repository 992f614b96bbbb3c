"""The one source of small models, pictures and defenders for the tests."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

import scc_fast
from scc_fast import Defender, DefenseResult, VisionLanguage, tiny
from scc_fast.api import make_defense
from scc_fast.models import hub as _hub

KINDS = ("tiny", "open_clip", "hf_clip", "hf_siglip")
METHODS = ("scc", "ttc", "views", "rn", "none", "extrapolate")
FIVE = ("a photo of a cat", "a photo of a dog", "a drawing of a bee", "a red apple", "a tree")
CONFIG: dict[str, Any] = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 600, "width": 32, "heads": 2, "layers": 1},
}
HF_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
HF_TEXT = {
    "vocab_size": 300,
    "max_position_embeddings": 12,
    "bos_token_id": 298,
    "eos_token_id": 299,
    "pad_token_id": 0,
}


def small_open_clip(**changes: Any) -> nn.Module:
    """A CLIP of a few thousand weights, in train mode, as open_clip builds it."""
    return open_clip.CLIP(**{**CONFIG, **changes})


def small_tokenizer(prompts: list[str]) -> Tensor:
    return _hub.stand_in_tokenizer({"vocab_size": 600, "context_length": 16})(prompts)


class HFTokenizer:
    """The call signature of a transformers tokenizer, on the stand-in's ids.

    Building a SentencePiece vocabulary offline would test SentencePiece; what the adapter owes
    the tokenizer is its arguments, which are recorded here.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.calls: list[dict[str, Any]] = []

    def __call__(self, text: list[str], **options: Any) -> dict[str, Tensor]:
        self.calls.append({**options, "count": len(text)})
        make = _hub.stand_in_tokenizer(
            {"vocab_size": self.vocab_size, "context_length": options["max_length"]}
        )
        ids = make(text)
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def hf_clip() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.CLIPModel(
        transformers.CLIPConfig(
            vision_config={**HF_TOWER, "image_size": 32, "patch_size": 8},
            text_config={**HF_TOWER, **HF_TEXT, "eos_token_id": 299},
            projection_dim=16,
        )
    )


def hf_siglip() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(2)
    model = transformers.SiglipModel(
        transformers.SiglipConfig(
            vision_config={**HF_TOWER, "image_size": 32, "patch_size": 8},
            text_config={**HF_TOWER, **HF_TEXT},
        )
    )
    with torch.no_grad():
        model.logit_scale.fill_(4.7)
        model.logit_bias.fill_(-12.5)
    return model


def hf_image_processor(name: str, **changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    if name == "CLIP":
        sizes: dict[str, Any] = {"size": {"shortest_edge": 32}}
        sizes["crop_size"] = {"height": 32, "width": 32}
        return transformers.CLIPImageProcessor(**{**sizes, **changes})
    sizes = {"size": {"height": 32, "width": 32}}
    return transformers.SiglipImageProcessor(**{**sizes, **changes})


@functools.cache
def model_of(kind: str) -> VisionLanguage:
    """The bundled model, or a random one of 32 pixels behind each adapter."""
    if kind == "tiny":
        return scc_fast.load_model("tiny", device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        if kind == "open_clip":
            return scc_fast.load_model(small_open_clip(), tokenizer=small_tokenizer)
        make, name = (hf_clip, "CLIP") if kind == "hf_clip" else (hf_siglip, "Siglip")
        return scc_fast.load_model(make(), processor=(hf_image_processor(name), HFTokenizer(300)))


def defender_of(kind: str = "tiny", **options: Any) -> Defender:
    return Defender(model_of(kind), tiny.prompts() if kind == "tiny" else FIVE, **options)


def made(spec: str, kind: str = "tiny", **options: Any) -> Any:
    return make_defense(spec, model_of(kind), tiny.prompts() if kind == "tiny" else FIVE, **options)


class Tuned:
    """A model whose encoder was fine-tuned from another: its features are scaled unevenly."""

    def __init__(self, inner: Any) -> None:
        self.inner = self.original = inner
        self.weights = torch.linspace(0.2, 3.0, inner.embed_dim)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.inner.encode_image(pixels) * self.weights


@functools.cache
def _drawn(n: int) -> tuple[Tensor, Tensor]:
    return tiny.generate("test", range(n))


def pictures(kind: str = "tiny", n: int = 4) -> Tensor:
    """(n, 3, H, W) in [0, 1] with some pixels at 0 and at 1, so that the box matters."""
    if kind == "tiny":
        return _drawn(n)[0].clone()
    x = torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(n))
    return (1.2 * x - 0.1).clamp(0, 1)


def assert_same(a: DefenseResult, b: DefenseResult, rows: Sequence[int] | slice = slice(None)):
    """b's rows are a. Two orders of one float sum may turn the sign of a gradient near zero."""
    torch.testing.assert_close(a.logits, b.logits[rows], atol=2e-3, rtol=1e-4)
    torch.testing.assert_close(a.drift, b.drift[rows], atol=1e-5, rtol=1e-4, equal_nan=True)
    assert torch.equal(a.flagged, b.flagged[rows])
    torch.testing.assert_close(a.inputs, b.inputs[rows], atol=1e-6, rtol=0)
    assert ((a.delta - b.delta[rows]).abs() > 1e-6).float().mean() < 2e-3
