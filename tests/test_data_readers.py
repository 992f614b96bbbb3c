"""Every data set, read from a generated copy of its real files."""

from __future__ import annotations

import io
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torchvision
from PIL import Image

from data_on_disk import NAMES, accept_checksums, pixels, write
from data_pieces import save
from scc_fast.evaluate.data.catalogue import CATALOGUE
from scc_fast.evaluate.data.readers import read
from scc_fast.evaluate.data.source import MissingData

# split, number of classes and the first three of them, as the papers and the real files have them
EXPECTED: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "cifar10": ("test", 10, ("airplane", "automobile", "bird")),
    "cifar100": ("test", 100, ("apple", "aquarium_fish", "baby")),
    "stl10": ("test", 10, ("airplane", "bird", "car")),
    "imagenet1k": ("val", 1000, ("n01440764", "n01443537", "n01484850")),
    "caltech101": ("all", 6, ("Faces", "Faces_easy", "Leopards")),
    "caltech256": ("all", 5, ("001.ak47", "002.american-flag", "003.backpack")),
    "pets": ("test", 6, ("Abyssinian", "American Bulldog", "American Pit Bull Terrier")),
    "flowers": ("test", 102, ("pink primrose", "hard-leaved pocket orchid", "canterbury bells")),
    "food101": ("test", 4, ("apple_pie", "baby_back_ribs", "french_fries")),
    "cars": ("test", 4, ("AM General Hummer SUV 2000", "Audi S4 Sedan 2012", "Audi S4 Sedan 2007")),
    "sun397": ("all", 4, ("abbey", "apartment_building/outdoor", "church/indoor")),
    "country211": ("test", 211, ("AD", "AE", "AF")),
    "fgvc_aircraft": ("test", 5, ("707-320", "727-200", "A300B4")),
    "eurosat": ("all", 10, ("AnnualCrop", "Forest", "HerbaceousVegetation")),
    "dtd": ("test", 4, ("banded", "blotchy", "polka-dotted")),
    "pcam": ("test", 2, ("lymph node", "lymph node containing metastatic tumor tissue")),
    "busi": ("test", 3, ("benign_tumor", "malignant_tumor", "normal_scan")),
    "btmri": ("test", 4, ("glioma_tumor", "meningioma_tumor", "normal_brain")),
    "chmnist": ("test", 8, ("adipose_tissue", "complex_stroma", "debris")),
    "covid_19": ("test", 4, ("covid_lungs", "lung_opacity_lungs", "normal_lungs")),
    "dermamnist": ("test", 7, ("actinic_keratosis", "basal_cell_carcinoma", "benign_keratosis")),
    "kneexray": ("test", 5, ("no", "doubtful", "minimal")),
}
MEDICAL = NAMES[-6:]


def close(picture: Image.Image, label: int, number: int) -> bool:
    """Whether a picture is the generated one, up to what JPEG loses at quality 95."""
    got = np.asarray(picture.convert("RGB"), dtype=int)
    wrong = np.abs(got - pixels(label, number, got.shape[0]).astype(int))
    return bool(np.median(wrong) <= 12)


@pytest.mark.parametrize("name", NAMES)
def test_the_real_layout(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    each = 1 if name == "imagenet1k" else 2
    write(name, tmp_path, each)
    accept_checksums(monkeypatch, tmp_path)
    split, count, first = EXPECTED[name]
    source = read(name, tmp_path)
    assert (source.name, source.split, len(source.classes)) == (name, split, count)
    assert source.classes[:3] == first
    assert list(source.labels) == [label for label in range(count) for _ in range(each)]
    assert all(type(label) is int for label in source.labels)
    assert len(source) == count * each
    ours = "imagefolder" if name in ("imagenet1k", *MEDICAL) else "torchvision"
    assert source.reader == (ours if (tmp_path / "wds_pcam").exists() is False else "webdataset")
    travelled = pickle.loads(pickle.dumps(source))
    for index in (0, 1, len(source) - 1):
        label, number = source.labels[index], index % each
        picture = travelled.picture(index)
        assert close(picture, label, number)
        assert not close(picture, label + 1, number + 1)
        if name in ("cifar10", "cifar100", "stl10", "pcam", *MEDICAL):  # stored without loss
            assert np.array_equal(picture, pixels(label, number, picture.width))


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("cifar10", "CIFAR10", {"train": False}),
        ("cifar100", "CIFAR100", {"train": False}),
        ("stl10", "STL10", {"split": "test"}),
        ("caltech101", "Caltech101", {}),
        ("caltech256", "Caltech256", {}),
        ("pets", "OxfordIIITPet", {"split": "test"}),
        ("flowers", "Flowers102", {"split": "test"}),
        ("food101", "Food101", {"split": "test"}),
        ("cars", "StanfordCars", {"split": "test"}),
        ("country211", "Country211", {"split": "test"}),
        ("fgvc_aircraft", "FGVCAircraft", {"split": "test"}),
        ("eurosat", "EuroSAT", {}),
        ("dtd", "DTD", {"split": "test"}),
    ],
)
def test_picture_by_picture_as_torchvision(
    name: str,
    kind: str,
    options: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(name, tmp_path)
    accept_checksums(monkeypatch, tmp_path)
    theirs = getattr(torchvision.datasets, kind)(str(tmp_path), **options)
    source = read(name, tmp_path)
    assert len(source) == len(theirs)
    for index in range(0, len(source), max(1, len(source) // 12)):
        picture, label = theirs[index]
        assert source.labels[index] == label
        assert np.array_equal(source.picture(index).convert("RGB"), picture.convert("RGB"))


def test_other_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cifar10", "pets", "fgvc_aircraft", "country211", "busi"):
        write(name, tmp_path)
    accept_checksums(monkeypatch, tmp_path)
    assert len(read("cifar10", tmp_path, "train")) == 15
    assert read("pets", tmp_path, "trainval").labels == (0, 1, 2, 3, 4, 5)
    assert len(read("fgvc_aircraft", tmp_path, "val")) == 5
    assert read("country211", tmp_path, "val").split == "valid"
    assert read("busi", tmp_path, "train").labels == (0, 1, 2)
    with pytest.raises(ValueError, match=r"split should be None or one of all, .*got 'tset'"):
        read("cifar10", tmp_path, "tset")
    with pytest.raises(MissingData, match=r"torchvision's files: they have only train, test"):
        read("cifar10", tmp_path, "val")


def test_sun397_is_in_the_order_of_its_paths(tmp_path: Path) -> None:
    write("sun397", tmp_path)
    source = read("sun397", tmp_path)
    paths = source.picture.paths  # type: ignore[attr-defined]
    assert list(paths) == sorted(map(str, (tmp_path / "SUN397").rglob("sun_*.jpg")))
    theirs = torchvision.datasets.SUN397(str(tmp_path))
    known = dict(zip(map(str, theirs._image_files), theirs._labels, strict=True))
    assert [known[path] for path in paths] == list(source.labels)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("food", "food101"),
        ("ILSVRC2012", "imagenet1k"),
        ("imagenet2012", "imagenet1k"),
        ("oxford-iiit-pets", "pets"),
        ("Flowers102", "flowers"),
        ("COVID-19", "covid_19"),
        ("wds_vtab-caltech101", "caltech101"),
    ],
)
def test_a_folder_has_any_spelling_that_a_name_has(folder: str, name: str, tmp_path: Path) -> None:
    for kind in ("this", "that"):
        save(tmp_path / folder / kind / "0.png", 0, 0)
    for decoy in ("digits", f"{folder}+", "food+"):
        save(tmp_path / decoy / "decoy" / "0.png", 0, 0)
    for spelling in (folder, name):
        for root in (tmp_path, tmp_path / folder):
            source = read(spelling, root)
            assert (source.name, source.classes) == (name, ("that", "this"))


def test_names_that_are_none(tmp_path: Path) -> None:
    on_disk = {entry.name for entry in CATALOGUE.values() if entry.group != "bundled"}
    assert on_disk == set(NAMES) == set(EXPECTED)
    for name in ("mnist", "", "cifar", "cifar1000", "xcifar10"):
        with pytest.raises(ValueError, match=f"dataset: {name!r} is none of cifar10, "):
            read(name, tmp_path)
    for name in ("digits", "emoji"):
        with pytest.raises(ValueError, match=f"dataset: {name} has no files to read"):
            read(name, tmp_path)
    with pytest.raises(TypeError, match="dataset: a name is needed, got int"):
        read(10, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="root should be a path, got None"):
        read("cifar10", None)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_missing_is_told(name: str, tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(MissingData) as caught:
            read(name, root)
        text = str(caught.value)
        assert text.startswith(f"{name}, split {EXPECTED[name][0]!r}, is not under {root}. Looked")
        for way in ("webdataset: ", "an image folder: "):
            assert way + str(root) in text
        can_download = name not in ("imagenet1k", "cars", *MEDICAL)
        assert ("download=True (--download)" in text) == can_download
        assert ("torchvision's files: missing " + str(root) in text) == (
            name not in ("imagenet1k", *MEDICAL)
        )
        repository = "TahaKoleilat/BiomedCoOp" if name in MEDICAL else "clip-benchmark/wds_"
        assert (f"hf download {repository}" in text) == (name != "caltech256")
    assert not list(tmp_path.iterdir())  # torchvision's Caltech classes leave an empty folder


def test_an_incomplete_copy_is_not_taken_for_folders_of_classes(tmp_path: Path) -> None:
    for name in ("cars", "pets", "food101"):
        write(name, tmp_path)
    gone = {
        "cars": "stanford_cars/cars_test_annos_withlabels.mat",
        "pets": "oxford-iiit-pet/annotations/test.txt",
        "food101": "food-101/meta/test.json",
    }
    for name, file in gone.items():
        (tmp_path / file).unlink()
        with pytest.raises(MissingData, match=f"torchvision's files: missing {tmp_path / file}\n"):
            read(name, tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10", "flowers"])
def test_checksums_stay(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(name, tmp_path)
    with pytest.raises(ValueError, match=f"{name}: the files under .* wrong checksum: {tmp_path}"):
        read(name, tmp_path)
    accept_checksums(monkeypatch, tmp_path)
    read(name, tmp_path)
    altered = {
        "cifar10": "cifar-10-batches-py/test_batch",
        "cifar100": "cifar-100-python/meta",
        "stl10": "stl10_binary/test_X.bin",
        "flowers": "flowers-102/setid.mat",
    }[name]
    with open(tmp_path / altered, "ab") as file:
        file.write(b"!")
    with pytest.raises(ValueError, match=f"wrong checksum: {tmp_path / altered}$"):
        read(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("food101", "food-101/meta/test.json"),
        ("cars", "stanford_cars/devkit/cars_meta.mat"),
        ("pets", "oxford-iiit-pet/annotations/test.txt"),
        ("sun397", "SUN397/ClassName.txt"),
        ("fgvc_aircraft", "fgvc-aircraft-2013b/data/variants.txt"),
        ("dtd", "dtd/dtd/labels/test1.txt"),
    ],
)
def test_lists_that_make_no_sense(name: str, file: str, tmp_path: Path) -> None:
    write(name, tmp_path)
    (tmp_path / file).write_text("neither this nor that\n")
    with pytest.raises(ValueError, match=f"{name}: the files under {tmp_path}"):
        read(name, tmp_path)


@pytest.mark.parametrize("name", ["pets", "caltech101", "country211", "busi"])
def test_labels_need_no_picture_and_a_bad_picture_is_named(name: str, tmp_path: Path) -> None:
    write(name, tmp_path)
    labels = read(name, tmp_path).labels
    pictures = sorted([*tmp_path.rglob("*.jpg"), *tmp_path.rglob("*.png")])
    for path in pictures:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    source = read(name, tmp_path)
    assert source.labels == labels
    path = source.picture.paths[3]  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=f"picture 3, the file {path}, is not a readable picture"):
        source.picture(3)
    Path(path).write_text("no picture at all")
    with pytest.raises(ValueError, match=f"picture 3, the file {path}, is not a readable picture"):
        source.picture(3)
    Path(path).unlink()
    if name in ("pets", "busi"):  # which list their pictures
        with pytest.raises(MissingData, match=f"picture 3 should be the file {path}"):
            read(name, tmp_path).picture(3)


def test_pictures_are_as_stored_and_wanted_by_index(tmp_path: Path) -> None:
    write("caltech101", tmp_path)
    path = tmp_path / "caltech101" / "101_ObjectCategories" / "Faces" / "image_0001.jpg"
    Image.new("L", (5, 7), 99).save(path)
    (path.parent / "Thumbs.db").write_text("what Windows leaves")
    source = read("caltech101", tmp_path)
    assert len(source) == 12
    assert (source.picture(0).mode, source.picture(0).size) == ("L", (5, 7))
    assert source.picture(np.int64(1)).mode == "RGB"  # type: ignore[arg-type]
    for index in (-1, 12):
        with pytest.raises(IndexError, match=f"picture {index} was asked for, but there are 12"):
            source.picture(index)


def test_many_threads_and_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("eurosat", tmp_path / "data", 5)
    monkeypatch.chdir(tmp_path)
    source = read("eurosat", Path("data"))
    monkeypatch.chdir(tmp_path / "data")
    with ThreadPoolExecutor(8) as pool:
        pictures = list(pool.map(source.picture, range(len(source))))
    assert all(
        close(picture, label, index % 5)
        for index, (picture, label) in enumerate(zip(pictures, source.labels, strict=True))
    )


def test_a_download_is_torchvisions_and_only_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fetch(self: torchvision.datasets.EuroSAT) -> None:
        calls.append(self.root)
        write("eurosat", Path(self.root))

    monkeypatch.setattr(torchvision.datasets.EuroSAT, "download", fetch)
    with pytest.raises(MissingData):
        read("eurosat", tmp_path)
    assert calls == []
    assert len(read("eurosat", tmp_path, download=True)) == 20
    assert len(read("eurosat", tmp_path, download=True)) == 20
    assert calls == [str(tmp_path)]  # what is there is not fetched again

    def fail(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets.dtd, "download_and_extract_archive", fail)
    with pytest.raises(
        MissingData, match=r"(?s)failed: .*no route to host.*hf download clip-bench"
    ):
        read("dtd", tmp_path, download=True)
    with pytest.raises(MissingData, match="cannot download it: its URL is dead"):
        read("cars", tmp_path, download=True)


@pytest.mark.parametrize(("name", "module"), [("flowers", "scipy.io"), ("cars", "scipy.io")])
def test_a_package_that_is_missing(
    name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(name, tmp_path)
    accept_checksums(monkeypatch, tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"{name}: .*pip install scipy"):
        read(name, tmp_path)


def test_pcam_without_h5py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pcam").mkdir()
    for axis in "xy":
        (tmp_path / "pcam" / f"camelyonpatch_level_2_split_test_{axis}.h5").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"PCAM's \.h5 files need h5py .*; pip install h5py"):
        read("pcam", tmp_path)


def test_pcam_with_h5py(tmp_path: Path) -> None:
    pytest.importorskip("h5py", reason="h5py reads PCAM's files and is not installed")
    write("pcam", tmp_path)
    source = read("pcam", tmp_path)
    assert (source.reader, list(source.labels)) == ("torchvision", [0, 0, 1, 1])
    theirs = torchvision.datasets.PCAM(str(tmp_path), split="test")
    for index in range(4):
        assert np.array_equal(source.picture(index), theirs[index][0])
    (tmp_path / "pcam" / "camelyonpatch_level_2_split_test_x.h5").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"picture 2 of .*_x\.h5 cannot be read"):
        source.picture(2)
    with pytest.raises(ValueError, match="pcam: the files under"):
        read("pcam", tmp_path)


def test_the_generator_draws_what_it_says() -> None:
    stream = io.BytesIO()
    Image.fromarray(pixels(3, 1)).save(stream, "png")
    assert pixels(3, 1)[2, 5].tolist() == [(201 + 6) % 256, (453 + 25) % 256, 41 + 7]
    assert np.array_equal(Image.open(stream), pixels(3, 1))
