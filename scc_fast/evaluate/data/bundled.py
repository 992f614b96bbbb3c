"""Data sets without files: scikit-learn's digits and the bundled model's emoji."""

from __future__ import annotations

import torch
from PIL import Image

from scc_fast import tiny
from scc_fast.config import shown
from scc_fast.evaluate.data.source import Source
from scc_fast.images import to_pil
from scc_fast.reference import philox
from scc_fast.tiny.data import seeds

EMOJI_SIZE = 64
_EMOJI_SPLITS = ("test", "validation")
_EMOJI_COUNT = 2000


def read_bundled(name: str, split: str | None) -> Source:
    """Source of "digits" or "emoji".

    Raises:
        ValueError: unknown split. ImportError: scikit-learn is missing.
    """
    return _digits(split) if name == "digits" else _emoji(split)


def _digits(split: str | None) -> Source:
    """1797 handwritten digits, 8x8 pixels of 17 levels, rounded to 8 bits."""
    if split not in (None, "all"):
        raise ValueError(f"split: digits has one split, 'all', got {shown(split)}")
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(
            'dataset "digits" needs scikit-learn: pip install "scc_fast[data]"'
        ) from error
    found = load_digits()
    pixels = (found.images * 255 / 16).round().astype("uint8")
    return Source(
        "digits",
        "all",
        tuple(str(i) for i in range(10)),
        tuple(int(label) for label in found.target),
        lambda index: Image.fromarray(pixels[index]),
        "bundled",
    )


def _emoji(split: str | None) -> Source:
    split = split or "test"
    if split not in _EMOJI_SPLITS:
        raise ValueError(f"split: emoji has {' and '.join(_EMOJI_SPLITS)}, got {shown(split)}")
    names = tiny.class_names()
    # Labels as tiny.generate() draws them, without painting the pictures
    u = philox.uniform(seeds(split, torch.arange(_EMOJI_COUNT, device="cpu")), philox.DATA, 0, 1)
    labels = (u[:, 0] * len(names)).long()

    def picture(index: int) -> Image.Image:
        return to_pil(tiny.generate(split, range(index, index + 1))[0])

    return Source("emoji", split, tuple(names), tuple(labels.tolist()), picture, "bundled")
