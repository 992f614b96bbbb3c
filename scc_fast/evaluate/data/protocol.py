"""Protocols: preparation of pictures and prompts; recorded in every result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

from PIL import Image
from torch import Tensor

from scc_fast.config import nearest, shown
from scc_fast.evaluate.data.class_names import words
from scc_fast.images import _convert, resize_transform
from scc_fast.models import VisionLanguage
from scc_fast.models.preprocess import Preprocess

Geometry = Literal["ttc", "model", "none"]


@dataclass(frozen=True)
class Protocol:
    """Named preparation of pictures and prompts.

    Args:
        name: as in results.
        geometry: "ttc": shortest edge to 256/224 of the model's size, bilinear with antialiasing
            on the 8-bit picture, centre crop; "model": the model's own preprocessing without its
            normalisation; "none": unchanged pictures.
        template: of prompts, with {} for the class; None: the data set's own.
        plain_names: class names without "_" and "/".
    """

    name: str
    geometry: Geometry
    template: str | None = None
    plain_names: bool = False

    def names(self, names: list[str]) -> tuple[str, ...]:
        """Cleaned class names as used in prompts."""
        return tuple(words(name) for name in names) if self.plain_names else tuple(names)

    def preparation(self, model: VisionLanguage) -> Preparation:
        """Preparation of pictures for a model.

        Raises:
            ValueError: "ttc" and a model with non-square pictures.
        """
        size = (int(model.image_size[0]), int(model.image_size[1]))
        if self.geometry == "ttc" and size[0] != size[1]:
            raise ValueError(
                f"protocol: {self.name!r} is for square models, but {model.name} takes "
                f"{size[0]}x{size[1]}; use 'open_clip'"
            )
        own = Preprocess(
            image_size=size,
            interpolation=model.interpolation,
            resize_mode=model.resize_mode,
            fill_color=model.fill_color,
            resize_edge=model.resize_edge,
        )
        return Preparation(self.geometry, own)


@dataclass(frozen=True)
class Preparation:
    """Picture -> (3, H, W) float32 in [0, 1], not normalised. Can be pickled."""

    geometry: Geometry
    own: Preprocess

    def __call__(self, picture: Image.Image) -> Tensor:
        """Prepare a picture; alpha and EXIF are ignored, as in torchvision's loaders."""
        # Pillow would clip 16-bit grey values (medical PNG files) at 255
        wide = picture.mode == "F" or picture.mode.startswith("I")
        rgb = _convert(picture, "picture") if wide else picture.convert("RGB")
        return self._transform(rgb)

    def __getstate__(self) -> dict[str, Any]:
        return {"geometry": self.geometry, "own": self.own}  # without the transform

    @property
    def edge(self) -> int | None:
        """Shortest edge after resizing by "ttc": 256 for 224 pixels."""
        return round(self.own.image_size[0] * 256 / 224) if self.geometry == "ttc" else None

    def facts(self) -> dict[str, Any]:
        """``resize`` and ``crop`` for results."""
        if self.geometry == "none":
            return {"resize": None, "crop": None}
        own, crop = self.own, list(self.own.image_size)
        if self.geometry == "ttc":
            resize = {"mode": "shortest", "edge": self.edge, "interpolation": "bilinear"}
            return {"resize": resize, "crop": crop}
        edge = (own.resize_edge or min(crop)) if own.resize_mode == "shortest" else None
        resize = {"mode": own.resize_mode, "edge": edge, "interpolation": own.interpolation}
        return {"resize": resize, "crop": crop}

    @cached_property
    def _transform(self) -> Callable[[Image.Image], Tensor]:
        from torchvision import transforms as tv  # type: ignore[import-untyped]

        if self.geometry == "model":
            return resize_transform(cast(VisionLanguage, self.own))
        steps: list[Any] = [tv.ToTensor()]
        if self.geometry == "ttc":
            bilinear = tv.InterpolationMode.BILINEAR
            resize = tv.Resize(self.edge, interpolation=bilinear, antialias=True)
            steps = [resize, tv.CenterCrop(self.own.image_size), *steps]
        return cast(Callable[[Image.Image], Tensor], tv.Compose(steps))


# TTC's code (Xing et al., CVPR 2025) defines the tables of TTC, DOC and SCC
TTC = Protocol("ttc", "ttc")
OPEN_CLIP = Protocol("open_clip", "model", "a photo of a {}.", plain_names=True)
BUNDLED = Protocol("bundled", "none")
PROTOCOLS: dict[str, Protocol] = {p.name: p for p in (TTC, OPEN_CLIP, BUNDLED)}


def find_protocol(name: str) -> Protocol:
    """Protocol by name.

    Raises:
        ValueError: unknown name; lists the known ones.
    """
    if name not in PROTOCOLS:
        raise ValueError(
            f"protocol: must be one of {', '.join(PROTOCOLS)}, got {shown(name)}"
            f"{nearest(name, PROTOCOLS)}"
        )
    return PROTOCOLS[name]
