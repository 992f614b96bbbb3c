"""The bundled model: 201 animals, foods and plants, drawn from an emoji font (see README.md here).

`scc_fast.load_model("tiny")` loads it, without network or font.
"""

from __future__ import annotations

from pathlib import Path

from scc_fast.tiny.data import ASSETS, SPLITS, class_names, generate

__all__ = ["SPLITS", "class_names", "generate", "prompts", "samples"]


def prompts() -> list[str]:
    """One prompt per class, by label."""
    return [f"a photo of a {name}" for name in class_names()]


def samples() -> list[Path]:
    """The sample pictures, PNG files named after their class."""
    return sorted((ASSETS / "samples").glob("*.png"))
