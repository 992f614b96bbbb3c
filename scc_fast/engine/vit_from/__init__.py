"""From a model to the runner of its image tower, or the reason why it has none.

A tower is taken only if every part of it is known: an adapter, a hook or a changed forward would
else be passed over in silence.
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
from scc_fast.models import FrozenModel, OpenCLIPModel, TransformersModel

# By the class whose encode_image or get_image_features is the tower and nothing else.
_FAMILIES = {
    "open_clip.model.CLIP": open_clip_tower,
    "open_clip.model.CustomTextCLIP": open_clip_tower,
    "transformers.models.clip.modeling_clip.CLIPModel": clip_tower,
    "transformers.models.siglip.modeling_siglip.SiglipModel": siglip_tower,
}


def tower_of(model: Any, dtype: torch.dtype = torch.float32) -> Tower | str:
    """The runner of a model's image tower in `dtype`, or why it has none.

    In the dtype of the model's weights it works on their storage, but for q, k and v where the
    model has them apart.
    """
    try:
        module = adapter_of(model).module
        expect(module, *_FAMILIES)
        unchanged(module, "model")
        require(not any(GLOBAL_HOOKS), "torch has a hook for all modules")
        return _FAMILIES[name_of(module)](module, model.image_size, dtype)
    except UnknownPartError as reason:
        return str(reason)
    except AttributeError as reason:  # a release that names its parts in another way
        return f"its library is not of a release that the runner knows: {reason}"


def adapter_of(model: Any) -> FrozenModel:
    """The adapter that a model encodes with; a wrapper may hand on an adapter's encode_image.

    Raises:
        UnknownPartError: it encodes in another way; says how.
    """
    encode = getattr(model, "encode_image", None)
    ours = getattr(encode, "__func__", None) is FrozenModel.encode_image
    require(ours, f"{name_of(model)} has an encode_image of its own")
    adapter: Any = getattr(encode, "__self__", None)
    plain = type(adapter) in (OpenCLIPModel, TransformersModel)
    require(plain, f"{name_of(adapter)} is not an adapter of scc_fast's")
    for name in ("encode_image", "_image_features"):
        require(name not in vars(adapter), f"its {name} was replaced")
    return adapter
