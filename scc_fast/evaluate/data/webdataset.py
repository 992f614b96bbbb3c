"""Reader of clip-benchmark's webdatasets: tar shards of pictures and labels.

Layout of ``clip_benchmark_export_wds`` and the repositories ``clip-benchmark/wds_*``:

    folder/classnames.txt         one name a line, in the order of the labels
    folder/<split>/nshards.txt    how many shards there are
    folder/<split>/0.tar, 1.tar …  members <key>.cls (a number as text) and <key>.webp|png|jpg
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scc_fast.config import shown
from scc_fast.evaluate.data.imagefolder import decode, position
from scc_fast.evaluate.data.source import MissingData, Source

EXTENSIONS = ("webp", "png", "jpg", "jpeg")


@dataclass(frozen=True, eq=False)
class TarPictures:
    """Index to picture, each a slice of a shard; opened at every call.

    Args:
        shards: paths of the tar files.
        slices: int64 (N, 3): shard, first byte, number of bytes.
    """

    shards: tuple[str, ...]
    slices: NDArray[np.int64]

    def __call__(self, index: int) -> Image.Image:
        index = position(index, len(self.slices))
        shard, offset, size = (int(value) for value in self.slices[index])
        path = self.shards[shard]
        where = f"picture {index}, {size} bytes at {offset} of {path},"
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                data = file.read(size)
        except FileNotFoundError as error:
            raise MissingData(f"{where} cannot be read: the shard is gone") from error
        except OSError as error:
            raise ValueError(f"{where} cannot be read: {error}") from error
        return decode(data, where)


def has_shards(folder: Path, split: str) -> bool:
    """Whether ``folder`` holds tar files of this split."""
    return any((folder / split).glob("*.tar"))


def read_webdataset(name: str, folder: Path, split: str) -> Source:
    """Read one split: labels now, pictures on demand.

    Args:
        name: of the Source.
        folder: holds ``classnames.txt`` and the folder of the split.
        split: name of that folder.

    Raises:
        MissingData: no ``classnames.txt``, or fewer shards than ``nshards.txt`` says.
        ValueError: a file does not follow the layout above.
    """
    kind = folder / "dataset_type.txt"
    if kind.is_file() and (word := kind.read_text().strip().lower()) != "classification":
        raise ValueError(
            f"{kind} should say classification, got {shown(word)}: it has no single labels"
        )
    classes = _classes(folder)
    shards = _shards(folder / split)
    labels: list[int] = []
    slices: list[tuple[int, int, int]] = []
    for number, shard in enumerate(shards):
        for key, label, offset, size in _samples(shard):
            if not 0 <= label < len(classes):
                raise ValueError(
                    f"{shard}: {key}.cls says {label}, but {folder / 'classnames.txt'} "
                    f"names the classes 0 to {len(classes) - 1}"
                )
            labels.append(label)
            slices.append((number, offset, size))
    if not labels:
        raise ValueError(f"{folder / split} holds shards without a single picture")
    pictures = TarPictures(tuple(map(str, shards)), np.array(slices, dtype=np.int64))
    return Source(name, split, classes, tuple(labels), pictures, "webdataset")


def _classes(folder: Path) -> tuple[str, ...]:
    path = folder / "classnames.txt"
    if not path.is_file():
        raise MissingData(f"{path} is missing: one class name a line, in the order of the labels")
    lines = path.read_text(encoding="utf-8").splitlines()
    return tuple(line.strip() for line in lines if line.strip())


def _shards(folder: Path) -> list[Path]:
    """Shards in order, as many as ``nshards.txt`` says, else all without a gap."""
    count = folder / "nshards.txt"
    if count.is_file():
        text = count.read_text().strip()
        if not text.isdigit() or int(text) == 0:
            raise ValueError(f"{count} should hold the number of shards, got {shown(text)}")
        wanted = int(text)
    else:
        stems = [path.stem for path in folder.glob("*.tar")]
        if not all(stem.isdigit() for stem in stems):
            raise MissingData(f"{count} is missing, and shards in {folder} are not 0.tar, 1.tar, …")
        wanted = max(map(int, stems)) + 1
    shards = [folder / f"{number}.tar" for number in range(wanted)]
    absent = [str(path) for path in shards if not path.is_file()]
    if absent:
        raise MissingData(
            f"{len(absent)} of the {wanted} shards in {folder} are missing: {', '.join(absent[:5])}"
        )
    return shards


def _samples(shard: Path) -> list[tuple[str, int, int, int]]:
    """(key, label, first byte, number of bytes) of every picture, in order."""
    labels: dict[str, int] = {}
    pictures: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(shard, "r:") as archive, open(shard, "rb") as file:
            for member in archive:
                # webdataset's rule: the key ends at the first dot behind the last slash
                folder, _, leaf = member.name.rpartition("/")
                stem, _, extension = leaf.partition(".")
                key, extension = f"{folder}/{stem}".lstrip("./"), extension.lower().lstrip(".")
                if not member.isfile() or extension not in ("cls", *EXTENSIONS):
                    continue
                if key in (labels if extension == "cls" else pictures):
                    raise ValueError(f"{key} has two members of the kind of {member.name}")
                if extension == "cls":
                    file.seek(member.offset_data)
                    labels[key] = int(file.read(member.size))
                else:
                    pictures[key] = (member.offset_data, member.size)
    except (tarfile.TarError, ValueError, OSError) as error:
        raise ValueError(
            f"{shard} is not a whole webdataset shard: {error}{_pointer(shard)}"
        ) from error
    if unpaired := labels.keys() ^ pictures.keys():
        raise ValueError(f"{shard}: {min(unpaired)} has no picture or no .cls beside it")
    return [(key, labels[key], *place) for key, place in pictures.items()]


def _pointer(shard: Path) -> str:
    with open(shard, "rb") as file:
        is_pointer = file.read(24).startswith(b"version https://git-lfs")
    return " (it is a Git LFS pointer: git lfs pull fetches the file itself)" if is_pointer else ""
