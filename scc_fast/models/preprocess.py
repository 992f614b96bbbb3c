"""Preprocessing of a model: size, resampling, normalisation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scc_fast.config import shown
from scc_fast.models.objects import unwrap

Triple = tuple[float, float, float]

_CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)
_PIL_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


@dataclass(frozen=True)
class Preprocess:
    """Resizing and normalisation; resize_mode is "shortest", "longest" or "squash".

    ``resize_edge`` selects transformers' "shortest": this edge, then a floored centre crop.
    """

    image_size: tuple[int, int]
    mean: Triple = _CLIP_MEAN
    std: Triple = _CLIP_STD
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0
    resize_edge: int | None = None

    @staticmethod
    def from_open_clip(model: Any, config: Mapping[str, Any]) -> Preprocess:
        """Read an open_clip ``preprocess_cfg``; missing keys take open_clip's defaults."""
        visual: Any = unwrap(model.visual)
        size = getattr(visual, "image_size", getattr(visual, "input_resolution", None))
        size = config.get("size") if size is None else size
        if size is None:
            raise ValueError("model: neither visual.image_size nor visual.preprocess_cfg is there")
        keys = ("mean", "std", "interpolation", "resize_mode", "fill_color")
        known = {key: config[key] for key in keys if config.get(key) is not None}
        for key in known.keys() & {"mean", "std"}:
            known[key] = triple(known[key], key)
        height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        return Preprocess((int(height), int(width)), **known)

    @staticmethod
    def from_transformers(processor: Any, config: Any) -> Preprocess:
        """Read a transformers image processor, checked against the model's image size."""
        side = config.vision_config.image_size
        size: tuple[int, int] = (side, side) if isinstance(side, int) else tuple(side)
        siglip = config.model_type == "siglip"
        if processor is None:
            if siglip:
                return Preprocess(size, (0.5,) * 3, (0.5,) * 3, resize_mode="squash")
            return Preprocess(size)
        wanted = _plain(processor.size)
        target: tuple[Any, Any] = (wanted.get("height"), wanted.get("width"))
        edge, mode = None, "squash"
        if wanted.get("shortest_edge"):
            edge, mode = int(wanted["shortest_edge"]), "shortest"
            target = (edge, edge)
            if getattr(processor, "do_center_crop", None):
                crop = _plain(processor.crop_size)
                target = (crop["height"], crop["width"])
        if target != size:
            raise ValueError(
                f"processor: makes {target[0]}x{target[1]} pixels, but the model takes "
                f"{size[0]}x{size[1]}; pass the processor of this checkpoint"
            )
        factor = getattr(processor, "rescale_factor", 1 / 255)
        if abs(factor * 255 - 1) > 1e-6:
            raise ValueError(f"processor: rescale_factor {factor}, not 1/255")
        mean, std = (0.0,) * 3, (1.0,) * 3
        if getattr(processor, "do_normalize", True) is not False:
            mean, std = triple(processor.image_mean, "mean"), triple(processor.image_std, "std")
        resample = getattr(processor.resample, "value", processor.resample)
        resample = _PIL_FILTERS.get(resample, resample)
        return Preprocess(size, mean, std, resample, mode, resize_edge=edge)


def triple(value: Any, argument: str) -> Triple:
    """Three finite floats; ``std`` above zero."""
    try:
        numbers = tuple(float(v) for v in value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{argument}: three numbers are needed, got {shown(value)}") from error
    low = 0.0 if argument == "std" else float("-inf")
    if len(numbers) != 3 or not all(low < v < float("inf") for v in numbers):
        raise ValueError(
            f"{argument}: three finite numbers are needed (std > 0), got {shown(value)}"
        )
    return numbers


def _plain(size: Any) -> dict[str, Any]:
    # transformers 5 has a SizeDict dataclass, 4 a dict, old files an int
    if isinstance(size, int):
        return {"shortest_edge": size, "height": size, "width": size}
    return dict(size) if isinstance(size, Mapping) else dict(vars(size))
