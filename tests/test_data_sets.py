"""The data sets: names, prompts, subsets, batches and facts, on pictures made up in memory."""

from __future__ import annotations

import hashlib
import json
import pickle
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import data_on_disk
import scc_fast
from scc_fast import tiny
from scc_fast.evaluate.data import CATALOGUE, MissingData, Source, from_source, open_dataset
from scc_fast.evaluate.data.dataset import Decoded
from scc_fast.evaluate.data.protocol import Preparation


@dataclass(frozen=True)
class Plain:
    """Index to a small picture of one color."""

    size: int = 8

    def __call__(self, index: int) -> Image.Image:
        return Image.new("RGB", (self.size, self.size), (index % 256, 7, 9))


@pytest.fixture(scope="module")
def model() -> Any:
    return scc_fast.load_model("tiny", device="cpu")


def source(
    name: str, classes: Sequence[str], labels: Sequence[int] = (0, 1), split: str | None = None
) -> Source:
    entry = CATALOGUE[name]
    return Source(name, split or entry.split, tuple(classes), tuple(labels), Plain(), "imagefolder")


def test_pictures_without_a_label_are_left_out_and_counted(model: Any) -> None:
    with pytest.warns(UserWarning, match="2 pictures have no valid label: left out"):
        data = from_source(source("pcam", ("0", "1"), (0, -1, 1, 2, 1)), model)
    assert sorted(data.indices) == [0, 2, 4]  # mixed, for disks are sorted by class
    facts = data.facts()
    assert facts["pictures"] == 5
    assert facts["pictures_expected"] == 32_768
    assert (facts["pictures_without_label"], facts["n"], facts["classes_present"]) == (2, 3, 2)
    assert from_source(source("pcam", ("0", "1"), split="val"), model).facts()[
        "pictures_expected"
    ] is None  # fmt: skip


def test_the_first_pictures_are_of_many_classes(model: Any) -> None:
    """Whoever takes the first of a set that is sorted by class on disk gets a fair draw."""
    labels = [0] * 500 + [1] * 500
    for n_samples in (None, 200):
        data = from_source(source("pcam", ("0", "1"), labels), model, n_samples=n_samples)
        first = [labels[index] for index in data.indices[:100]]
        assert 30 < sum(first) < 70
        assert data.facts()["sampling_seed"] == 0


def test_digits(model: Any) -> None:
    data = open_dataset("digits", model)
    assert len(data) == 1797
    assert data.prompts[3] == 'a photo of the digit "3".'
    x, labels = data.batch(0, 5)
    assert x.shape == (5, 3, 64, 64)
    assert x.dtype == torch.float32
    assert x.device.type == "cpu"
    assert 0 <= x.min() < x.max() <= 1
    assert labels.tolist() == [0, 1, 2, 3, 4]
    first, second = data.batch(0, 2), data.batch(2, 5)
    assert torch.equal(torch.cat([first[0], second[0]]), x)
    assert torch.equal(torch.cat([first[1], second[1]]), labels)
    assert not torch.equal(x, open_dataset("digits", model, protocol="open_clip").batch(0, 5)[0])


def test_the_first_digit_by_hand(model: Any) -> None:
    """The first zero begins with 0 0 5 13 9 1 0 0 sixteenths: 255/16 of that, rounded."""
    picture = open_dataset("digits", model)._source().picture(0)
    assert picture.mode == "L"
    assert picture.size == (8, 8)
    assert np.asarray(picture)[0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]


def test_digits_without_scikit_learn(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "scc_fast\[data\]"'):
        open_dataset("digits", model)


def test_emoji_pass_unchanged(model: Any) -> None:
    data = open_dataset("emoji", model, protocol="open_clip")
    x, labels = data.batch(10, 14)
    expected, expected_labels = tiny.generate("test", range(10, 14))
    assert torch.equal(x, expected)
    assert torch.equal(labels, expected_labels)
    assert list(data.prompts) == tiny.prompts()
    assert list(data.classes) == list(tiny.class_names())
    assert data.protocol == "bundled"
    assert len(data) == 2000
    again = open_dataset("emoji", model, split="validation", protocol="bundled")
    assert torch.equal(again.batch(0, 1)[0], tiny.generate("validation", range(1))[0])


def test_emoji_for_another_size_are_resized() -> None:
    class Larger:
        image_size = (96, 96)
        name, interpolation, resize_mode, fill_color, resize_edge = "l", "bicubic", "shortest", 0, 0

    data = open_dataset("emoji", Larger(), n_samples=2)  # type: ignore[arg-type]
    assert data.protocol == "ttc"
    assert data.facts()["resize"]["edge"] == 110
    assert data.batch(0, 2)[0].shape == (2, 3, 96, 96)
    with pytest.raises(ValueError, match="'bundled' is for emoji and models of 64 pixels"):
        open_dataset("emoji", Larger(), protocol="bundled")  # type: ignore[arg-type]


def test_subsets_are_drawn_by_their_seed(model: Any) -> None:
    """Of numpy's default_rng(0).permutation(1797), which begins 1482, 1773, 360, 850, 600."""
    data = open_dataset("digits", model, n_samples=5)
    assert data.indices == (360, 600, 850, 1482, 1773)
    whole = open_dataset("digits", model)
    x, labels = data.batch(0, 5)
    for place, index in enumerate(data.indices):
        one, label = whole.batch(index, index + 1)
        assert torch.equal(one[0], x[place])
        assert label[0] == labels[place]
    larger = open_dataset("digits", model, n_samples=20)
    assert set(data.indices) < set(larger.indices)
    assert open_dataset("digits", model, n_samples=5, seed=1).indices != data.indices
    assert open_dataset("digits", model, n_samples=1797).indices == whole.indices
    assert (data.facts()["n"], data.facts()["sampling_seed"]) == (5, 0)
    assert whole.facts()["sampling_seed"] is None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_samples": 0}, ValueError, "n_samples: digits has 1797 pictures, so 1 to 1797; got 0"),
        ({"n_samples": -3}, ValueError, "got -3"),
        ({"n_samples": 1798}, ValueError, "got 1798"),
        ({"n_samples": 2.5}, TypeError, "n_samples: a whole number is needed, got 2.5"),
        ({"n_samples": 2, "seed": -1}, ValueError, "seed: must be at least 0, got -1"),
        ({"split": "test"}, ValueError, "split: digits has one split, 'all', got 'test'"),
        ({"protocol": "paper"}, ValueError, "protocol: must be one of ttc"),
    ],
)
def test_wrong_arguments(
    options: dict[str, Any], error: type[Exception], message: str, model: Any
) -> None:
    with pytest.raises(error, match=message):
        open_dataset("digits", model, **options)
    with pytest.raises(TypeError, match="model: a loaded model is needed, got str"):
        open_dataset("digits", "tiny")  # type: ignore[arg-type]


def test_batches_out_of_range(model: Any) -> None:
    data = open_dataset("digits", model, n_samples=3)
    x, labels = data.batch(1, 1)
    assert x.shape == (0, 3, 64, 64)
    assert labels.shape == (0,)
    for start, stop in ((-1, 2), (2, 1), (0, 4)):
        with pytest.raises(ValueError, match=f"start <= stop <= 3 must hold, got {start}, {stop}"):
            data.batch(start, stop)


@pytest.mark.parametrize("name", ["digits", "emoji", "pcam"])
def test_another_process_gets_the_same(name: str, model: Any) -> None:
    if name == "pcam":
        data = from_source(source("pcam", ("0", "1"), (0, 1, 1)), model)
    else:
        data = open_dataset(name, model, n_samples=3)
    x, labels = data.batch(0, 3)
    sent = pickle.dumps(data)
    assert len(sent) < 20_000  # a description, no pictures
    arrived = pickle.loads(sent)
    assert arrived._opened == []
    assert torch.equal(arrived.batch(0, 3)[0], x)
    assert torch.equal(arrived.batch(0, 3)[1], labels)
    assert arrived.facts() == data.facts()


def test_facts_are_json_and_hash_the_prompts(model: Any) -> None:
    data = from_source(source("pcam", ("0", "1")), model)
    facts = data.facts()
    assert json.loads(json.dumps(facts)) == facts
    text = (
        b"This is a photo of a healthy lymph node tissue.\n"
        b"This is a photo of a lymph node tumor tissue."
    )
    assert facts["prompts_sha256"] == hashlib.sha256(text).hexdigest()
    assert facts["classes"] == ["healthy lymph node tissue", "lymph node tumor tissue"]
    assert facts["paper"] == "PCAM"
    assert facts["reader"] == "imagefolder"
    facts["classes"].clear()
    assert len(data.facts()["classes"]) == 2


def test_missing_data_says_where_the_root_came_from(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCC_FAST_DATA", str(tmp_path / "here"))
    with pytest.raises(MissingData, match=r"here is \$SCC_FAST_DATA; set SCC_FAST_DATA or"):
        open_dataset("cifar10", model)
    monkeypatch.delenv("SCC_FAST_DATA")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(MissingData, match=r"\.cache/scc_fast/data is the default"):
        open_dataset("cifar10", model)
    with pytest.raises(MissingData) as caught:
        open_dataset("cifar10", model, root=tmp_path)
    assert "SCC_FAST_DATA" not in str(caught.value)


# A prompt of each generated copy: its label, and the "ttc" string
ON_DISK = {
    "cifar10": (9, "This is a photo of a truck."),
    "cifar100": (1, "This is a photo of a aquarium_fish."),
    "stl10": (1, "This is a photo of a bird."),
    "imagenet1k": (0, "This is a photo of a tench."),
    "caltech101": (0, "This is a photo of a person."),
    "caltech256": (1, "A photo of a american flag."),
    "pets": (1, "A photo of a american bulldog, a type of pet."),
    "flowers": (1, "A photo of a hard leaved pocket orchid, a type of flower."),
    "food101": (1, "A photo of baby back ribs, a type of food."),
    "cars": (0, "A photo of a am general hummer suv."),
    "sun397": (1, "This is a photo of a apartment_building/outdoor."),
    "country211": (0, "A photo I took in Andorra."),
    "fgvc_aircraft": (0, "A photo of a Boeing 707-320, a type of aircraft."),
    "eurosat": (3, "A centered satellite photo of a highway or a road."),
    "dtd": (2, "A surface with a polka dotted texture."),
    "pcam": (1, "This is a photo of a lymph node tumor tissue."),
    "busi": (0, "An ultrasound image of a breast with a benign tumor."),
    "btmri": (0, "An MRI scan of a brain with a glioma tumor."),
    "chmnist": (7, "A histopathology image of tumor epithelium."),
    "covid_19": (1, "A chest X-ray image of lung opacity."),
    "dermamnist": (4, "A dermatoscopy image of melanocytic nevus."),
    "kneexray": (0, "A knee X-ray with no osteoarthritis."),
}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *((name, "own") for name in ON_DISK),
        *(
            (name, "webdataset")
            for name in ("imagenet1k", "flowers", "country211", "eurosat", "cars")
        ),
        *((name, "imagefolder") for name in ("stl10", "pets", "eurosat", "pcam", "kneexray")),
    ],
)
@pytest.mark.filterwarnings("ignore:.*(not comparable|two classes)")
def test_copies_on_disk(
    name: str, layout: Any, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the files to prompts, pixels and facts, in every layout that a set comes in."""
    data_on_disk.write(name, tmp_path, per_class=1, layout=layout)
    data_on_disk.accept_checksums(monkeypatch, tmp_path)
    data = open_dataset(CATALOGUE[name].paper, model, root=tmp_path)
    facts = data.facts()
    assert facts["class_names"] == "of the protocol"
    label, prompt = ON_DISK[name]
    if layout == "imagefolder":  # sorted by name there
        assert prompt in data.prompts
    else:
        assert data.prompts[label] == prompt
    count = len(data_on_disk.classes(name))
    assert len(data) == facts["pictures"] == facts["classes_present"] == len(data.classes) == count
    x, labels = data.batch(0, min(3, count))
    assert x.shape[1:] == (3, 64, 64)
    assert 0 <= x.min() < x.max() <= 1
    sent = pickle.loads(pickle.dumps(data))
    assert torch.equal(sent.batch(0, len(labels))[0], x)
    assert layout == "own" or name == "pcam" or facts["reader"] == layout


def test_every_set_of_the_papers_is_read_from_disk() -> None:
    assert set(ON_DISK) == {e.name for e in CATALOGUE.values() if e.group != "bundled"}


def test_a_picture_is_decoded_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[Image.Image] = []
    prepare = Preparation.__call__

    def count(self: Preparation, picture: Image.Image) -> torch.Tensor:
        decoded.append(picture)
        return prepare(self, picture)

    monkeypatch.setattr(Preparation, "__call__", count)
    for data in (
        from_source(source("pcam", ("0", "1"), (0, 1, 0, 1, 1)), model),
        open_dataset("emoji", model, n_samples=5),
    ):
        first, labels = data.batch(0, 5)
        for start, stop in ((0, 5), (3, 5), (1, 2)):
            x, again = data.batch(start, stop)
            assert torch.equal(x, first[start:stop])
            assert torch.equal(again, labels[start:stop])
        assert len(decoded) == 5
        decoded.clear()


def test_pictures_that_bytes_do_not_hold_are_not_kept() -> None:
    kept = Decoded()
    kept.put(3, torch.full((3, 2, 2), 0.3))
    assert kept.get(3, (2, 2)) is None
    kept.put(4, torch.full((3, 2, 2), 51 / 255))
    found = kept.get(4, (2, 2))
    assert found is not None
    assert torch.equal(found, torch.full((3, 2, 2), 51 / 255))


def test_labels_follow_names_not_positions(model: Any, tmp_path: Path) -> None:
    """Flowers in folders called 1 to 102: sorted as text, "10" stands second."""
    data_on_disk.write("flowers", tmp_path, per_class=1, layout="imagefolder")
    data = open_dataset("flowers", model, root=tmp_path)
    assert data.classes[:3] == ("pink primrose", "globe thistle", "blanket flower")  # 1, 10, 100
    place = data.indices.index(1)
    assert data.batch(place, place + 1)[1].tolist() == [1]
