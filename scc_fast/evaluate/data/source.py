"""What a reader of pictures on disk gives, whatever their format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image


class MissingData(FileNotFoundError):
    """Pictures are not where they were looked for; says what, where, and how to get them."""


@dataclass(frozen=True)
class Source:
    """Labelled pictures of one split.

    Args:
        name: as clip-benchmark spells it, such as "cifar10".
        split: as the data set itself calls it, "test", "val", "all", …
        classes: the names on disk (folders, words or wordnet ids), by label.
        labels: the label of every picture, in the order of the data set.
        picture: index to a PIL image as it is stored.
        reader: what read it: "torchvision", "webdataset", "imagefolder" or "bundled".
    """

    name: str
    split: str
    classes: tuple[str, ...]
    labels: Sequence[int]
    picture: Callable[[int], Image.Image]
    reader: str

    def __len__(self) -> int:
        return len(self.labels)
