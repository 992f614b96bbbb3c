"""to_batch and to_pil: every kind of input, and every refusal."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from scc_fast.images import _cut, to_batch, to_pil

pytest.importorskip("open_clip")

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def fake_model(**changes: Any) -> Any:
    """The attributes that images.py reads."""
    declared = {
        "image_size": (32, 32),
        "mean": MEAN,
        "std": STD,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "fill_color": 0,
        "resize_edge": None,
        "device": torch.device("cpu"),
    }
    return SimpleNamespace(**{**declared, **changes})


MODEL = fake_model()


def picture(width: int = 48, height: int = 40, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Smooth structure and noise, so that resampling and orientation show."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, width)[None, :, None] + np.linspace(0, 30, height)[:, None, None]
    values = np.clip(ramp + rng.integers(0, 25, (height, width, 3)), 0, 255).astype(np.uint8)
    return Image.fromarray(values).convert(mode)


def pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1).float() / 255


def test_float_tensors_keep_their_size_and_memory() -> None:
    x = torch.rand(2, 3, 7, 5)
    before = x.clone()
    out = to_batch(x, MODEL)
    assert torch.equal(out, before)
    assert torch.equal(x, before)
    assert to_batch(x[0], MODEL).shape == (1, 3, 7, 5)
    strided = torch.rand(2, 7, 5, 3).permute(0, 3, 1, 2)
    assert torch.equal(to_batch(strided, MODEL), strided)
    assert torch.equal(
        to_batch(torch.tensor([0.0, 1.0, 0.5]).view(1, 3, 1, 1), MODEL).sum(), 1.5 * torch.ones(())
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types(dtype: torch.dtype) -> None:
    x = torch.rand(2, 3, 4, 4).to(dtype)
    out = to_batch(x, MODEL)
    assert out.dtype == torch.float32
    assert torch.equal(out, x.float())


def test_uint8_is_divided_by_255() -> None:
    x = torch.arange(256, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    out = to_batch(x, MODEL)
    assert out.dtype == torch.float32
    assert (out.min(), out.max()) == (0, 1)
    assert torch.equal(out, x / 255)


@pytest.mark.parametrize("empty", [[], (), torch.zeros(0, 3, 9, 9), torch.zeros(0, 3, 9, 9).byte()])
def test_empty_batches(empty: Any) -> None:
    size = empty.shape[2:] if isinstance(empty, Tensor) else MODEL.image_size
    out = to_batch(empty, MODEL)
    assert out.shape == (0, 3, *size)
    assert out.dtype == torch.float32


def test_gradients_can_be_taken_whatever_the_mode() -> None:
    with torch.inference_mode():
        x = torch.rand(2, 3, 4, 4)
        inside = to_batch(x, MODEL)
        mixed = to_batch([x[0], picture(4, 4)], fake_model(image_size=(4, 4)))
    for out in (inside, mixed, to_batch(x, MODEL), to_batch(x[0], MODEL)):
        assert not out.is_inference()
        out = out.requires_grad_()
        (out**2).sum().backward()
        assert out.grad is not None
    with torch.no_grad():
        assert not to_batch(torch.rand(1, 3, 4, 4, requires_grad=True), MODEL).requires_grad


@pytest.mark.parametrize("is_normalized", [False, True])
def test_keep_graph(is_normalized: bool) -> None:
    x = torch.full((1, 3, 4, 4), 0.25, dtype=torch.float64, requires_grad=True)
    assert not to_batch(x, MODEL, is_normalized=is_normalized).requires_grad
    out = to_batch(x, MODEL, is_normalized=is_normalized, keep_graph=True)
    (grad,) = torch.autograd.grad(out.sum(), x)
    scale = torch.tensor(STD if is_normalized else (1.0, 1, 1), dtype=torch.float64)
    torch.testing.assert_close(grad, scale.view(1, 3, 1, 1).expand_as(grad), rtol=1e-6, atol=0)


def test_is_normalized_round_trip() -> None:
    x = torch.rand(2, 3, 8, 8)
    x[0, :, 0, 0], x[0, :, 0, 1] = 0.0, 1.0
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    for dtype, atol in ((torch.float32, 1e-6), (torch.float64, 1e-6)):
        out = to_batch(((x - mean) / std).to(dtype), MODEL, is_normalized=True)
        torch.testing.assert_close(out, x, atol=atol, rtol=0)
        assert out.min() >= 0
        assert out.max() <= 1
    near = (x * (1 + 5e-5) - mean) / std
    assert to_batch(near, MODEL, is_normalized=True).max() == 1
    with pytest.raises(ValueError, match="after un-normalising"):
        to_batch((x * 1.001 - mean) / std, MODEL, is_normalized=True)
    with pytest.raises(ValueError, match="is_normalized: images is uint8"):
        to_batch(torch.zeros(1, 3, 2, 2).byte(), MODEL, is_normalized=True)
    with pytest.raises(
        ValueError, match=r"is_normalized: only for .* arrays, but images is a Image"
    ):
        to_batch(picture(), MODEL, is_normalized=True)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("size", [(48, 40), (31, 90), (32, 32), (1, 1), (5, 3)])
def test_pictures_equal_what_open_clip_feeds(
    size: tuple[int, int], mode: str, interpolation: str
) -> None:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    config = PreprocessCfg(
        size=(32, 32), mean=MEAN, std=STD, interpolation=interpolation, resize_mode=mode
    )
    expected = image_transform_v2(config, is_train=False)(picture(*size))
    out = to_batch(picture(*size), fake_model(resize_mode=mode, interpolation=interpolation))
    assert out.shape == (1, 3, 32, 32)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    torch.testing.assert_close((out[0] - mean) / std, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["CLIP", "Siglip"])
@pytest.mark.parametrize("edge", [32, 37])
def test_pictures_equal_what_transformers_feeds(family: str, edge: int) -> None:
    transformers = pytest.importorskip("transformers")
    size: dict[str, Any] = {"size": {"height": 32, "width": 32}}
    if family == "CLIP":
        size = {"size": {"shortest_edge": edge}, "crop_size": {"height": 32, "width": 32}}
    processor = getattr(transformers, f"{family}ImageProcessor")(**size, do_normalize=False)
    expected = processor(images=[picture(61, 50)], return_tensors="pt")["pixel_values"]
    mode = "shortest" if family == "CLIP" else "squash"
    wide = edge if family == "CLIP" else None
    out = to_batch(picture(61, 50), fake_model(resize_mode=mode, resize_edge=wide))
    # transformers 5 resizes tensors instead of pictures: one level of 8 bits
    assert (out - expected).abs().max() <= 1.01 / 255


def test_non_square_models_and_other_filters() -> None:
    for size in ((32, 48), (48, 32)):
        assert to_batch(picture(), fake_model(image_size=size)).shape == (1, 3, *size)
    wide = {"resize_edge": 32}
    nearest = to_batch(picture(64, 64), fake_model(interpolation="nearest", **wide))
    levels = torch.unique((pixels(picture(64, 64)) * 255).round())
    assert torch.isin((nearest * 255).round(), levels).all()
    assert not torch.equal(
        nearest, to_batch(picture(64, 64), fake_model(interpolation="lanczos", **wide))
    )
    squash = [fake_model(interpolation=f, resize_mode="squash") for f in ("nearest", "bicubic")]
    assert not torch.equal(*(to_batch(picture(64, 60), model) for model in squash))
    crop = to_batch(picture(64, 64), fake_model(resize_edge=20))
    assert (crop[:, :, :6] == 0).all()  # an edge below the crop is padded, as transformers does


def test_large_and_extreme_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    big = Image.new("RGB", (4000, 3000), (10, 20, 30))
    out = to_batch(big, MODEL)
    torch.testing.assert_close(
        out, torch.tensor([10, 20, 30]).view(1, 3, 1, 1).expand_as(out) / 255
    )
    # 1 x 4000 would be 896000 pixels wide on its way: only the middle is resized
    made: list[tuple[int, int]] = []
    resize = Image.Image.resize

    def record(image: Image.Image, size: Any, *args: Any, **options: Any) -> Image.Image:
        made.append(tuple(size))
        return resize(image, size, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", record)
    for width in (4000, 4001):
        values = np.zeros((1, width, 3), np.uint8)
        values[:, width // 2 - 30 : width // 2 + 30] = 200
        values[:, width // 2] = 100
        image = Image.fromarray(values)
        for thin in (image, image.transpose(Image.Transpose.ROTATE_90)):
            to_batch(thin, fake_model(image_size=(8, 8)))
            middle = _cut(thin, 16)
            assert max(middle.size) <= 17
            line = np.asarray(middle).reshape(-1, 3)[:, 0]
            # the middle stays in the middle, to the half pixel
            assert line[len(line) // 2] == 100 or line[(len(line) - 1) // 2] == 100
            assert abs(len(line) - width) % 2 == 0
    assert made
    assert max(max(size) for size in made) <= 8 * 17
    # where both ways are affordable they agree
    from open_clip.transform import PreprocessCfg, image_transform_v2

    thin = picture(1501, 30)
    usual = image_transform_v2(PreprocessCfg(size=32, mean=(0, 0, 0), std=(1, 1, 1)), False)(thin)
    torch.testing.assert_close(to_batch(thin, MODEL)[0], usual, atol=2 / 255, rtol=0)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1", "YCbCr", "HSV"])
def test_picture_modes(mode: str) -> None:
    image = picture(32, 32, mode) if mode != "LA" else picture(32, 32, "L").convert("LA")
    out = to_batch(image, MODEL)
    torch.testing.assert_close(out[0], pixels(image))


def test_alpha_is_dropped_and_transparent_palettes_do_not_warn() -> None:
    image = picture(32, 32, "P")
    image.info["transparency"] = bytes(range(256))
    clear = picture(32, 32)
    clear.putalpha(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_batch(image, MODEL)
        assert torch.equal(to_batch(clear, MODEL)[0], pixels(picture(32, 32)))


def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = (np.linspace(0, 65535, 32 * 32).reshape(32, 32)).astype(np.uint16)
    expected = torch.from_numpy(values.astype(np.float64) / 65535).float()
    image = Image.fromarray(values)
    image.save(tmp_path / "grey.png")
    image.save(tmp_path / "grey.tiff")
    wide = Image.fromarray(values.astype(np.int32))
    for source in (image, wide, tmp_path / "grey.png", tmp_path / "grey.tiff"):
        out = to_batch(source, MODEL)
        torch.testing.assert_close(out[0, 1], expected, atol=0.51 / 255, rtol=0)
        assert torch.equal(out[0, 0], out[0, 2])
    small = Image.fromarray((values // 257).astype(np.int32))
    torch.testing.assert_close(to_batch(small, MODEL)[0, 0], expected, atol=1.01 / 255, rtol=0)
    with pytest.raises(ValueError, match="grey values from 0 to 70000, outside 16 bits"):
        to_batch(Image.fromarray(np.array([[0, 70000]], np.int32)), MODEL)
    with pytest.raises(ValueError, match="floating-point pixels"):
        to_batch(Image.fromarray(np.zeros((4, 4), np.float32)), MODEL)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    upright = picture(32, 32)
    # What a camera would store so that the orientation tag turns it upright
    turns = {
        1: [],
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = upright
    for turn in turns[orientation]:
        stored = stored.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert torch.equal(to_batch(tmp_path / "a.png", MODEL)[0], pixels(upright))
    with Image.open(tmp_path / "a.png") as image:
        assert torch.equal(to_batch(image, MODEL)[0], pixels(upright))


def test_paths_and_mixed_sequences(tmp_path: Path) -> None:
    for i in range(3):
        picture(40, 36, seed=i).save(tmp_path / f"{i}.png")
    single = to_batch(str(tmp_path / "0.png"), MODEL)
    assert torch.equal(single, to_batch(tmp_path / "0.png", MODEL))
    assert torch.equal(single, to_batch([picture(40, 36)], MODEL))
    mixed = [
        tmp_path / "1.png",
        str(tmp_path / "2.png"),
        picture(40, 36),
        torch.full((3, 32, 32), 0.5, dtype=torch.float16),
        torch.full((3, 32, 32), 255, dtype=torch.uint8),
    ]
    out = to_batch(mixed, MODEL)
    assert out.shape == (5, 3, 32, 32)
    assert torch.equal(out[2:3], single)
    assert torch.equal(out[3], torch.full((3, 32, 32), 0.5))
    assert torch.equal(out[4], torch.ones(3, 32, 32))
    assert not torch.equal(out[0], out[1])
    assert to_batch([torch.rand(3, 5, 6)] * 2, MODEL).shape == (2, 3, 5, 6)
    with pytest.raises(ValueError, match=r"images\[1\]: 5x6 pixels, the first .* has 32x32"):
        to_batch([picture(), torch.rand(3, 5, 6)], MODEL)
    with pytest.raises(ValueError, match=r"images\[1\]: in a sequence each tensor is \(3, H, W\)"):
        to_batch([torch.rand(3, 4, 4), torch.rand(1, 3, 4, 4)], MODEL)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.full((1, 3, 2, 2), 200.0), "from 200 to 200, outside .0, 1.; divide by 255"),
        (torch.full((1, 3, 2, 2), -1.5), "from -1.5 to -1.5.*pass is_normalized=True"),
        (torch.full((1, 3, 2, 2), 1.5), "from 1.5 to 1.5.*clamp=True"),
        (torch.full((1, 3, 2, 2), 1.00001), "from 1.00001 to 1.00001, .*; clamp=True clamps them"),
        (torch.full((1, 3, 2, 2), float("nan")), "NaN or infinity in 12 of 12 values"),
        (torch.full((1, 3, 2, 2), float("-inf")), "NaN or infinity"),
        (torch.rand(2, 8, 8, 3), r"got shape \(2, 8, 8, 3\).*permute\(0, 3, 1, 2\)"),
        (torch.rand(8, 8, 3), r"permute\(0, 3, 1, 2\)"),
        (torch.rand(2, 1, 8, 8), r"expand\(-1, 3, -1, -1\)"),
        (torch.rand(2, 4, 8, 8), "alpha channel"),
        (torch.rand(2, 5, 8, 8), r"3 channels are needed, got shape \(2, 5, 8, 8\)$"),
        (torch.rand(8, 8), "got 2 dimensions"),
        (torch.rand(1, 1, 3, 8, 8), "got 5 dimensions"),
        (torch.rand(1, 3, 0, 8), r"at least 1, got shape \(1, 3, 0, 8\)"),
        (torch.rand(0, 3, 8, 0), "at least 1"),
        (Image.new("RGB", (0, 4)), "an image of 0x4 pixels"),
        ("/no/such/file.png", "images: '/no/such/file.png' does not exist"),
        ("/", "is a folder"),
    ],
)
def test_wrong_values(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_batch(value, MODEL)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(1, 3, 2, 2, dtype=torch.int64), "got torch.int64; use x.to.torch.uint8"),
        (torch.zeros(1, 3, 2, 2, dtype=torch.int8), "got torch.int8"),
        (torch.zeros(1, 3, 2, 2, dtype=torch.bool), "got torch.bool"),
        (torch.zeros(1, 3, 2, 2, dtype=torch.complex64), "got torch.complex64"),
        (None, "got builtins.NoneType"),
        (3.5, "got builtins.float"),
        ({"a": 1}, "got builtins.dict"),
    ],
)
def test_wrong_types(value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        to_batch(value, MODEL)


def test_one_bad_value_is_found_and_validate_false_skips_it() -> None:
    x = torch.rand(4, 3, 9, 9)
    x[3, 2, 8, 8] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity in 1 of 972 values"):
        to_batch(x, MODEL)
    assert to_batch(x, MODEL, validate=False)[3, 2, 8, 8].isnan()
    with pytest.raises(ValueError, match="3 channels"):
        to_batch(torch.rand(1, 4, 2, 2), MODEL, validate=False)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tiff", "bmp"])
def test_damaged_files_name_the_path(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cut.{suffix}"
    picture(200, 200).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(
        ValueError, match=rf"images\[1\]: .*cut\.{suffix}' cannot be read as an ima"
    ):
        to_batch([picture(), path], MODEL)


def test_other_unreadable_files(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    for content in (b"", b"not a picture"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.png' cannot be read as an image"):
            to_batch(path, MODEL)
    # A header that claims 60000 x 60000 pixels
    picture(8, 8).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", 60000, 60000)
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"a\.png' cannot be read as an image"):
        to_batch(path, MODEL)
    picture(64, 64).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with (
        Image.open(path) as image,
        pytest.raises(ValueError, match="images cannot be read as an image"),
    ):
        to_batch(image, MODEL)


def test_to_pil_rounds() -> None:
    image = picture()
    for shift in (-0.49, 0.0, 0.49):
        x = (pixels(image) * 255 + shift).clamp(0, 255) / 255
        assert np.array_equal(np.asarray(to_pil(x)), np.asarray(image))
    assert np.array_equal(np.asarray(to_pil(pixels(image).double()[None])), np.asarray(image))
    x = torch.randint(0, 256, (3, 5, 6), dtype=torch.uint8)
    assert torch.equal(torch.from_numpy(np.asarray(to_pil(x)).copy()).permute(2, 0, 1), x)
    assert to_pil(x).mode == "RGB"
    loop = to_batch(to_pil(pixels(picture(32, 32)).requires_grad_()), MODEL)
    assert torch.equal(loop[0], pixels(picture(32, 32)))


def test_to_pil_refuses() -> None:
    with pytest.raises(ValueError, match=r"one image \(3, H, W\) is needed, got \(2, 3, 4, 4\)"):
        to_pil(torch.rand(2, 3, 4, 4))
    with pytest.raises(ValueError, match="outside"):
        to_pil(torch.full((3, 4, 4), 2.5))
    with pytest.raises(TypeError, match=r"got torch\.int32"):
        to_pil(torch.zeros(3, 4, 4, dtype=torch.int32))
    with pytest.raises(TypeError, match=r"image: a tensor .* ndarray"):
        to_pil(np.zeros((3, 4, 4)))  # type: ignore[arg-type]
