"""FARE and BiomedCLIP: their repositories, made small, in the hub's cache and in folders."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from scc_fast.models import load_model
from scc_fast.models.hub import stand_in_tokenizer

open_clip = pytest.importorskip("open_clip")

CLIP: dict[str, Any] = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 600, "width": 32, "heads": 2, "layers": 1},
}
TOKENIZER = stand_in_tokenizer({"vocab_size": 600, "context_length": 16})
BERT = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"
BIOMED = "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "tumor", "##s", "."]


def hub_folder(place: Path, repo: str, revision: str = "abc") -> Path:
    """The empty snapshot folder of a repository in the hub's cache."""
    root = place / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / "main").write_text(revision)
    (root / "snapshots" / revision).mkdir(parents=True)
    return root / "snapshots" / revision


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(hub, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr(hub, "hf_hub_download", unreachable)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("file", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
@pytest.mark.parametrize("repo", ["chs20/fare2-clip", "chs20/FARE4-ViT-B-32-laion2B-s34B-b79K"])
def test_fare_from_the_hub_and_from_a_folder(tmp_path: Path, file: str, repo: str) -> None:
    original = open_clip.CLIP(**CLIP)
    mean = [0.4815, 0.4578, 0.4082]
    preprocess = {"mean": mean, "std": [0.2, 0.3, 0.4], "interpolation": "bicubic"}
    config = {"model_cfg": CLIP, "preprocess_cfg": {**preprocess, "resize_mode": "shortest"}}
    folder = hub_folder(tmp_path, repo)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    if file.endswith(".bin"):
        torch.save(original.state_dict(), folder / file)
    else:
        save_file(original.state_dict(), folder / file)
    name = f"hf-hub:{repo}"
    loaded: Any = load_model(name, cache_dir=tmp_path, tokenizer=TOKENIZER, device="cpu")
    assert (loaded.name, loaded.source) == (name, str(folder / file))
    local: Any = load_model(f"local-dir:{folder}", tokenizer=TOKENIZER, device="cpu")
    pixels = torch.randn(2, 3, 32, 32)
    expected = original.eval().encode_image(pixels)
    for model in (loaded, local):
        torch.testing.assert_close(model.encode_image(pixels), expected)
        assert model.mean == tuple(mean)
    # Only its config came with a newer revision: half of each would be random weights
    newer = hub_folder(tmp_path, repo, "def")
    (newer / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match=r"open_clip_model\.safetensors or open_clip_pyt"):
        load_model(name, cache_dir=tmp_path, tokenizer=TOKENIZER)


@pytest.mark.usefixtures("offline")
def test_config_and_weights_of_two_revisions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    original = open_clip.CLIP(**CLIP)
    old = hub_folder(tmp_path, "org/x", "old")
    (old / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP}))
    new = hub_folder(tmp_path, "org/x", "new")
    hub_main = tmp_path / "models--org--x" / "refs" / "main"
    hub_main.write_text("old")

    def download(repo: str, file: str, **_: Any) -> str:
        hub_main.write_text("new")
        if file == "open_clip_config.json":
            (new / file).write_text(json.dumps({"model_cfg": CLIP}))
        else:
            save_file(original.state_dict(), new / file)
        return str(new / file)

    monkeypatch.setattr(hub, "get_hf_file_metadata", lambda *_, **__: None)
    monkeypatch.setattr(hub, "hf_hub_download", download)
    model: Any = load_model("hf-hub:org/x", cache_dir=tmp_path, tokenizer=TOKENIZER, device="cpu")
    pixels = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(model.encode_image(pixels), original.eval().encode_image(pixels))


def bert_folder(folder: Path) -> Path:
    """config.json of a small BERT, and its tokenizer's files."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "vocab_size": len(WORDS), "max_position_embeddings": 512}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", **sizes}))
    return tokenizer_files(folder)


def tokenizer_files(folder: Path) -> Path:
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    kind = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    return folder


def biomed_folder(folder: Path, bert: Path, name: str) -> nn.Module:
    """BiomedCLIP's files with small towers: timm's ViT, BERT with an MLP, context length 256."""
    pytest.importorskip("transformers")
    vision = {"timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": ""}
    vision |= {"timm_proj": "linear", "image_size": 160}
    text = {"hf_model_name": str(bert), "hf_tokenizer_name": str(bert), "hf_proj_type": "mlp"}
    text |= {"hf_pooler_type": "cls_last_hidden_state_pooler", "context_length": 256}
    torch.manual_seed(6)
    towers = {"vision_cfg": vision, "text_cfg": {**text, "hf_model_pretrained": False}}
    model = open_clip.CustomTextCLIP(24, **towers)
    state = model.state_dict()
    # transformers before 4.31 saved this buffer, and the released file has it
    state["text.transformer.embeddings.position_ids"] = torch.arange(512)[None]
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    names = {"hf_model_name": name, "hf_tokenizer_name": name}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": {**text, **names}}
    content = {"model_cfg": config, "preprocess_cfg": {"mean": [0.48, 0.46, 0.41]}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    return model.eval()


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("place", ["hub", "hub, text tower only", "beside", "elsewhere"])
def test_biomedclip(tmp_path: Path, place: str) -> None:
    bert, folder, options = tmp_path / "somewhere" / "bert", tmp_path / "biomed", {}
    name, spec = str(bert), f"local-dir:{folder}"
    if place.startswith("hub"):
        options = {"cache_dir": tmp_path / "cache"}
        bert, name = hub_folder(tmp_path / "cache", BERT), BERT
    if place == "hub":
        folder, spec = hub_folder(tmp_path / "cache", BIOMED), f"hf-hub:{BIOMED}"
    elif place == "beside":
        bert, name = folder / "text tower", "text tower"
    original = biomed_folder(folder, bert_folder(bert), name)
    if place == "hub, text tower only":  # the repository has the tokenizer, not the tower's config
        tokenizer_files(folder)
    model: Any = load_model(spec, device="cpu", **options)
    assert (model.image_size, model.embed_dim) == ((160, 160), 24)
    assert model.mean == (0.48, 0.46, 0.41)
    ids = torch.zeros(1, 256, dtype=torch.long)
    sentence = ["[CLS]", "a", "photo", "of", "tumor", "##s", ".", "[SEP]"]
    ids[0, :8] = torch.tensor([WORDS.index(word) for word in sentence])
    assert torch.equal(model.tokenizer(["a photo of Tumors."]), ids)
    text = nn.functional.normalize(original.encode_text(ids), dim=-1)  # type: ignore[operator]
    prompts = ["a photo", "a photo of Tumors."]
    torch.testing.assert_close(model.encode_text(prompts)[1:], text.detach())
    pixels = torch.randn(2, 3, 160, 160, requires_grad=True)
    features = model.encode_image(pixels)
    torch.testing.assert_close(features, original.encode_image(pixels))  # type: ignore[operator]
    features.square().sum().backward()
    assert pixels.grad is not None
    assert bool((pixels.grad.abs().amax(dim=(1, 2, 3)) > 0).all())


@pytest.mark.usefixtures("offline")
def test_biomedclip_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bert = bert_folder(tmp_path / "bert")
    folder = tmp_path / "biomed"
    biomed_folder(folder, bert, "/no/such/folder")
    with pytest.raises(ValueError, match="no folder '/no/such/folder', named in open_clip_config"):
        load_model(folder)
    biomed_folder(folder, bert, BERT)
    with pytest.raises(RuntimeError, match=r"tokenizer: .* keep its files beside the weights"):
        load_model(folder)
    tokenizer_files(folder)
    with pytest.raises(RuntimeError) as caught:
        load_model(folder, cache_dir=tmp_path / "empty")
    for part in ("text tower of", "config.json of https://huggingface.co/", BERT, "hf_model_name"):
        assert part in str(caught.value)
    biomed_folder(folder, bert, "config")
    (folder / "config").mkdir()
    with pytest.raises(ValueError, match=r"config', hf_model_name of .*, has no config.json"):
        load_model(folder, tokenizer=TOKENIZER)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "scc_fast\[transformers\]"'):
        load_model(folder, tokenizer=TOKENIZER)
