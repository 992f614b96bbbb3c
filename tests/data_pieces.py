"""What the generated copies of data sets are made of: class names, pixels, picture files."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import scc_fast

_WNIDS = Path(importlib.util.find_spec("timm").submodule_search_locations[0])  # type: ignore
_COUNTRIES = Path(scc_fast.__file__).parent / "evaluate" / "data" / "countries.txt"


def _wordnet_ids() -> tuple[str, ...]:
    return tuple((_WNIDS / "data" / "_info" / "imagenet_synsets.txt").read_text().split())


def _country_codes() -> tuple[str, ...]:
    lines = _COUNTRIES.read_text(encoding="utf-8").splitlines()
    return tuple(line[:2] for line in lines if not line.startswith("#"))


# Classes as the files spell them, by label
_CLASSES: dict[str, str | Callable[[], tuple[str, ...]]] = {
    "cifar10": "airplane automobile bird cat deer dog frog horse ship truck",
    "cifar100": """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy
        bridge bus butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud
        cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl
        hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
        motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
        pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal
        shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper
        table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
        willow_tree wolf woman worm""",
    "stl10": "airplane bird car cat deer dog horse monkey ship truck",
    "imagenet1k": _wordnet_ids,
    "caltech101": "Faces Faces_easy Leopards accordion car_side windsor_chair",
    "caltech256": "001.ak47 002.american-flag 003.backpack 004.baseball-bat 005.baseball-glove",
    "pets": "Abyssinian american_bulldog american_pit_bull_terrier basset_hound beagle Bengal",
    "flowers": lambda: tuple(str(number) for number in range(1, 103)),
    "food101": "apple_pie baby_back_ribs french_fries waffles",
    "cars": lambda: (
        "AM General Hummer SUV 2000",
        "Audi S4 Sedan 2012",
        "Audi S4 Sedan 2007",
        "smart fortwo Convertible 2012",
    ),
    "sun397": "/a/abbey /a/apartment_building/outdoor /c/church/indoor /z/zen_garden",
    "country211": _country_codes,
    "fgvc_aircraft": lambda: ("707-320", "727-200", "A300B4", "Cessna 172", "Yak-42"),
    "eurosat": """AnnualCrop Forest HerbaceousVegetation Highway Industrial Pasture PermanentCrop
        Residential River SeaLake""",
    "dtd": "banded blotchy polka-dotted zigzagged",
    "pcam": lambda: ("lymph node", "lymph node containing metastatic tumor tissue"),
    "busi": "benign_tumor malignant_tumor normal_scan",
    "btmri": "glioma_tumor meningioma_tumor normal_brain pituitary_tumor",
    "chmnist": """adipose_tissue complex_stroma debris empty_background immune_cells
        normal_mucosal_glands simple_stroma tumor_epithelium""",
    "covid_19": "covid_lungs lung_opacity_lungs normal_lungs viral_pneumonia_lungs",
    "dermamnist": """actinic_keratosis basal_cell_carcinoma benign_keratosis dermatofibroma
        melanocytic_nevus melanoma vascular_lesion""",
    "kneexray": "no doubtful minimal moderate severe",
}
NAMES = tuple(_CLASSES)


def classes(name: str) -> tuple[str, ...]:
    """The classes of a generated copy, as the files spell them, by label."""
    found = _CLASSES[name]
    return tuple(found.split()) if isinstance(found, str) else found()


def words(name: str) -> tuple[str, ...]:
    """The lines of ``classnames.txt``: words even where the data set's own files have codes."""
    if name == "imagenet1k":
        from open_clip import IMAGENET_CLASSNAMES

        return tuple(IMAGENET_CLASSNAMES)
    if name == "country211":
        lines = _COUNTRIES.read_text(encoding="utf-8").splitlines()
        return tuple(line[3:] for line in lines if not line.startswith("#"))
    if name == "flowers":
        from torchvision.datasets import Flowers102

        return tuple(Flowers102.classes)
    return classes(name)


def pixels(label: int, number: int, size: int = 16) -> NDArray[np.uint8]:
    """uint8 (size, size, 3): the class sets the color, and no two corners are alike."""
    y, x = np.mgrid[:size, :size]
    plane = np.stack([label * 67 + 3 * y, label * 151 + 5 * x, number * 41 + y + x], axis=-1)
    return (plane % 256).astype(np.uint8)


def encoded(label: int, number: int, extension: str) -> bytes:
    """A picture file as bytes; lossless unless it is a JPEG."""
    stream = io.BytesIO()
    picture = Image.fromarray(pixels(label, number))
    if extension == "webp":
        picture.save(stream, "webp", lossless=True, method=0, quality=0)  # the quickest
    elif extension == "png":
        picture.save(stream, "png")
    else:
        picture.save(stream, "jpeg", quality=95)
    return stream.getvalue()


def each(count: int, per_class: int) -> Iterator[tuple[int, int]]:
    """(label, number) of every picture, class by class."""
    return ((label, number) for label in range(count) for number in range(per_class))


def save(path: Path, label: int, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(label, number, path.suffix.lower().lstrip(".").replace("jpeg", "jpg")))


def write_lines(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines))
