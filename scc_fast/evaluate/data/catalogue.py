"""Catalogue of data sets: names, sizes, splits, prompts.

Sizes, splits, templates and names of the sixteen are those of TTC's release (Xing et al., CVPR
2025, github.com/Sxing2/CLIP-Test-time-Counterattacks), used for the tables of TTC, DOC and SCC.
Cleaning of Pets, Flowers102, Food101, DTD, Cars and countries follows the code it descends from
(github.com/zhyblue424/TGA-ZSR, replace/datasets). CLIP's tokenizer ignores case.

The SCC paper prints no prompts, splits or sizes of the six medical sets: splits and sizes are
those of BiomedCoOp (Koleilat et al., CVPR 2025), the prompts are our own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from scc_fast.config import nearest, shown
from scc_fast.evaluate.data import class_names as cn
from scc_fast.evaluate.data.class_names import Clean, Table

_PLAIN = "This is a photo of a {}."
_CAPITAL = "A photo of a {}."


@dataclass(frozen=True)
class Entry:
    """One data set.

    Args:
        name: clip-benchmark's spelling.
        paper: the papers' spelling.
        split: the papers' evaluation split; "all": no splits.
        size: number of pictures.
        n_classes: number of classes, including empty ones.
        template: of prompts, with {} for the class.
        clean: class name on disk -> class name in prompts.
        table: names by label, where names on disk do not suffice.
        spellings: other names of the data set.
        group: "natural" (the sixteen), "medical" or "bundled" (needs no files).
        note: caveat for comparisons.
    """

    name: str
    paper: str
    split: str
    size: int
    n_classes: int
    template: str
    clean: Clean = cn.as_stored
    table: Callable[[], Table] | None = None
    spellings: tuple[str, ...] = ()
    group: Literal["natural", "medical", "bundled"] = "natural"
    note: str = ""


def _rows(*rows: str | tuple[str, ...]) -> Callable[[], Table]:
    table = tuple((row,) if isinstance(row, str) else row for row in rows)
    return lambda: table


_EUROSAT = _rows(
    ("annual crop land", "AnnualCrop"),
    ("a forest", "Forest"),
    ("brushland or shrubland", "HerbaceousVegetation"),
    ("a highway or a road", "Highway", "highway or road"),
    ("industrial buildings", "Industrial", "industrial buildings or commercial buildings"),
    ("pasture land", "Pasture"),
    ("permanent crop land", "PermanentCrop"),
    ("residential buildings", "Residential", "residential buildings or homes or apartments"),
    ("a river", "River"),
    ("a sea or a lake", "SeaLake", "lake or sea"),
)
_PCAM = _rows(
    ("healthy lymph node tissue", "lymph node", "normal", "no tumor", "non tumor"),
    (
        "lymph node tumor tissue",
        "lymph node containing metastatic tumor tissue",
        "metastatic tissue",
        "tumor",
    ),
)
_BUSI = _rows(
    ("a benign tumor", "benign", "benign tumor", "benign tumors"),
    ("a malignant tumor", "malignant", "malignant tumor", "malignant tumors"),
    ("normal tissue", "normal", "normal scan", "normal scans"),
)
_BTMRI = _rows(
    ("a brain with a glioma tumor", "glioma", "glioma tumor"),
    ("a brain with a meningioma tumor", "meningioma", "meningioma tumor"),
    ("a normal brain", "normal brain", "notumor", "normal"),
    ("a brain with a pituitary tumor", "pituitary", "pituitary tumor"),
)
_CHMNIST = _rows(
    ("adipose tissue", "adipose", "07_ADIPOSE"),
    ("complex stroma", "complex", "03_COMPLEX"),
    ("debris", "05_DEBRIS"),
    ("empty background", "empty", "background", "08_EMPTY"),
    ("immune cells", "lympho", "immune cell conglomerates", "04_LYMPHO"),
    ("normal mucosal glands", "mucosa", "mucosal glands", "06_MUCOSA"),
    ("simple stroma", "stroma", "02_STROMA"),
    ("tumor epithelium", "tumor", "01_TUMOR"),
)
_COVID = _rows(
    ("COVID-19", "covid", "covid lungs"),
    ("lung opacity", "lung opacity lungs"),
    ("normal lungs", "normal"),
    ("viral pneumonia", "viral pneumonia lungs"),
)
_DERMA = _rows(
    ("actinic keratosis", "actinic keratoses and intraepithelial carcinoma", "akiec"),
    ("basal cell carcinoma", "bcc"),
    ("benign keratosis", "benign keratosis-like lesions", "bkl"),
    ("dermatofibroma", "df"),
    ("melanoma", "mel"),
    ("melanocytic nevus", "melanocytic nevi", "nv"),
    ("vascular lesion", "vascular lesions", "vasc"),
)
_KNEE = _rows(
    ("no", "normal", "healthy", "no osteoarthritis", "0normal"),
    ("doubtful", "doubtful osteoarthritis", "1doubtful"),
    ("minimal", "mild", "minimal osteoarthritis", "mild osteoarthritis", "2mild"),
    ("moderate", "moderate osteoarthritis", "3moderate"),
    ("severe", "severe osteoarthritis", "4severe"),
)

_999 = (
    "names are open_clip's; the label file of the TTC release has 999 of the 1000 classes, without "
    "n03710637 (maillot)"
)
_YEAR = "without the year seven pairs of classes have equal prompts"
_PERSON = "Faces and Faces_easy have equal prompts: 870 of 8677 pictures are decided by a tie"
_SPLIT = "split and size of BiomedCoOp, prompts of our own: the SCC paper names none"


def _medical(
    name: str, paper: str, size: int, classes: int, template: str, table: Callable[[], Table]
) -> Entry:
    return Entry(
        name, paper, "test", size, classes, template, cn.spaced, table,
        group="medical", note=_SPLIT,
    )  # fmt: skip


_ENTRIES = (
    Entry("cifar10", "CIFAR10", "test", 10_000, 10, _PLAIN),
    Entry("cifar100", "CIFAR100", "test", 10_000, 100, _PLAIN),
    Entry("stl10", "STL10", "test", 8_000, 10, _PLAIN),
    Entry(
        "imagenet1k", "ImageNet", "val", 50_000, 1000, _PLAIN, table=cn.imagenet,
        spellings=("imagenet-1k", "imagenet1k-unverified", "ilsvrc2012", "imagenet2012"), note=_999,
    ),
    Entry(
        "caltech101", "Caltech101", "all", 8_677, 101, _PLAIN, cn.caltech101, note=_PERSON,
    ),
    Entry("caltech256", "Caltech256", "all", 30_607, 257, _CAPITAL, cn.caltech256),
    Entry(
        "pets", "OxfordPets", "test", 3_669, 37, "A photo of a {}, a type of pet.", cn.spaced,
        spellings=("oxfordpet", "oxford_iiit_pet", "oxford_iiit_pets"),
    ),
    Entry(
        "flowers", "Flowers102", "test", 6_149, 102, "A photo of a {}, a type of flower.",
        cn.spaced, cn.flowers, ("oxford_flowers", "oxford_flowers102"),
    ),
    Entry(
        "fgvc_aircraft", "FGVCAircraft", "test", 3_333, 100,
        "A photo of a {}, a type of aircraft.", cn.aircraft, spellings=("aircraft",),
    ),
    Entry(
        "cars", "StanfordCars", "test", 8_041, 196, _CAPITAL, cn.cars,
        spellings=("stanford_cars",), note=_YEAR,
    ),
    Entry("sun397", "SUN397", "all", 108_754, 397, _PLAIN, cn.sun397),
    Entry(
        "country211", "Country211", "test", 21_100, 211, "A photo I took in {}.",
        table=cn.countries,
    ),
    Entry(
        "food101", "Food101", "test", 25_250, 101, "A photo of {}, a type of food.", cn.spaced,
        spellings=("food",),
    ),
    Entry(
        "eurosat", "EuroSAT", "all", 27_000, 10, "A centered satellite photo of {}.",
        cn.spaced, _EUROSAT,
    ),
    Entry(
        "dtd", "DTD", "test", 1_880, 47, "A surface with a {} texture.", cn.spaced,
        spellings=("describable_textures",),
    ),
    Entry(
        "pcam", "PCAM", "test", 32_768, 2, _PLAIN, cn.spaced, _PCAM, ("patch_camelyon",),
    ),
    _medical("busi", "BUSI", 236, 3, "An ultrasound image of a breast with {}.", _BUSI),
    _medical("btmri", "BTMRI", 1_717, 4, "An MRI scan of {}.", _BTMRI),
    _medical("chmnist", "CHMNIST", 1_504, 8, "A histopathology image of {}.", _CHMNIST),
    _medical("covid_19", "COVID-19", 6_351, 4, "A chest X-ray image of {}.", _COVID),
    _medical("dermamnist", "DermaMNIST", 2_005, 7, "A dermatoscopy image of {}.", _DERMA),
    _medical("kneexray", "KneeXray", 1_656, 5, "A knee X-ray with {} osteoarthritis.", _KNEE),
    Entry(
        "digits", "digits", "all", 1_797, 10, 'a photo of the digit "{}".',
        table=_rows(*"0123456789"), group="bundled",
    ),
    Entry(
        "emoji", "emoji", "test", 2_000, 201, "a photo of a {}",
        group="bundled", note="the number of pictures is a convention: they are generated",
    ),
)  # fmt: skip

CATALOGUE: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}
NAMES: tuple[str, ...] = tuple(CATALOGUE)


def find(name: str) -> Entry:
    """Entry of a data set, in clip-benchmark's or the papers' spelling, in any case.

    clip-benchmark's prefixes are dropped: "wds/cifar10", "wds/vtab/cifar10", "vtab-cifar10" and
    "wds_vtab-cifar10" are "cifar10".

    Raises:
        TypeError: not a string. ValueError: unknown data set; lists the known ones.
    """
    if not isinstance(name, str):
        raise TypeError(f"dataset: a name is needed, got {type(name).__name__}")
    entry = known(name)
    if entry is None:
        raise ValueError(
            f"dataset: {shown(name)} is none of {', '.join(NAMES)}{nearest(name, NAMES)}"
        )
    return entry


def known(name: str) -> Entry | None:
    """As :func:`find`, but None for an unknown name."""
    bare = re.sub(r"^(wds[/_-])?(vtab[/_-])?", "", name.strip().lower())
    return _BY_KEY.get(_key(bare))


def _key(name: str) -> str:
    # Other characters count: "food101+" may be another data set
    return re.sub(r"[\s/_.-]", "", name.lower())


_BY_KEY = {_key(word): e for e in _ENTRIES for word in (e.name, e.paper, *e.spellings)}
