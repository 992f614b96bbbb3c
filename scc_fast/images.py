"""Whatever a caller calls an image, as one batch of pixels in [0, 1]; and back to a picture."""

from __future__ import annotations

import contextlib
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image, ImageOps
from torch import Tensor

from scc_fast.models import VisionLanguage

ImageLike = Tensor | Image.Image | str | Path
_ROUNDING = 1e-4  # un-normalising in half precision may leave the range by this much
# What Pillow's decoders raise for truncated, corrupt or huge files
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
_LONGEST_RATIO = 16  # a thinner picture is cut before it is resized, or it would fill the memory


def to_batch(
    images: ImageLike | Sequence[ImageLike],
    model: VisionLanguage,
    *,
    is_normalized: bool = False,
    validate: bool = True,
    keep_graph: bool = False,
) -> Tensor:
    """One float32 batch (B, 3, H, W) in [0, 1], not normalised, on ``model.device``.

    Tensors keep their size. Pictures and files go through the model's own preprocessing without
    its normalisation, turned as their EXIF orientation says.

    Args:
        images: a tensor (B, 3, H, W) or (3, H, W), floating in [0, 1] or uint8 in [0, 255]; a
            PIL image; a path; or a sequence mixing (3, H, W) tensors, pictures and paths that
            come to one size. An empty sequence gives an empty batch. It is never written to, but
            the result may share its memory.
        is_normalized: the tensor was normalised with the model's mean and std: undo that.
        validate: check for NaN and the range (one synchronisation on a GPU).
        keep_graph: let gradients flow back to the given tensor; else the result is detached.

    Raises:
        TypeError: not an image, or a type of number that has no agreed range.
        ValueError: shape, range, NaN, or a file that cannot be read.
    """
    with _normal_mode():
        if isinstance(images, Tensor):
            return _from_tensor(images, model, is_normalized, validate, keep_graph, "images")
        if isinstance(images, (Image.Image, str, Path)):
            images = [images]
        elif not isinstance(images, Sequence):
            raise TypeError(_not_an_image("images", images))
        if not images:
            return torch.zeros(0, 3, *model.image_size, device=model.device)
        transform: Callable[[Image.Image], Tensor] | None = None
        rows: list[Tensor] = []
        for i, item in enumerate(images):
            where = f"images[{i}]" if len(images) > 1 else "images"
            if isinstance(item, Tensor):
                if item.ndim != 3:
                    raise ValueError(
                        f"{where}: in a sequence each tensor is (3, H, W), got {tuple(item.shape)}"
                    )
                row = _from_tensor(item, model, is_normalized, validate, keep_graph, where)[0]
            elif isinstance(item, (Image.Image, str, Path)):
                if is_normalized:
                    raise ValueError(
                        f"is_normalized: only for tensors, but {where} is a {type(item).__name__}"
                    )
                transform = transform or _picture_transform(model)
                row = transform(_to_rgb(item, where)).to(model.device)
            else:
                raise TypeError(_not_an_image(where, item))
            if rows and row.shape != rows[0].shape:
                raise ValueError(
                    f"{where}: {row.shape[1]}x{row.shape[2]} pixels, the first of the sequence has "
                    f"{rows[0].shape[1]}x{rows[0].shape[2]}; resize them to one size (pictures and "
                    f"files come to {model.image_size[0]}x{model.image_size[1]})"
                )
            rows.append(row)
        return torch.stack(rows)


def to_pil(image: Tensor) -> Image.Image:
    """A PIL picture of a (3, H, W) or (1, 3, H, W) tensor, floating in [0, 1] or uint8.

    Rounds to 8 bits: truncation, as in torchvision's ToPILImage, would wipe out a perturbation.

    Raises:
        TypeError: not a tensor. ValueError: another shape, type or range.
    """
    if not isinstance(image, Tensor):
        raise TypeError(_not_an_image("image", image))
    if image.ndim == 4 and image.shape[0] == 1:
        image = image[0]
    if image.ndim != 3:
        raise ValueError(f"image: one image (3, H, W) is needed, got {tuple(image.shape)}")
    _check_layout(image[None], "image")
    image = image.detach().cpu()
    if image.dtype != torch.uint8:
        _check_range(image.float(), "image")
        image = (image.float() * 255).round().to(torch.uint8)
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


@contextlib.contextmanager
def _normal_mode() -> Iterator[None]:
    # Inside inference_mode new tensors could take no gradient later; elsewhere nothing changes
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def _from_tensor(
    x: Tensor, model: VisionLanguage, is_normalized: bool, validate: bool, graph: bool, where: str
) -> Tensor:
    if x.ndim == 3:
        x = x[None]
    _check_layout(x, where)
    if not graph:
        x = x.detach()
    if x.is_inference():
        x = x.clone()
    if x.dtype == torch.uint8:
        if is_normalized:
            raise ValueError(f"is_normalized: {where} is uint8, which is never normalised")
        return x.to(model.device).float() / 255
    x = x.to(model.device, torch.float32)
    if is_normalized:
        mean = torch.tensor(model.mean, device=x.device).view(3, 1, 1)
        std = torch.tensor(model.std, device=x.device).view(3, 1, 1)
        x = x * std + mean
    if validate:
        _check_range(x, where, is_normalized)
    return x.clamp(0, 1) if is_normalized else x


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
            f"{where}: floating numbers in [0, 1] or uint8 in [0, 255] are needed, got {x.dtype}; "
            "use x.to(torch.uint8) if the values are 0...255"
        )


def _check_range(x: Tensor, where: str, is_normalized: bool = False) -> None:
    if x.numel() == 0:
        return
    low, high = torch.stack(torch.aminmax(x.detach())).tolist()
    slack = _ROUNDING if is_normalized else 0.0
    if -slack <= low and high <= 1 + slack:  # false for NaN too
        return
    if low != low or high != high or max(abs(low), abs(high)) == float("inf"):
        bad = int((~torch.isfinite(x)).sum())
        raise ValueError(f"{where}: NaN or infinity in {bad} of {x.numel()} values")
    found = f"{where}: values from {low:.6g} to {high:.6g}, outside [0, 1]"
    if is_normalized:
        raise ValueError(f"{found} after un-normalising; is it normalised with the model's mean?")
    if low > -1e-3 and high < 1 + 1e-3:
        hint = "only rounding: use x.clamp(0, 1)"
    elif high > 2 and low >= 0:
        hint = "divide by 255"
    elif low < 0:
        hint = "if the model's normalisation was applied, pass is_normalized=True"
    else:
        hint = "pixels must be in [0, 1]"
    raise ValueError(f"{found}; {hint}")


def _not_an_image(where: str, value: Any) -> str:
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    known = "a tensor, a PIL image, a path or a sequence of them is needed"
    if type(value).__module__.split(".")[0] == "numpy":
        return f"{where}: {known}, got {kind}; use torch.from_numpy(x).permute(0, 3, 1, 2) for NHWC"
    return f"{where}: {known}, got {kind}"


def _to_rgb(item: Image.Image | str | Path, where: str) -> Image.Image:
    """Decoded, upright, 8-bit RGB. Alpha is dropped, as open_clip and transformers do."""
    opened: contextlib.AbstractContextManager[Image.Image]
    try:
        if isinstance(item, Image.Image):
            opened = contextlib.nullcontext(item)
        else:
            path = Path(item).expanduser()
            where = f"{where}: {str(path)!r}"
            if path.is_dir():
                raise _Refused(f"{where} is a folder; give its files, e.g. path.glob('*.png')")
            if not path.exists():
                raise _Refused(f"{where} does not exist")
            opened = Image.open(path)
        with opened as picture:
            picture.load()
            return _convert(picture, where)
    except _Refused as error:
        raise ValueError(str(error)) from None
    except _UNREADABLE as error:
        raise ValueError(f"{where} cannot be read as an image: {error}") from error


class _Refused(Exception):
    """Ours, so that it is not taken for a decoder's error."""


def _convert(picture: Image.Image, where: str) -> Image.Image:
    if 0 in picture.size:
        raise _Refused(f"{where}: an image of {picture.width}x{picture.height} pixels")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "F":
        raise _Refused(f"{where}: floating-point pixels have no agreed range; convert to 8 bits")
    if picture.mode.startswith("I"):
        picture = _grey_16_to_8(picture, where)
    if picture.mode == "P":  # by way of RGBA, or Pillow warns about transparent palettes
        picture = picture.convert("RGBA")
    return picture.convert("RGB")


def _grey_16_to_8(picture: Image.Image, where: str) -> Image.Image:
    import numpy as np

    values = np.asarray(picture).astype(np.int64)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise _Refused(f"{where}: grey values from {low} to {high}, outside 16 bits")
    # Mode "I" has 32 bits: files of 16 bits arrive in it, and 8-bit pictures that were converted
    if picture.mode == "I" and high <= 255:
        return Image.fromarray(values.astype(np.uint8))
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))


def _picture_transform(model: VisionLanguage) -> Callable[[Image.Image], Tensor]:
    """The model's own preprocessing up to the normalisation: RGB picture -> (3, h, w) in [0, 1]."""
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
        # transformers' edge, filters and crop, which differs by a pixel where the rest is odd
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
    # The centre crop would throw the ends away, after making 600 MB of a picture of 1x4000
    width, height = picture.size
    most = int(ratio * min(width, height))
    most += (max(width, height) - most) % 2  # keeps the centre where it was
    if max(width, height) <= most:
        return picture
    return _centre(picture, min(width, most), min(height, most))
