"""Test-time defense of CLIP-style models against adversarial images."""

from typing import Any as _Any

from scc_fast import defenses as defenses  # registers its methods with Defender
from scc_fast._version import __version__
from scc_fast.api import Defender, defend, image_seeds
from scc_fast.config import (
    MethodConfig,
    NoneConfig,
    RNConfig,
    SCCConfig,
    TTCConfig,
    View,
    ViewsConfig,
)
from scc_fast.defended import DefendedCLIP
from scc_fast.models import VisionLanguage, load_model
from scc_fast.presets import PRESETS, Preset, recommended
from scc_fast.result import DefenseResult

__all__ = [
    "PRESETS",
    "DefendedCLIP",
    "Defender",
    "DefenseResult",
    "MethodConfig",
    "NoneConfig",
    "Preset",
    "RNConfig",
    "SCCConfig",
    "TTCConfig",
    "View",
    "ViewsConfig",
    "VisionLanguage",
    "__version__",
    "defend",
    "image_seeds",
    "load_model",
    "recommended",
]


def __getattr__(name: str) -> _Any:
    if name != "TTEConfig":
        raise AttributeError(f"module 'scc_fast' has no attribute {name!r}")
    import warnings

    warnings.warn(
        "scc_fast.TTEConfig was the config of SCC's views averaged, which is ViewsConfig now",
        DeprecationWarning,
        stacklevel=2,
    )
    return ViewsConfig
