"""How pictures are prepared: the papers' resize and crop on hand-worked pixels, and the model's."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from scc_fast.evaluate.data.protocol import BUNDLED, OPEN_CLIP, PROTOCOLS, TTC, find_protocol
from scc_fast.images import to_batch


def model(size: int | tuple[int, int] = 224, **changes: Any) -> Any:
    """The attributes that a preparation reads."""
    declared = {
        "name": "toy",
        "image_size": (size, size) if isinstance(size, int) else size,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "fill_color": 0,
        "resize_edge": None,
        "device": torch.device("cpu"),
    }
    return SimpleNamespace(**{**declared, **changes})


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def as_tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.copy()).permute(2, 0, 1).float() / 255


@pytest.mark.parametrize(("size", "edge"), [(224, 256), (336, 384), (64, 73), (32, 37)])
def test_the_edge_is_256_for_224_pixels_and_in_proportion(size: int, edge: int) -> None:
    preparation = TTC.preparation(model(size))
    assert preparation.edge == edge
    assert preparation.facts() == {
        "resize": {"mode": "shortest", "edge": edge, "interpolation": "bilinear"},
        "crop": [size, size],
    }
    out = preparation(Image.fromarray(noise(90, 120)))
    assert out.shape == (3, size, size)
    assert out.dtype == torch.float32


def test_a_picture_of_256_pixels_is_only_cropped() -> None:
    """256 - 224 = 32: 16 pixels go on each side."""
    values = noise(256, 256)
    out = TTC.preparation(model())(Image.fromarray(values))
    assert torch.equal(out, as_tensor(values[16:240, 16:240]))


def test_the_longer_side_is_cropped_around_its_middle() -> None:
    """512 - 224 = 288: 144 rows go above, 16 columns on the left."""
    values = noise(512, 256)
    out = TTC.preparation(model())(Image.fromarray(values))
    assert torch.equal(out, as_tensor(values[144:368, 16:240]))


def test_halving_weighs_four_pixels_like_an_antialiased_triangle() -> None:
    """At scale 2 the triangle weighs the four nearest pixels 1, 3, 3 and 1 eighths.

    A white column at 2k therefore leaves 255·3/8 = 95.6 in column k and 255/8 = 31.9 in k - 1.
    Without antialiasing it would leave 127.5 in column k alone.
    """
    values = np.zeros((512, 512, 3), np.uint8)
    values[:, 200] = 255
    out = TTC.preparation(model())(Image.fromarray(values)) * 255
    row = out[0, 100].round()
    column = 200 // 2 - 16
    assert row[column - 1 : column + 1].tolist() == [32, 96]
    assert row.sum() == 32 + 96


def test_a_ramp_stays_a_ramp() -> None:
    """Columns 0, 0, 1, 1, 2, 2, … halve to 0, 1, 2, …; the crop begins at 16."""
    ramp = np.broadcast_to((np.arange(512) // 2)[None, :, None], (512, 512, 3)).astype(np.uint8)
    out = TTC.preparation(model())(Image.fromarray(ramp))
    assert torch.equal(out[1, 7], torch.arange(16, 240) / 255)


def enlarged(values: np.ndarray, edge: int) -> np.ndarray:
    """Bilinear by hand, in float64: output centers, clamped to the outermost pixels."""
    for axis in (0, 1):
        count = values.shape[axis]
        where = np.clip((np.arange(edge) + 0.5) * count / edge - 0.5, 0, count - 1)
        low = np.floor(where).astype(int)
        high, part = np.minimum(low + 1, count - 1), where - low
        shape = [1, 1]
        shape[axis] = -1
        part = part.reshape(shape)
        values = values.take(low, axis) * (1 - part) + values.take(high, axis) * part
    return values


def test_small_pictures_are_enlarged_bilinearly() -> None:
    """8 pixels to 73, of which 4 go on the left and 5 on the right: (73 - 64) / 2 = 4.5 -> 4."""
    values = np.random.default_rng(3).integers(0, 256, (8, 8)).astype(np.uint8)
    out = TTC.preparation(model(64))(Image.fromarray(values))
    expected = enlarged(values.astype(np.float64), 73)[4:68, 4:68]
    assert np.abs(out[0].double().numpy() * 255 - expected).max() < 1.01  # rounded after each axis
    assert torch.equal(out[0], out[1])
    assert torch.equal(out[0], out[2])


def test_open_clip_is_the_models_own_preprocessing() -> None:
    picture = Image.fromarray(noise(80, 100))
    for changes in ({}, {"interpolation": "bilinear"}, {"resize_mode": "squash"}):
        like = model(32, **changes)
        assert torch.equal(OPEN_CLIP.preparation(like)(picture), to_batch(picture, like)[0])
    facts = OPEN_CLIP.preparation(model(32)).facts()
    assert facts["resize"] == {"mode": "shortest", "edge": 32, "interpolation": "bicubic"}
    assert facts["crop"] == [32, 32]
    ttc = TTC.preparation(model(32))(picture)
    assert not torch.allclose(ttc, OPEN_CLIP.preparation(model(32))(picture), atol=0.05)


def test_bundled_pictures_pass_unchanged() -> None:
    values = noise(64, 64)
    preparation = BUNDLED.preparation(model(64))
    assert torch.equal(preparation(Image.fromarray(values)), as_tensor(values))
    assert preparation.facts() == {"resize": None, "crop": None}


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_kind_of_picture_becomes_rgb(mode: str) -> None:
    picture = Image.fromarray(noise(256, 256)).convert(mode)
    out = TTC.preparation(model())(picture)
    assert torch.equal(out, as_tensor(np.asarray(picture.convert("RGB"))[16:240, 16:240]))


def test_16_bit_grey_keeps_its_range() -> None:
    """Pillow's own conversion would clip 32896 = 128·257 to 255."""
    values = np.full((256, 256), 128 * 257, np.uint16)
    out = TTC.preparation(model())(Image.fromarray(values))
    assert torch.equal(out, torch.full((3, 224, 224), 128 / 255))


def test_exif_does_not_turn_a_picture() -> None:
    """As in torchvision's loaders, with which the papers read."""
    values = noise(256, 300)
    picture = Image.fromarray(values)
    picture.getexif()[0x0112] = 6
    out = TTC.preparation(model())(picture)
    assert torch.equal(out, as_tensor(values[16:240, 38:262]))


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=lambda p: p.name)
def test_a_used_preparation_can_be_pickled(protocol: Any) -> None:
    picture = Image.fromarray(noise(64, 64))
    preparation = protocol.preparation(model(64, resize_edge=64))
    expected = preparation(picture)
    assert torch.equal(pickle.loads(pickle.dumps(preparation))(picture), expected)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"one of ttc, open_clip, bundled, got 'TTC'"):
        find_protocol("TTC")
    with pytest.raises(ValueError, match=r"'ttc' is for square models, but toy takes 32x48"):
        TTC.preparation(model((32, 48)))
    assert OPEN_CLIP.preparation(model((32, 48))).facts()["crop"] == [32, 48]
