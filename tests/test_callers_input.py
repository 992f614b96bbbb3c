"""What callers have in their hands: arrays, bytes, files, collections, NumPy's numbers."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from scc_fast import DefendedCLIP, Defender, defend, image_seeds, tiny
from scc_fast._classes import check_prompts
from scc_fast.images import to_batch
from toys import FIVE, defender_of, model_of

MODEL: Any = SimpleNamespace(
    image_size=(8, 8),
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.25, 0.3),
    interpolation="bicubic",
    resize_mode="shortest",
    fill_color=0,
    resize_edge=None,
    device=torch.device("cpu"),
)
RGB = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
PIXELS = torch.from_numpy(RGB).permute(0, 3, 1, 2).float() / 255


def png(values: np.ndarray = RGB[0]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "png")
    return file.getvalue()


# Images


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (RGB, PIXELS),
        (RGB[0], PIXELS[:1]),
        (RGB / 255, PIXELS),
        ((RGB / 255).astype(">f4"), PIXELS),
        ((RGB / 255).astype(np.longdouble), PIXELS),
        (RGB[:, ::-1, ::-1], PIXELS.flip(2, 3)),
        (np.concatenate([RGB, RGB[..., :1]], axis=-1), PIXELS),
        (RGB[0, ..., 1], PIXELS[:1, 1:2].expand(-1, 3, -1, -1)),
        (RGB[0, ..., 1:2], PIXELS[:1, 1:2].expand(-1, 3, -1, -1)),
        (RGB[..., 1], PIXELS[:, 1:2].expand(-1, 3, -1, -1)),
        (RGB[..., 1:2] / 255, PIXELS[:, 1:2].expand(-1, 3, -1, -1)),
        (RGB[:0], PIXELS[:0]),
        (list(RGB), PIXELS),
        (iter(list(RGB)), PIXELS),
        ([RGB[0], PIXELS[1], Image.fromarray(RGB[0]), png(RGB[1])], PIXELS.repeat(2, 1, 1, 1)),
        (png(), PIXELS[:1]),
        (bytearray(png()), PIXELS[:1]),
        (memoryview(png()), PIXELS[:1]),
        ([png(RGB[1]), io.BytesIO(png())], PIXELS.flip(0)),
    ],
)
def test_kinds_of_images(images: Any, expected: Tensor) -> None:
    before = images.copy() if isinstance(images, np.ndarray) else None
    torch.testing.assert_close(to_batch(images, MODEL), expected, atol=1e-7, rtol=0)
    assert before is None or np.array_equal(images, before)


def test_arrays_keep_their_size_and_their_memory() -> None:
    for values in (np.zeros((5, 7, 3), np.float32), np.zeros((1, 1, 3), np.float32)):
        out = to_batch(values, MODEL)
        assert out.shape == (1, 3, *values.shape[:2])
        out += 0.5
        assert not values.any()


def test_files_are_read_from_their_start(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png())
    with path.open("rb") as file:
        for _ in range(2):  # the second finds it read
            assert torch.equal(to_batch(file, MODEL), PIXELS[:1])
    with pytest.raises(ValueError, match=r"images: the BufferedReader object .*closed file"):
        to_batch(file, MODEL)
    with path.open(errors="replace") as file, pytest.raises(ValueError, match="mode 'rb'"):
        to_batch(file, MODEL)
    with pytest.raises(ValueError, match="nothing to read"):
        to_batch(io.BytesIO(), MODEL)
    named = np.array([str(path)] * 2)
    assert torch.equal(to_batch(named, MODEL), PIXELS[:1].expand(2, -1, -1, -1))
    assert torch.equal(to_batch(tmp_path.glob("*.png"), MODEL), PIXELS[:1])


@pytest.mark.parametrize("mode", ["La", "LA", "RGBa", "RGBX", "PA", "I;16", "I;16B", "L", "1"])
def test_odd_modes_of_pictures(mode: str) -> None:
    grey = Image.fromarray(np.full((8, 8), 255, np.uint8))
    picture = grey.convert("LA").convert("La") if mode == "La" else None
    if mode == "RGBa":
        picture = grey.convert("RGBA").convert("RGBa")
    elif mode.startswith("I;16"):
        order = ">u2" if mode.endswith("B") else "<u2"
        picture = Image.frombytes(mode, (8, 8), np.full((8, 8), 65535, order).tobytes())
    elif mode == "PA":
        picture = grey.convert("P").convert("PA")
    picture = picture or grey.convert(mode)
    assert picture.mode == mode
    assert torch.equal(to_batch(picture, MODEL), torch.ones(1, 3, 8, 8))


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_broken_exif_says_nothing(kind: str) -> None:
    file = io.BytesIO()
    broken = b"Exif\0\0II*\0\x08\0\0\0\x09\0\x12\x01\xff"
    Image.fromarray(RGB[0]).save(file, kind, exif=broken, lossless=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(to_batch(file, MODEL), PIXELS[:1])


IMAGES: list[tuple[Any, type[Exception], str]] = [
    ("~nobody_known/x.png", ValueError, "'~nobody_known/x.png' does not exist"),
    ("", ValueError, "'' does not exist"),
    ("a\0b", ValueError, "does not exist"),
    ("x" * 5000, ValueError, r"'\.\.\.x+' does not exist"),
    ("https://example.org/a.png", ValueError, "is a URL; URLs are not read"),
    (Path("https://example.org/a.png"), ValueError, "is a URL; URLs are not read"),
    ("s3://bucket/a.png", ValueError, "is a URL"),
    ("data:image/png;base64," + "A" * 9000, ValueError, "is a URL"),
    (b"", ValueError, "images: the bytes object cannot be read"),
    (b"no picture", ValueError, "images: the bytes object .* of no known format"),
    (png()[:60], ValueError, "images: the bytes object cannot be read"),
    (RGB.astype(np.int64), TypeError, r"images: .*array of int64; use .astype\(numpy.uint8\)"),
    (RGB.astype(np.uint16), TypeError, "images: .*array of uint16"),
    (RGB > 5, TypeError, "images: .*array of bool"),
    (RGB / 255 + 1j, TypeError, "images: .*array of complex128"),
    (RGB * 1.0, ValueError, "images: values from 0 to 255.*divide by 255"),
    (RGB / 255 * np.nan, ValueError, "images: NaN or infinity in 384 of 384"),
    (np.full((8, 8), 1e300), ValueError, "images: NaN or infinity"),
    (np.ma.masked_less(RGB, 5), TypeError, "images: a masked array"),
    (RGB.transpose(0, 3, 1, 2), ValueError, r"\(2, 3, 8, 8\); for channels first use torch.from"),
    (RGB[0].transpose(2, 0, 1), ValueError, r"\(3, 8, 8\) may be channels or 3 grey images"),
    (RGB[None], ValueError, r"images: an array .*\(1, 2, 8, 8, 3\)"),
    (np.frombuffer(png(), np.uint8), ValueError, r"given as bytes: x.tobytes\(\)"),
    (np.zeros((4, 0, 3)), ValueError, r"height and width must be at least 1"),
    ([RGB, RGB], ValueError, r"images\[0\]: in a sequence each array is"),
    ([RGB[0], RGB[..., 0]], ValueError, r"images\[1\]: 2 grey images"),
    ({"a": RGB[0]}, TypeError, "images: .*dict; give the pictures in it"),
    ({"a.png", "b.png"}, TypeError, "images: .*set, which has no order"),
    (DataLoader(TensorDataset(PIXELS)), TypeError, "images: .*DataLoader; .*one batch"),
    (TensorDataset(PIXELS), TypeError, "images: .*TensorDataset; .*one batch"),
    (iter(DataLoader(TensorDataset(PIXELS))), TypeError, r"images\[0\]: .*got builtins.list"),
    (object(), TypeError, "images: .*got builtins.object$"),
    (PIXELS.to_sparse(), ValueError, r"images: a dense .* a sparse_coo one; use .to_dense\(\)"),
    (PIXELS[0, 0].to_sparse_csr(), ValueError, "images: a dense .* sparse_csr"),
    (PIXELS.to("meta"), ValueError, "images: a dense .* meta"),
    (PIXELS.to_mkldnn(), ValueError, "images: a dense .* mkldnn"),
    ([PIXELS[0].to_sparse()], ValueError, "images: a dense .* sparse"),
]


@pytest.mark.parametrize(("images", "kind", "message"), IMAGES)
def test_refused_images(images: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as error:
        to_batch(images, MODEL)
    assert len(str(error.value)) < 300


@pytest.mark.filterwarnings("ignore")
def test_nested_and_quantized_tensors_are_refused() -> None:
    nested = torch.nested.nested_tensor(list(PIXELS))
    with pytest.raises(ValueError, match=r"images: a dense .* nested"):
        to_batch(nested, MODEL)
    quantized = torch.quantize_per_tensor(PIXELS, 1 / 255, 0, torch.quint8)
    with pytest.raises(ValueError, match=r"images: a dense .* quantized"):
        to_batch(quantized, MODEL)


# A little outside the range


@pytest.mark.parametrize("value", [1 + 2e-7, 1 + 9e-7, -9e-7])
def test_roundings_outside_are_clamped_and_keep_their_gradient(value: float) -> None:
    x = torch.full((1, 3, 8, 8), value, requires_grad=True)
    out = to_batch(x, MODEL, keep_graph=True)
    assert torch.equal(out.detach(), x.detach().clamp(0, 1))
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.ones_like(x))
    assert torch.equal(to_batch(x.detach().numpy()[0].transpose(1, 2, 0), MODEL), out.detach())


def test_more_outside_is_refused_with_its_digits_or_clamped_when_asked() -> None:
    x = torch.tensor([-7.5, 0.25, 1 + 3e-6, 1e10]).view(1, 1, 1, 4).repeat(1, 3, 4, 1)
    with pytest.raises(ValueError, match=r"from 0 to 1\.00000298, outside \[0, 1\]; clamp=True"):
        to_batch(x[..., 1:3] * (x[..., 1:3] > 0.5), MODEL)
    with pytest.raises(ValueError, match=r"images: values from -7.5 to 1e\+10, .*clamp=True"):
        to_batch(x, MODEL)
    leaf = x.clone().requires_grad_()
    out = to_batch(leaf, MODEL, clamp=True, keep_graph=True)
    assert torch.equal(out.detach(), x.clamp(0, 1))
    assert torch.equal(torch.autograd.grad(out.sum(), leaf)[0], torch.ones_like(x))
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="NaN or infinity"):
            to_batch(x * bad, MODEL, clamp=True)


def test_clamp_of_the_calls() -> None:
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 1.4 - 0.2
    defender, model = defender_of("open_clip", method="none"), model_of("open_clip")
    want = defender(x.clamp(0, 1)).logits
    assert torch.equal(defender(x, clamp=True).logits, want)
    again = defend(x, model, FIVE, method="none", clamp=True)
    assert torch.equal(again.logits, want)
    torch.testing.assert_close(DefendedCLIP(defender, clamp=True)(x), want)
    with pytest.raises(ValueError, match=r"outside \[0, 1\]; leave the model's .*clamp=True"):
        DefendedCLIP(defender)(x)


# Seeds


@pytest.mark.parametrize(
    "seeds",
    [
        [3, -4],
        (3, -4),
        [np.int64(3), torch.tensor(-4)],
        range(3, -11, -7),
        np.array([3, -4]),
        np.array([3, -4], np.int8),
        torch.tensor([3, -4]),
        torch.tensor([3, -4], dtype=torch.int16),
        [3, 2**64 - 4],
        np.array([3, 2**64 - 4], np.uint64),
    ],
)
def test_seeds_one_for_each_image(seeds: Any) -> None:
    assert image_seeds(seeds, 2).tolist() == [3, -4]
    assert image_seeds(seeds, 2).dtype == torch.int64


@pytest.mark.parametrize("seed", [np.int64(7), np.uint8(7), np.int32(7)])
def test_numpy_s_whole_numbers_seed_as_python_s(seed: Any) -> None:
    assert torch.equal(image_seeds(seed, 3), image_seeds(7, 3))


@pytest.mark.parametrize(
    "seeds",
    [
        *(np.True_, [True, False], np.array([True, False]), torch.tensor([True, False])),
        *({1, 2}, np.array([1.0, 2.0]), "12", b"12", [1, "2"], [[1], [2]], np.float64(1)),
        iter([1, 2]),
    ],
)
def test_refused_seeds(seeds: Any) -> None:
    with pytest.raises(TypeError, match="seeds must be None, a whole number"):
        image_seeds(seeds, 2)


@pytest.mark.parametrize("seeds", [list(range(3000)), torch.zeros(3000).long(), [], np.array(5)])
def test_another_number_of_seeds(seeds: Any) -> None:
    with pytest.raises(ValueError, match="seeds must be one whole number or 2") as error:
        image_seeds(seeds, 2)
    assert len(str(error.value)) < 300


# Classes and text features


@pytest.mark.parametrize(
    "make",
    [
        list,
        tuple,
        np.array,
        iter,
        dict.fromkeys,
        lambda names: dict.fromkeys(names).keys(),
        lambda names: dict(enumerate(names)).values(),
        lambda names: (name for name in names),
        lambda names: np.array(names, dtype=object),
        lambda names: SimpleNamespaceSeries(names),
    ],
)
def test_collections_of_classes(make: Callable[[Any], Any]) -> None:
    found = check_prompts(make(["a dog", "a cat"]))
    assert found == ("a dog", "a cat")
    assert {type(name) for name in found} == {str}


class SimpleNamespaceSeries:
    """What of pandas' Series is asked for."""

    ndim = 1

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __iter__(self) -> Any:
        return iter(self.names)


CLASSES: list[tuple[Any, type[Exception], str]] = [
    ("a dog " * 3000, TypeError, r"classes must be a list .*put it in a list"),
    ({"a dog", "a cat"}, TypeError, r"classes .*no order: use sorted"),
    (torch.rand(1000, 128), TypeError, "classes .*Tensor of shape.*text_features="),
    (np.array([["a dog", "a cat"]]), TypeError, r"classes .*\(1, 2\)"),
    (np.array([0.5, 1.0]), ValueError, "classes must hold non-empty strings.*0.5"),
    (io.StringIO("a dog\na cat"), TypeError, "classes must be a list"),
    (b"a dog", TypeError, "classes must be a list"),
    (5, TypeError, "classes must be a list"),
    ({0: "a dog"}, ValueError, "classes must hold non-empty strings, got 0"),
    (["a dog", ["a cat"] * 3000], ValueError, "classes must hold non-empty strings"),
    (["a dog"] * 3000, ValueError, "classes must hold at least two different"),
]


@pytest.mark.parametrize(("classes", "kind", "message"), CLASSES)
def test_refused_classes(classes: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as error:
        check_prompts(classes)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("prompt", ["a photo of a {}", "a photo of a {c}.", "{0}"])
def test_a_template_among_the_prompts_is_warned_about_once(prompt: str) -> None:
    with pytest.warns(UserWarning, match=r"classes holds the template .*\{") as caught:
        check_prompts([prompt, prompt + " too", "a {word} more"])
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_prompts(["a dog", "a set {1, 2}"])


TEXT = torch.randn(4, 24, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "given",
    [
        TEXT.numpy(),
        TEXT.tolist(),
        list(TEXT),
        TEXT * 1e30,
        TEXT * 1e-30,
        TEXT.double() * 1e60,
        TEXT.double().numpy() * 1e-200,
        TEXT.T.contiguous().T,
        TEXT.clone().requires_grad_(),
    ],
)
def test_text_features_of_any_container_and_scale(given: Any) -> None:
    want = torch.nn.functional.normalize(TEXT, dim=-1)
    found = Defender(model_of("open_clip"), text_features=given).text_features
    torch.testing.assert_close(found, want, atol=1e-6, rtol=0)
    assert found.dtype == torch.float32
    assert not found.requires_grad


TEXTS: list[tuple[Any, str]] = [
    (torch.complex(TEXT, TEXT), "complex64"),
    (TEXT.double().numpy() * 1j, "complex128"),
    (TEXT > 0, "bool"),
    (TEXT.to_sparse(), "dense .* sparse_coo"),
    (TEXT.to("meta"), "dense .* meta"),
    (TEXT.to_mkldnn(), "dense .* mkldnn"),
    ([[0.123456] * 64] * 1000, r"\(K, 24\)"),
    ([[1.0] * 24, [1.0] * 23], r"\(K, 24\)"),
    ([TEXT[0], TEXT[0, :5]], r"\(K, 24\)"),
    ([["a"] * 24] * 2, r"\(K, 24\)"),
    ("text", r"\(K, 24\)"),
    (TEXT.index_fill(0, torch.tensor([2]), torch.nan), "finite and not zero, row 2"),
    (TEXT.index_fill(0, torch.tensor([1]), torch.inf), "finite and not zero, row 1"),
    (TEXT.index_fill(0, torch.tensor([3]), 0), "finite and not zero, row 3"),
]


@pytest.mark.parametrize(("given", "message"), TEXTS)
def test_refused_text_features(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"text_features.*{message}") as error:
        Defender(model_of("open_clip"), text_features=given)
    assert len(str(error.value)) < 300


# All together


def test_a_defender_takes_them(tmp_path: Path) -> None:
    defender = defender_of("tiny", method="rn")
    data = Path(tiny.samples()[0]).read_bytes()
    values = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    tensor = torch.from_numpy(values.copy()).permute(2, 0, 1)
    want = defender(tensor, [5])
    for images in (values, data, io.BytesIO(data), [values], [data]):
        result = defender(images, np.array([5]))
        assert torch.equal(result.logits, want.logits)
        assert torch.equal(result.delta, want.delta)


def test_results_outlive_inference_mode_and_print_one_line() -> None:
    result = defender_of("open_clip", method="none")(torch.rand(2, 3, 32, 32))
    with torch.inference_mode():
        kept = (result.images, result.probs, result.labels)
    assert not any(value.is_inference() for value in kept)
    line = repr(result)
    assert line.startswith("DefenseResult(2 images of 32x32, 5 classes, method='none', ")
    assert "\n" not in line
    assert len(line) < 150
    assert torch.equal(result.topk(np.int64(2))[1], result.topk(2)[1])
    for wrong in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="k must be a whole number >= 1"):
            result.topk(wrong)  # type: ignore[arg-type]
