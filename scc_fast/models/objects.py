"""Checks of model objects: wrappers are removed, other objects rejected with a hint."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from scc_fast.config import shown

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
_OPEN_CLIP = ("encode_image", "encode_text")
_TRANSFORMERS = ("get_image_features", "get_text_features")


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's, the data-parallel and the averaging wrappers."""
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif isinstance(model, _WRAPPERS):
            model = cast(nn.Module, model.module)
        else:
            return model


def is_transformers(model: Any) -> bool:
    return all(hasattr(model, name) for name in _TRANSFORMERS)


def model_in(value: Any) -> nn.Module:
    """The model in `value`, unwrapped, with its weights checked.

    Raises:
        TypeError, ValueError: no usable model; says what to pass.
    """
    if not isinstance(value, nn.Module):
        raise TypeError(f"model: {_what_came(value)}")
    model = unwrap(value)
    check_weights(model)
    if not _is_model(model):
        raise TypeError(f"model: {_what_module(model)}")
    _check_parts(model)
    return model


def _is_model(value: Any) -> bool:
    return is_transformers(value) or all(hasattr(value, name) for name in _OPEN_CLIP)


def _what_came(value: Any) -> str:
    """Error text for an object that is not a module."""
    kind = type(value).__name__
    if isinstance(value, type):
        return f"got the class {value.__name__}; pass an object of it, with its weights"
    if isinstance(value, tuple | list) and value and isinstance(value[0], nn.Module):
        return (
            f"got a {kind} of {len(value)}, as open_clip.create_model_and_transforms() and "
            "create_model_from_pretrained() return; pass the first alone, model[0]"
        )
    if isinstance(value, Mapping):
        return (
            f"got a {kind}, as a state dict or a checkpoint is: weights without a model; load them "
            "into one (load_state_dict), or pass an architecture's name and the file as pretrained="
        )
    if (path := _inside(value)) is not None:
        parts = hasattr(value, "tokenizer") and hasattr(value, "image_processor")
        more = ", and processor=(its .image_processor, its .tokenizer)" if parts else ""
        return f"got a {kind}; pass the model in it, {path}{more}"
    if any(hasattr(value, name) for name in ("image_processor", "image_mean", "pad_token_id")):
        return f"got {kind}, what prepares a model's input; pass the model, and this as processor="
    needed = f"a name, a folder or a model is needed, got {kind}"
    if _is_model(value):
        from scc_fast.models import missing_members

        missing = missing_members(value)
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        return f"{needed}; as a VisionLanguage it lacks {', '.join(missing[:5])}{more}"
    return needed if value is None else f"{needed}: {shown(value)}"


def _what_module(model: nn.Module) -> str:
    """Error text for a module that is not a vision-language model."""
    kind = type(model).__name__
    if (path := _inside(model)) is not None:
        return f"got {kind}; pass the model in it, {path}"
    takes = inspect.signature(model.forward).parameters
    whole = "pass the whole model, such as transformers' CLIPModel"
    if "pixel_values" in takes and "input_ids" not in takes:
        return f"{kind} has no text tower; {whole}"
    if "input_ids" in takes and "pixel_values" not in takes:
        return f"{kind} has no image tower; {whole}"
    return (
        f"{kind} is neither an open_clip model ({', '.join(_OPEN_CLIP)}) nor a transformers one "
        f"({', '.join(_TRANSFORMERS)}); wrap an image encoder in scc_fast.TwoTowers"
    )


def _check_parts(model: Any) -> None:
    """Raise TypeError for a model without the parts of CLIP."""
    kind = type(model).__name__
    if getattr(getattr(model, "config", None), "model_type", "") == "siglip2":
        raise TypeError(
            f"model: {kind} takes patches, not pixels (NaFlex); load a fixed-resolution SigLIP 2 "
            'checkpoint (model_type "siglip") or the open_clip one'
        )
    parts = ("vision_model", "config.vision_config", "config.text_config")
    needed = ("logit_scale", *(parts if is_transformers(model) else ("visual",)))
    if missing := [path for path in needed if _part(model, path) is None]:
        raise TypeError(
            f"model: {kind} has no {', no '.join(missing)}; open_clip's models and transformers' "
            "CLIPModel, SiglipModel and those made like them are taken"
        )


def _part(value: Any, path: str) -> Any:
    try:
        return attrgetter(path)(value)
    except Exception:  # attribute access may raise anything
        return None


def _inside(value: Any) -> str | None:
    """Attribute path of a model in an object, such as ".model"; None if not found."""
    parts = [name for name, _ in value.named_children()] if isinstance(value, nn.Module) else []
    for path in ("model", "defender.model", *parts):
        part = _part(value, path)
        if _is_model(unwrap(part) if isinstance(part, nn.Module) else part):
            return f".{path}"
    return None


def check_weights(model: nn.Module) -> None:
    """Raise TypeError for weights that are quantized, sharded, scripted or of another dtype."""
    before = "pass the model as it was before, with its weights in float32, float16 or bfloat16"
    for name, part in model.named_modules():
        where = f"its {name}" if name else type(model).__name__
        if isinstance(part, torch.jit.ScriptModule):
            raise TypeError(
                f"model: {where} is TorchScript (torch.jit), which cannot be used; pass the model "
                "that it was made of, or load it with jit=False"
            )
        if ".quantized." in type(part).__module__:
            raise TypeError(f"model: {where} is quantized; {before}")
        if type(part).__name__ == "FullyShardedDataParallel":
            raise TypeError(
                f"model: {where} is sharded (FSDP); gather its weights (state_dict with "
                "StateDictType.FULL_STATE_DICT) into an ordinary model"
            )
    parameters = list(model.named_parameters())
    if not parameters:
        raise TypeError(f"model: {type(model).__name__} has no parameters")
    for name, p in parameters:
        if is_traceable_wrapper_subclass(p):  # torchao's, DTensor: not what its dtype says
            raise TypeError(
                f"model: {name} is a {type(p).__name__}, quantized or sharded; pass an ordinary "
                "model, with its whole weights in float32, float16 or bfloat16"
            )
        integer = not (p.is_floating_point() or p.is_complex())
        if integer:
            raise TypeError(f"model: {name} is {p.dtype}, quantized; {before}")
        # A scalar, such as the logit scale, is read in any type
        if p.numel() > 1 and p.dtype not in DTYPES:
            raise TypeError(
                f"model: {name} is {p.dtype}; weights in float32, float16 or bfloat16 are taken: "
                "pass model.float(), .half() or .bfloat16()"
            )


def check_features(features: Any, rows: int, what: str) -> Tensor:
    """Check that a tower's output is a tensor (rows, D); else ValueError."""
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != rows:
        raise ValueError(
            f"model: {what} gives {shown(features)}; one embedding for each of {rows} rows is "
            f"needed, a tensor ({rows}, D)"
        )
    return features
