"""Vision-language models behind one interface: frozen copies in eval mode."""

from scc_fast.models.checkpoints import frozen_twin, parse_model
from scc_fast.models.load import load_model, load_spec
from scc_fast.models.model import (
    FrozenModel,
    OpenCLIPModel,
    TransformersModel,
    VisionLanguage,
    missing_members,
)

__all__ = [
    "FrozenModel",
    "OpenCLIPModel",
    "TransformersModel",
    "VisionLanguage",
    "frozen_twin",
    "load_model",
    "load_spec",
    "missing_members",
    "parse_model",
]
