"""Tar shards as clip-benchmark writes them, and pictures in folders of classes."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_on_disk import NAMES, accept_checksums, classes, pixels, words, write, write_webdataset
from data_pieces import encoded
from scc_fast.evaluate.data.readers import read
from scc_fast.evaluate.data.source import MissingData

PETS = ("cat", "dog", "newt")


def shard(path: Path, members: Sequence[tuple[str, bytes]], mode: str = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=tarfile.PAX_FORMAT) as tar:  # type: ignore[call-overload]
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def by_hand(folder: Path, *members: tuple[str, bytes]) -> Path:
    """A data set of one shard, whose path it returns."""
    shard(folder / "test" / "0.tar", members)
    (folder / "test" / "nshards.txt").write_text("1")
    (folder / "classnames.txt").write_text("\n".join(PETS))
    return folder / "test" / "0.tar"


@pytest.mark.parametrize("extension", ["webp", "png", "jpg"])
def test_labels_and_pictures_across_shards(extension: str, tmp_path: Path) -> None:
    write_webdataset(tmp_path / "wds_vtab-pets", "test", PETS, 8, extension, per_shard=11)
    assert len(list(tmp_path.rglob("*.tar"))) == 3
    source = read("pets", tmp_path)
    assert (source.name, source.split, source.reader) == ("pets", "test", "webdataset")
    assert source.classes == PETS
    assert source.labels == (0,) * 8 + (1,) * 8 + (2,) * 8
    travelled = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(8) as pool:
        pictures = list(pool.map(travelled.picture, range(24)))
    for index, picture in enumerate(pictures):
        wanted = np.asarray(Image.open(io.BytesIO(encoded(index // 8, index % 8, extension))))
        assert np.array_equal(picture, wanted)
        if extension != "jpg":
            assert np.array_equal(picture, pixels(index // 8, index % 8))
    with pytest.raises(IndexError, match="picture 24 was asked for, but there are 24"):
        source.picture(24)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", ["webdataset", "imagefolder"])
def test_every_data_set_in_both_layouts(name: str, layout: str, tmp_path: Path) -> None:
    write(name, tmp_path, 1, layout)  # type: ignore[arg-type]
    source = read(name, tmp_path)
    assert source.reader == (
        "torchvision"  # which keeps Country211 in such folders
        if (name, layout) == ("country211", "imagefolder")
        else layout
    )
    assert source.split == ("val" if (name, layout) == ("imagenet1k", "imagefolder") else "test")
    if layout == "webdataset":
        assert source.classes == words(name)
    else:
        assert list(source.classes) == sorted(
            word.strip("/").replace("/", " ") for word in classes(name)
        )
    assert list(source.labels) == list(range(len(source.classes)))
    index = len(source) - 1
    label = index
    if layout == "imagefolder":  # folders are sorted by name, the generator counts in its order
        spelled = [word.strip("/").replace("/", " ") for word in classes(name)]
        label = spelled.index(source.classes[index])
    assert np.array_equal(source.picture(index), pixels(label, 0))


@pytest.mark.parametrize(
    "folder", ["wds_vtab-pets", "wds_pets", "vtab-pets", "pets", "wds_OxfordPets", "."]
)
def test_where_it_may_lie(folder: str, tmp_path: Path) -> None:
    root = tmp_path / "wds_pets" if folder == "." else tmp_path
    write_webdataset(root / folder, "test", PETS)
    assert read("pets", root).classes == PETS
    with pytest.raises(MissingData):
        read("cars", root)


def test_the_first_way_that_is_there_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for layout in ("imagefolder", "webdataset", "own"):
        write("cifar10", tmp_path, 1, layout)  # type: ignore[arg-type]
        accept_checksums(monkeypatch, tmp_path)
        wanted = "torchvision" if layout == "own" else layout
        assert read("cifar10", tmp_path).reader == wanted


def test_country211s_shards_are_not_taken_for_torchvisions_folders(tmp_path: Path) -> None:
    write_webdataset(tmp_path / "country211", "test", ["Andorra", "Yemen"])
    assert read("country211", tmp_path).reader == "webdataset"


def test_a_part_of_the_whole_is_called_what_it_is(tmp_path: Path) -> None:
    write("eurosat", tmp_path, layout="webdataset")
    assert read("eurosat", tmp_path).split == "test"
    with pytest.raises(MissingData, match=r"wds_eurosat is there, with test only"):
        read("eurosat", tmp_path, "all")
    folder_of(tmp_path / "EuroSAT", ["Forest", "River"])
    assert read("eurosat", tmp_path).split == "all"  # the whole goes before a part
    write("imagenet1k", tmp_path, 1, "webdataset")
    assert read("imagenet1k", tmp_path).split == "test"
    assert read("imagenet1k", tmp_path, "val").split == "test"
    with pytest.raises(MissingData, match="imagenet1k, split 'train'"):
        read("imagenet1k", tmp_path, "train")


def test_shards_that_are_missing(tmp_path: Path) -> None:
    folder = tmp_path / "wds_pets"
    write_webdataset(folder, "test", PETS, 8, per_shard=5)
    (folder / "test" / "3.tar").rename(tmp_path / "away")
    with pytest.raises(MissingData, match=rf"1 of the 5 shards .* missing: {folder}/test/3\.tar"):
        read("pets", tmp_path)
    (folder / "test" / "nshards.txt").unlink()
    with pytest.raises(MissingData, match=r"1 of the 5 shards .* missing"):
        read("pets", tmp_path)
    (tmp_path / "away").rename(folder / "test" / "3.tar")
    assert len(read("pets", tmp_path)) == 24
    source = read("pets", tmp_path)
    (folder / "test" / "0.tar").unlink()
    with pytest.raises(MissingData, match=r"picture 0, \d+ bytes at \d+ of .*0\.tar.*is gone"):
        source.picture(0)
    (folder / "classnames.txt").unlink()
    with pytest.raises(MissingData, match=r"classnames\.txt is missing"):
        read("pets", tmp_path)


PICTURE = encoded(0, 0, "webp")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.cls", b"3"), ("a.webp", PICTURE)], "a.cls says 3, but .* the classes 0 to 2"),
        ([("a.cls", b"-1"), ("a.webp", PICTURE)], "a.cls says -1"),
        ([("a.cls", b"cat"), ("a.webp", PICTURE)], "not a whole webdataset shard: invalid literal"),
        ([("a.cls", b"1")], "a has no picture or no .cls"),
        ([("a.webp", PICTURE)], "a has no picture or no .cls"),
        ([("a.cls", b"1"), ("a.webp", PICTURE), ("a.png", PICTURE)], "a has two members"),
        ([("readme.txt", b"1")], "shards without a single picture"),
    ],
)
def test_shards_that_are_wrong(
    members: list[tuple[str, bytes]], message: str, tmp_path: Path
) -> None:
    by_hand(tmp_path / "pets", *members)
    with pytest.raises(ValueError, match=message):
        read("pets", tmp_path)


def test_files_that_are_no_shards(tmp_path: Path) -> None:
    path = by_hand(tmp_path / "pets", ("a.cls", b"1"), ("a.webp", PICTURE))
    whole = path.read_bytes()
    for length in (0, 1, 700, 1600):  # the picture begins at 1536
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"0\.tar"):
            read("pets", tmp_path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(ValueError, match="it is a Git LFS pointer"):
        read("pets", tmp_path)
    shard(path, [("a.cls", b"1"), ("a.webp", PICTURE)], "w:gz")
    with pytest.raises(ValueError, match="not a whole webdataset shard"):
        read("pets", tmp_path)
    path.write_bytes(whole)
    assert read("pets", tmp_path).labels == (1,)
    (path.parent / "nshards.txt").write_text("some")
    with pytest.raises(ValueError, match=r"nshards\.txt should hold the number of shards"):
        read("pets", tmp_path)
    (path.parent / "nshards.txt").write_text("1")
    (tmp_path / "pets" / "dataset_type.txt").write_text("retrieval\n")
    with pytest.raises(ValueError, match="should say classification, got 'retrieval'"):
        read("pets", tmp_path)


def test_odd_but_right_members(tmp_path: Path) -> None:
    """Keys with folders, capitals, path_to_bytes' double dot, long names, and strangers."""
    long = "x" * 150
    by_hand(
        tmp_path / "pets",
        ("./b/1.JPG", encoded(2, 0, "jpg")),
        ("./b/1.cls", b"2"),
        ("a..png", encoded(1, 0, "png")),
        ("a.cls", b" 1\n"),
        ("a.json", b"{}"),
        (f"{long}.cls", b"0"),
        (f"{long}.webp", PICTURE),
    )
    source = read("pets", tmp_path)
    assert source.labels == (2, 1, 0)
    assert np.array_equal(source.picture(1), pixels(1, 0))
    assert np.array_equal(source.picture(2), pixels(0, 0))


def test_a_picture_has_the_label_of_its_key(tmp_path: Path) -> None:
    a, b = encoded(0, 0, "png"), encoded(2, 0, "png")
    by_hand(tmp_path / "pets", ("a.cls", b"0"), ("b.cls", b"2"), ("b.png", b), ("a.png", a))
    source = read("pets", tmp_path)
    assert source.labels == (2, 0)
    assert np.array_equal(source.picture(0), pixels(2, 0))


def test_a_picture_that_is_broken_is_named(tmp_path: Path) -> None:
    path = by_hand(tmp_path / "pets", ("a.cls", b"0"), ("a.webp", b"RIFF, but not quite"))
    source = read("pets", tmp_path)
    assert source.labels == (0,)
    with pytest.raises(ValueError, match=rf"picture 0, 19 bytes at \d+ of {path}, is not"):
        source.picture(0)


def folder_of(root: Path, names: Sequence[str], count: int = 1, extension: str = "png") -> None:
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for number in range(count):
            (root / name / f"{number}.{extension}").write_bytes(encoded(label, number, "png"))


def test_folders_with_and_without_splits(tmp_path: Path) -> None:
    folder_of(tmp_path / "BUSI" / "test", ["benign", "malignant", "normal"], 2, "PNG")
    folder_of(tmp_path / "BUSI" / "val", ["benign", "malignant"])
    folder_of(tmp_path / "covid-19", ["covid", "normal"])
    (tmp_path / "covid-19" / "__MACOSX").mkdir()
    (tmp_path / "covid-19" / ".cache").mkdir()
    (tmp_path / "covid-19" / "viral").mkdir()  # a class without pictures stays a class
    (tmp_path / "covid-19" / "covid" / "._0.png").write_bytes(b"what macOS adds")
    (tmp_path / "covid-19" / "covid" / "notes.txt").write_text("no picture")
    busi = read("BUSI", tmp_path)
    assert (busi.split, busi.labels) == ("test", (0, 0, 1, 1, 2, 2))
    assert read("busi", tmp_path, "val").labels == (0, 1)
    covid = read("COVID-19", tmp_path)
    assert (covid.split, covid.labels) == ("all", (0, 1))
    assert covid.classes == ("covid", "normal", "viral")
    assert read("covid_19", tmp_path, "all").labels == (0, 1)
    with pytest.raises(MissingData, match="BUSI is there, with val, test only"):
        read("busi", tmp_path, "train")
    with pytest.raises(MissingData):
        read("covid_19", tmp_path, "test")


def test_imagenet_beside_its_archives(tmp_path: Path) -> None:
    folder_of(tmp_path / "val", ["n01440764", "n01443537"], 2)
    for split in (None, "val", "test"):
        source = read("ImageNet", tmp_path, split)
        assert (source.split, source.classes) == ("val", ("n01440764", "n01443537"))
        assert source.labels == (0, 0, 1, 1)
    folder_of(tmp_path / "other" / "val", ["cats", "dogs"])
    with pytest.raises(MissingData, match="ILSVRC2012_img_val"):
        read("imagenet1k", tmp_path / "other")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "should map train, val and test to lists"),
        ('["test"]', "should map train, val and test to lists"),
        ('{"test": [["a.png", 0]]}', "should map train, val and test to lists"),
        ('{"test": [["a.png", "x", "a"]]}', "should map train, val and test to lists"),
        ('{"test": [["a.png", 1, "a"]]}', "labels should count from 0 without gaps, got .1."),
    ],
)
def test_split_files_that_are_wrong(text: str, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "BTMRI"
    folder.mkdir()
    (folder / "split_BTMRI.json").write_text(text)
    with pytest.raises(ValueError, match=rf"split_BTMRI\.json.*{message}"):
        read("btmri", tmp_path)


def test_split_files(tmp_path: Path) -> None:
    """Labels count over all parts, and a part may lack a class."""
    folder = tmp_path / "btmri"
    folder_of(folder, ["glioma", "normal"])
    table = {"train": [["glioma/0.png", 0, "glioma"]], "test": [["normal/0.png", "1", "normal"]]}
    (folder / "split_BTMRI.json").write_text(json.dumps(table))
    source = read("btmri", tmp_path)
    assert (source.classes, source.labels) == (("glioma", "normal"), (1,))
    assert np.array_equal(source.picture(0), pixels(1, 0))
    (folder / "split_other.json").write_text("{}")
    with pytest.raises(ValueError, match="holds several split files"):
        read("btmri", tmp_path)


def test_the_classes_of_a_split_file_are_in_the_order_of_their_labels(tmp_path: Path) -> None:
    names = ("benign", "malignant", "normal")
    folder_of(tmp_path / "BUSI", names)
    rows = [[f"{names[label]}/0.png", label, names[label]] for label in (2, 0, 1)]
    (tmp_path / "BUSI" / "split_BUSI.json").write_text(json.dumps({"test": rows}))
    source = read("busi", tmp_path)
    assert (source.classes, source.labels) == (names, (2, 0, 1))
