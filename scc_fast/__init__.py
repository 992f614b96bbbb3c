"""Test-time defense of CLIP-style models against adversarial images."""

from typing import Any as _Any

from scc_fast._version import __version__
from scc_fast.api import Defender, defend, image_seeds
from scc_fast.classifier import DefendedCLIP
from scc_fast.config import (
    MethodConfig,
    NoneConfig,
    RNConfig,
    SCCConfig,
    TTCConfig,
    View,
    ViewsConfig,
)
from scc_fast.models import TwoTowers, VisionLanguage, load_model
from scc_fast.result import DefenseResult

__all__ = [
    "DefendedCLIP",
    "Defender",
    "DefenseResult",
    "MethodConfig",
    "NoneConfig",
    "RNConfig",
    "SCCConfig",
    "TTCConfig",
    "TwoTowers",
    "View",
    "ViewsConfig",
    "VisionLanguage",
    "__version__",
    "defend",
    "image_seeds",
    "load_model",
]


# Deprecated names and their new places.
_MOVED = {
    "TTEConfig": ("scc_fast.config", "ViewsConfig"),
    "PRESETS": ("scc_fast.evaluate.presets", "PRESETS"),
    "Preset": ("scc_fast.evaluate.presets", "Preset"),
    "recommended": ("scc_fast.evaluate.presets", "recommended"),
}


def __getattr__(name: str) -> _Any:
    if name not in _MOVED:
        raise AttributeError(f"module 'scc_fast' has no attribute {name!r}")
    import importlib
    import warnings

    place, new = _MOVED[name]
    warnings.warn(f"scc_fast.{name} is {place}.{new} now", DeprecationWarning, stacklevel=2)
    return getattr(importlib.import_module(place), new)
