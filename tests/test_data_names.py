"""What classes are called in prompts: exact strings, from names as the files have them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

import scc_fast
from scc_fast.evaluate.data import CATALOGUE, NAMES, Source, from_source
from scc_fast.evaluate.data.catalogue import find

# Seven pairs of StanfordCars differ by their year alone
CAR_PAIRS = (
    "Audi S4 Sedan 2012", "Audi S4 Sedan 2007",
    "Bentley Continental GT Coupe 2012", "Bentley Continental GT Coupe 2007",
    "Dodge Caliber Wagon 2012", "Dodge Caliber Wagon 2007",
    "Dodge Durango SUV 2012", "Dodge Durango SUV 2007",
    "Ford F-150 Regular Cab 2012", "Ford F-150 Regular Cab 2007",
    "Honda Odyssey Minivan 2012", "Honda Odyssey Minivan 2007",
    "Volkswagen Golf Hatchback 2012", "Volkswagen Golf Hatchback 1991",
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Any:
    return scc_fast.load_model("tiny", device="cpu")


def source(name: str, classes: Sequence[str]) -> Source:
    def picture(index: int) -> Image.Image:
        return Image.new("RGB", (8, 8), (index % 256, 7, 9))

    return Source(name, CATALOGUE[name].split, tuple(classes), (0, 1), picture, "imagefolder")


def filled(name: str, first: Sequence[str]) -> list[str]:
    """Class names of the right number: those given, then made-up ones."""
    rest = CATALOGUE[name].n_classes - len(first)
    return [*first, *(f"filler {chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(rest))]


def quiet(*arguments: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return from_source(*arguments, **options)


def test_the_catalogue_holds_the_papers_sets() -> None:
    sizes = {entry.name: (entry.size, entry.n_classes) for entry in CATALOGUE.values()}
    assert len(NAMES) == 24
    groups = [entry.group for entry in CATALOGUE.values()]
    assert [groups.count(g) for g in ("natural", "medical", "bundled")] == [16, 6, 2]
    natural = sum(entry.size for entry in CATALOGUE.values() if entry.group == "natural")
    assert natural == 355_228
    assert sizes["caltech256"] == (30_607, 257)
    assert sizes["sun397"] == (108_754, 397)
    assert sizes["pets"] == (3_669, 37)


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("CIFAR-10", "cifar10"), ("ImageNet", "imagenet1k"), ("OxfordPets", "pets"),
        ("oxfordpet", "pets"), ("Flowers102", "flowers"), ("FGVC-Aircraft", "fgvc_aircraft"),
        ("StanfordCars", "cars"), ("wds/vtab/dtd", "dtd"), ("vtab/caltech101", "caltech101"),
        ("wds/imagenet1k", "imagenet1k"), ("COVID-19", "covid_19"), ("KneeXray", "kneexray"),
        ("PCAM", "pcam"), ("Emoji", "emoji"), ("STL-10", "stl10"), ("DermaMNIST", "dermamnist"),
        ("vtab/cifar10", "cifar10"), ("vtab-cifar10", "cifar10"), ("wds_vtab-dtd", "dtd"),
        ("food", "food101"), ("ILSVRC2012", "imagenet1k"), ("ImageNet-2012", "imagenet1k"),
        ("oxford-iiit-pets", "pets"),
    ],
)  # fmt: skip
def test_spellings(spelling: str, name: str) -> None:
    assert find(spelling).name == name


def test_every_name_is_found_and_unknown_ones_are_not() -> None:
    for entry in CATALOGUE.values():
        assert find(entry.name) is find(entry.paper) is find(entry.name.upper()) is entry
    with pytest.raises(ValueError, match=r"'mnist' is none of cifar10, .*, emoji"):
        find("mnist")
    with pytest.raises(TypeError, match=r"dataset: a name is needed, got int"):
        find(7)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "stored", "prompt"),
    [
        ("cifar10", "airplane", "This is a photo of a airplane."),
        ("cifar100", "aquarium_fish", "This is a photo of a aquarium_fish."),
        ("stl10", "car", "This is a photo of a car."),
        ("caltech101", "car_side", "This is a photo of a car_side."),
        ("caltech101", "Faces_easy", "This is a photo of a person."),
        ("caltech256", "069.fighter-jet", "A photo of a fighter jet."),
        ("caltech256", "252.car-side-101", "A photo of a car side."),
        ("caltech256", "008.bathtub", "A photo of a bathtub."),
        ("pets", "American Pit Bull Terrier",
         "A photo of a american pit bull terrier, a type of pet."),
        ("fgvc_aircraft", "707-320", "A photo of a Boeing 707-320, a type of aircraft."),
        ("fgvc_aircraft", "A300B4", "A photo of a A300B4, a type of aircraft."),
        ("cars", "AM General Hummer SUV 2000", "A photo of a am general hummer suv."),
        ("cars", "Ford F-150 Regular Cab 2012", "A photo of a ford f 150 regular cab."),
        ("sun397", "apartment_building/outdoor",
         "This is a photo of a apartment_building/outdoor."),
        ("sun397", "/a/apartment_building/outdoor",
         "This is a photo of a apartment_building/outdoor."),
        ("food101", "apple_pie", "A photo of apple pie, a type of food."),
        ("dtd", "polka-dotted", "A surface with a polka dotted texture."),
    ],
)  # fmt: skip
def test_prompts_from_names_on_disk(name: str, stored: str, prompt: str, model: Any) -> None:
    """With "ttc", as the release writes them; articles are not bent."""
    data = quiet(source(name, filled(name, [stored])), model)
    assert data.prompts[0] == prompt
    assert data.protocol == data.facts()["protocol"] == "ttc"
    assert data.facts()["class_names"] == "of the protocol"


EUROSAT = (
    "AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture",
    "PermanentCrop", "Residential", "River", "SeaLake",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "stored", "label", "prompt"),
    [
        ("eurosat", EUROSAT, 2, "A centered satellite photo of brushland or shrubland."),
        ("eurosat", EUROSAT, 9, "A centered satellite photo of a sea or a lake."),
        ("eurosat", EUROSAT[::-1], 9, "A centered satellite photo of annual crop land."),
        ("pcam", ("0", "1"), 0, "This is a photo of a healthy lymph node tissue."),
        ("pcam", ("lymph node", "lymph node containing metastatic tumor tissue"), 1,
         "This is a photo of a lymph node tumor tissue."),
        ("flowers", [str(i) for i in range(1, 103)], 1,
         "A photo of a hard leaved pocket orchid, a type of flower."),
        ("flowers", sorted(str(i) for i in range(1, 103)), 1,  # "1", "10", "100", …
         "A photo of a globe thistle, a type of flower."),
        ("flowers", [str(i) for i in range(102)], 11,
         "A photo of a colts foot, a type of flower."),
        ("btmri", ("glioma_tumor", "meningioma_tumor", "normal_brain", "pituitary_tumor"), 2,
         "An MRI scan of a normal brain."),
        ("btmri", ("glioma", "meningioma", "notumor", "pituitary"), 3,
         "An MRI scan of a brain with a pituitary tumor."),
        ("busi", ("benign", "malignant", "normal"), 1,
         "An ultrasound image of a breast with a malignant tumor."),
        ("kneexray", ("0", "1", "2", "3", "4"), 2, "A knee X-ray with minimal osteoarthritis."),
        ("covid_19", ("COVID", "Lung_Opacity", "Normal", "Viral Pneumonia"), 0,
         "A chest X-ray image of COVID-19."),
        ("chmnist", ("01_TUMOR", "02_STROMA", "03_COMPLEX", "04_LYMPHO", "05_DEBRIS", "06_MUCOSA",
                     "07_ADIPOSE", "08_EMPTY"), 3, "A histopathology image of immune cells."),
        ("dermamnist", [str(i) for i in range(7)], 5,
         "A dermatoscopy image of melanocytic nevus."),
    ],
)  # fmt: skip
def test_prompts_by_label(
    name: str, stored: Sequence[str], label: int, prompt: str, model: Any
) -> None:
    data = from_source(source(name, stored), model)
    assert data.prompts[label] == prompt
    assert data.facts()["class_names"] == "of the protocol"
    assert len(data.prompts) == len(data.classes) == len(stored)


def test_countries(model: Any) -> None:
    table = CATALOGUE["country211"].table
    assert table is not None
    codes = [row[1] for row in table()]
    assert len(set(codes)) == 211
    assert codes == sorted(codes)
    prompts = from_source(source("country211", codes), model).prompts
    known = {
        "CH": "Switzerland", "XK": "Kosovo", "TL": "Timor Leste", "TR": "Türkiye",
        "CD": "Congo, The Democratic Republic of the", "GB": "United Kingdom",
    }  # fmt: skip
    for code, country in known.items():
        assert prompts[codes.index(code)] == f"A photo I took in {country}."
    # clip-benchmark's names of the same labels differ for some, which are told by their place
    theirs = {"KR": "South Korea", "CD": "DR Congo", "TL": "Timor-Leste", "RU": "Russia"}
    names = [theirs.get(row[1], row[0]) for row in table()]
    assert from_source(source("country211", names), model).prompts == prompts
    # In another order a stranger cannot be told: everybody keeps the name on disk
    with pytest.warns(UserWarning, match="country211: unknown class names on disk"):
        data = from_source(source("country211", sorted(names)), model)
    assert list(data.classes) == sorted(names)


def test_imagenet_names_by_wordnet_id(model: Any) -> None:
    """Against timm's list of ids, which is in the order of the labels."""
    wnids = pytest.importorskip("timm.data").ImageNetInfo().label_names()
    data = from_source(source("imagenet1k", wnids), model)
    known = {
        "n01440764": "tench", "n02134084": "polar bear", "n03710637": "tights",
        "n04355338": "sundial", "n07753592": "banana", "n15075141": "toilet paper",
    }  # fmt: skip
    for wnid, word in known.items():
        assert data.prompts[wnids.index(wnid)] == f"This is a photo of a {word}."
    mixed = [wnids[i] for i in np.random.default_rng(0).permutation(1000)]
    prompts = from_source(source("imagenet1k", mixed), model).prompts
    assert prompts[mixed.index("n02134084")] == "This is a photo of a polar bear."
    with pytest.raises(ValueError, match=r"has 1000 classes, but 999 .*without n03710637"):
        from_source(source("imagenet1k", [w for w in wnids if w != "n03710637"]), model)
    with pytest.raises(ValueError, match=r"not the 1000 of ILSVRC 2012"):
        from_source(source("imagenet1k", [f"n{i:08d}" for i in range(1000)]), model)


def test_open_clip_has_one_template_and_plain_names(model: Any) -> None:
    for name, stored, prompt in (
        ("cifar100", "aquarium_fish", "a photo of a aquarium fish."),
        ("sun397", "apartment_building/outdoor", "a photo of a apartment building outdoor."),
        ("pets", "American Bulldog", "a photo of a american bulldog."),
    ):
        data = from_source(source(name, filled(name, [stored])), model, protocol="open_clip")
        assert data.prompts[0] == prompt
        assert data.facts()["template"] == "a photo of a {}."


@pytest.mark.parametrize(
    ("name", "first", "groups"),
    [
        ("caltech101", ("Faces", "Faces_easy", "Leopards"), [[0, 1]]),
        ("cars", CAR_PAIRS, [[i, i + 1] for i in range(0, 14, 2)]),
    ],
)
def test_duplicate_prompts_are_reported(
    name: str, first: Sequence[str], groups: list[list[int]], model: Any
) -> None:
    with pytest.warns(UserWarning, match=f"{name}: {len(groups)} prompts name two classes"):
        data = from_source(source(name, filled(name, first)), model)
    assert data.facts()["duplicate_prompts"] == groups


def test_a_folder_of_other_names_keeps_them(model: Any) -> None:
    with pytest.warns(UserWarning, match="pcam: unknown class names on disk"):
        data = from_source(source("pcam", ("good", "bad_tissue")), model)
    assert data.classes == ("good", "bad tissue")
    assert data.facts()["class_names"] == "as on disk"


def test_wrong_classes_are_refused(model: Any) -> None:
    for name, stored, message in (
        ("dtd", [*filled("dtd", ["banded"]), "more"], "dtd has 47 classes, but 48 were read"),
        ("dtd", ["banded"], "dtd has 47 classes, but 1 were read"),
        ("eurosat", ("Forest", "Desert"), "eurosat has 10 classes, but 2 were read"),
        ("kneexray", ("0", "1"), "kneexray has 5 classes, but 2 were read from disk"),
        ("cifar10", [str(i) for i in range(10)], r"cifar10: classes: stored as numbers \('0'"),
        ("pcam", ("3", "4"), "pcam: classes: numbers from 3 to 4 on disk, 0 to 1 or 1 to 2 were"),
        ("stl10", ["cat"] * 10, r"stl10: classes: \['cat'\] stand for two classes"),
    ):
        with pytest.raises(ValueError, match=message):
            from_source(source(name, stored), model)


def test_a_part_of_the_classes_will_do_where_names_tell_them(model: Any) -> None:
    for name, stored, prompt in (
        ("dtd", ("banded", "zigzagged"), "A surface with a zigzagged texture."),
        ("eurosat", ("Forest", "River"), "A centered satellite photo of a river."),
        ("country211", ("CH", "DE"), "A photo I took in Germany."),
    ):
        with pytest.warns(UserWarning, match=f"{name}: 2 of its .* classes are on disk: not comp"):
            data = from_source(source(name, stored), model)
        assert data.prompts[1] == prompt
        facts = data.facts()
        assert (len(facts["classes"]), facts["classes_expected"]) == (
            2,
            CATALOGUE[name].n_classes,
        )
