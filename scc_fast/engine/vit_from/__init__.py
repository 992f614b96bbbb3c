"""Conversion of a model's image tower to the runner, or the reason why it is not supported.

Every part must be known, for the runner would ignore an adapter, a hook or a changed forward.
"""

from __future__ import annotations

from typing import Any

import torch

from scc_fast.engine.vit import Tower
from scc_fast.engine.vit_from.open_clip import open_clip_tower
from scc_fast.engine.vit_from.parts import (
    GLOBAL_HOOKS,
    UnknownPartError,
    expect,
    name_of,
    require,
    unchanged,
)
from scc_fast.engine.vit_from.transformers import clip_tower, siglip_tower
from scc_fast.models import FrozenModel, OpenCLIPModel, TransformersModel, TwoTowers

# By model class.
_FAMILIES = {
    "open_clip.model.CLIP": open_clip_tower,
    "open_clip.model.CustomTextCLIP": open_clip_tower,
    "transformers.models.clip.modeling_clip.CLIPModel": clip_tower,
    "transformers.models.siglip.modeling_siglip.SiglipModel": siglip_tower,
}


def tower_of(model: Any, dtype: torch.dtype = torch.float32) -> Tower | str:
    """Runner of a model's image tower in `dtype`, or the reason why there is none.

    In the weights' dtype it shares their storage, except for separate q, k and v.
    """
    try:
        module = adapter_of(model).module
        expect(module, *_FAMILIES)
        unchanged(module, "model")
        require(not any(GLOBAL_HOOKS), "torch has a hook for all modules")
        return _FAMILIES[name_of(module)](module, model.image_size, dtype)
    except UnknownPartError as reason:
        return str(reason)
    except AttributeError as reason:  # a release with other attribute names
        return f"its library is not of a release that the runner knows: {reason}"


def adapter_of(model: Any) -> FrozenModel:
    """Adapter behind a model's encode_image, possibly through a wrapper.

    Raises:
        UnknownPartError: the model has another encode_image.
    """
    encode = getattr(model, "encode_image", None)
    ours = getattr(encode, "__func__", None) is FrozenModel.encode_image
    require(ours, f"{name_of(model)} has an encode_image of its own")
    adapter: Any = getattr(encode, "__self__", None)
    plain = type(adapter) in (OpenCLIPModel, TransformersModel, TwoTowers)
    require(plain, f"{name_of(adapter)} is not an adapter of scc_fast's")
    for name in ("encode_image", "_image_features"):
        require(name not in vars(adapter), f"its {name} was replaced")
    return adapter
