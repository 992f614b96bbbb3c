"""Image folders: one folder per class, or a list of files with classes."""

from __future__ import annotations

import io
import json
import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from scc_fast.config import shown
from scc_fast.evaluate.data.source import MissingData, Source

# As in torchvision's ImageFolder
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
SPLIT_FOLDERS = ("train", "trainval", "val", "valid", "test", "all")


def decode(data: bytes, where: str) -> Image.Image:
    """Decode a picture, in its stored mode.

    Raises:
        ValueError: not decodable; begins with ``where``.
    """
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except Exception as error:  # Pillow's decoders raise many unrelated types
        raise ValueError(
            f"{where} is not a readable picture: {str(error) or type(error).__name__}"
        ) from error
    return image


def position(index: int, count: int) -> int:
    """``index`` as an int; IndexError if it is not below ``count``."""
    index = operator.index(index)
    if not 0 <= index < count:
        raise IndexError(f"picture {index} was asked for, but there are {count}, from 0")
    return index


@dataclass(frozen=True)
class FilePictures:
    """Index to picture, one file each; opened at every call."""

    paths: tuple[str, ...]

    def __call__(self, index: int) -> Image.Image:
        index = position(index, len(self.paths))
        path = self.paths[index]
        try:
            data = Path(path).read_bytes()
        except FileNotFoundError as error:
            raise MissingData(
                f"picture {index} should be the file {path}, which is gone"
            ) from error
        except OSError as error:
            raise ValueError(
                f"picture {index}, the file {path}, cannot be read: {error}"
            ) from error
        return decode(data, f"picture {index}, the file {path},")


def from_files(
    name: str,
    split: str,
    classes: Sequence[str],
    samples: Sequence[tuple[str, int]],
    reader: str = "imagefolder",
) -> Source:
    """Source of ``samples``, (path, label) each, in order."""
    return Source(
        name=name,
        split=split,
        classes=tuple(classes),
        labels=tuple(int(label) for _, label in samples),
        picture=FilePictures(tuple(path for path, _ in samples)),
        reader=reader,
    )


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in ``folder``, sorted, without hidden ones and macOS's."""
    with os.scandir(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if entry.is_dir() and not entry.name.startswith(".") and entry.name != "__MACOSX"
        )


def pictures_in(folder: Path, extensions: tuple[str, ...] = EXTENSIONS) -> list[str]:
    """Paths of the picture files in ``folder``, sorted by name."""
    with os.scandir(folder) as entries:
        return sorted(
            entry.path
            for entry in entries
            if entry.name.lower().endswith(extensions)
            and not entry.name.startswith(".")
            and entry.is_file()
        )


def class_folders(folder: Path) -> tuple[list[str], list[tuple[str, int]]]:
    """Sorted classes, and (path, label) of the pictures in their folders.

    An empty folder is a class, too: the model may answer with it. Both lists are empty without two
    class folders, or without any picture.
    """
    classes = subfolders(folder) if folder.is_dir() else []
    samples = [
        (path, label) for label, name in enumerate(classes) for path in pictures_in(folder / name)
    ]
    return (classes, samples) if len(classes) > 1 and samples else ([], [])


def read_folder(name: str, folder: Path, split: str, default: bool) -> Source | None:
    """Read ``folder/<split>/<class>/<picture>``, or ``folder/<class>/<picture>`` as split "all".

    Args:
        name: of the Source.
        folder: of the data set.
        split: name of its folder.
        default: the caller named no split; a folder without splits is accepted.

    Returns:
        The Source, or None without such a split.
    """
    classes, samples = class_folders(folder / split)
    if samples:
        return from_files(name, split, classes, samples)
    if (default or split == "all") and not any((folder / part).is_dir() for part in SPLIT_FOLDERS):
        classes, samples = class_folders(folder)
        if samples:
            return from_files(name, "all", classes, samples)
    return None


def split_file(folder: Path) -> Path | None:
    """The ``split_<name>.json`` of CoOp's and BiomedCoOp's copies of a data set."""
    if not folder.is_dir():
        return None
    own = folder / f"split_{folder.name}.json"
    found = [own] if own.is_file() else sorted(folder.glob("split_*.json"))
    if len(found) > 1:
        raise ValueError(
            f"{folder} holds several split files, {', '.join(map(str, found))}: keep one"
        )
    return found[0] if found else None


def read_split_file(name: str, folder: Path, split: str) -> Source | None:
    """Read a data set in BiomedCoOp's layout.

    ``folder/split_<name>.json`` maps "train", "val" and "test" to lists of [path, label, class
    name]; paths are relative to ``folder/<name>/`` or ``folder``
    (github.com/HealthX-Lab/BiomedCoOp, assets/DATASETS.md).

    Returns:
        The Source, or None without such a file or split.

    Raises:
        ValueError: malformed file.
    """
    path = split_file(folder)
    if path is None:
        return None
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        entries = {part: [_entry(row) for row in rows] for part, rows in table.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} should map train, val and test to lists of [path, label, class name]: {error}"
        ) from error
    if not entries.get(split):
        return None
    names = {label: word for rows in entries.values() for _, label, word in rows}
    if sorted(names) != list(range(len(names))):
        raise ValueError(
            f"{path}: labels should count from 0 without gaps, got {shown(sorted(names))}"
        )
    inner = folder / path.stem.removeprefix("split_")
    base = inner if inner.is_dir() else folder
    samples = [(str(base / file), label) for file, label, _ in entries[split]]
    return from_files(name, split, [names[label] for label in sorted(names)], samples)


def _entry(row: Any) -> tuple[str, int, str]:
    file, label, word = row
    if not isinstance(file, str) or not isinstance(word, str):
        raise TypeError(f"got {shown(row)}")
    return file, operator.index(label) if not isinstance(label, str) else int(label), word
