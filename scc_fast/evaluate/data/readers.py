"""Readers of data sets on disk: torchvision, webdataset, image folder."""

from __future__ import annotations

import re
from pathlib import Path

from scc_fast.config import shown
from scc_fast.evaluate.data.catalogue import Entry, find, known
from scc_fast.evaluate.data.imagefolder import class_folders, read_folder, read_split_file
from scc_fast.evaluate.data.source import MissingData, Source
from scc_fast.evaluate.data.torchvision_sets import LAYOUTS, read_torchvision
from scc_fast.evaluate.data.webdataset import has_shards, read_webdataset

_SAME_SPLIT: dict[tuple[str, str], tuple[str, ...]] = {
    ("imagenet1k", "test"): ("val",),  # clip-benchmark calls ImageNet's val "test"
    ("imagenet1k", "val"): ("test",),
    ("country211", "val"): ("valid",),
}
_SPLITS = ("train", "trainval", "val", "valid", "test", "all")

# clip-benchmark's repositories; some are VTAB's selection
_HUB: dict[str, str] = {
    **{
        name: f"clip-benchmark/wds_vtab-{name}"
        for name in (
            "caltech101",
            "cifar10",
            "cifar100",
            "dtd",
            "eurosat",
            "flowers",
            "pcam",
            "pets",
        )
    },
    **{
        name: f"clip-benchmark/wds_{name}"
        for name in (
            "cars",
            "country211",
            "fgvc_aircraft",
            "food101",
            "imagenet1k",
            "stl10",
            "sun397",
        )
    },
}
_PAGES: dict[str, str] = {
    "imagenet1k": "register at https://image-net.org/download-images for ILSVRC2012_img_val.tar "
    "and ILSVRC2012_devkit_t12.tar.gz, put both into {root}, and let "
    "torchvision.datasets.ImageNet('{root}', split='val') unpack them into val/<wordnet id>",
    "caltech101": "https://data.caltech.edu/records/mzrjq-6wc02",
    "caltech256": "https://data.caltech.edu/records/nyy15-4j048",
    "cars": "the files as https://github.com/pytorch/vision/issues/7545 gathers them",
    "sun397": "https://vision.princeton.edu/projects/2010/SUN/",
}


def read(name: str, root: Path, split: str | None = None, download: bool = False) -> Source:
    """Read a data set under ``root``: names and labels now, pictures on demand.

    The first that holds the split is read:

    1. torchvision's own files, such as ``root/cifar-10-batches-py``;
    2. clip-benchmark's webdataset, ``root/wds_<name>/<split>/*.tar`` beside ``classnames.txt``
       (the folder may also be called ``wds_vtab-<name>`` or ``<name>``);
    3. folders, ``root/<name>/<split>/<class>/<picture>``, without ``<split>`` for a single
       split; BiomedCoOp's ``root/<name>/split_<name>.json``; ImageNet's ``root/val/<wordnet id>``.

    Args:
        name: any spelling of ``catalogue.find``.
        root: the folder of the data sets; for 2 and 3 also that of the data set itself.
        split: None: the papers' (``Entry.split``), or "test" in place of a missing "all", as in
            clip-benchmark's EuroSAT; see ``Source.split``.
        download: let torchvision download missing files.

    Raises:
        MissingData: not found; says where it was searched and how to get it.
        ValueError: unknown name or split, or unexpected files.
        ImportError: a file format needs a package that is not installed.
    """
    entry = find(name)
    if entry.group == "bundled":
        raise ValueError(f"dataset: {entry.name} has no files to read; it is bundled")
    name = entry.name
    if not isinstance(root, str | Path):
        raise TypeError(f"root should be a path, got {shown(root)}")
    root = Path(root).expanduser().absolute()  # workers may run in another folder
    splits = _candidates(entry, split)
    layout = LAYOUTS.get(name)
    mine = [part for part in splits if layout and part in layout.splits]
    folders = _folders(entry, root)
    for part in splits:
        if layout and part in mine and not layout.missing(root, part):
            return read_torchvision(name, root, part)
        for folder in folders:
            if has_shards(folder, part):
                return read_webdataset(name, folder, part)
        found = _in_folders(entry, root, folders, part, split is None)
        if found is not None:
            return found
    ways = _how_to_get(entry, root, folders, splits, download)
    if download and layout and mine and not layout.no_download:
        try:
            return read_torchvision(name, root, mine[0], download=True)
        except MissingData as error:
            raise MissingData(f"{error}\n{ways}") from error
    raise MissingData(ways)


def _candidates(entry: Entry, split: str | None) -> tuple[str, ...]:
    """Acceptable splits, best first."""
    name = entry.name
    if split is None:
        return (entry.split,) if entry.split == "test" else (entry.split, "test")
    allowed = sorted({*_SPLITS, *(LAYOUTS[name].splits if name in LAYOUTS else ())})
    if split not in allowed:
        raise ValueError(f"split should be None or one of {', '.join(allowed)}; got {shown(split)}")
    return (split, *_SAME_SPLIT.get((name, split), ()))


def _folders(entry: Entry, root: Path) -> list[Path]:
    """Folders that may hold a webdataset or an image folder of this data set, sorted."""
    if not root.is_dir():
        return []
    inside = sorted(path for path in root.iterdir() if path.is_dir() and known(path.name) is entry)
    return [*inside, *([root] if known(root.resolve().name) is entry else [])]


def _in_folders(
    entry: Entry, root: Path, folders: list[Path], split: str, default: bool
) -> Source | None:
    name, medical = entry.name, entry.group == "medical"
    for folder in folders:
        if medical and (source := read_split_file(name, folder, split)) is not None:
            return source
        if not _is_torchvisions(name, root, folder):
            source = read_folder(name, folder, split, default)
            if source is not None:
                return source
    if name == "imagenet1k":
        classes, _ = class_folders(root / split)
        if classes and all(re.fullmatch(r"n\d{8}", word) for word in classes):
            return read_folder(name, root, split, False)
    return None


def _is_torchvisions(name: str, root: Path, folder: Path) -> bool:
    """Whether a folder is an incomplete torchvision copy: its folders are not classes."""
    layout = LAYOUTS.get(name)
    if layout is None or name == "country211":  # torchvision keeps that one as an image folder
        return False
    listed = (path for split in layout.splits for path in layout.lists(root, split))
    return any(path.exists() and folder in path.parents for path in listed)


def _how_to_get(
    entry: Entry, root: Path, folders: list[Path], splits: tuple[str, ...], download: bool
) -> str:
    name, medical = entry.name, entry.group == "medical"
    layout, hub, split = LAYOUTS.get(name), _HUB.get(name), splits[0]
    mine = [part for part in splits if layout and part in layout.splits]
    lines = [f"{name}, split {shown(split)}, is not under {root}. Looked for:"]
    if layout and mine:
        missing = ", ".join(map(str, layout.missing(root, mine[0])[:3]))
        lines.append(f"  torchvision's files: missing {missing}")
    elif layout:
        lines.append(f"  torchvision's files: they have only {', '.join(layout.splits)}")
    base = hub.rpartition("/")[2] if hub else f"wds_{name}"
    lines.append(
        f"  clip-benchmark's webdataset: {root / base / splits[-1]}/0.tar, … "
        f"beside {root / base}/classnames.txt"
    )
    lines.append(f"  an image folder: {root / name / split}/<class>/<picture>")
    if medical:
        own = _zip_of(name)
        lines.append(
            f"  BiomedCoOp's copy: {root / own}/split_{own}.json beside {root / own / own}/"
        )
    if name == "imagenet1k":
        lines.append(f"  ImageNet's own folders: {root / split}/n01440764/<picture>, …")
    for folder in folders:
        if there := [part for part in _SPLITS if (folder / part).is_dir()]:
            lines.append(f"{folder} is there, with {', '.join(there)} only.")
    lines.append("To get it:")
    if layout and mine:
        if layout.no_download:
            lines.append(f"  torchvision cannot download it: {layout.no_download}")
        elif not download:
            lines.append("  download=True (--download) lets torchvision fetch it")
    if hub:
        lines.append(
            f"  hf download {hub} --repo-type dataset --exclude 'train/*' --local-dir {root / base}"
        )
        lines.append("  (huggingface-cli download where there is no hf)")
    if medical:
        lines.append(
            f"  hf download TahaKoleilat/BiomedCoOp {_zip_of(name)}.zip --repo-type dataset "
            f"--local-dir {root}, unzipped so that the json is there"
        )
    elif name in _PAGES:
        lines.append("  by hand: " + _PAGES[name].format(root=root))
    return "\n".join(lines)


def _zip_of(name: str) -> str:
    return {"dermamnist": "DermaMNIST", "kneexray": "KneeXray"}.get(name, name.upper())
