"""Published figures: what the papers print, with the source of every number (paper.json).

Nothing here was measured by this package. Tables mark these figures with a dagger, keep them in
lines of their own, and never let them into an average of measured ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# As clip-benchmark spells them, in the order of TTC's code.
SETS = (
    "cifar10", "cifar100", "stl10", "imagenet1k", "caltech101", "caltech256", "pets", "flowers",
    "fgvc_aircraft", "cars", "sun397", "country211", "food101", "eurosat", "dtd", "pcam",
)  # fmt: skip
MEDICAL = ("busi", "btmri", "chmnist", "covid_19", "dermamnist", "kneexray")
AVERAGE = "average"
CLIP_MODEL, BIOMEDCLIP_MODEL = "CLIP ViT-B/32", "BiomedCLIP"
# Methods as tables show them, in the order of their lines.
METHODS = {
    "none": "undefended", "clip-ft": "CLIP-FT", "tecoa": "TeCoA", "pmg-aft": "PMG-AFT",
    "fare": "FARE", "rn": "RN", "tte": "TTE", "anti_adv": "Anti-adv", "hd": "HD", "ttc": "TTC",
    "doc": "DOC", "r_tpt": "R-TPT", "csr": "CSR", "dbd": "DBD", "mac": "MAC", "scc": "SCC",
    "extrapolate": "Extrapolation",
}  # fmt: skip
ENCODERS = ("clip-ft", "tecoa", "pmg-aft", "fare")


@dataclass(frozen=True)
class Published:
    """Printed accuracies, top-1 in percent, digits as printed; "" where a value is not known.

    Args:
        source: which of SOURCES prints it.
        model: CLIP_MODEL or BIOMEDCLIP_MODEL.
        attack, eps: "pgd10", "cw" or "aa", and its budget.
        method: one of METHODS.
        dataset: one of SETS or MEDICAL, or AVERAGE over `sets` of them.
        robust, clean: under the attack and without.
        ms: milliseconds an image.
        semantic, spatial: SCC's switches.
    """

    source: str
    model: str
    attack: str
    eps: str
    method: str
    dataset: str
    sets: int = 1
    robust: str = ""
    clean: str = ""
    ms: str = ""
    semantic: bool = True
    spatial: bool = True


_STORED = json.loads(Path(__file__).with_name("paper.json").read_text(encoding="utf-8"))
SOURCES: dict[str, str] = _STORED["sources"]
FIGURES = tuple(Published(**row) for row in _STORED["rows"])


def figures(*sources: str, attack: str = "pgd10", eps: str = "1/255") -> Iterator[Published]:
    """What some sources print under an attack."""
    for one in FIGURES:
        if one.source in sources and (one.attack, one.eps) == (attack, eps):
            yield one


def known_set(name: str) -> str | None:
    """The name, if it is one of SETS or MEDICAL, or None."""
    return name if name in SETS or name in MEDICAL else None


def rank(method: str) -> int:
    """The place of a method's line; those that are not known are last."""
    return list(METHODS).index(method) if method in METHODS else len(METHODS)


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
