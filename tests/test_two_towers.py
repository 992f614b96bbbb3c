"""Models from any image encoder and any texts, and --model package.module:factory."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import scc_fast
from command_line import Run
from scc_fast import Defender, TwoTowers, image_seeds, tiny
from scc_fast._options import classes
from scc_fast.defenses import DEFENSES
from scc_fast.evaluate.worker import weights_hash
from toys import assert_same

NAMES = ["red", "green", "blue", "grey"]
ROWS = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
SIZE = 16


class Cnn(nn.Module):
    """A small convolutional network with what it must not run in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU6(), nn.Dropout(0.5),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6),
        )  # fmt: skip

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels)


def cnn() -> Cnn:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return Cnn()


def towers(**options: Any) -> TwoTowers:
    given = {"text": dict(zip(NAMES, ROWS, strict=True)), "size": SIZE, "mean": (0.5,) * 3}
    return TwoTowers(cnn(), **{**given, "std": (0.5,) * 3, "logit_scale": 20.0, **options})


def pictures(n: int = 3) -> Tensor:
    return torch.rand(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(n))


def test_logits_by_hand() -> None:
    own = cnn()
    model = towers(logit_bias=-1.5)
    result = Defender(model, NAMES, method="none")(pictures(), 0)
    with torch.no_grad():
        features = own.eval()((pictures() - 0.5) / 0.5)
    want = 20 * F.normalize(features, dim=-1) @ F.normalize(ROWS, dim=-1).T - 1.5
    torch.testing.assert_close(result.logits, want, atol=1e-4, rtol=1e-4)
    assert result.engine == "eager"
    assert model.embed_dim == 6


def test_an_image_function() -> None:
    own = cnn().eval().requires_grad_(False)
    by_function = TwoTowers(own.forward, dict(zip(NAMES, ROWS, strict=True)), size=SIZE)
    by_module = TwoTowers(own, dict(zip(NAMES, ROWS, strict=True)), size=SIZE)
    for method in ("none", "scc"):
        a, b = (Defender(m, NAMES, method=method, config={}) for m in (by_function, by_module))
        assert_same(a(pictures(), 0), b(pictures(), 0))
    assert weights_hash(by_function) == ""


def test_texts_are_embedded_for_each_defender() -> None:
    """No digest of the encoder's weights says whether a text function changed."""
    scale = torch.ones(6)
    model = TwoTowers(cnn(), lambda prompts: ROWS[: len(prompts)] * scale, size=SIZE)
    first = Defender(model, NAMES, method="none")
    scale[0] = -1
    second = Defender(model, NAMES, method="none")
    assert second.snapshot is first.snapshot
    torch.testing.assert_close(second.text_features, F.normalize(ROWS * scale, dim=-1))
    torch.testing.assert_close(first.text_features, F.normalize(ROWS, dim=-1))


def test_a_defender_stands_on_its_own_copy() -> None:
    """Training goes on in the caller's module; a new Defender has both towers anew."""
    own = cnn()
    before = Defender(TwoTowers(own, dict(zip(NAMES, ROWS, strict=True)), size=SIZE), NAMES)
    want = before(pictures(), 0).logits
    scale = torch.ones(6)
    moving = TwoTowers(own, lambda prompts: ROWS[: len(prompts)] * scale, size=SIZE)
    first = Defender(moving, NAMES, method="none")
    old = first.text_features.clone()
    with torch.no_grad():
        own.layers[-1].weight.mul_(-1)
        own.layers[1].running_mean.add_(1)
    scale[0] = -1
    assert torch.equal(before(pictures(), 0).logits, want)
    assert torch.equal(first.text_features, old)
    held, again = first(pictures(), 0), Defender(moving, NAMES, method="none")
    assert not torch.equal(again.text_features, old)
    with torch.no_grad():
        features = F.normalize(own.eval()(pictures()), dim=-1)
    want = 100 * features @ F.normalize(ROWS * scale, dim=-1).T
    torch.testing.assert_close(again(pictures(), 0).logits, want, atol=1e-3, rtol=1e-4)
    assert (held.logits - want).abs().max() > 1


def test_engine_compile() -> None:
    plain, compiled = (
        Defender(towers(), NAMES, method="none", engine=engine)(pictures(), 0)
        for engine in ("eager", "compile")
    )
    assert compiled.engine == "compile"
    torch.testing.assert_close(compiled.logits, plain.logits, atol=1e-4, rtol=1e-4)


def test_the_module_is_the_callers() -> None:
    own = cnn().train()
    before = {name: value.clone() for name, value in own.state_dict().items()}
    model = TwoTowers(own, size=SIZE)
    Defender(model, text_features=ROWS, method="ttc")(pictures(), 0)
    assert own.training
    assert all(parameter.requires_grad for parameter in own.parameters())
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())


@pytest.mark.parametrize("method", [name for name in DEFENSES if name != "r_tpt"])
def test_every_method(method: str) -> None:
    defender = Defender(towers(), NAMES, method=method, config={})
    seeds = image_seeds(3, 3)
    result = defender(pictures(), seeds)
    assert result.logits.isfinite().all()
    assert_same(defender(pictures()[1:2], seeds[1:2]), result, [1])
    assert (result.images - pictures()).abs().max() <= 17 / 255


def test_what_needs_a_text_tower_says_so() -> None:
    with pytest.raises(ValueError, match=r"r_tpt.*text tower"):
        Defender(towers(), NAMES, method="r_tpt", config={})(pictures(), 0)


def test_texts_of_a_function_and_of_a_table() -> None:
    seen: list[list[str]] = []

    def embed(prompts: list[str]) -> Tensor:
        seen.append(prompts)
        return torch.tensor([[len(p), 1.0, 2.0, 0, 0, 0] for p in prompts])

    text = towers(text=embed).encode_text(["aa", "b", "aa"], batch_size=1)
    assert seen == [["aa"], ["b"]]
    torch.testing.assert_close(text[[0, 2, 1]].norm(dim=-1), torch.ones(3))
    assert torch.equal(text[0], text[2])
    table = towers().encode_text(["blue", "red"])
    torch.testing.assert_close(table, F.normalize(ROWS[[2, 0]], dim=-1))
    assert towers().encode_text([]).shape == (0, 6)
    small = towers(text={"a": [1e-30] * 6, "b": [1e30, 0, 0, 0, 0, 0]}).encode_text(["a", "b"])
    torch.testing.assert_close(small.norm(dim=-1), torch.ones(2))
    for given, told in (
        (lambda prompts: torch.zeros(len(prompts), 6), "row of 'a' must be finite and not zero"),
        (lambda prompts: torch.full((len(prompts), 6), torch.nan), "row of 'a' must be finite"),
        (lambda prompts: torch.ones(len(prompts), 5), "pictures in 6 numbers and texts in 5"),
        (lambda prompts: None, "its text function gives None"),
    ):
        with pytest.raises(ValueError, match=told):
            towers(text=given).encode_text(["a", "b"])
    with pytest.raises(TypeError, match="a list of strings is needed"):
        towers().encode_text("red")
    with pytest.raises(ValueError, match=r"'gren' is not among the 4 texts of two-towers.*'green'"):
        Defender(towers(), ["red", "gren"])
    with pytest.raises(ValueError, match="two-towers has no text tower: give text="):
        Defender(TwoTowers(cnn(), size=SIZE), NAMES)


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        ({"image": 3}, TypeError, "image: a module or a function is needed, got 3"),
        ({"image": Cnn}, TypeError, "image: a module or a function"),
        ({"text": ROWS}, TypeError, "text: a function of prompts, or a mapping"),
        ({"text": {}}, ValueError, "text: the mapping is empty"),
        ({"text": {"a": [1.0, 2.0], "b": [1.0]}}, ValueError, "all of one length, got 'b'"),
        ({"text": {"a": [0.0, 0.0]}}, ValueError, "row of 'a' must be finite and not zero"),
        ({"text": {"a": "red"}}, ValueError, "one row of numbers"),
        ({"text": {"a": [float("nan")] * 6}}, ValueError, "must be finite and not zero"),
        ({"text": {3: [1.0] * 6}}, ValueError, "one row of numbers, .* got 3"),
        ({"text": {"a": [1.0, 2.0]}}, ValueError, "pictures in 6 numbers and texts in 2"),
        ({"image": lambda pixels: pixels}, ValueError, "its image tower gives"),
        ({"image": lambda: 0}, ValueError, "image: <lambda> fails on a picture of size="),
        ({"image": nn.Linear(7, 6)}, ValueError, r"Linear fails on a picture of size=\(16, 16\)"),
        ({"image": cnn().double()}, TypeError, "weight is torch.float64; weights in"),
        ({"name": ""}, TypeError, "name: a string"),
        ({"logit_scale": "x"}, ValueError, "logit_scale must be a number"),
        ({"interpolation": "cubic"}, ValueError, "interpolation must be one of bicubic, bilinear"),
        ({"size": 0}, ValueError, "size: .* got 0"),
        ({"size": (3, 4.0)}, ValueError, "size: "),
        ({"size": None}, ValueError, "size: .* got None"),
        ({"mean": 0.5}, TypeError, "mean: three numbers"),
        ({"std": (0, 1, 1)}, ValueError, "std: three finite numbers"),
        ({"resize_mode": "short"}, ValueError, "resize_mode must be one of"),
        ({"device": "cud"}, ValueError, "device"),
    ],
)
def test_refusals(given: dict[str, Any], error: type[Exception], told: str) -> None:
    image = given.get("image", cnn())
    rest = {key: value for key, value in given.items() if key != "image"}
    with pytest.raises(error, match=told) as found:
        TwoTowers(image, **{"size": SIZE, "text": dict(zip(NAMES, ROWS, strict=True)), **rest})
    assert len(str(found.value)) < 300


def test_shapes_and_one_line() -> None:
    model = towers(name="small")
    assert model.encode_image(torch.zeros(0, 3, SIZE, SIZE)).shape == (0, 6)
    with pytest.raises(ValueError, match=r"shape \(1, 3, 8, 8\), but small takes"):
        model.encode_image(torch.zeros(1, 3, 8, 8))
    assert repr(model) == "TwoTowers('small', 16x16, float32, cpu)"
    assert model.info()["parameters"] == sum(p.numel() for p in cnn().parameters())
    assert weights_hash(model) == weights_hash(towers())
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again.encode_image(pictures()), model.encode_image(pictures()))


def test_a_network_of_timm_without_attention() -> None:
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0)
    model = TwoTowers(net, size=64, mean=(0.5,) * 3, std=(0.5,) * 3, name="lite0")
    text = torch.randn(3, 1280, generator=torch.Generator().manual_seed(2))
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    plain = Defender(model, text_features=text, method="scc", config={"gate": False})(x, 0)
    bf16 = Defender(model, text_features=text, method="none", precision="bf16")(x, 0)
    assert plain.delta.abs().max() > 0
    none = Defender(model, text_features=text, method="none")(x, 0).logits
    assert 0 < (bf16.logits - none).abs().max() < 2


# ------------------------------------------------------------------------------------- factories

SOURCE = """
import torch
from torch import nn
from scc_fast import TwoTowers, tiny

def make(device=None):
    torch.manual_seed(1)
    net = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(192, 16))
    return TwoTowers(net, embed, size=64, name="pools", device=device)

def embed(prompts):
    source = torch.Generator()
    rows = []
    for prompt in prompts:
        source.manual_seed(sum(map(ord, prompt)))
        rows.append(torch.randn(16, generator=source))
    return torch.stack(rows)

def fails():
    raise KeyError("no such key")

def needs(argument):
    pass

def nothing():
    return "tiny"
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_towers_of_a_test.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    return "own_towers_of_a_test"


def test_a_factory(module: str) -> None:
    model = scc_fast.load_model(f"{module}:make", device="cpu")
    assert (type(model), model.name) == (TwoTowers, "pools")
    result = Defender(f"{module}:make", NAMES, method="none")(torch.zeros(1, 3, 64, 64), 0)
    want = model.logit_scale * F.normalize(model.encode_image(torch.zeros(1, 3, 64, 64)), dim=-1)
    torch.testing.assert_close(result.logits, want @ model.encode_text(NAMES).T)
    for name, error, told in (
        (f"{module}:mke", ValueError, "has no function mke; did you mean 'make'"),
        ("own_towers_of_nobody:make", ValueError, "No module named .own_towers_of_nobody"),
        (f"{module}:nothing", TypeError, "must return a model, got 'tiny'"),
        (f"{module}:torch", ValueError, "has no function torch"),
        (f"{module}:fails", ValueError, "fails: KeyError: .*no such key"),
        (f"{module}:needs", ValueError, "fails: TypeError"),
    ):
        with pytest.raises(error, match=told):
            scc_fast.load_model(name)
    for more in ({"pretrained": "openai"}, {"mean": (0.5,) * 3}, {"flip": False}):
        for name in (f"{module}:make", towers()):
            with pytest.raises(ValueError, match="is complete: omit pretrained"):
                scc_fast.load_model(name, **more)


def test_a_factory_in_the_other_commands(module: str, run: Run, tmp_path: Path) -> None:
    """What each writes is of that model; evaluate has a test of its own."""
    Image.new("RGB", (64, 64), (200, 30, 30)).save("red.png")
    found = {}
    for asked in ("defend red.png --labels red,blue --method none", "doctor",
                  "bench --seconds 0.01 --batch 1"):  # fmt: skip
        code, _, err = run(*asked.split(), "--model", f"{module}:make", "--json", "found.json")
        assert code == 0, err
        found[asked.split()[0]] = json.loads((tmp_path / "found.json").read_text())
        (tmp_path / "found.json").unlink()
    assert found["doctor"]["model"]["name"] == "pools"
    assert {row["model"] for row in found["bench"]["rows"]} == {"pools"}
    prompts = classes("red,blue", f"{module}:make")
    pixels = torch.tensor([200, 30, 30])[None, :, None, None].expand(1, 3, 64, 64) / 255
    want = Defender(f"{module}:make", prompts, method="none")(pixels, 0).logits.softmax(dim=-1)[0]
    got = {one["label"]: one["probability"] for one in found["defend"]["rows"][0]["after"]}
    assert [got["red"], got["blue"]] == pytest.approx(want.tolist(), rel=1e-2)


def test_a_factory_in_an_evaluation(module: str, run: Run, tmp_path: Path) -> None:
    asked = f"--model {module}:make --defense none,extrapolate --attack pgd2 --n-samples 4"
    code, _, err = run("evaluate", *asked.split(), "--allow-weak-attack", "--out", "found")
    assert code == 0, err
    (folder,) = (tmp_path / "found").iterdir()
    model = json.loads((folder / "run.json").read_text())["model"]
    assert (model["spec"], model["source"]) == (f"{module}:make", "TwoTowers(Sequential)")
    towers = scc_fast.load_model(f"{module}:make")
    assert model["weights_sha256"] == weights_hash(towers)
    assert model["logit_scale"] == 100.0
    text = towers.encode_text(tiny.prompts())
    assert model["text_sha256"] == hashlib.sha256(text.numpy().tobytes()).hexdigest()
