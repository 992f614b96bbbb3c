"""Models by name, file, folder, hub or object."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from scc_fast import _devices
from scc_fast._plain import default_device, default_dtype
from scc_fast.config import shown
from scc_fast.models import weights as _weights
from scc_fast.models.checkpoints import (
    parse_model,
    read_image_encoder,
    with_image_encoder,
)
from scc_fast.models.model import (
    FrozenModel,
    OpenCLIPModel,
    TransformersModel,
    VisionLanguage,
    missing_members,
)
from scc_fast.models.preprocess import Preprocess, triple
from scc_fast.models.state_dicts import as_path
from scc_fast.models.tokens import Tokenizer, check_tokenizer
from scc_fast.models.two_towers import from_factory, is_factory

_LOG = logging.getLogger("scc_fast")


def load_model(
    model: str | Path | nn.Module | VisionLanguage,
    pretrained: str | Path | None = None,
    *,
    tokenizer: Tokenizer | str | None = None,
    processor: Any = None,
    device: torch.device | str | None = None,
    cache_dir: str | Path | None = None,
    precision: str = "fp32",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    flip: bool | None = None,
    image_encoder: str | Path | None = None,
) -> VisionLanguage:
    """Load or wrap a vision-language model, frozen; a given object is unchanged.

    Args:
        model: "tiny" (bundled); an open_clip name; "hf-hub:org/repo"; a folder, "local-dir:folder",
            in open_clip's or transformers' layout; "package.module:factory", a function that
            returns a model; or an open_clip or transformers model, or a TwoTowers.
            FARE ("hf-hub:chs20/fare2-clip") and BiomedCLIP ("hf-hub:microsoft/BiomedCLIP-…", with
            the extra "transformers" for its text tower) are such names.
        pretrained: open_clip tag or weights file, for open_clip names. None: random weights,
            the same in every call, for timing.
        tokenizer: for objects: open_clip's tokenizer or the name of the architecture; not needed
            where the vocabulary is CLIP's own.
        processor: transformers: AutoProcessor's object, or (image_processor, tokenizer).
        device: default: an object's own, else CUDA where there is one.
        cache_dir: where open_clip keeps downloads; a file found there is used without the network.
        precision: open_clip's name of the weights' dtype; not for objects.
        mean, std: three numbers each, in place of the declared normalisation.
        flip: False if a mirrored picture may be another class; default: what the model declares.
        image_encoder: file of a fine-tuned image tower (TeCoA, PMG-AFT, FARE; see
            read_image_encoder) that replaces the model's own. Text tower, logit scale
            and preprocessing stay; PMG-AFT's own release was tuned with ImageNet's mean and std.
            The result's ``original`` is the model without it.
    Raises:
        TypeError, ValueError: an invalid argument.
        RuntimeError: unreachable weights; names the places searched.

    The logger "scc_fast" gets one INFO line on the loaded model.

    Example:
        >>> model = load_model("ViT-B-32-quickgelu", pretrained="openai")  # doctest: +SKIP
    """
    device = None if device is None else _devices.find(device)
    options = {"mean": mean, "std": std}
    overrides: dict[str, Any] = {k: triple(v, k) for k, v in options.items() if v is not None}
    what = f"model: {shown(model)}"
    if is_factory(model):
        model = from_factory(str(model), device or torch.device(_default()))
        if isinstance(model, str | Path):
            raise TypeError(f"{what} must return a model, got {shown(model)}")
    if not isinstance(model, (str, Path)) and not missing_members(model):
        given = cast(VisionLanguage, model)
        if (
            any(v is not None for v in (pretrained, tokenizer, processor, mean, std, flip))
            or image_encoder is not None
            or precision != "fp32"
        ):
            raise ValueError(
                f"{what} is complete: omit pretrained, tokenizer, processor, precision, mean, std, "
                "flip and image_encoder"
            )
        if device is not None and device.type != given.device.type:
            raise ValueError(f"{what} is on {given.device}, not on the device asked for, {device}")
        return given
    check_tokenizer(tokenizer)
    # Initialisation draws from torch's global generator: restore it
    own = torch.random.fork_rng(devices=[])
    with torch.inference_mode(False), own, default_dtype(), default_device():
        tower = None if image_encoder is None else as_path(image_encoder, "image_encoder")
        state = None if tower is None else read_image_encoder(tower)
        if not isinstance(model, (str, Path)):
            found = _weights.from_object(model, tokenizer, processor)
            if pretrained is not None or precision != "fp32" or tower is not None:
                raise ValueError(
                    "pretrained, precision, image_encoder: only for names, not for a model object; "
                    "its precision is that of its weights, such as model.bfloat16()"
                )
        else:
            found = _weights.from_name(
                str(model), pretrained, tokenizer, processor, cache_dir, precision
            )
            if device is None:
                device = _default()
        adapter: type[FrozenModel] = OpenCLIPModel
        if found.kind == "transformers":
            adapter = TransformersModel
            config = cast(Any, found.module).config
            preprocess = Preprocess.from_transformers(found.image_processor, config)
            _weights.check_activation(config, found.source)
        else:
            preprocess = Preprocess.from_open_clip(found.module, found.preprocess)
        extra = {**found.extras, **({} if flip is None else {"flip": flip})}
        preprocess = replace(preprocess, **overrides)
        if tower is not None and found.kind != "open_clip":
            raise ValueError(f"image_encoder: only for open_clip's models, not {found.name!r}")
        name, source = found.name, found.source
        parts = (preprocess, found.tokenizer)
        loaded = adapter(found.module, *parts, name=name, source=source, device=device, **extra)
        if tower is None or state is None:
            _LOG.info(_resolved(loaded))
            return loaded
        module = with_image_encoder(loaded.module, state, tower)
        name, source = f"{name}+{tower.name}", f"{tower} over {source}"
        tuned = adapter(module, *parts, name=name, source=source, **extra)
        tuned.original = loaded
        _LOG.info(_resolved(tuned))
        return tuned


def _default() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _resolved(model: FrozenModel) -> str:
    """One-line summary of a model."""
    numbers = (f"({', '.join(f'{v:.3g}' for v in values)})" for values in (model.mean, model.std))
    mean, std = numbers
    tokenizer = getattr(model.tokenizer, "__name__", type(model.tokenizer).__name__)
    return (
        f"model {model.name} ({type(model.module).__name__}): weights {model.source}; "
        f"{_weights.activation(model.module)}; {model.image_size[0]}x{model.image_size[1]} pixels, "
        f"{model.interpolation}, {model.resize_mode}, mean {mean}, std {std}; "
        f"tokenizer {tokenizer}; {str(model.dtype).removeprefix('torch.')} on {model.device}"
    )


def load_spec(spec: str, device: torch.device | str | None = None) -> VisionLanguage:
    """Load a model by its spec (see parse_model).

    Raises:
        TypeError, ValueError: an invalid spec, or as load_model().
        RuntimeError: unreachable weights.

    Example:
        >>> load_spec("tiny", device="cpu").name
        'tiny'
    """
    name, pretrained, image_encoder = parse_model(spec)
    return load_model(name, pretrained, device=device, image_encoder=image_encoder)
