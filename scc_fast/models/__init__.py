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
from scc_fast.models.two_towers import TwoTowers

__all__ = [
    "FrozenModel",
    "OpenCLIPModel",
    "TransformersModel",
    "TwoTowers",
    "VisionLanguage",
    "frozen_twin",
    "load_model",
    "load_spec",
    "missing_members",
    "parse_model",
]
