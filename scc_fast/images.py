"""Conversion of images (tensors, arrays, pictures, files) to a batch of pixels, and back."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from scc_fast._arguments import listed
from scc_fast.config import shown
from scc_fast.models import VisionLanguage

Encoded = bytes | bytearray | memoryview
ImageLike = Tensor | np.ndarray | Image.Image | str | os.PathLike[Any] | Encoded | BinaryIO
_TOLERANCE = 1e-6  # rounding of an attack's arithmetic
_ROUNDING = 1e-4  # rounding of un-normalisation in half precision
# Raised by Pillow's decoders for truncated, corrupt or huge files
_UNREADABLE = (
    Image.DecompressionBombError,
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    struct.error,
    zlib.error,
)
_LONGEST_RATIO = 16  # thinner pictures are cropped before resizing, to bound memory
_URL = re.compile(r"[a-z][a-z0-9+.-]+:/|data:", re.IGNORECASE)
# Transposition by EXIF orientation
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_batch(
    images: ImageLike | Sequence[ImageLike],
    model: VisionLanguage,
    *,
    is_normalized: bool = False,
    clamp: bool = False,
    validate: bool = True,
    keep_graph: bool = False,
) -> Tensor:
    """One float32 batch (B, 3, H, W) in [0, 1], not normalised, on ``model.device``.

    Tensors and arrays keep their size. Pictures, files and encoded bytes get the model's
    preprocessing without its normalisation, after EXIF orientation.

    Args:
        images: a tensor (B, 3, H, W) or (3, H, W), floating in [0, 1] or uint8 in [0, 255]; a
            NumPy array of such numbers, channels last: (H, W) or (H, W, C) with 1, 3 or 4
            channels, or a batch of either; a PIL image; a path; an encoded file as bytes or as a
            binary file object (read from its start); or a sequence or iterator of single images
            of one resulting size, possibly empty. Never written to, but the result may share its
            memory.
        is_normalized: undo the model's normalisation of a tensor.
        clamp: clamp finite values outside [0, 1] instead of raising; up to 1e-6 outside is always
            clamped. The gradient is the identity.
        validate: check for NaN and the range (one synchronisation on a GPU).
        keep_graph: keep the autograd graph of a tensor; else the result is detached.

    Raises:
        TypeError: not an image, or a dtype without an agreed range.
        ValueError: wrong shape, layout or range, NaN, or an unreadable file.
    """
    reader = _Reader(model, is_normalized, clamp, validate, keep_graph)
    with _normal_mode():
        if isinstance(images, Tensor) or (
            isinstance(images, np.ndarray) and images.dtype.kind not in "OSU"
        ):
            return reader.pixels(images, "images")
        items = [images] if _is_file(images) else listed(images)
        if items is None:
            raise TypeError(_not_an_image("images", images))
        alone = isinstance(items, Sequence) and len(items) == 1
        rows: list[Tensor] = []
        for i, item in enumerate(items):
            where = "images" if alone else f"images[{i}]"
            row = reader.one(item, where)
            if rows and row.shape != rows[0].shape:
                raise ValueError(
                    f"{where}: {row.shape[1]}x{row.shape[2]} pixels, the first of the sequence has "
                    f"{rows[0].shape[1]}x{rows[0].shape[2]}; resize them to one size (pictures and "
                    f"files come to {model.image_size[0]}x{model.image_size[1]})"
                )
            rows.append(row)
        size = 0, 3, *model.image_size
        none = torch.zeros(size, dtype=torch.float32, device=model.device)
        return torch.stack(rows) if rows else none


def to_pil(image: Tensor) -> Image.Image:
    """PIL picture of a tensor (3, H, W) or (1, 3, H, W), floating in [0, 1] or uint8.

    Rounds to 8 bits; truncation (torchvision's ToPILImage) would erase a perturbation.

    Raises:
        TypeError: not a tensor. ValueError: wrong shape, dtype or range.
    """
    if not isinstance(image, Tensor):
        raise TypeError(f"image: a tensor is needed, got {shown(image)}")
    check_dense("image", image)
    if image.ndim == 4 and image.shape[0] == 1:
        image = image[0]
    if image.ndim != 3:
        raise ValueError(f"image: one image (3, H, W) is needed, got {tuple(image.shape)}")
    _check_layout(image[None], "image")
    image = image.detach().cpu()
    if image.dtype != torch.uint8:
        _check_range(image.float(), "image", _TOLERANCE)
        image = (image.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def check_dense(name: str, x: Tensor) -> None:
    """Check that a tensor is strided.

    Raises:
        ValueError: sparse, nested, quantized, meta or MKL-DNN tensor.
    """
    if x.is_nested:
        kind, instead = "nested", "torch.stack its parts"
    elif x.is_meta:
        kind, instead = "meta", "it holds no values"
    elif x.is_quantized:
        kind, instead = "quantized", "use .dequantize()"
    elif x.layout != torch.strided:
        kind, instead = str(x.layout).removeprefix("torch.").lstrip("_"), "use .to_dense()"
    else:
        return
    raise ValueError(f"{name}: a dense (strided) tensor is needed, got a {kind} one; {instead}")


@contextlib.contextmanager
def _normal_mode() -> Iterator[None]:
    # Tensors made in inference mode could not take part in autograd later
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def _is_file(value: Any) -> bool:
    return isinstance(value, Image.Image | str | os.PathLike | Encoded) or hasattr(value, "read")


@dataclass(frozen=True)
class _Reader:
    """Converter of single images, with to_batch()'s options."""

    model: VisionLanguage
    is_normalized: bool
    clamp: bool
    validate: bool
    keep_graph: bool

    def one(self, item: Any, where: str) -> Tensor:
        """One item of a sequence, (3, H, W)."""
        if isinstance(item, Tensor) and not item.is_nested and item.ndim != 3:
            raise ValueError(
                f"{where}: in a sequence each tensor is (3, H, W), got {tuple(item.shape)}"
            )
        if isinstance(item, np.ndarray) and item.ndim not in (2, 3):
            raise ValueError(
                f"{where}: in a sequence each array is (H, W) or (H, W, C), got {item.shape}"
            )
        if isinstance(item, Tensor | np.ndarray):
            batch = self.pixels(item, where)
            if len(batch) != 1:
                raise ValueError(f"{where}: {len(batch)} grey images; give them one by one")
            return batch[0]
        if not _is_file(item):
            raise TypeError(_not_an_image(where, item))
        if self.is_normalized:
            raise ValueError(
                f"is_normalized: only for tensors and arrays, but {where} is a "
                f"{type(item).__name__}"
            )
        return self._transform(_to_rgb(item, where)).to(self.model.device, torch.float32)

    @functools.cached_property
    def _transform(self) -> Callable[[Image.Image], Tensor]:
        return resize_transform(self.model)

    def pixels(self, given: Tensor | np.ndarray, where: str) -> Tensor:
        """(B, 3, H, W) of a tensor or an array of numbers."""
        x = given if isinstance(given, Tensor) else _channels_first(given, where)
        check_dense(where, x)
        if x.ndim == 3:
            x = x[None]
        _check_layout(x, where)
        if not self.keep_graph:
            x = x.detach()
        if x.is_inference():
            x = x.clone()
        if x.dtype == torch.uint8:
            if self.is_normalized:
                raise ValueError(f"is_normalized: {where} is uint8, which is never normalised")
            return x.to(self.model.device).float() / 255
        x = x.to(self.model.device, torch.float32)
        if self.is_normalized:
            mean = x.new_tensor(self.model.mean).view(3, 1, 1)
            std = x.new_tensor(self.model.std).view(3, 1, 1)
            x = x * std + mean
        slack = _ROUNDING if self.is_normalized else _TOLERANCE
        inside = not (self.clamp or self.is_normalized)
        if self.validate:
            inside &= _check_range(x, where, float("inf") if self.clamp else slack, self._hint)
        return x if inside else _clamped(x)

    def _hint(self, low: float, high: float) -> str:
        if self.is_normalized:
            return " after un-normalising; is it normalised with the model's mean?"
        if high > 2 and low >= 0:
            return "; divide by 255"
        if low >= -1e-3:
            return "; clamp=True clamps them"
        if self.keep_graph:  # for DefendedCLIP, whose call takes no is_normalized
            return "; leave the model's normalisation out, or clamp=True clamps them"
        return (
            "; if the model's normalisation was applied, pass is_normalized=True, else clamp=True "
            "clamps them"
        )


def _clamped(x: Tensor) -> Tensor:
    """Clamp to [0, 1] with an identity gradient."""
    inside = x.detach().clamp(0, 1)
    return inside + (x - x.detach()) if x.requires_grad else inside


def _channels_first(values: np.ndarray, where: str) -> Tensor:
    """Copy an array (H, W), (H, W, C) or a batch of them to a tensor ([B,] 3, H, W).

    Alpha is dropped.
    """
    shape = values.shape
    if values.dtype != np.uint8 and values.dtype.kind != "f":
        raise TypeError(
            f"{where}: {_NUMBERS}, got an array of {values.dtype}; use .astype(numpy.uint8) if the "
            "values are 0...255"
        )
    if isinstance(values, np.ma.MaskedArray):
        raise TypeError(f"{where}: a masked array has pixels without values; use .filled(0)")
    channels = values.ndim > 2 and shape[-1] in (1, 3, 4)
    if not channels and values.ndim == 3 and shape[0] in (3, 4):
        raise ValueError(
            f"{where}: an array of shape {shape} may be channels or {shape[0]} grey images; use "
            "torch.from_numpy(x) for channels first, x[..., None] for grey images"
        )
    if not channels and values.ndim in (2, 3):
        values, channels = values[..., None], True
    if not channels or values.ndim > 4:
        hint = ""
        if values.ndim == 1 and values.dtype == np.uint8:
            hint = "; an encoded file is given as bytes: x.tobytes()"
        elif values.ndim == 4 and shape[1] == 3:
            hint = "; for channels first use torch.from_numpy(x)"
        raise ValueError(
            f"{where}: an array is (H, W), (H, W, C) or (B, H, W, C) with 1, 3 or 4 channels, got "
            f"shape {shape}{hint}"
        )
    if values.dtype != np.uint8:
        with np.errstate(over="ignore"):  # the range check catches infinity
            values = values.astype(np.float32)
    values = values[..., :3].repeat(3, axis=-1) if values.shape[-1] == 1 else values[..., :3]
    return torch.from_numpy(np.array(np.moveaxis(values, -1, -3), order="C"))


_NUMBERS = "floating numbers in [0, 1] or uint8 in [0, 255] are needed"


def _check_layout(x: Tensor, where: str) -> None:
    shape = tuple(x.shape)
    if x.ndim != 4:
        raise ValueError(f"{where}: (B, 3, H, W) or (3, H, W) is needed, got {x.ndim} dimensions")
    if shape[1] != 3:
        hint = ""
        if shape[3] == 3:
            hint = "; channels come first here: use x.permute(0, 3, 1, 2)"
        elif shape[1] == 1:
            hint = "; for grey images use x.expand(-1, 3, -1, -1)"
        elif shape[1] == 4:
            hint = "; drop the alpha channel: x[:, :3]"
        raise ValueError(f"{where}: 3 channels are needed, got shape {shape}{hint}")
    if shape[2] == 0 or shape[3] == 0:
        raise ValueError(f"{where}: height and width must be at least 1, got shape {shape}")
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise TypeError(
            f"{where}: {_NUMBERS}, got {x.dtype}; use x.to(torch.uint8) if the values are 0...255"
        )


def _check_range(
    x: Tensor, where: str, slack: float, hint: Callable[[float, float], str] | None = None
) -> bool:
    """Whether x is in [0, 1]; ValueError beyond `slack`, or for NaN."""
    if x.numel() == 0:
        return True
    low, high = torch.stack(torch.aminmax(x.detach())).tolist()
    finite = -float("inf") < low and high < float("inf")  # false for NaN too
    if finite and -slack <= low and high <= 1 + slack:
        return low >= 0 and high <= 1
    if not finite:
        bad = int((~torch.isfinite(x)).sum())
        raise ValueError(f"{where}: NaN or infinity in {bad} of {x.numel()} values")
    found = f"{where}: values from {_digits(low)} to {_digits(high)}, outside [0, 1]"
    raise ValueError(found + (hint(low, high) if hint else ""))


def _digits(value: float) -> str:
    """Six digits, or more to show that a value is outside [0, 1]."""
    text = f"{value:.6g}"
    return text if (0 <= value <= 1) == (0 <= float(text) <= 1) else f"{value:.9g}"


def _not_an_image(where: str, value: Any) -> str:
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    hint = ""
    if isinstance(value, dict) or hasattr(value, "keys"):
        hint = "; give the pictures in it"
    elif isinstance(value, set | frozenset):
        hint = ", which has no order"
    elif hasattr(value, "__array__"):
        hint = "; numpy.asarray() of it may do"
    elif hasattr(value, "__iter__") or hasattr(value, "__getitem__"):
        hint = "; of a data set or loader give one batch of pictures at a time"
    return (
        f"{where}: a tensor, an array, a PIL image, a path, an encoded file or a sequence of them "
        f"is needed, got {kind}{hint}"
    )


def _to_rgb(item: Any, where: str) -> Image.Image:
    """Decode to upright 8-bit RGB; alpha is dropped, as in open_clip and transformers."""
    opened: contextlib.AbstractContextManager[Image.Image]
    try:
        if isinstance(item, Image.Image):
            opened = contextlib.nullcontext(item)
        elif isinstance(item, str | os.PathLike):
            path = os.path.expanduser(os.fsdecode(item))  # keeps "~who" of an unknown user
            where = f"{where}: {_named(path)}"
            _check_path(path, where)
            opened = Image.open(path)
        else:
            where = f"{where}: the {type(item).__name__} object"
            opened = Image.open(io.BytesIO(_content(item, where)))
        with opened as picture:
            picture.load()
            return _convert(picture, where)
    except _Refused as error:
        raise ValueError(str(error)) from None
    except UnidentifiedImageError:
        raise ValueError(f"{where} cannot be read as an image: of no known format") from None
    except _UNREADABLE as error:
        raise ValueError(f"{where} cannot be read as an image: {str(error)[:100]}") from error


class _Refused(Exception):
    """Rejected input, as opposed to a decoder's error."""


def _named(path: str) -> str:
    """Path for a message: the end of a long path, the beginning of a URL."""
    if _URL.match(path):
        return shown(path)
    return repr(path if len(path) <= 120 else f"...{path[-80:]}")


def _check_path(path: str, where: str) -> None:
    if os.path.isdir(path):
        raise _Refused(f"{where} is a folder; give its files, e.g. path.glob('*.png')")
    if os.path.exists(path):
        return
    if _URL.match(path):
        raise _Refused(f"{where} is a URL; URLs are not read: give the file's path or its bytes")
    raise _Refused(f"{where} does not exist")


def _content(item: Any, where: str) -> bytes:
    """Encoded bytes, or content of a file object, rewound if possible."""
    if not hasattr(item, "read"):
        return bytes(item)
    with contextlib.suppress(OSError, AttributeError):  # not seekable
        item.seek(0)
    data = item.read()
    if not isinstance(data, bytes):
        raise _Refused(f"{where} gives {type(data).__name__}, not bytes; open it in mode 'rb'")
    if not data:
        raise _Refused(f"{where} has nothing to read; was it read before?")
    return data


def _convert(picture: Image.Image, where: str) -> Image.Image:
    if 0 in picture.size:
        raise _Refused(f"{where}: an image of {picture.width}x{picture.height} pixels")
    picture = _upright(picture)
    if picture.mode == "F":
        raise _Refused(f"{where}: floating-point pixels have no agreed range; convert to 8 bits")
    if picture.mode.startswith("I"):
        picture = _grey_16_to_8(picture, where)
    if picture.mode == "P":  # via RGBA: Pillow warns about transparent palettes
        picture = picture.convert("RGBA")
    if picture.mode in ("La", "RGBa"):  # premultiplied alpha: Pillow converts it only this way
        picture = picture.convert(picture.mode.upper())
    return picture.convert("RGB")


def _upright(picture: Image.Image) -> Image.Image:
    """Apply EXIF orientation; broken EXIF is ignored."""
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation)
        turn = _UPRIGHT.get(cast(int, orientation))
    except _UNREADABLE:
        return picture
    return picture if turn is None else picture.transpose(turn)


def _grey_16_to_8(picture: Image.Image, where: str) -> Image.Image:
    values = np.asarray(picture).astype(np.int64)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise _Refused(f"{where}: grey values from {low} to {high}, outside 16 bits")
    # Mode "I" (32 bits) holds 16-bit files and converted 8-bit pictures
    if picture.mode == "I" and high <= 255:
        return Image.fromarray(values.astype(np.uint8))
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))


def resize_transform(model: VisionLanguage) -> Callable[[Image.Image], Tensor]:
    """Resize and crop of the model's preprocessing: RGB picture -> (3, h, w) in [0, 1]."""
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from torchvision import transforms as tv  # type: ignore[import-untyped]

    usual = model.interpolation in ("bicubic", "bilinear", "random")
    config = PreprocessCfg(
        size=model.image_size,
        interpolation=model.interpolation if usual else "bicubic",
        resize_mode=model.resize_mode,
        fill_color=model.fill_color,
    )
    steps = list(image_transform_v2(config, is_train=False).transforms)
    steps = [step for step in steps if not isinstance(step, tv.Normalize)]
    name = "bicubic" if model.interpolation == "random" else model.interpolation
    filter_ = tv.InterpolationMode(name)
    if model.resize_mode != "shortest":
        if not usual and model.resize_mode == "squash":
            steps[0] = tv.Resize(model.image_size, interpolation=filter_)
        return cast(Callable[[Image.Image], Tensor], tv.Compose(steps))
    if model.resize_edge is not None:
        # transformers' crop differs by a pixel for odd margins
        height, width = model.image_size
        steps[:2] = [
            tv.Resize(model.resize_edge, interpolation=filter_),
            lambda picture: _centre(picture, width, height),
        ]
    pipeline = tv.Compose(steps)
    ratio = _LONGEST_RATIO * max(model.image_size) / min(model.image_size)
    return lambda picture: pipeline(_cut(picture, ratio))


def _centre(picture: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def _cut(picture: Image.Image, ratio: float) -> Image.Image:
    # Cut the ends first: resizing 1x4000 pixels takes 600 MB before the centre crop
    width, height = picture.size
    most = int(ratio * min(width, height))
    most += (max(width, height) - most) % 2  # keeps the centre
    if max(width, height) <= most:
        return picture
    return _centre(picture, min(width, most), min(height, most))
