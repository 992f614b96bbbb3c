"""Source of labelled pictures, common to all formats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image


class MissingData(FileNotFoundError):
    """Missing pictures; says which, where, and how to get them."""


@dataclass(frozen=True)
class Source:
    """Labelled pictures of one split.

    Args:
        name: clip-benchmark's spelling, such as "cifar10".
        split: the data set's name of it: "test", "val", "all", …
        classes: names on disk (folders, words or wordnet ids), by label.
        labels: label of every picture, in order.
        picture: index to a PIL image, as stored.
        reader: "torchvision", "webdataset", "imagefolder" or "bundled".
    """

    name: str
    split: str
    classes: tuple[str, ...]
    labels: Sequence[int]
    picture: Callable[[int], Image.Image]
    reader: str

    def __len__(self) -> int:
        return len(self.labels)
