"""Weights files of any kind: read whatever their name, or named for what they are."""

from __future__ import annotations

import json
import logging
import warnings
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from scc_fast import tiny as tiny_package
from scc_fast.evaluate.store import slug
from scc_fast.models import load_model
from scc_fast.models.state_dicts import misfit, plain, state_dict
from scc_fast.models.weights import check_activation

open_clip = pytest.importorskip("open_clip")

ASSETS = Path(tiny_package.__file__).parent / "assets"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 605247071\n"
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n"


@pytest.fixture(scope="module")
def tiny() -> Any:
    return load_model("tiny", device="cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tiny: Any) -> Callable[..., Any]:
    """load_model() of the bundled architecture under a name of open_clip's, from a file."""
    config = json.loads((ASSETS / "open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "small", config)

    def load(file: Path) -> Any:
        return load_model("small", pretrained=file, tokenizer=tiny.tokenizer, device="cpu")

    return load


def whole(tiny: Any) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in tiny.module.state_dict().items()}


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Any]:
    return {prefix + key: value for key, value in state.items()}


def bytes_of(content: Any, folder: Path, **options: Any) -> bytes:
    torch.save(content, folder / "content", **options)
    return (folder / "content").read_bytes()


def cases(folder: Path, state: dict[str, Tensor]) -> dict[str, tuple[bytes, str]]:
    """By file name, what it holds and what a message says of it."""
    zipped, old = (
        bytes_of(state, folder),
        bytes_of(state, folder, _use_new_zipfile_serialization=False),
    )
    save_file(state, folder / "content")
    tensors = (folder / "content").read_bytes()
    np.savez(folder / "content.npz", a=np.ones(2))
    torch.jit.trace(nn.Linear(1, 1), torch.ones(1, 1)).save(folder / "content")
    script = (folder / "content").read_bytes()
    with zipfile.ZipFile(folder / "content", "w") as archive:
        archive.writestr("readme.txt", "x")
    return {
        "pointer.pt": (POINTER, "is a git-LFS pointer"),
        "pointer.safetensors": (POINTER, "is a git-LFS pointer"),
        "page.bin": (PAGE, r"is a web page \(HTML\)"),
        "model.safetensors.index.json": (b'{"weight_map": {}}', "is JSON text"),
        "cut.pt": (zipped[: len(zipped) // 2], "is truncated or damaged"),
        "cut_old.pt": (old[: len(old) // 2], "truncated, damaged or"),
        "cut.safetensors": (tensors[: len(tensors) // 2], "truncated or damaged"),
        "head.safetensors": (tensors[:5], "5 bytes without safetensors' header"),
        "empty.pt": (b"", r"is empty \(0 bytes\)"),
        "script.pt": (script, "is a TorchScript archive"),
        "other.pt": ((folder / "content").read_bytes(), "is a zip archive that torch.save did"),
        "array.npy": (b"\x93NUMPY...", "is a NumPy array"),
        "weights.tar.gz": (b"\x1f\x8b\x08", "is a gzip archive"),
        "keras.h5": (b"\x89HDF\r\n", "is an HDF5 file"),
        "text.pt": (b"some words", "is not a checkpoint that torch can read"),
        "module.pt": (bytes_of(nn.Linear(1, 1), folder), "holds a torch.nn.modules.linear.Linear"),
        "optimizer.pt": (
            bytes_of({"optimizer": {"state": {0: {"m": torch.ones(1)}}}, "epoch": 1}, folder),
            "holds epoch, optimizer, not only tensors",
        ),
        "list.pt": (bytes_of([1, 2], folder), "holds list without tensors"),
        "two.pt": (
            bytes_of({"student": state, "teacher": state}, folder),
            "holds several state dicts, student, teacher",
        ),
    }


def refused(call: Callable[[], Any], argument: str, file: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call()
    text = str(caught.value)
    assert text.startswith(f"{argument}: ")
    assert file.name in text
    assert "weights_only" not in text
    assert len(text) < 520


def test_files_that_are_none(tmp_path: Path, tiny: Any, small: Callable[..., Any]) -> None:
    state = {"class_embedding": torch.ones(9999)}
    for name, (content, message) in cases(tmp_path, state).items():
        file = tmp_path / name
        file.write_bytes(content)
        refused(partial(small, file), "pretrained", file, message)
        refused(partial(load_model, "tiny", image_encoder=file), "image_encoder", file, message)


def test_a_folder_with_such_a_file(tmp_path: Path) -> None:
    config = (ASSETS / "open_clip_config.json").read_text()
    (tmp_path / "open_clip_config.json").write_text(config)
    file = tmp_path / "open_clip_model.safetensors"
    for content, message in ((POINTER, "git-LFS"), (PAGE, "HTML"), (b"", "is empty")):
        file.write_bytes(content)
        refused(lambda: load_model(tmp_path), "model", file, message)
        refused(lambda: load_model(f"local-dir:{tmp_path}"), "model", file, message)


def test_the_name_of_a_file_does_not_matter(
    tmp_path: Path, tiny: Any, small: Callable[..., Any]
) -> None:
    pixels = torch.randn(1, 3, *tiny.image_size)
    want = tiny.encode_image(pixels)
    state = whole(tiny)
    save_file(state, tmp_path / "tensors.bin")
    torch.save(state, tmp_path / "pickle.safetensors")
    torch.save(state, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    for name in ("tensors.bin", "pickle.safetensors", "old.ckpt"):
        assert torch.equal(small(tmp_path / name).encode_image(pixels), want)


NESTS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "plain": lambda state: state,
    "module.": lambda state: under("module.", state),
    "_orig_mod.module.": lambda state: under("_orig_mod.module.", state),
    "model.": lambda state: under("model.", state),
    "module.model.backbone.": lambda state: under("module.model.backbone.", state),
    "inside": lambda state: {k.replace(".", "._orig_mod.", 1): v for k, v in state.items()},
    "averaged": lambda state: {"n_averaged": torch.tensor(3), **under("module.", state)},
    "state_dict": lambda state: {"state_dict": under("model.", state), "epoch": 1},
    "model": lambda state: {"model": state, "optimizer": {"state": {0: {"m": torch.ones(1)}}}},
    "ema": lambda state: {"ema": state, "steps": torch.tensor(2)},
    "checkpoint": lambda state: {"checkpoint": {"model_state_dict": state}},
    "batch norm": lambda state: {"ln.num_batches_tracked": torch.tensor(3), **state},
}


@pytest.mark.parametrize("nest", NESTS)
def test_wrapped_weights(nest: str, tmp_path: Path, tiny: Any, small: Callable[..., Any]) -> None:
    pixels, file = torch.randn(1, 3, *tiny.image_size), tmp_path / "w.pt"
    moved = {k: v * 1.01 if v.is_floating_point() else v for k, v in whole(tiny).items()}
    torch.save(NESTS[nest](moved), file)
    want = small(file)
    for key, value in want.module.state_dict().items():
        assert torch.equal(value, moved[key]), key
    tower = {key[7:]: value for key, value in moved.items() if key.startswith("visual.")}
    for content in (tower, under("visual.", tower)):
        torch.save(NESTS[nest](content), file)
        tuned = load_model("tiny", device="cpu", image_encoder=file)
        assert torch.equal(tuned.encode_image(pixels), want.encode_image(pixels))
        assert not torch.equal(tuned.encode_image(pixels), tiny.encode_image(pixels))


def test_weights_of_something_else(tmp_path: Path, tiny: Any, small: Callable[..., Any]) -> None:
    file, state = tmp_path / "w.pt", whole(tiny)

    def pretrained(content: Any, message: str) -> None:
        torch.save(content, file)
        refused(lambda: small(file), "pretrained", file, message)

    keys = list(state)[:5]
    other = under("vision_model.", {letter: torch.ones(1) for letter in "abcdef"})
    names = "vision_model.a, vision_model.b, vision_model.c, vision_model.d, vision_model.e and 1"
    pretrained(other, f"lacks {', '.join(keys)} and .*has {names} more besides; these are transf")
    tower = {key[7:]: value for key, value in state.items() if key.startswith("visual.")}
    pretrained(tower, "an image tower alone is passed as image_encoder=")
    bad = {**state, "visual.proj": state["visual.proj"] * torch.nan}
    pretrained(bad, "visual.proj has values that are not finite")
    torch.save({"state_dict": under("module.", state)}, file)
    tuned = partial(load_model, "tiny", image_encoder=file)
    refused(tuned, "image_encoder", file, "is a whole model: pass it as pretrained=")
    long = str(tmp_path / ("x" * 300))
    for path in (long, "~no-such-user/x.pt"):
        for options in ({"pretrained": path}, {"image_encoder": path}):
            given: Any = options
            with pytest.raises(
                ValueError, match=rf"^{next(iter(options))}: .* is not a valid path: "
            ):
                load_model("ViT-B-32", device="cpu", **given)


def test_names_are_kept_where_wrappers_do_not_matter() -> None:
    one = torch.ones(1)
    own = {"module.a": one, "b.c": one}
    assert plain(own, own) == own  # a model of one's own that calls a part "module"
    assert plain({"module.a": one, "a": one}, {"x": one}).keys() == {"module.a", "a"}
    assert plain({"x.a": one, "y.b": one}, {"a": one}).keys() == {"x.a", "y.b"}
    counted = {"a": one, "bn.num_batches_tracked": one}
    assert plain({"a": one}, counted).keys() == counted.keys()
    assert misfit({"a": one}, {"a": torch.ones(2)}) == "has a of shape (1,), not (2,)"
    assert misfit(own, own) == ""
    assert state_dict({"x": {"a": one}, "epoch": 3}, "it") == {"a": one}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("laion/CLIP-ViT-B-32", "'laion/CLIP-ViT-B-32' .* is 'hf-hub:laion/CLIP-ViT-B-32'"),
        ("https://huggingface.co/google/siglip/", "the hub is 'hf-hub:google/siglip'"),
        (
            "/no/such/ViT-B-32.pt",
            "'/no/such/ViT-B-32.pt' is not an existing file.*pretrained=.*image_encoder=",
        ),
        ("tecoa.pth.tar", "'tecoa.pth.tar' is not an existing file.*pretrained="),
        ("/no/such/folder", "no folder '/no/such/folder'"),
        ("Tiny", "'Tiny' is neither .*did you mean 'tiny'"),
        ("ViT-B-32 ", "did you mean 'ViT-B-32'"),
        ("ViT-B/99", "'ViT-B/99' is neither .*did you mean 'ViT-B-"),
        ("hf_hub:org/repo", "did you mean 'hf-hub:org/repo'"),
        ("hf-hub:org repo", "'hf-hub:owner/name' is needed, got 'hf-hub:org repo'"),
        ("", "a path is needed, got ''"),
        ("x" * 5000, "is not a valid path: OSError"),
        ("~no-such-user/model", "is not a valid path: RuntimeError"),
    ],
)
def test_names_of_no_model(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^model: .*{message}") as caught:
        load_model(name, device="cpu")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("argument", ["pretrained", "image_encoder"])
def test_paths_that_are_none(argument: str) -> None:
    path: Any
    for path, error in (("", ValueError), (3, TypeError), ({"a": torch.ones(9)}, TypeError)):
        with pytest.raises(error, match=rf"^{argument}: a path is needed, got "):
            load_model("ViT-B-32", device="cpu", **{argument: path})


def test_a_file_is_no_model(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"x")
    with pytest.raises(ValueError, match="weights' is a file, and the name of an architecture is"):
        load_model(str(file))


def test_a_tokenizer_that_does_not_exist(tiny: Any) -> None:
    for model in ("tiny", tiny.module):
        with pytest.raises(ValueError, match=r"^tokenizer: 'ViT-B-3' is .*did you mean 'ViT-B-32'"):
            load_model(model, tokenizer="ViT-B-3", device="cpu")


def test_what_was_resolved_is_logged(
    tmp_path: Path, tiny: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert logging.getLogger("scc_fast").handlers == []
    caplog.set_level(logging.INFO, "scc_fast")
    load_model("tiny", device="cpu")
    file = tmp_path / "tower.pt"
    torch.save(tiny.module.visual.state_dict(), file)
    load_model("tiny", device="cpu", image_encoder=file)
    lines = [record.getMessage() for record in caplog.records if record.name == "scc_fast"]
    assert len(lines) == 2
    for part in ("tiny", "bundled", "QuickGELU", "64x64", "mean (", "tokenizer", "float32 on cpu"):
        assert part in lines[0]
    assert lines[1].startswith("model tiny+tower.pt")
    assert "\n" not in "".join(lines)


def test_the_activation_of_transformers_weights() -> None:
    transformers = pytest.importorskip("transformers")

    def clip(vision: str, text: str) -> Any:
        towers = {"vision_config": {"hidden_act": vision}, "text_config": {"hidden_act": text}}
        return transformers.CLIPConfig(**towers)

    openai, laion = "object (openai/clip-vit-base-patch32)", "/x/models--laion--CLIP-ViT-B-32/y"
    with pytest.warns(UserWarning, match=r"QuickGELU mismatch: .*computes gelu, .*quick_gelu"):
        check_activation(clip("gelu", "gelu"), openai)
    with pytest.warns(UserWarning, match=r"computes quick_gelu, .* with gelu"):
        check_activation(clip("quick_gelu", "quick_gelu"), laion)
    with pytest.warns(UserWarning, match=r"computes gelu and quick_gelu, .*one activation"):
        check_activation(clip("quick_gelu", "gelu"), "/some/folder")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_activation(clip("quick_gelu", "quick_gelu"), openai)
        check_activation(clip("gelu", "gelu"), laion)
        check_activation(clip("gelu", "gelu"), "/some/folder")


def save_transformers(folder: Path) -> Any:
    """A small CLIP of transformers in a folder, and a processor for it."""
    transformers = pytest.importorskip("transformers")
    part = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    part |= {"num_attention_heads": 2}
    vision = {**part, "image_size": 32, "patch_size": 8}
    text = {**part, "vocab_size": 64, "max_position_embeddings": 8}
    config = transformers.CLIPConfig(vision_config=vision, text_config=text)
    transformers.CLIPModel(config).save_pretrained(folder)

    def tokenize(prompts: list[str], **_: Any) -> dict[str, Tensor]:
        return {"input_ids": torch.full((len(prompts), 8), 3)}

    return None, tokenize


def test_the_activation_of_openais_archives(
    tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((ASSETS / "open_clip_config.json").read_text())["model_cfg"]
    plain_gelu = {**config, "quick_gelu": False}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "gelu", plain_gelu)
    torch.save({**whole(tiny), "input_resolution": torch.tensor(64)}, tmp_path / "w.pt")
    with pytest.warns(
        UserWarning, match="QuickGELU mismatch: gelu computes GELU.*'gelu-quick"
    ) as w:
        load_model("gelu", tmp_path / "w.pt", tokenizer=tiny.tokenizer, device="cpu")
    assert w[0].filename == __file__  # the caller's line


def test_folders_of_transformers(tmp_path: Path, tiny: Any) -> None:
    processor = save_transformers(tmp_path)
    load = partial(load_model, tmp_path, processor=processor, device="cpu")
    assert load().info()["kind"] == "transformers"
    file = tmp_path / "model.safetensors"
    tensors = file.read_bytes()
    for content, message in ((POINTER, "git-LFS"), (PAGE, "HTML"), (b"", "is empty")):
        file.write_bytes(content)
        refused(load, "model", file, message)
    torch.save({}, file)
    refused(load, "model", file, "is of torch, not of safetensors as its name says")
    file.write_bytes(tensors[: len(tensors) // 2])
    refused(load, "model", tmp_path, "transformers cannot load")
    save_file(whole(tiny), file)
    refused(load, "model", tmp_path, "lack .* tensors, .* these are open_clip's names")
    file.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(tensors)
    bin_file = tmp_path / "pytorch_model.bin"
    refused(load, "model", bin_file, "is of safetensors, not of torch as its name says")
    torch.save({"logit_scale": nn.Linear(1, 1)}, bin_file)
    refused(load, "model", tmp_path, "transformers cannot load")


def test_a_repository_with_transformers_files_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub.utils import EntryNotFoundError

    def unreachable(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(hub, "get_hf_file_metadata", unreachable)
    repository = tmp_path / "models--org--x"
    processor = save_transformers(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    load = partial(load_model, processor=processor, cache_dir=tmp_path, device="cpu")
    cached = load("hf-hub:org/x")
    assert (cached.name, cached.info()["kind"]) == ("hf-hub:org/x", "transformers")
    with pytest.raises(RuntimeError, match="hf-hub:org/y: not found"):
        load("hf-hub:org/y")

    def absent(*_: Any, **__: Any) -> Any:
        raise EntryNotFoundError("404")

    def download(repo: str, allow_patterns: list[str], **_: Any) -> str:
        assert (repo, allow_patterns[0]) == ("org/z", "*.json")
        return str(repository / "snapshots" / "abc")

    monkeypatch.setattr(hub, "get_hf_file_metadata", absent)
    monkeypatch.setattr(hub, "snapshot_download", download)
    fetched = load("hf-hub:org/z")
    pixels = torch.randn(1, 3, 32, 32)
    assert torch.equal(fetched.encode_image(pixels), cached.encode_image(pixels))


def test_folders_of_results_can_be_read() -> None:
    assert slug("tiny-emoji") == "tiny-emoji"
    path = "ViT-B-32@openai+/a/very/long/folder" + "/deep" * 20 + "/tecoa.pth.tar-cifar10"
    short = slug("ViT-B-32@openai+tecoa.pth.tar-cifar10", path)
    assert short.startswith("ViT-B-32_openai_tecoa.pth.tar-cifar10-")
    assert short != slug("ViT-B-32@openai+tecoa.pth.tar-cifar10", path + "0")
