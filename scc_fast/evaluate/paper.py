"""Published figures: what the papers print, as data with the source of every number.

Nothing here was measured by this package. Tables mark these figures with a dagger, keep them in
lines of their own, and never let them into an average of measured ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

# As clip-benchmark spells them, in the order of TTC's code.
SETS = (
    "cifar10", "cifar100", "stl10", "imagenet1k", "caltech101", "caltech256", "pets", "flowers",
    "fgvc_aircraft", "cars", "sun397", "country211", "food101", "eurosat", "dtd", "pcam",
)  # fmt: skip
MEDICAL = ("busi", "btmri", "chmnist", "covid_19", "dermamnist", "kneexray")
AVERAGE = "average"
CLIP_MODEL, BIOMEDCLIP_MODEL = "CLIP ViT-B/32", "BiomedCLIP"

_SCC_PAGE = "SCC's project page (arXiv 2510.22785)"
TABLE_1 = f"{_SCC_PAGE}, Table 1: OpenAI CLIP ViT-B/32, protocol of TTC, PGD-10 at 1/255"
TABLE_3 = f"{_SCC_PAGE}, Table 3: averages over the six medical sets, PGD-10 at 1/255"
TABLE_4 = (
    f"{_SCC_PAGE}, Table 4: DTD, ViT-B/32, PGD-10 at 1/255; its times include data loading and "
    "TTC's re-encoding of every prompt"
)
ABLATION = (
    f"{_SCC_PAGE}, ablation figure: ViT-B/32, PGD-10 at 1/255, read off the bars to about "
    "0.4 points"
)
DOC_NOTE = (
    "DOC (arXiv 2511.09064) in a third party's summary: averages over the 16 sets, ViT-B/32, 4/255"
)


@dataclass(frozen=True)
class Published:
    """One printed pair of accuracies, digits as printed; "" where a paper's value is not known.

    Args:
        robust, clean: top-1 in percent.
        sets: how many sets it is an average of; 1 for a single set.
        source: where it is printed.
    """

    robust: str
    clean: str
    sets: int
    source: str


@dataclass(frozen=True)
class Method:
    """A method as a table shows it; link and venue are those of its paper."""

    title: str
    venue: str = "N/A"
    link: str = ""


METHODS: dict[str, Method] = {
    "none": Method("undefended"),
    "clip-ft": Method("CLIP-FT"),
    "tecoa": Method("TeCoA"),
    "pmg-aft": Method("PMG-AFT"),
    "fare": Method("FARE"),
    "rn": Method("RN"),
    "tte": Method("TTE", "ICCV Workshops 2021", "https://arxiv.org/abs/2107.14110"),
    "anti_adv": Method("Anti-adv", "AAAI 2022", "https://arxiv.org/abs/2103.14347"),
    "hd": Method("HD", "arXiv, Jun 2021", "https://arxiv.org/abs/2106.04938"),
    "ttc": Method("TTC", "CVPR 2025", "https://arxiv.org/abs/2503.03613"),
    "doc": Method("DOC", "AAAI 2026", "https://arxiv.org/abs/2511.09064"),
    "r_tpt": Method("R-TPT", "CVPR 2025", "https://arxiv.org/abs/2504.11195"),
    "csr": Method("CSR", "ICML 2026", "https://arxiv.org/abs/2601.19210"),
    "dbd": Method("DBD", "ICLR 2026", "https://arxiv.org/abs/2606.06186"),
    "mac": Method("MAC", "CVPR 2026", "https://arxiv.org/abs/2606.06938"),
    "scc": Method("SCC", "ICML 2026", "https://arxiv.org/abs/2510.22785"),
}
ENCODERS = ("clip-ft", "tecoa", "pmg-aft", "fare")


def _figures(source: str, sets: int, **lines: str) -> dict[str, dict[str, Published]]:
    """{method: {set: figure}} of "set robust/clean, …"; `sets` are what an average is over."""
    found: dict[str, dict[str, Published]] = {}
    for method, line in lines.items():
        for part in line.split(","):
            name, pair = part.split()
            robust, _, clean = pair.partition("/")
            count = sets if name == AVERAGE else 1
            key = method.replace("pmg_aft", "pmg-aft")
            found.setdefault(key, {})[name] = Published(robust, clean, count, source)
    return found


_TABLE_1 = _figures(
    TABLE_1,
    16,
    none="average 2.70/61.51, cifar10 /85.12, imagenet1k /59.69",
    fare="average 20.00/51.02",
    tecoa="average 26.54/40.25",
    pmg_aft="average 28.76/42.30",
    rn="average 3.86/61.61, cifar10 2.01/81.18, stl10 16.23/95.85, imagenet1k 1.77/59.34, "
    "pcam 0.41/52.73",
    anti_adv="average 12.01/57.35, stl10 37.42, caltech256 25.36, cifar10 12.39, imagenet1k 8.67, "
    "pcam 4.97",
    hd="average 13.81/56.62, pcam 44.74, stl10 39.02, cifar10 17.22, imagenet1k 6.63",
    ttc="average 39.17/59.75, imagenet1k 38.41/49.39, cifar10 28.75/81.18, stl10 76.70/95.85, "
    "pets 57.87/83.35, pcam 52.85/52.73, flowers 39.14",
    doc="average 46.04/59.60, imagenet1k 43.72/46.46, cifar10 47.78/81.99, stl10 86.33/96.04, "
    "pets 67.18/81.36, pcam 62.44/53.46",
    scc="average 51.68/60.21, cifar10 59.18/82.24, stl10 90.50/95.62, imagenet1k 49.77/56.03, "
    "pets 76.67/86.48, caltech256 72.88/81.16, flowers 54.59/64.16, food101 65.39/82.13, "
    "pcam 69.99/54.41",
)
_DTD = _figures(TABLE_4, 1, ttc="dtd 27.4", r_tpt="dtd 32.8", scc="dtd 34.6")
_DOC_PGD = _figures(
    DOC_NOTE,
    16,
    none="average 0.06/61.51",
    fare="average 1.38/56.62",
    tecoa="average 10.95/37.58",
    hd="average 0.56/54.85",
    ttc="average 21.22/55.63",
    doc="average 31.02/58.26, cifar10 38.14, stl10 69.16, imagenet1k 24.64, pets 46.52, "
    "caltech256 43.08",
)
_DOC_CW = _figures(DOC_NOTE, 16, ttc="average 20.70", doc="average 28.15")
_DOC_AA = _figures(DOC_NOTE, 16, ttc="average 21.97", doc="average 25.89")
_MEDICAL = _figures(TABLE_3, 6, none="average 0.02", ttc="average 7.38", scc="average 13.32")
_BIOMED = _figures(TABLE_3, 6, none="average 0.08", ttc="average 10.62", scc="average 34.00/44.63")

# (attack, budget) -> method -> set -> figure, on CLIP ViT-B/32. DTD's come from another table.
Figures = Mapping[str, Mapping[str, Published]]
SIXTEEN: dict[tuple[str, str], Figures] = {
    ("pgd10", "1/255"): {
        method: {**_TABLE_1.get(method, {}), **_DTD.get(method, {})}
        for method in {**_TABLE_1, **_DTD}
    },
    ("pgd10", "4/255"): _DOC_PGD,
    ("cw", "4/255"): _DOC_CW,
    ("aa", "4/255"): _DOC_AA,
}
# (attack, budget) -> backbone -> method -> set -> figure.
SIX: dict[tuple[str, str], dict[str, Figures]] = {
    ("pgd10", "1/255"): {CLIP_MODEL: _MEDICAL, BIOMEDCLIP_MODEL: _BIOMED}
}
# Table 4: milliseconds an image.
DTD_MS: dict[str, str] = {"ttc": "12", "r_tpt": "370", "scc": "12.5"}

# (semantic, spatial) -> set -> robust accuracy.
SWITCHES: dict[tuple[bool, bool], dict[str, Published]] = {
    switches: {
        name: Published(value, "", 1, ABLATION)
        for name, value in zip(
            ("imagenet1k", "pets", "flowers", "sun397", "country211", "dtd"),
            values.split(),
            strict=True,
        )
    }
    for switches, values in {
        (True, True): "49.8 76.6 54.5 53.3 9.4 34.5",
        (False, True): "45.9 69.8 47.7 48.0 8.3 30.7",
        (True, False): "39.0 62.0 40.1 43.8 7.2 31.3",
        (False, False): "38.4 58.3 39.0 41.5 7.0 27.4",
    }.items()
}


def known_set(name: str) -> str | None:
    """The name, if it is one of SETS or MEDICAL, or None."""
    return name if name in SETS or name in MEDICAL else None


def encoder_of(name: str, source: str) -> str:
    """Which of the tables' encoders a model is: one of ENCODERS, "biomedclip", "clip" or "".

    "clip" is OpenAI's ViT-B/32, which the papers' tables are about; "" is any other.
    """
    text = f"{name} {source}".lower()
    patterns = (
        ("biomedclip", r"biomedclip"),
        ("pmg-aft", r"pmg[-_ ]?aft"),
        ("tecoa", r"(?<![a-z])tecoa\d*(?![a-z])"),
        ("fare", r"(?<![a-z])fare\d*(?![a-z])"),
        ("clip-ft", r"clip[-_]?ft(?![a-z])"),
    )
    for key, pattern in patterns:
        if re.search(pattern, text):
            return key
    is_b32 = re.search(r"vit-?b[-/_]?32|clip-vit-base-patch32", text)
    tuned = "+" in name  # another image encoder, from a file
    return "clip" if is_b32 and "openai" in text and not tuned else ""
