"""load_model: every source and adapter, offline, with random weights of real and small size."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from scc_fast.models import VisionLanguage, frozen_twin, load_model, missing_members
from scc_fast.models import weights as _weights
from toys import (
    CONFIG,
    HFTokenizer,
    hf_clip,
    hf_image_processor,
    hf_siglip,
    small_open_clip,
    small_tokenizer,
)

open_clip = pytest.importorskip("open_clip")

PROMPTS = ["a photo of a cat", "a photo of a dog", "a photo of a cat", "", "x " * 200]


@pytest.fixture(scope="session")
def big_clip() -> VisionLanguage:
    with pytest.warns(UserWarning, match="random weights, for timing only"):
        return load_model("ViT-B-32-quickgelu", device="cpu")


@pytest.fixture(scope="session")
def big_siglip() -> VisionLanguage:
    pytest.importorskip("timm")
    with pytest.warns(UserWarning, match="random weights, for timing only"):
        return load_model("ViT-B-16-SigLIP", device="cpu")


@pytest.fixture(params=["open_clip", "hf_clip", "hf_siglip"])
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, dict[str, Any]]:
    """A small model object and the arguments with which load_model takes it."""
    if request.param == "open_clip":
        torch.manual_seed(0)
        return small_open_clip(), {"tokenizer": small_tokenizer}
    if request.param == "hf_clip":
        return hf_clip(), {"processor": (hf_image_processor("CLIP"), HFTokenizer(300))}
    return hf_siglip(), {"processor": (hf_image_processor("Siglip"), HFTokenizer(300))}


def check_adapter(model: VisionLanguage) -> None:
    """What every adapter owes its callers."""
    assert missing_members(model) == []
    text = model.encode_text(PROMPTS)
    assert text.shape == (len(PROMPTS), model.embed_dim)
    assert text.dtype == torch.float32
    assert not text.requires_grad
    torch.testing.assert_close(text.norm(dim=-1), torch.ones(len(PROMPTS)))
    assert torch.equal(text[0], text[2])
    assert not torch.allclose(text[0], text[1], atol=1e-6)

    pixels = torch.randn(2, 3, *model.image_size, requires_grad=True)
    features = model.encode_image(pixels)
    assert features.shape == (2, model.embed_dim)
    assert features.dtype == torch.float32
    assert not torch.allclose(features.norm(dim=-1), torch.ones(2), atol=1e-2)
    features.square().sum().backward()
    assert pixels.grad is not None
    assert (pixels.grad.abs().amax(dim=(1, 2, 3)) > 0).all()
    module = model.module  # type: ignore[attr-defined]
    assert not module.training
    assert all(not p.requires_grad and p.grad is None for p in module.parameters())


def test_real_size_clip(big_clip: VisionLanguage) -> None:
    check_adapter(big_clip)
    assert (big_clip.name, big_clip.source) == ("ViT-B-32-quickgelu", "random weights")
    assert (big_clip.image_size, big_clip.embed_dim) == ((224, 224), 512)
    assert big_clip.logit_scale == pytest.approx(1 / 0.07, rel=1e-5)
    assert big_clip.logit_bias == 0
    assert (big_clip.interpolation, big_clip.resize_mode) == ("bicubic", "shortest")
    assert big_clip.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))


def test_real_size_siglip_with_its_own_preprocessing(big_siglip: VisionLanguage) -> None:
    check_adapter(big_siglip)
    assert big_siglip.logit_bias == -10
    # open_clip itself reports CLIP's mean and "shortest" without a tag
    assert big_siglip.mean == big_siglip.std == (0.5, 0.5, 0.5)
    assert big_siglip.resize_mode == "squash"
    assert big_siglip.embed_dim == 768


def test_small_adapters_and_the_object_as_it_was(pair: tuple[nn.Module, dict[str, Any]]) -> None:
    original, options = pair
    original.train()
    frozen = next(original.parameters())
    frozen.requires_grad_(False)
    next(iter(original.modules())).custom = "kept"  # type: ignore[assignment]
    before = {k: v.clone() for k, v in original.state_dict().items()}
    model = load_model(original, **options)
    check_adapter(model)
    assert all(m.training for m in original.modules())
    assert not frozen.requires_grad
    assert all(p.requires_grad for p in original.parameters() if p is not frozen)
    assert all(p.grad is None for p in original.parameters())
    assert all(torch.equal(before[k], v) for k, v in original.state_dict().items())
    twin = model.module  # type: ignore[attr-defined]
    for a, b in zip(original.parameters(), twin.parameters(), strict=True):
        assert a is not b
        assert a.data_ptr() == b.data_ptr()
    # The original still trains
    original.logit_scale.requires_grad_()  # type: ignore[union-attr, operator]
    (original.logit_scale * 2).sum().backward()  # type: ignore[operator]
    assert twin.logit_scale.grad is None


def test_values_are_those_of_the_original_in_eval_mode(
    pair: tuple[nn.Module, dict[str, Any]],
) -> None:
    original, options = pair
    model = load_model(original, **options)
    original.eval()
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        if hasattr(original, "encode_image"):
            expected = original.encode_image(pixels)
            text = original.encode_text(small_tokenizer(["a cat"]))
        else:
            outputs = original.vision_model(pixel_values=pixels).pooler_output
            expected = getattr(original, "visual_projection", lambda x: x)(outputs)
            ids = HFTokenizer(300)(["a cat"], max_length=12)["input_ids"]
            output = original.text_model(input_ids=ids).pooler_output
            text = getattr(original, "text_projection", lambda x: x)(output)
    torch.testing.assert_close(model.encode_image(pixels), expected)
    text = nn.functional.normalize(text, dim=-1)
    torch.testing.assert_close(model.encode_text(["a cat"]), text)


def test_logit_scale_and_bias_of_transformers() -> None:
    siglip = load_model(hf_siglip(), processor=(hf_image_processor("Siglip"), HFTokenizer(300)))
    assert siglip.logit_scale == pytest.approx(109.947, rel=1e-4)  # exp(4.7)
    assert siglip.logit_bias == -12.5
    clip = load_model(hf_clip(), processor=(hf_image_processor("CLIP"), HFTokenizer(300)))
    assert clip.logit_scale == pytest.approx(1 / 0.07, rel=1e-3)
    assert clip.logit_bias == 0


def test_siglip_text_is_padded_to_full_length_and_not_masked() -> None:
    original, tokenizer = hf_siglip(), HFTokenizer(300)
    model = load_model(original, processor=(hf_image_processor("Siglip"), tokenizer))
    seen: list[Any] = []
    hook = model.module.text_model.register_forward_pre_hook(  # type: ignore[attr-defined]
        lambda _, args, kwargs: seen.append(kwargs.get("attention_mask")), with_kwargs=True
    )
    model.encode_text(["a cat"])
    hook.remove()
    assert tokenizer.calls[-1]["padding"] == "max_length"
    assert tokenizer.calls[-1]["max_length"] == 12
    assert seen == [None]


def test_preprocessing_comes_from_the_image_processor() -> None:
    tokenizer = HFTokenizer(300)
    clip = load_model(hf_clip(), processor=(hf_image_processor("CLIP"), tokenizer))
    assert (clip.resize_mode, clip.resize_edge) == ("shortest", 32)
    assert clip.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    wide = hf_image_processor("CLIP", size={"shortest_edge": 36}, resample=2, image_std=[1, 2, 3])
    model = load_model(hf_clip(), processor=(wide, tokenizer))
    assert (model.resize_edge, model.interpolation, model.std) == (36, "bilinear", (1, 2, 3))
    siglip = load_model(hf_siglip(), processor=(hf_image_processor("Siglip"), tokenizer))
    assert (siglip.resize_mode, siglip.mean) == ("squash", (0.5, 0.5, 0.5))
    bare = hf_image_processor("Siglip", do_normalize=False)
    assert load_model(hf_siglip(), processor=(bare, tokenizer)).std == (1, 1, 1)
    other = hf_image_processor("Siglip", size={"height": 64, "width": 64})
    with pytest.raises(ValueError, match=r"makes 64x64 pixels, but the model takes 32x32"):
        load_model(hf_siglip(), processor=(other, tokenizer))


@pytest.mark.parametrize("mode", ["inference", "no_grad", "autocast"])
def test_any_mode_of_the_caller(pair: tuple[nn.Module, dict[str, Any]], mode: str) -> None:
    original, options = pair
    expected = load_model(original, **options).encode_text(PROMPTS)
    context: Any = {
        "inference": torch.inference_mode(),
        "no_grad": torch.no_grad(),
        "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
    }[mode]
    with context:
        model = load_model(original, **options)
        text = model.encode_text(PROMPTS)
        features = model.encode_image(torch.randn(2, 3, 32, 32))
        empty = model.encode_text([])
    assert torch.equal(text, expected)
    assert not text.is_inference()
    assert not empty.is_inference()
    assert empty.shape == (0, model.embed_dim)
    assert features.dtype == torch.float32
    check_adapter(model)


def test_a_model_made_of_inference_tensors_still_gives_gradients() -> None:
    with torch.inference_mode():
        original = small_open_clip()
    check_adapter(load_model(original, tokenizer=small_tokenizer))


def test_four_threads_agree(pair: tuple[nn.Module, dict[str, Any]]) -> None:
    original, options = pair
    model = load_model(original, **options)
    pixels = torch.randn(4, 3, 32, 32)
    images, texts = model.encode_image(pixels), model.encode_text(PROMPTS)
    failures: list[str] = []

    def work() -> None:
        for _ in range(10):
            x = pixels.clone().requires_grad_()
            out = model.encode_image(x)
            (grad,) = torch.autograd.grad(out.sum(), x)
            if not torch.allclose(out, images, atol=1e-6) or not grad.abs().sum() > 0:
                failures.append("image")
            if not torch.allclose(model.encode_text(PROMPTS), texts, atol=1e-6):
                failures.append("text")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_many_prompts_go_in_batches_and_duplicates_once() -> None:
    tokenizer = HFTokenizer(300)
    model = load_model(hf_clip(), processor=(hf_image_processor("CLIP"), tokenizer))
    tokenizer.calls.clear()
    prompts = [f"class number {i % 15000}" for i in range(20_000)]
    text = model.encode_text(prompts, batch_size=512)
    counts = [call["count"] for call in tokenizer.calls]
    assert text.shape == (20_000, 16)
    assert sum(counts) == 15_000
    assert max(counts) == 512
    assert torch.equal(text[:5000], text[15_000:])
    torch.testing.assert_close(text[9_001:9_002], model.encode_text([prompts[9_001]]))


def test_training_extras_do_not_reach_the_twin() -> None:
    original = small_open_clip()
    original.set_grad_checkpointing(True)  # type: ignore[operator]
    twin = frozen_twin(original)
    assert original.visual.transformer.grad_checkpointing  # type: ignore[union-attr]
    assert not twin.visual.transformer.grad_checkpointing  # type: ignore[union-attr]
    twin.train()
    twin.eval()
    assert original.training
    compiled = torch.compile(original)
    assert type(frozen_twin(compiled)) is type(original)  # type: ignore[arg-type]
    tied = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    tied["b"].weight = tied["a"].weight
    copied = frozen_twin(tied)
    assert copied["a"].weight is copied["b"].weight  # type: ignore[index]


def test_batch_norm_statistics_stay() -> None:
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}
    original = small_open_clip(vision_cfg=vision)
    before = {k: v.clone() for k, v in original.state_dict().items() if "running" in k}
    assert before
    model = load_model(original, tokenizer=small_tokenizer)
    model.encode_image(torch.randn(4, 3, 32, 32))
    assert all(torch.equal(v, original.state_dict()[k]) for k, v in before.items())


def test_half_precision_weights_take_float32_pixels() -> None:
    original = small_open_clip()
    open_clip.convert_weights_to_lp(original, dtype=torch.bfloat16)
    model = load_model(original, tokenizer=small_tokenizer)
    assert model.encode_image(torch.randn(1, 3, 32, 32)).dtype == torch.float32
    assert model.info()["dtype"] == "torch.bfloat16"


def save_open_clip(folder: Path, **changes: Any) -> nn.Module:
    """The layout of open_clip's own folders, with a vocabulary of our own in merges.txt.gz."""
    from safetensors.torch import save_file

    torch.manual_seed(3)
    folder.mkdir(exist_ok=True)
    letters = [f"{a} {b}" for a in "abcdefghij" for b in "klmnopqrst"][:86]
    with gzip.open(folder / "merges.txt.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(["#version: test", *letters]))
    model = small_open_clip()  # 600 = 512 bytes + 86 merges + 2
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "resize_mode": "squash"}
    content = {"model_cfg": CONFIG, "preprocess_cfg": preprocess, **changes}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    return model


def test_open_clip_folder(tmp_path: Path) -> None:
    original = save_open_clip(tmp_path)
    declared = {
        "defaults": {"scc": {"warmup_steps": 2}},
        "flip": False,
        "templates": ["a picture of a {}"],
    }
    (tmp_path / "defaults.json").write_text(json.dumps(declared))
    model = load_model(f"local-dir:{tmp_path}", device="cpu")
    check_adapter(model)
    expected = load_model(original, tokenizer=model.tokenizer)  # type: ignore[attr-defined]
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.encode_image(pixels), expected.encode_image(pixels))
    torch.testing.assert_close(model.encode_text(PROMPTS), expected.encode_text(PROMPTS))
    assert (model.mean, model.resize_mode) == ((0.1, 0.2, 0.3), "squash")
    assert model.defaults == {"scc": {"warmup_steps": 2}}
    assert (model.flip, model.templates) == (False, ("a picture of a {}",))
    info = model.info()
    assert info["source"] == str(tmp_path)
    assert info["parameters"] == sum(p.numel() for p in original.parameters())
    json.dumps(info)
    other = load_model(tmp_path, device="cpu", mean=(0, 0, 0), std=[1, 2, 3], flip=True)
    assert (other.mean, other.std, other.flip) == ((0, 0, 0), (1, 2, 3), True)


def test_open_clip_folder_with_a_transformers_tokenizer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    text = {**CONFIG["text_cfg"], "hf_tokenizer_name": "org/elsewhere"}
    save_open_clip(tmp_path, model_cfg={**CONFIG, "text_cfg": text})
    (tmp_path / "merges.txt.gz").unlink()
    with pytest.raises(RuntimeError, match=r"tokenizer: .* cannot be loaded .*; pass tokenizer="):
        load_model(tmp_path)
    clip_tokenizer(tmp_path / "vocabulary")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path / "vocabulary")
    tokenizer.save_pretrained(tmp_path)
    model = load_model(tmp_path, device="cpu")
    check_adapter(model)
    made = model.tokenizer(["a cat"])  # type: ignore[attr-defined]
    expected = tokenizer(["a cat"], padding="max_length", max_length=16)["input_ids"]
    assert made.tolist() == expected


def test_text_tower_of_transformers_fails_before_the_retries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(_weights, "fetch", refuse)
    with (
        pytest.warns(UserWarning, match="random weights"),
        pytest.raises(RuntimeError, match="stopped here"),
    ):
        load_model("roberta-ViT-B-32")


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_transformers_folder(tmp_path: Path, family: str) -> None:
    original = hf_clip() if family == "clip" else hf_siglip()
    image = hf_image_processor("CLIP" if family == "clip" else "Siglip")
    original.save_pretrained(tmp_path)  # type: ignore[operator]
    if family == "clip":
        clip_tokenizer(tmp_path / "vocabulary")
        transformers = pytest.importorskip("transformers")
        tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path / "vocabulary")
        transformers.CLIPProcessor(image, tokenizer).save_pretrained(tmp_path)
        model = load_model(f"local-dir:{tmp_path}", device="cpu")
    else:
        tokenizer = HFTokenizer(300)
        model = load_model(tmp_path, processor=(image, tokenizer), device="cpu")
    check_adapter(model)
    expected = load_model(original, processor=(image, tokenizer))
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.encode_image(pixels), expected.encode_image(pixels))
    torch.testing.assert_close(model.encode_text(PROMPTS), expected.encode_text(PROMPTS))
    assert model.source == str(tmp_path)
    assert model.logit_bias == expected.logit_bias


def clip_tokenizer(folder: Path) -> None:
    """vocab.json and merges.txt of a CLIPTokenizer with 300 ids."""
    from open_clip.tokenizer import bytes_to_unicode

    letters = list("abcdefghijklmnopqrstuvwxyz0123456789")
    merges = [f"{a} {b}</w>" for a in "abcdefghijklm" for b in "nopqrstuvwxyz"]
    words = [*letters, *(f"{c}</w>" for c in letters), *(m.replace(" ", "") for m in merges)]
    extra = [c for c in bytes_to_unicode().values() if c not in letters]
    words = [*words, *extra][:298]
    folder.mkdir()
    vocabulary = [*words, "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')


def test_weights_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from open_clip import factory

    monkeypatch.setitem(factory._MODEL_CONFIGS, "Small", {**CONFIG, "quick_gelu": False})
    original, path = small_open_clip(quick_gelu=False), tmp_path / "weights.pt"
    torch.save(original.state_dict(), path)
    state = torch.random.get_rng_state()
    model = load_model("Small", pretrained=path, tokenizer=small_tokenizer, device="cpu")
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.source == str(path)
    pixels = torch.randn(2, 3, 32, 32)
    expected = load_model(original, tokenizer=small_tokenizer)
    torch.testing.assert_close(model.encode_image(pixels), expected.encode_image(pixels))
    state = torch.random.get_rng_state()
    with pytest.warns(UserWarning, match="random weights") as caught:
        first = load_model("Small", tokenizer=small_tokenizer)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.rand(1)
    with pytest.warns(UserWarning, match="random weights"):
        second = load_model("Small", tokenizer=small_tokenizer)
    assert torch.equal(first.encode_text(["a"]), second.encode_text(["a"]))
    assert caught[0].filename == __file__  # the caller's line
    torch.save(small_open_clip(embed_dim=8).state_dict(), path)
    with pytest.raises(ValueError, match=r"open_clip cannot load Small with weights .*weights\.pt"):
        load_model("Small", pretrained=path, tokenizer=small_tokenizer)
    path.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="open_clip cannot load Small"):
        load_model("Small", pretrained=path, tokenizer=small_tokenizer)


def refuse(*_: Any, **__: Any) -> Any:
    raise RuntimeError("stopped here")


def test_quickgelu_mismatch_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_weights, "fetch", refuse)
    text = "QuickGELU mismatch: ViT-B-32 computes GELU.*load 'ViT-B-32-quickgelu'"
    with (
        pytest.warns(UserWarning, match=text) as caught,
        pytest.raises(RuntimeError, match="stopped here"),
    ):
        load_model("ViT-B-32", pretrained="openai")
    assert caught[0].filename == __file__
    # A file carries no tag, but its name often does, as in the hub's cache
    path = tmp_path / "vit_base_patch32_clip_224.openai" / "open_clip_model.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match=text),
        pytest.raises(ValueError, match="cannot load ViT-B-32"),
    ):
        load_model("ViT-B-32", pretrained=str(path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="stopped here"):
            load_model("ViT-B-32-quickgelu", pretrained="openai")
        with pytest.raises(RuntimeError, match="stopped here"):
            load_model("ViT-B-32", pretrained="laion2b_s34b_b79k")


def test_no_network_is_said_quickly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked: list[str] = []

    def unreachable(url: str, **_: Any) -> None:
        asked.append(url)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(hub, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr(hub, "hf_hub_download", refuse)
    started = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        load_model("ViT-B-32-quickgelu", pretrained="openai", cache_dir=tmp_path)
    assert time.monotonic() - started < 5
    assert len(asked) == 1
    for part in (
        "pretrained='openai'",
        "open_clip_model.safetensors",
        "huggingface.co/timm/vit_base_patch32_clip_224.openai",
        str(tmp_path),
        "no route to host",
        "pretrained='/path/to/file.safetensors'",
        "local-dir:",
    ):
        assert part in str(caught.value)
    with pytest.raises(
        RuntimeError, match=r"open_clip_config\.json of https://huggingface.co/org/x"
    ):
        load_model("hf-hub:org/x", cache_dir=tmp_path)


def test_cached_files_are_used_without_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "get_hf_file_metadata", refuse)
    snapshot = tmp_path / "models--org--x" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--org--x" / "refs").mkdir()
    (tmp_path / "models--org--x" / "refs" / "main").write_text("abc")
    save_open_clip(snapshot)
    model = load_model("hf-hub:org/x", cache_dir=tmp_path, tokenizer=small_tokenizer)
    check_adapter(model)
    assert model.name == "hf-hub:org/x"
    assert model.mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("vit-b32",), {}, ValueError, r"did you mean .*ViT-B-32"),
        (("no such thing at all",), {}, ValueError, "neither an open_clip model nor a folder"),
        (("ViT-B-32", "opanai"), {}, ValueError, r"known tags: openai, laion400m_e31"),
        (("ViT-B-32", "/no/file.pt"), {}, ValueError, "'/no/file.pt' is not a file and no tag of"),
        (("ViT-B-32", "/"), {}, ValueError, "is a folder; write model='local-dir:"),
        (("local-dir:/no/such",), {}, ValueError, "no folder '/no/such'"),
        (("local-dir:/",), {}, ValueError, r"neither open_clip_config\.json .* nor config\.json"),
        (("local-dir:/x", "openai"), {}, ValueError, "only for architecture names"),
        (("tiny", "openai"), {}, ValueError, "only for architecture names"),
        ((42,), {}, TypeError, "a name, a folder or a model is needed, got int"),
        ((nn.Linear(1, 1),), {}, TypeError, "Linear is neither an open_clip model"),
        (("tiny",), {"mean": (1, 2)}, ValueError, "mean: three finite numbers"),
        (("tiny",), {"std": (1, 0, 1)}, ValueError, r"std: three finite numbers .* > 0"),
        (("tiny",), {"precision": "int8"}, ValueError, "precision: one of fp32, .* got 'int8'"),
        (("tiny",), {"mean": 0.5}, TypeError, "mean: three numbers"),
    ],
)
def test_wrong_arguments(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_model(*arguments, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_device() -> None:
    with pytest.raises(ValueError, match="device: 'cuda:0' asked for, but torch sees no CUDA"):
        load_model(small_open_clip(), tokenizer=small_tokenizer, device="cuda:0")


def test_wrong_objects_and_parts() -> None:
    with pytest.raises(ValueError, match="tokenizer: needed"):
        load_model(small_open_clip())
    with pytest.raises(ValueError, match="vocabulary has 600"):
        load_model(small_open_clip(), tokenizer="ViT-B-32")
    with pytest.raises(TypeError, match="must return a tensor of ids, got list"):
        load_model(small_open_clip(), tokenizer=lambda prompts: [[1]])
    with pytest.raises(ValueError, match="not for a model object"):
        load_model(small_open_clip(), "openai", tokenizer=small_tokenizer)
    with pytest.raises(TypeError, match="TorchScript"):
        load_model(torch.jit.script(nn.Linear(1, 1)))
    with torch.device("meta"):
        empty = small_open_clip()
    with pytest.raises(ValueError, match="meta device"):
        load_model(empty, tokenizer=small_tokenizer)
    original = hf_clip()
    with pytest.raises(ValueError, match="processor: needed; pass AutoProcessor"):
        load_model(original)
    with pytest.raises(TypeError, match="or \\(image_processor, tokenizer\\) is needed, got str"):
        load_model(original, processor="openai/clip")
    original.config.model_type = "siglip2"  # type: ignore[union-attr]
    with pytest.raises(TypeError, match="NaFlex"):
        load_model(original, processor=(None, HFTokenizer(300)))


def test_wrong_folders(tmp_path: Path) -> None:
    save_open_clip(tmp_path / "a")
    (tmp_path / "a" / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        load_model(tmp_path / "a")
    (tmp_path / "a" / "open_clip_config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        load_model(tmp_path / "a")
    (tmp_path / "a" / "open_clip_config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no 'model_cfg'"):
        load_model(tmp_path / "a")
    original = hf_clip()
    options: dict[str, Any] = {"processor": (hf_image_processor("CLIP"), HFTokenizer(300))}
    del original.logit_scale
    original.save_pretrained(tmp_path / "b")  # type: ignore[operator]
    with pytest.raises(ValueError, match="lack 1 tensors, such as logit_scale"):
        load_model(tmp_path / "b", **options)
    (tmp_path / "b" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="transformers cannot load"):
        load_model(tmp_path / "b", **options)


def test_wrong_calls() -> None:
    model = load_model(small_open_clip(), tokenizer=small_tokenizer)
    with pytest.raises(TypeError, match="a list of strings is needed, got str"):
        model.encode_text("a cat")
    with pytest.raises(TypeError, match="every one must be a string, got 3"):
        model.encode_text(["a", 3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="batch_size: must be at least 1"):
        model.encode_text(["a"], batch_size=0)
    with pytest.raises(
        ValueError, match=r"shape \(1, 3, 31, 32\), but CLIP takes \(B, 3, 32, 32\)"
    ):
        model.encode_image(torch.zeros(1, 3, 31, 32))
    assert model.encode_image(torch.zeros(0, 3, 32, 32)).shape == (0, 24)
    assert load_model(model) is model


def test_missing_transformers_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf_clip().save_pretrained(tmp_path)  # type: ignore[operator]
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "scc_fast\[transformers\]"'):
        load_model(tmp_path)


def test_import_stays_light() -> None:
    code = "import sys, scc_fast.models as m; print({'open_clip', 'transformers'} & {*sys.modules})"
    root = Path(_weights.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
