"""Small copies of the papers' data sets, in the files and folders they really come in.

``write("cifar10", root)`` makes what torchvision unpacks for CIFAR-10, with tiny pictures of the
real classes: all of them where prompts are looked up in a table, a few of them elsewhere.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import pickle
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from data_pieces import NAMES, classes, each, encoded, pixels, save, words, write_lines

__all__ = ["NAMES", "accept_checksums", "classes", "pixels", "words", "write", "write_webdataset"]

Layout = Literal["own", "webdataset", "imagefolder"]


def write(name: str, root: Path, per_class: int = 2, layout: Layout = "own") -> None:
    """Write a copy with ``per_class`` pictures of each class in the split the papers use.

    Args:
        name: one of ``NAMES``.
        root: the folder that holds data sets; made if need be.
        layout: "own": torchvision's, BiomedCoOp's or ImageNet's, PCAM as a webdataset where h5py
            is not installed; "webdataset": clip-benchmark's; "imagefolder": folders of classes.
    """
    root.mkdir(parents=True, exist_ok=True)
    if layout == "own" and name == "pcam" and not _has_h5py():
        layout = "webdataset"
    if layout == "webdataset":
        write_webdataset(root / f"wds_{name}", "test", words(name), per_class)
    elif layout == "imagefolder":
        split = "val" if name == "imagenet1k" else "test"
        folders = [word.strip("/").replace("/", " ") for word in classes(name)]
        for label, number in each(len(folders), per_class):
            save(root / name / split / folders[label] / f"{number}.png", label, number)
    else:
        _WRITERS[name](root, per_class)


def accept_checksums(patch: pytest.MonkeyPatch, root: Path) -> None:
    """Let torchvision expect the MD5 of the files generated under ``root``.

    It knows those of the real files, which no copy can have. Nothing else of it is replaced, and a
    file that changes after this call is refused as ever.
    """
    from torchvision.datasets import CIFAR10, CIFAR100, STL10, Flowers102

    def md5(path: Path) -> str:
        return hashlib.md5(path.read_bytes()).hexdigest() if path.exists() else "not there"

    for kind in (CIFAR10, CIFAR100, STL10):
        base = root / kind.base_folder
        for part in ("train_list", "test_list"):
            files = [[file, md5(base / file)] for file, _ in getattr(kind, part)]
            patch.setattr(kind, part, files)
        if hasattr(kind, "meta"):
            patch.setattr(kind, "meta", {**kind.meta, "md5": md5(base / kind.meta["filename"])})
    flowers = {
        key: (file, md5(root / "flowers-102" / file))
        for key, (file, _) in Flowers102._file_dict.items()
    }
    patch.setattr(Flowers102, "_file_dict", flowers)


def write_webdataset(
    folder: Path,
    split: str,
    names: Sequence[str],
    per_class: int = 2,
    extension: str = "webp",
    per_shard: int = 7,
) -> None:
    """A split as ``clip_benchmark_export_wds`` writes it: lossless pictures in numbered shards."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    (folder / "classnames.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n")
    every = list(each(len(names), per_class))
    count = -(-len(every) // per_shard)
    for shard in range(count):
        with tarfile.open(folder / split / f"{shard}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for index in range(shard * per_shard, min((shard + 1) * per_shard, len(every))):
                label, number = every[index]
                _add(tar, f"s{index:07d}.cls", str(label).encode())
                _add(tar, f"s{index:07d}.{extension}", encoded(label, number, extension))
    (folder / split / "nshards.txt").write_text(f"{count}\n")


def _has_h5py() -> bool:
    return importlib.util.find_spec("h5py") is not None


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _pickle(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(value, protocol=2))


def _batch(per_class: int, count: int, key: str) -> dict[str, Any]:
    every = list(each(count, per_class))
    planes = [pixels(label, number, 32).transpose(2, 0, 1).reshape(-1) for label, number in every]
    data = np.stack(planes) if planes else np.zeros((0, 3072), np.uint8)
    names = [f"{label}_{number}.png" for label, number in every]
    return {"data": data, key: [label for label, _ in every], "filenames": names}


def _cifar10(root: Path, per_class: int) -> None:
    base = root / "cifar-10-batches-py"
    for number in range(1, 6):
        _pickle(base / f"data_batch_{number}", _batch(1, 3, "labels"))
    _pickle(base / "test_batch", _batch(per_class, 10, "labels"))
    _pickle(base / "batches.meta", {"label_names": list(classes("cifar10")), "num_vis": 3072})


def _cifar100(root: Path, per_class: int) -> None:
    base = root / "cifar-100-python"
    for file, count in (("train", 1), ("test", per_class)):
        batch = _batch(count, 100, "fine_labels")
        _pickle(base / file, {**batch, "coarse_labels": [0] * len(batch["filenames"])})
    meta = {"fine_label_names": list(classes("cifar100")), "coarse_label_names": ["things"]}
    _pickle(base / "meta", meta)


def _stl10(root: Path, per_class: int) -> None:
    base = root / "stl10_binary"
    base.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", 1), ("test", per_class), ("unlabeled", 1)):
        every = list(each(2 if part == "unlabeled" else 10, count))
        # Column-major planes, as MATLAB wrote them; labels count from 1
        planes = [pixels(label, number, 96).transpose(2, 1, 0).tobytes() for label, number in every]
        (base / f"{part}_X.bin").write_bytes(b"".join(planes))
        if part != "unlabeled":
            (base / f"{part}_y.bin").write_bytes(bytes(label + 1 for label, _ in every))
    write_lines(base / "class_names.txt", classes("stl10"))
    write_lines(base / "fold_indices.txt", ["0 1 2"] * 10)


def _imagenet(root: Path, per_class: int) -> None:
    wnids = classes("imagenet1k")
    for label, number in each(len(wnids), per_class):
        file = f"ILSVRC2012_val_{label * per_class + number + 1:08d}.JPEG"
        save(root / "imagenet1k" / "val" / wnids[label] / file, label, number)


def _caltech101(root: Path, per_class: int) -> None:
    from scipy.io import savemat

    base = root / "caltech101"
    names = classes("caltech101")
    for label, number in each(len(names), per_class):
        picture = base / "101_ObjectCategories" / names[label] / f"image_{number + 1:04d}.jpg"
        save(picture, label, number)
        other = {"Faces": "Faces_2", "Faces_easy": "Faces_3"}.get(names[label], names[label])
        outline = base / "Annotations" / other / f"annotation_{number + 1:04d}.mat"
        outline.parent.mkdir(parents=True, exist_ok=True)
        savemat(outline, {"obj_contour": np.zeros((2, 4)), "box_coord": np.zeros((1, 4))})
    save(base / "101_ObjectCategories" / "BACKGROUND_Google" / "image_0001.jpg", 9, 0)


def _caltech256(root: Path, per_class: int) -> None:
    names = classes("caltech256")
    for label, number in each(len(names), per_class):
        file = f"{names[label][:3]}_{number + 1:04d}.jpg"
        save(root / "caltech256" / "256_ObjectCategories" / names[label] / file, label, number)
    # The real archive has a stray entry like this one
    write_lines(root / "caltech256" / "256_ObjectCategories" / names[-1] / "RENAME2", ["stray"])


def _pets(root: Path, per_class: int) -> None:
    base, names = root / "oxford-iiit-pet", classes("pets")
    for split, count in (("trainval", 1), ("test", per_class)):
        lines = []
        for label, number in each(len(names), count):
            stem = f"{names[label]}_{number + (1 if split == 'trainval' else 101)}"
            species = 1 if names[label][0].isupper() else 2
            lines.append(f"{stem} {label + 1} {species} 1")
            save(base / "images" / f"{stem}.jpg", label, number)
        write_lines(base / "annotations" / f"{split}.txt", lines)
    write_lines(base / "annotations" / "xmls" / "Abyssinian_1.xml", ["<annotation></annotation>"])
    save(base / "annotations" / "trimaps" / "Abyssinian_1.png", 0, 0)


def _flowers(root: Path, per_class: int) -> None:
    from scipy.io import savemat

    base = root / "flowers-102"
    parts = {"trnid": (3, 1), "valid": (3, 1), "tstid": (102, per_class)}
    labels: list[int] = []
    ids: dict[str, NDArray[np.uint16]] = {}
    for part, (count, per) in parts.items():
        first = len(labels) + 1
        for label, number in each(count, per):
            labels.append(label + 1)
            save(base / "jpg" / f"image_{len(labels):05d}.jpg", label, number)
        ids[part] = np.arange(first, len(labels) + 1, dtype=np.uint16)[None]
    savemat(base / "imagelabels.mat", {"labels": np.array([labels], dtype=np.uint8)})
    savemat(base / "setid.mat", ids)


def _food101(root: Path, per_class: int) -> None:
    base, names = root / "food-101", classes("food101")
    for split, count in (("train", 1), ("test", per_class)):
        table: dict[str, list[str]] = {name: [] for name in names}
        for label, number in each(len(names), count):
            stem = f"{names[label]}/{(1000 if split == 'train' else 2000) + number}"
            table[names[label]].append(stem)
            save(base / "images" / f"{stem}.jpg", label, number)
        write_lines(base / "meta" / f"{split}.json", [json.dumps(table)])
    write_lines(base / "meta" / "classes.txt", names)


def _cars(root: Path, per_class: int) -> None:
    from scipy.io import savemat

    base, names = root / "stanford_cars", classes("cars")
    (base / "devkit").mkdir(parents=True, exist_ok=True)
    fields = [*(f"bbox_{axis}" for axis in ("x1", "y1", "x2", "y2")), "class", "fname"]
    targets = {"train": "devkit/cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}
    for split, file in targets.items():
        rows = []
        for label, number in each(len(names), per_class if split == "test" else 1):
            picture = f"{len(rows) + 1:05d}.jpg"
            rows.append((1, 1, 9, 9, label + 1, picture))
            save(base / f"cars_{split}" / picture, label, number)
        table = np.array([rows], dtype=[(field, object) for field in fields])
        savemat(base / file, {"annotations": table})
    words = np.array([list(names)], dtype=object)
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": words})


def _sun397(root: Path, per_class: int) -> None:
    base, names = root / "SUN397", classes("sun397")
    for label, number in each(len(names), per_class):
        file = f"sun_a{9 - number}{label}bcdefghijklm.jpg"
        save(base / names[label].lstrip("/") / file, label, number)
    write_lines(base / "ClassName.txt", names)


def _country211(root: Path, per_class: int) -> None:
    names = classes("country211")
    for label, number in each(len(names), per_class):
        save(root / "country211" / "test" / names[label] / f"{number}.jpg", label, number)
    for split in ("train", "valid"):
        save(root / "country211" / split / names[0] / "0.jpg", 0, 0)


def _aircraft(root: Path, per_class: int) -> None:
    base, names = root / "fgvc-aircraft-2013b" / "data", classes("fgvc_aircraft")
    serial = 1_514_522
    for split, count in (("train", 1), ("val", 1), ("test", per_class)):
        lines = []
        for label, number in each(len(names), count):
            serial += 1
            lines.append(f"{serial:07d} {names[label]}")
            save(base / "images" / f"{serial:07d}.jpg", label, number)
        write_lines(base / f"images_variant_{split}.txt", lines)
    for file in ("variants", "families", "manufacturers"):
        write_lines(base / f"{file}.txt", names)


def _eurosat(root: Path, per_class: int) -> None:
    names = classes("eurosat")
    for label, number in each(len(names), per_class):
        file = f"{names[label]}_{number + 1}.jpg"
        save(root / "eurosat" / "2750" / names[label] / file, label, number)


def _dtd(root: Path, per_class: int) -> None:
    base, names = root / "dtd" / "dtd", classes("dtd")
    for first, (split, count) in enumerate((("train", 1), ("val", 1), ("test", per_class))):
        lines = []
        for label, number in each(len(names), count):
            lines.append(f"{names[label]}/{names[label]}_{100 * first + number:04d}.jpg")
            save(base / "images" / lines[-1], label, number)
        for partition in range(1, 11):  # the same in all ten, unlike the real one
            write_lines(base / "labels" / f"{split}{partition}.txt", lines)


def _pcam(root: Path, per_class: int) -> None:
    import h5py

    base = root / "pcam"
    base.mkdir(parents=True, exist_ok=True)
    every = list(each(2, per_class))
    for axis, value in (
        ("x", np.stack([pixels(label, number, 96) for label, number in every])),
        ("y", np.array([label for label, _ in every], np.uint8).reshape(-1, 1, 1, 1)),
    ):
        with h5py.File(base / f"camelyonpatch_level_2_split_test_{axis}.h5", "w") as file:
            file.create_dataset(axis, data=value)


def _medical(name: str, folder: str) -> Callable[[Path, int], None]:
    def writer(root: Path, per_class: int) -> None:
        names = classes(name)
        table: dict[str, list[list[str | int]]] = {"train": [], "val": [], "test": []}
        for split, count in (("train", 1), ("val", 1), ("test", per_class)):
            for label, number in each(len(names), count):
                file = f"{names[label]}/{split}_{number}.png"
                table[split].append([file, label, names[label]])
                save(root / folder / folder / file, label, number)
        write_lines(root / folder / f"split_{folder}.json", [json.dumps(table)])

    return writer


_WRITERS: dict[str, Callable[[Path, int], None]] = {
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "stl10": _stl10,
    "imagenet1k": _imagenet,
    "caltech101": _caltech101,
    "caltech256": _caltech256,
    "pets": _pets,
    "flowers": _flowers,
    "food101": _food101,
    "cars": _cars,
    "sun397": _sun397,
    "country211": _country211,
    "fgvc_aircraft": _aircraft,
    "eurosat": _eurosat,
    "dtd": _dtd,
    "pcam": _pcam,
    "busi": _medical("busi", "BUSI"),
    "btmri": _medical("btmri", "BTMRI"),
    "chmnist": _medical("chmnist", "CHMNIST"),
    "covid_19": _medical("covid_19", "COVID_19"),
    "dermamnist": _medical("dermamnist", "DermaMNIST"),
    "kneexray": _medical("kneexray", "KneeXray"),
}
