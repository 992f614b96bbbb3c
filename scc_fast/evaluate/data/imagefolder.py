"""Pictures in folders: one folder a class, or a list of files with their classes."""

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

# What torchvision's ImageFolder takes for a picture
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
SPLIT_FOLDERS = ("train", "trainval", "val", "valid", "test", "all")


def decode(data: bytes, where: str) -> Image.Image:
    """The picture in ``data``, decoded, in the mode it is stored in.

    Raises:
        ValueError: it cannot be decoded; the message begins with ``where``.
    """
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except Exception as error:  # Pillow's decoders raise a dozen unrelated types for bad files
        raise ValueError(
            f"{where} is not a readable picture: {str(error) or type(error).__name__}"
        ) from error
    return image


def position(index: int, count: int) -> int:
    """``index`` as a plain int, or IndexError if no picture of ``count`` has it."""
    index = operator.index(index)
    if not 0 <= index < count:
        raise IndexError(f"picture {index} was asked for, but there are {count}, from 0")
    return index


@dataclass(frozen=True)
class FilePictures:
    """Index to picture, each in a file of its own. Opens nothing until called, keeps nothing."""

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
    """A Source of ``samples``, (path, label) each, in the order given."""
    return Source(
        name=name,
        split=split,
        classes=tuple(classes),
        labels=tuple(int(label) for _, label in samples),
        picture=FilePictures(tuple(path for path, _ in samples)),
        reader=reader,
    )


def subfolders(folder: Path) -> list[str]:
    """The names of the folders in ``folder``, sorted, without hidden ones and what macOS adds."""
    with os.scandir(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if entry.is_dir() and not entry.name.startswith(".") and entry.name != "__MACOSX"
        )


def pictures_in(folder: Path, extensions: tuple[str, ...] = EXTENSIONS) -> list[str]:
    """The paths of the picture files directly in ``folder``, sorted by name."""
    with os.scandir(folder) as entries:
        return sorted(
            entry.path
            for entry in entries
            if entry.name.lower().endswith(extensions)
            and not entry.name.startswith(".")
            and entry.is_file()
        )


def class_folders(folder: Path) -> tuple[list[str], list[tuple[str, int]]]:
    """Classes, sorted, and (path, label) of the pictures directly in their folders.

    An empty folder stays a class: it is a name a model may answer with. Both lists are empty where
    ``folder`` does not hold two or more class folders with any picture.
    """
    classes = subfolders(folder) if folder.is_dir() else []
    samples = [
        (path, label) for label, name in enumerate(classes) for path in pictures_in(folder / name)
    ]
    return (classes, samples) if len(classes) > 1 and samples else ([], [])


def read_folder(name: str, folder: Path, split: str, default: bool) -> Source | None:
    """Read ``folder/<split>/<class>/<picture>``, or ``folder/<class>/<picture>`` as split "all".

    Args:
        name: what the Source shall be called.
        folder: where the data set lies.
        split: the name of its folder.
        default: nobody asked for a split, so that a folder without split folders will do.

    Returns:
        The Source, or None where no such split lies there.
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
    """The ``split_<name>.json`` that CoOp's and BiomedCoOp's copies of a data set bring."""
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
    """Read a data set laid out as BiomedCoOp publishes it.

    ``folder/split_<name>.json`` maps "train", "val" and "test" to lists of [path, label, class
    name]; the paths count from ``folder/<name>/``, or from ``folder`` itself
    (github.com/HealthX-Lab/BiomedCoOp, assets/DATASETS.md).

    Returns:
        The Source, or None where there is no such file or no such split in it.

    Raises:
        ValueError: the file is not of that form.
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
