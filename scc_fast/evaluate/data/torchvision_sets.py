"""Data sets in torchvision's folders, read with ``torchvision.datasets``.

Unlike there, labels need no decoding, pictures keep their stored mode, and the order does not
depend on the file system (as torchvision's SUN397 does).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scc_fast.evaluate.data.imagefolder import from_files, pictures_in, position, subfolders
from scc_fast.evaluate.data.source import MissingData, Source

# Label 1: tumor tissue in the patch's center (github.com/basveeling/pcam); clip-benchmark's words
PCAM_CLASSES = ("lymph node", "lymph node containing metastatic tumor tissue")


@dataclass(frozen=True, eq=False)
class ArrayPictures:
    """Index to picture of an array uint8 (N, H, W, 3) in memory."""

    array: NDArray[np.uint8]

    def __call__(self, index: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(self.array[position(index, len(self.array))]))


@dataclass(frozen=True)
class H5Pictures:
    """Index to picture of the data set "x", uint8 (N, H, W, 3), of an HDF5 file.

    Opens the file at every call: a handle survives neither fork nor pickle.
    """

    path: str
    count: int

    def __call__(self, index: int) -> Image.Image:
        index = position(index, self.count)
        try:
            with _h5py().File(self.path, "r") as file:
                return Image.fromarray(np.asarray(file["x"][index], dtype=np.uint8))
        except (OSError, KeyError, RuntimeError) as error:
            raise ValueError(f"picture {index} of {self.path} cannot be read: {error}") from error


@dataclass(frozen=True)
class Layout:
    """Files of a data set in torchvision's layout.

    Args:
        splits: torchvision's names of the splits; "all" without any.
        needs: required files and folders under the root; "{split}" is replaced.
        build: (root, split, download) to a Source with an empty name.
        also: more requirements, by split.
        no_download: why torchvision cannot download it; "" if it can.
    """

    splits: tuple[str, ...]
    needs: tuple[str, ...]
    build: Callable[[Path, str, bool], Source]
    also: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    no_download: str = ""

    def lists(self, root: Path, split: str) -> list[Path]:
        """Required paths of a split."""
        needs = (*self.needs, *self.also.get(split, ()))
        return [root / need.format(split=split) for need in needs]

    def missing(self, root: Path, split: str) -> list[Path]:
        """Missing paths of a split; a folder with shards is a webdataset's and does not count."""
        return [
            path
            for path in self.lists(root, split)
            if not path.exists() or (path.name == split and any(path.glob("*.tar")))
        ]


def read_torchvision(name: str, root: Path, split: str, download: bool = False) -> Source:
    """Read a split of one of ``LAYOUTS``.

    Args:
        name: a key of ``LAYOUTS``.
        root: torchvision's root.
        split: one of the layout's splits.
        download: let torchvision download missing files.

    Raises:
        MissingData: the download failed.
        ImportError: a package for a file format is not installed.
        ValueError: unexpected or damaged files.
    """
    layout = LAYOUTS[name]
    try:
        return replace(layout.build(root, split, download), name=name)
    except MissingData:
        raise
    except Exception as error:  # unpicklers and .mat and .h5 readers raise anything
        cause = error if isinstance(error, ImportError) else error.__context__
        if isinstance(cause, ImportError):
            package = (cause.name or "the package").split(".")[0]
            raise ImportError(f"{name}: {error}; pip install {package}") from error
        missing = layout.missing(root, split)
        if download and missing:
            raise MissingData(
                f"{name}: torchvision's download into {root} failed: {error}"
            ) from error
        damaged = _damaged(name, root)
        why = f"wrong checksum: {', '.join(damaged)}" if damaged else str(error)
        raise ValueError(
            f"{name}: the files under {layout.lists(root, split)[0].parent} cannot be read as "
            f"torchvision's copy of it: {why}"
        ) from error


def _damaged(name: str, root: Path) -> list[str]:
    """Files whose MD5 differs from torchvision's; [] if it has none."""
    sets = _datasets()
    intact = sets.utils.check_integrity
    if name == "flowers":
        pairs = [sets.Flowers102._file_dict[key] for key in ("label", "setid")]
        folder = root / "flowers-102"
    elif name in ("cifar10", "cifar100", "stl10"):
        kind = {"cifar10": sets.CIFAR10, "cifar100": sets.CIFAR100, "stl10": sets.STL10}[name]
        pairs = [*kind.train_list, *kind.test_list]
        if name != "stl10":
            pairs.append([kind.meta["filename"], kind.meta["md5"]])
        folder = root / kind.base_folder
    else:
        return []
    return [str(folder / file) for file, md5 in pairs if not intact(folder / file, md5)]


def _datasets() -> Any:
    from torchvision import datasets  # type: ignore[import-untyped]

    return datasets


def _h5py() -> Any:
    try:
        import h5py  # type: ignore[import-not-found, import-untyped]
    except ImportError as error:
        raise ImportError(
            "PCAM's .h5 files need h5py (its webdataset does not)", name="h5py"
        ) from error
    return h5py


def _cifar(kind: str) -> Callable[[Path, str, bool], Source]:
    def build(root: Path, split: str, download: bool) -> Source:
        data = getattr(_datasets(), kind)(str(root), train=split == "train", download=download)
        labels = tuple(map(int, data.targets))
        return Source(
            "", split, tuple(data.classes), labels, ArrayPictures(data.data), "torchvision"
        )

    return build


def _stl10(root: Path, split: str, download: bool) -> Source:
    data = _datasets().STL10(str(root), split=split, download=download)
    pictures = ArrayPictures(data.data.transpose(0, 2, 3, 1))
    labels = tuple(map(int, data.labels))
    return Source("", split, tuple(data.classes), labels, pictures, "torchvision")


def _path_of(path: Any) -> str:
    """Loader that returns the path: torchvision then lists (path, label)."""
    return str(path)


def _listed(
    kind: str, in_order: bool = True, **options: Any
) -> Callable[[Path, str, bool], Source]:
    """Builder for a torchvision class with a loader argument."""

    def build(root: Path, split: str, download: bool) -> Source:
        chosen = {} if split == "all" else {"split": split}
        make = getattr(_datasets(), kind)
        data = make(str(root), download=download, loader=_path_of, **chosen, **options)
        samples = [data[index] for index in range(len(data))]
        if not in_order:
            samples.sort()
        return from_files("", split, data.classes, samples, "torchvision")

    return build


def _cars(root: Path, split: str, download: bool) -> Source:
    # Its download() only raises
    return _listed("StanfordCars")(root, split, False)


def _pets(root: Path, split: str, download: bool) -> Source:
    data = _datasets().OxfordIIITPet(str(root), split=split, download=download)
    samples = list(zip(map(str, data._images), data._labels, strict=True))  # has no loader=
    return from_files("", split, data.classes, samples, "torchvision")


def _caltech(kind: str, base: str) -> Callable[[Path, str, bool], Source]:
    """Builder for Caltech101 and 256, in torchvision's order, from the existing files.

    torchvision derives file names from the number of entries, which a stray file breaks.
    """

    def build(root: Path, split: str, download: bool) -> Source:
        folder = root / base
        if download and not folder.is_dir():
            getattr(_datasets(), kind)(str(root), download=True)
        classes = [name for name in subfolders(folder) if name != "BACKGROUND_Google"]
        samples = [
            (path, label)
            for label, name in enumerate(classes)
            for path in pictures_in(folder / name, (".jpg",))
        ]
        if not samples:
            raise ValueError(f"no folder in {folder} holds a .jpg")
        return from_files("", split, classes, samples, "torchvision")

    return build


def _pcam(root: Path, split: str, download: bool) -> Source:
    h5py = _h5py()
    data = _datasets().PCAM(str(root), split=split, download=download)
    part = "valid" if split == "val" else split
    images, targets = (
        root / "pcam" / f"camelyonpatch_level_2_split_{part}_{axis}.h5" for axis in "xy"
    )
    with h5py.File(targets, "r") as file:
        labels = tuple(int(label) for label in np.asarray(file["y"]).reshape(-1))
    if len(labels) != len(data):
        raise ValueError(f"{targets} has {len(labels)} labels, {images} {len(data)} pictures")
    return Source(
        "", split, PCAM_CLASSES, labels, H5Pictures(str(images), len(data)), "torchvision"
    )


_TRAIN_TEST = ("train", "test")
_ALL = ("all",)

LAYOUTS: dict[str, Layout] = {
    "cifar10": Layout(
        _TRAIN_TEST,
        tuple(
            f"cifar-10-batches-py/{file}"
            for file in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
        ),
        _cifar("CIFAR10"),
    ),
    "cifar100": Layout(
        _TRAIN_TEST,
        tuple(f"cifar-100-python/{file}" for file in ("train", "test", "meta")),
        _cifar("CIFAR100"),
    ),
    "stl10": Layout(
        _TRAIN_TEST,
        tuple(
            f"stl10_binary/{file}"
            for file in (
                "train_X.bin",
                "train_y.bin",
                "unlabeled_X.bin",
                "test_X.bin",
                "test_y.bin",
                "class_names.txt",
            )
        ),
        _stl10,
    ),
    "caltech101": Layout(
        _ALL,
        ("caltech101/101_ObjectCategories",),
        _caltech("Caltech101", "caltech101/101_ObjectCategories"),
    ),
    "caltech256": Layout(
        _ALL,
        ("caltech256/256_ObjectCategories",),
        _caltech("Caltech256", "caltech256/256_ObjectCategories"),
    ),
    "pets": Layout(
        ("trainval", "test"),
        ("oxford-iiit-pet/images", "oxford-iiit-pet/annotations/{split}.txt"),
        _pets,
    ),
    "flowers": Layout(
        ("train", "val", "test"),
        ("flowers-102/jpg", "flowers-102/imagelabels.mat", "flowers-102/setid.mat"),
        _listed("Flowers102"),
    ),
    "food101": Layout(
        _TRAIN_TEST, ("food-101/images", "food-101/meta/{split}.json"), _listed("Food101")
    ),
    "cars": Layout(
        _TRAIN_TEST,
        ("stanford_cars/devkit/cars_meta.mat", "stanford_cars/cars_{split}"),
        _cars,
        {
            "train": ("stanford_cars/devkit/cars_train_annos.mat",),
            "test": ("stanford_cars/cars_test_annos_withlabels.mat",),
        },
        "its URL is dead",
    ),
    "sun397": Layout(_ALL, ("SUN397/ClassName.txt",), _listed("SUN397", in_order=False)),
    "country211": Layout(
        ("train", "valid", "test"), ("country211/{split}",), _listed("Country211")
    ),
    "fgvc_aircraft": Layout(
        ("train", "val", "trainval", "test"),
        tuple(
            f"fgvc-aircraft-2013b/data/{file}"
            for file in ("variants.txt", "images", "images_variant_{split}.txt")
        ),
        _listed("FGVCAircraft", annotation_level="variant"),
    ),
    "eurosat": Layout(_ALL, ("eurosat/2750",), _listed("EuroSAT")),
    "dtd": Layout(
        ("train", "val", "test"), ("dtd/dtd/images", "dtd/dtd/labels/{split}1.txt"), _listed("DTD")
    ),
    "pcam": Layout(
        ("train", "val", "test"),
        (),
        _pcam,
        {
            split: tuple(f"pcam/camelyonpatch_level_2_split_{part}_{axis}.h5" for axis in "xy")
            for split, part in (("train", "train"), ("val", "valid"), ("test", "test"))
        },
    ),
}
