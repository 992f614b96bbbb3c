"""What is handed over as a model or a tokenizer: taken, or refused in words."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import scc_fast
from scc_fast import Defender, load_model
from scc_fast._warn import warn
from toys import FIVE, HF_TEXT, HF_TOWER, hf_clip, model_of, small_open_clip, small_tokenizer

X = torch.full((2, 3, 32, 32), 0.3)


def tokens(prompts: list[str], max_length: int = 12, **_: Any) -> dict[str, Tensor]:
    """As transformers' tokenizers are called: a row fills the length that is asked for."""
    ids = torch.full((len(prompts), max_length), 7)
    ids[:, 0] = torch.tensor([2 + len(prompt) for prompt in prompts])
    ids[:, -1] = 299
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def logits(model: Any, **options: Any) -> Tensor:
    return Defender(load_model(model, **options), FIVE, method="none")(X).logits


# ---------------------------------------------------------------------------------------- wrappers


class Averaged(nn.Module):
    """Somebody's own wrapper, whose forward may do anything."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        AveragedModel,
        torch.compile,
        lambda model: AveragedModel(nn.DataParallel(model)),
        lambda model: torch.compile(nn.DataParallel(AveragedModel(model))),
    ],
)
def test_wrappers_are_taken_off(wrap: Any) -> None:
    model = small_open_clip()
    want = logits(model, tokenizer=small_tokenizer)
    assert torch.equal(logits(wrap(model), tokenizer=small_tokenizer), want)
    inside = copy.deepcopy(model)
    inside.visual = wrap(inside.visual)
    loaded: Any = load_model(inside, tokenizer=small_tokenizer)
    assert torch.equal(Defender(loaded, FIVE, method="none")(X).logits, want)
    assert type(loaded.module.visual) is type(model.visual)
    assert type(inside.visual) is not type(model.visual)  # the caller's stays wrapped


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (torch.jit.script, "TorchScript.*jit=False"),
        (
            lambda model: torch.jit.trace_module(
                model, {"encode_image": X, "encode_text": small_tokenizer(["a"])}
            ),
            "TorchScript",
        ),
        (
            lambda model: torch.ao.quantization.quantize_dynamic(model, {nn.Linear}),
            "quantized.*as it was before",
        ),
        (lambda model: model.double(), r"torch.float64.*model.float\(\), .half\(\) or .bfloat16"),
        (lambda model: model.to(torch.float8_e4m3fn), r"torch.float8_e4m3fn.*model.float\(\)"),
        (lambda model: model.to(torch.complex64), r"torch.complex64.*model.float\(\)"),
        (lambda model: model.to("meta"), "meta device"),
    ],
)
def test_weights_that_cannot_be_used(make: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^model: .*{words}") as caught:
        load_model(make(small_open_clip()), tokenizer=small_tokenizer)
    assert len(str(caught.value)) < 300


def test_whole_numbers_as_weights() -> None:
    model: Any = small_open_clip()
    weight = model.visual.conv1.weight
    model.visual.conv1.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"visual.conv1.weight is torch.int8, quantized"):
        load_model(model, tokenizer=small_tokenizer)


def test_a_part_in_another_type() -> None:
    model: Any = small_open_clip()
    want = logits(model, tokenizer=small_tokenizer)
    text_only: Any = copy.deepcopy(model)
    text_only.visual.bfloat16()  # a whole tower: its pictures are cast
    torch.testing.assert_close(
        logits(text_only, tokenizer=small_tokenizer), want, atol=0.2, rtol=0.05
    )
    model.visual.transformer.double()
    with pytest.raises(TypeError, match=r"visual.transformer.*torch.float64.*model.float\(\)"):
        load_model(model, tokenizer=small_tokenizer)
    model.visual.transformer.half()
    with pytest.raises(ValueError, match=r"model: its image tower .* fails: .*model.float\(\)"):
        load_model(model, tokenizer=small_tokenizer)


# ---------------------------------------------------------------------------------- no model at all


def _things() -> dict[str, tuple[Any, str]]:
    model, tiny = small_open_clip(), model_of("tiny")
    defender = Defender(tiny, FIVE)
    pipeline = type("Pipeline", (), {})()
    pipeline.model, pipeline.tokenizer, pipeline.image_processor = model, tokens, None
    near = type("Near", (), {"encode_image": None, "encode_text": None, "name": "near"})()
    return {
        "triple": ((model, None, None), r"a tuple of 3, as open_clip.create_model.*model\[0\]"),
        "pair": ([model, None], r"a list of 2, .*model\[0\]"),
        "state dict": (model.state_dict(), "state dict.*pretrained="),
        "checkpoint": ({"epoch": 1}, "state dict.*pretrained="),
        "class": (open_clip.CLIP, "the class CLIP; pass an object"),
        "Defender": (defender, r"Defender; pass the model in it, \.model"),
        "DefendedCLIP": (scc_fast.DefendedCLIP(defender), r"in it, \.defender\.model"),
        "pipeline": (pipeline, r"in it, \.model, and processor=\(its .image_processor"),
        "own wrapper": (Averaged(model), r"Averaged; pass the model in it, \.clip"),
        "nothing": (None, "a name, a folder or a model is needed, got NoneType$"),
        "number": (4, "a model is needed, got int: 4"),
        "function": (lambda: model, "a model is needed, got function"),
        "prompts": (list(FIVE), "a model is needed, got list"),
        "pictures": (X, r"a model is needed, got Tensor: Tensor of shape \(2, 3, 32, 32\)"),
        "image processor": (transformers.CLIPImageProcessor(), "as processor="),
        "nearly one": (near, "as a VisionLanguage it lacks source, .* and .* more"),
        "image tower": (model.visual, "VisionTransformer is neither an open_clip model"),
        "no parameters": (nn.ReLU(), "ReLU has no parameters"),
    }


def test_what_is_no_model_is_named() -> None:
    for name, (thing, words) in _things().items():
        for take in (load_model, lambda model: Defender(model, FIVE)):
            with pytest.raises(TypeError, match=f"^model: .*{words}") as caught:
                take(thing)
            assert len(str(caught.value)) < 300, name


# ----------------------------------------------------------------------------------- transformers


def test_tuples_for_outputs() -> None:
    model: Any = hf_clip()
    want = logits(model, processor=(None, tokens))
    model.config.return_dict = False
    assert torch.equal(logits(model, processor=(None, tokens)), want)
    assert model.config.return_dict is False


def _family(name: str, **more: Any) -> Any:
    vision = {**HF_TOWER, "image_size": 32, "patch_size": 8, "projection_dim": 16}
    config = getattr(transformers, f"{name}Config")(
        vision_config=vision, text_config={**HF_TOWER, **HF_TEXT, **more}, projection_dim=16
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{name}Model")(config).eval()


@pytest.mark.parametrize(
    ("name", "more", "length"),
    [("AltCLIP", {"project_dim": 16}, 11), ("ChineseCLIP", {}, 12), ("CLIPSeg", {}, 12)],
)
def test_other_clips_score_as_they_do_themselves(
    name: str, more: dict[str, Any], length: int
) -> None:
    """AltCLIP's positions begin after the padding's, so that it reads one token less (id 0)."""
    model = _family(name, **more)
    loaded: Any = load_model(model, processor=(None, tokens))
    assert loaded.text_size().length == length
    inputs = tokens(list(FIVE), length)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        want = model(pixel_values=pixels, **inputs).logits_per_image
        image = nn.functional.normalize(loaded.encode_image(pixels), dim=-1)
    got = loaded.logit_scale * image @ loaded.encode_text(FIVE).T
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_a_kind_that_scores_in_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _family("ChineseCLIP")
    forward = type(model).forward

    def squared(self: Any, **inputs: Any) -> Any:
        output = forward(self, **inputs)
        output.logits_per_image = output.logits_per_image**2
        return output

    monkeypatch.setattr(type(model), "forward", squared)
    with pytest.raises(ValueError, match="ChineseCLIPModel's own logits are not those of its feat"):
        load_model(model, processor=(None, tokens))


def test_parts_of_a_transformers_model() -> None:
    config = hf_clip().config
    vision: Any = transformers.CLIPVisionModelWithProjection(config.vision_config)  # type: ignore
    text: Any = transformers.CLIPTextModelWithProjection(config.text_config)  # type: ignore
    classifier: Any = transformers.CLIPForImageClassification(config)  # type: ignore[arg-type]
    for part, lacks in ((vision, "text"), (classifier, "text"), (text, "image")):
        words = f"{type(part).__name__} has no {lacks} tower; pass the whole model, .*CLIPModel"
        with pytest.raises(TypeError, match=words):
            load_model(part, processor=(None, tokens))
    align: Any = hf_clip()
    del align.logit_scale
    with pytest.raises(TypeError, match="CLIPModel has no logit_scale; "):
        load_model(align, processor=(None, tokens))


# -------------------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        (lambda p: small_tokenizer(p)[:1], r"one row of ids for each prompt, \(5, length\)"),
        (lambda p: small_tokenizer(p).repeat(2, 1), r"one row of ids for each prompt"),
        (lambda p: small_tokenizer(p)[0], "one row of ids for each prompt"),
        (lambda p: small_tokenizer(p)[:, :12], "gives 12 ids a prompt.* context length is 16"),
        (lambda p: small_tokenizer(p).repeat(1, 2), "gives 32 ids a prompt.* length is 16"),
        (lambda p: small_tokenizer(p).float(), r"integer ids \(torch.int64\), got torch.float32"),
        (lambda p: small_tokenizer(p) > 0, "integer ids .* got torch.bool"),
        (lambda p: small_tokenizer(p) - 1, "gives id -1, below 0"),
        (lambda p: small_tokenizer(p) + 1, "gives id 600, but the model's vocabulary has 600"),
        (lambda p: small_tokenizer(p).tolist(), "must return a tensor of ids, got list"),
        (lambda p: small_tokenizer(p).numpy() * 0.5, "must return a tensor of ids, got ndarray"),
        (lambda p: {"input_ids": small_tokenizer(p)}, r"got dict, .* open_clip.get_tokenizer"),
        (lambda: None, "function fails on "),
        (77, "a callable is needed, such as open_clip.get_tokenizer"),
        (open_clip, "a callable is needed, such as open_clip.get_tokenizer"),
        ("ViT-B-33", "'ViT-B-33' is not an open_clip arch.*ViT-B-32"),
        ("ViT-B-32", "vocabulary has 600"),
    ],
)
def test_a_tokenizer_that_does_not_fit(tokenizer: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^tokenizer: .*{words}") as caught:
        load_model(small_open_clip(), tokenizer=tokenizer).encode_text(FIVE)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("change", [np.asarray, lambda ids: ids.int(), lambda ids: ids.short()])
def test_whole_numbers_of_another_kind_are_ids(change: Any) -> None:
    model = small_open_clip()
    want = load_model(model, tokenizer=small_tokenizer).encode_text(FIVE)
    got = load_model(model, tokenizer=lambda p: change(small_tokenizer(p))).encode_text(FIVE)
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokenizer": open_clip.get_tokenizer("ViT-B-32")}, "SimpleTokenizer fails.*AutoTokeniz"),
        ({"tokenizer": "openai/clip"}, "AutoTokenizer.from_pretrained"),
        ({"tokenizer": lambda p, **_: tokens(p, 20)}, "20 ids a prompt.* at most 12"),
        ({"tokenizer": lambda p, **_: tokens(p[:1], 12)}, "one row of ids for each prompt"),
        ({"tokenizer": lambda p, **_: {"ids": 1}}, r"a mapping with input_ids, got \['ids'\]"),
        ({"tokenizer": lambda p, **_: {"input_ids": [[1]]}}, "a tensor .*return_tensors='pt'"),
        (
            {"tokenizer": lambda p, **_: tokens(p) | {"attention_mask": [[1]]}},
            "attention_mask must be a tensor",
        ),
    ],
)
def test_a_tokenizer_that_does_not_fit_transformers(options: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^tokenizer: .*{words}") as caught:
        load_model(hf_clip(), **options).encode_text(FIVE)
    assert len(str(caught.value)) < 300


# --------------------------------------------------------------------------------- what is cut off


def test_a_prompt_that_is_cut_is_warned_about() -> None:
    model: Any = load_model("tiny", device="cpu")
    full = "a " * (model.text_size().length - 2)  # with its start and its end
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode_text([full.strip(), full, "a cat", ""])
    with pytest.warns(UserWarning, match="tokens that tiny reads") as caught:
        Defender(model, [full + "a", "a dog " * 200, "a cat"])
    assert len(caught) == 1
    assert caught[0].filename == __file__
    text = str(caught[0].message)
    assert repr(full)[:20] in text
    assert "(and 1 more)" in text
    assert str(model.text_size().length) in text
    assert len(text) < 300


def test_a_cut_prompt_of_transformers() -> None:
    model = load_model(hf_clip(), processor=(None, counted))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode_text(["a b c d e f g h i j k", "a"])
    with pytest.warns(UserWarning, match="the 12 tokens"):
        model.encode_text(["a b c d e f g h i j k l m", "a"])


def counted(prompts: list[str], max_length: int, **_: Any) -> dict[str, Tensor]:
    """An id for each word, then the end and padding."""
    ids = torch.zeros(len(prompts), max_length, dtype=torch.long)
    for row, prompt in zip(ids, prompts, strict=True):
        words = [1 + len(w) + ord(w[0]) for w in prompt.split()][: max_length - 1]
        row[: len(words) + 1] = torch.tensor([*words, 299])
    return {"input_ids": ids}


def test_a_warning_points_at_the_line_outside() -> None:
    with pytest.warns(UserWarning, match="look") as caught:
        warn("look")
    assert caught[0].filename == __file__
