"""Fine-tuned image encoders from files made here, and one-line names of models."""

from __future__ import annotations

import os
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import scc_fast
from scc_fast.models import load_model, load_spec
from scc_fast.models.checkpoints import parse_model, read_image_encoder
from scc_fast.models.hub import stand_in_tokenizer

open_clip = pytest.importorskip("open_clip")

CLIP: dict[str, Any] = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 600, "width": 32, "heads": 2, "layers": 1},
}
TOKENIZER = stand_in_tokenizer({"vocab_size": 600, "context_length": 16})


@pytest.fixture(scope="module")
def tiny() -> Any:
    return load_model("tiny", device="cpu")


@pytest.fixture(scope="module")
def tower(tiny: Any) -> OrderedDict[str, Tensor]:
    """The bundled model's image tower, moved as fine-tuning would move it."""
    draw = torch.Generator().manual_seed(4)
    own = tiny.module.visual.state_dict()
    return OrderedDict(
        (key, value + 0.05 * torch.randn(value.shape, generator=draw)) for key, value in own.items()
    )


def training_script(tower: Any, **changes: Any) -> dict[str, Any]:
    """What TeCoA's finetuning.py and PMG_AFT.py pass to torch.save."""
    weights = [nn.Parameter(torch.ones(2))]
    optimizer = torch.optim.SGD(weights, lr=1e-5, momentum=0.9)
    weights[0].sum().backward()
    optimizer.step()
    prompter = OrderedDict({"module.prompt": torch.zeros(1, 0, 768)})  # TokenPrompter(0)
    return {
        "epoch": 10,
        "state_dict": OrderedDict(),
        "add_prompter": prompter,
        "vision_encoder_state_dict": tower,
        "best_acc1": np.mean([50.0, 60.5]),
        "optimizer": optimizer.state_dict(),
        **changes,
    }


def as_old_numpy(path: Path) -> None:
    """The file as NumPy 1 would have pickled its number."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in content.items():
            old = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            archive.writestr(name, old if name.endswith("data.pkl") else data)


def write(folder: Path, layout: str, tower: OrderedDict[str, Tensor]) -> Path:
    name = {"fare": "fare_eps_2.pt", "safetensors": "x.safetensors"}.get(layout, "tecoa.pth.tar")
    path = folder / name
    if layout == "safetensors":
        save_file(dict(tower), path)
    elif layout == "fare":
        torch.save(tower, path)
    elif layout == "module":
        prefixed = OrderedDict((f"module.{key}", value) for key, value in tower.items())
        torch.save(training_script(prefixed), path)
    else:
        torch.save(training_script(tower), path)
    if layout == "numpy 1":
        as_old_numpy(path)
        assert b"numpy.core.multiarray" in path.read_bytes()
    return path


@pytest.mark.parametrize("layout", ["tecoa", "module", "numpy 1", "fare", "safetensors"])
def test_only_the_image_tower_is_replaced(
    tmp_path: Path, layout: str, tiny: Any, tower: OrderedDict[str, Tensor]
) -> None:
    path = write(tmp_path, layout, tower)
    state = torch.random.get_rng_state()
    model: Any = load_model("tiny", device="cpu", image_encoder=path)
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.name == f"tiny+{path.name}"
    assert model.source == f"{path} over bundled with scc_fast"
    assert (model.mean, model.templates, model.flip) == (tiny.mean, tiny.templates, tiny.flip)
    assert model.defaults == tiny.defaults
    assert model.logit_scale == tiny.logit_scale
    prompts = ["a cat", "a dog"]
    assert torch.equal(model.encode_text(prompts), tiny.encode_text(prompts))
    pixels = torch.randn(3, 3, *tiny.image_size)
    before = tiny.encode_image(pixels)
    reference = load_model("tiny", device="cpu").module  # type: ignore[attr-defined]
    reference.visual.load_state_dict(tower)
    assert torch.equal(model.encode_image(pixels), reference.encode_image(pixels))
    assert not torch.allclose(model.encode_image(pixels), before, atol=1e-2)
    # The gate of TTC on a fine-tuned model looks at the tower that it was tuned from
    assert torch.equal(model.original.encode_image(pixels), before)
    assert (model.original.name, model.original.original) == ("tiny", None)
    theirs = dict(model.original.module.named_parameters())
    for key, value in model.module.named_parameters():
        assert not value.requires_grad
        assert (value.data_ptr() == theirs[key].data_ptr()) != key.startswith("visual.")


def test_a_tuned_model_is_defended_as_any_other(
    tmp_path: Path, tower: OrderedDict[str, Tensor]
) -> None:
    model: Any = load_model("tiny", device="cpu", image_encoder=write(tmp_path, "tecoa", tower))
    images = torch.rand(2, 3, *model.image_size)
    same: Any = load_model("tiny", device="cpu")
    same.module.visual.load_state_dict(tower)
    for method in ("none", "ttc"):
        found = scc_fast.Defender(model, ["cat", "dog"], method=method)(images, 0)
        expected = scc_fast.Defender(same, ["cat", "dog"], method=method)(images, 0)
        torch.testing.assert_close(found.logits, expected.logits)


def test_names_are_those_of_openai_clip() -> None:
    """The names of the checkpoints, written down from OpenAI's VisionTransformer."""
    with torch.device("meta"):
        visual = open_clip.CLIP(**open_clip.get_model_config("ViT-B-32-quickgelu")).visual
    block = ["attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight"]
    block += ["attn.out_proj.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight"]
    block += ["mlp.c_proj.bias", "ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"]
    names = {f"transformer.resblocks.{i}.{part}" for i in range(12) for part in block}
    names |= {"class_embedding", "positional_embedding", "proj", "conv1.weight"}
    names |= {f"ln_{place}.{part}" for place in ("pre", "post") for part in ("weight", "bias")}
    assert set(visual.state_dict()) == names
    assert visual.conv1.weight.shape == (768, 3, 32, 32)
    assert visual.proj.shape == (768, 512)


def test_weights_take_the_models_precision(tmp_path: Path, tower: OrderedDict[str, Tensor]) -> None:
    half = OrderedDict((key, value.half()) for key, value in tower.items())
    path = write(tmp_path, "tecoa", half)
    model: Any = load_model("tiny", device="cpu", image_encoder=path)
    for key, value in model.module.visual.state_dict().items():
        assert torch.equal(value, half[key].float())
    low: Any = load_model("tiny", device="cpu", precision="bf16", image_encoder=path)
    types = {key: value.dtype for key, value in low.original.module.state_dict().items()}
    assert torch.bfloat16 in types.values()
    assert {key: value.dtype for key, value in low.module.state_dict().items()} == types


class Runs:
    """What a pickle may do to who reads it."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.place),)


def test_nothing_in_a_file_is_run(tmp_path: Path, tower: OrderedDict[str, Tensor]) -> None:
    path = tmp_path / "evil.pth.tar"
    torch.save(training_script(tower, best_acc1=Runs(tmp_path / "ran")), path)
    with pytest.raises(
        ValueError, match=r"evil.pth.tar' holds a (posix|nt)\.mkdir, and only tensor"
    ):
        load_model("tiny", device="cpu", image_encoder=path)
    assert not (tmp_path / "ran").exists()
    # An allowance for NumPy's numbers does not stay behind, and the caller's own does
    with torch.serialization.safe_globals([np.dtype]):
        before = torch.serialization.get_safe_globals()
        read_image_encoder(write(tmp_path, "tecoa", tower))
        assert set(torch.serialization.get_safe_globals()) == set(before)
        assert np.dtype in before


def test_files_that_do_not_fit(tmp_path: Path, tiny: Any, tower: OrderedDict[str, Tensor]) -> None:
    path = tmp_path / "x.pth.tar"

    def refused(content: Any, message: str) -> None:
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            load_model("tiny", device="cpu", image_encoder=path)

    def script(**changes: Any) -> dict[str, Any]:
        return training_script(OrderedDict({**tower, **changes}))

    less = OrderedDict((key, value) for key, value in tower.items() if key != "proj")
    refused(training_script(less), r"x.pth.tar' does not fit .*: it lacks proj; load it over")
    refused(less, "lacks proj")
    refused(script(prompt_pos_embedding=torch.ones(2)), "it has prompt_pos_embedding besides")
    wide = torch.ones(tower["proj"].shape[0], 7)
    refused(script(proj=wide), rf"proj of shape \({len(wide)}, 7\), not \({len(wide)}, \d+\)")
    refused(script(proj=tower["proj"] * torch.nan), "proj has values that are not finite")
    refused(script(proj=3), "holds proj, not only tensors")
    prompt = {"module.prompt": torch.ones(1, 5, 768)}
    refused(training_script(tower, add_prompter=prompt), "weights under 'add_prompter' too, a vis")
    refused(training_script(tower, state_dict={"pad_up": torch.ones(1)}), "under 'state_dict' too")
    refused(tiny.module.state_dict(), r"is a whole model: pass it as pretrained=")
    refused({"state_dict": tiny.module.state_dict(), "epoch": 3}, "is a whole model")
    refused(
        {"epoch": 3, "best_acc1": 2.0}, "holds best_acc1, epoch, not only tensors; an image tower"
    )
    refused({}, "holds dict without tensors")
    refused([1, 2], "holds list without tensors")
    other = open_clip.CLIP(**CLIP).visual.state_dict()
    refused(other, r"it lacks .* and \d+ more|of shape")
    path.write_bytes(b"not a checkpoint at all")
    with pytest.raises(ValueError, match=r"x.pth.tar' is not a checkpoint that torch can read"):
        read_image_encoder(path)
    (tmp_path / "x.safetensors").write_bytes(b"nor this")
    with pytest.raises(ValueError, match=r"x.safetensors' cannot be read"):
        read_image_encoder(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"is a folder; an image tower"):
        load_model("tiny", image_encoder=tmp_path)
    with pytest.raises(ValueError, match=r"'/no/file.pth.tar' is not a file"):
        load_model("tiny", image_encoder="/no/file.pth.tar")


def test_models_that_take_no_tower(tmp_path: Path, tower: OrderedDict[str, Tensor]) -> None:
    transformers = pytest.importorskip("transformers")
    path = write(tmp_path, "fare", tower)
    with pytest.raises(ValueError, match="image_encoder: only for names, not for a model object"):
        load_model(open_clip.CLIP(**CLIP), tokenizer=TOKENIZER, image_encoder=path)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2}
    vision = {**small, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(vision_config=vision, text_config={**small, "vocab_size": 64})
    transformers.CLIPModel(config).save_pretrained(tmp_path / "hf")
    with pytest.raises(ValueError, match="image_encoder: only for open_clip's models, not 'hf'"):
        load_model(tmp_path / "hf", processor=(None, lambda *_, **__: 0), image_encoder=path)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("tiny", ("tiny", None, None)),
        (" ViT-B-32 ", ("ViT-B-32", None, None)),
        ("ViT-B-32-quickgelu@openai", ("ViT-B-32-quickgelu", "openai", None)),
        ("ViT-B/32@/w/x@2.pt", ("ViT-B/32", "/w/x@2.pt", None)),
        ("ViT-B-32@openai+/a+b/x@1.pt", ("ViT-B-32", "openai", "/a+b/x@1.pt")),
        ("tiny+x.pt", ("tiny", None, "x.pt")),
        ("hf-hub:org/repo", ("hf-hub:org/repo", None, None)),
        ("hf-hub:org/repo+x.pt", ("hf-hub:org/repo", None, "x.pt")),
        ("local-dir:/a@b/c", ("local-dir:/a@b/c", None, None)),
        ("local-dir:/a@b/c+~/x.pt", ("local-dir:/a@b/c", None, "~/x.pt")),
    ],
)
def test_one_line_names(spec: str, expected: tuple[str | None, ...]) -> None:
    assert parse_model(spec) == expected
    assert parse_model(spec)._fields == ("model", "pretrained", "image_encoder")


@pytest.mark.parametrize(
    "spec", ["", "  ", "@openai", "+x.pt", "ViT-B-32@", "ViT-B-32@openai+", "hf-hub:", "local-dir:"]
)
def test_one_line_names_with_an_empty_part(spec: str) -> None:
    with pytest.raises(ValueError, match="no part may be empty; got "):
        parse_model(spec)


def test_one_line_names_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tower: OrderedDict[str, Tensor]
) -> None:
    for name in ("tiny@openai", "hf-hub:org/x@main"):
        with pytest.raises(ValueError, match=r"brings its weights and takes no '@'"):
            load_spec(name)
    with pytest.raises(TypeError, match=r"NAME\[@PRETRAINED\]\[\+IMAGE_ENCODER\] .*, got int"):
        load_spec(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"did you mean .*ViT-B-32"):
        load_spec("vit-b32@openai")
    assert load_spec("tiny", "cpu").device == torch.device("cpu")
    path = write(tmp_path, "tecoa", tower)
    assert load_spec(f"tiny+{path}", "cpu").name == "tiny+tecoa.pth.tar"
    # The whole line, on an architecture of open_clip made small
    config = {**CLIP, "text_cfg": {**CLIP["text_cfg"], "vocab_size": 49408, "context_length": 77}}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Small-quickgelu", config)
    base, tuned = open_clip.CLIP(**config), open_clip.CLIP(**config)
    torch.save(base.state_dict(), tmp_path / "base.pt")
    torch.save(training_script(tuned.visual.state_dict()), path)
    model: Any = load_spec(f"Small-quickgelu@{tmp_path / 'base.pt'}+{path}", "cpu")
    assert model.name == "Small-quickgelu+tecoa.pth.tar"
    assert model.source == f"{path} over {tmp_path / 'base.pt'}"
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.encode_image(pixels), tuned.eval().encode_image(pixels))
    ids = open_clip.get_tokenizer("ViT-B-32")(["a cat"])
    text = base.eval().encode_text(ids, normalize=True)
    torch.testing.assert_close(model.encode_text(["a cat"]), text)
