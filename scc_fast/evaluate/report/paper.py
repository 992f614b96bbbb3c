"""Published figures of the papers, with the source of every number (paper.json).

Not measured by this package. Tables mark them with a dagger, in separate lines, and never average
them with measured ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# clip-benchmark's spelling, in the order of TTC's code.
SETS = (
    "cifar10", "cifar100", "stl10", "imagenet1k", "caltech101", "caltech256", "pets", "flowers",
    "fgvc_aircraft", "cars", "sun397", "country211", "food101", "eurosat", "dtd", "pcam",
)  # fmt: skip
MEDICAL = ("busi", "btmri", "chmnist", "covid_19", "dermamnist", "kneexray")
AVERAGE = "average"
CLIP_MODEL, BIOMEDCLIP_MODEL = "CLIP ViT-B/32", "BiomedCLIP"
# Names of methods in tables, in order.
METHODS = {
    "none": "undefended", "clip-ft": "CLIP-FT", "tecoa": "TeCoA", "pmg-aft": "PMG-AFT",
    "fare": "FARE", "rn": "RN", "tte": "TTE", "anti_adv": "Anti-adv", "hd": "HD", "ttc": "TTC",
    "doc": "DOC", "r_tpt": "R-TPT", "csr": "CSR", "dbd": "DBD", "mac": "MAC", "scc": "SCC",
    "agc": "AGC", "extrapolate": "Extrapolation",
}  # fmt: skip
ENCODERS = ("clip-ft", "tecoa", "pmg-aft", "fare")


@dataclass(frozen=True)
class Published:
    """Printed accuracies, top-1 in percent, with the printed digits; "" if unknown.

    Args:
        source: one of SOURCES.
        model: CLIP_MODEL or BIOMEDCLIP_MODEL.
        attack, eps: "pgd10", "cw" or "aa", and its budget.
        method: one of METHODS.
        dataset: one of SETS or MEDICAL, or AVERAGE over `sets` of them.
        robust, clean: under the attack and without.
        ms: milliseconds per image.
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
    """Published figures of some sources under an attack."""
    for one in FIGURES:
        if one.source in sources and (one.attack, one.eps) == (attack, eps):
            yield one


def known_set(name: str) -> str | None:
    """`name` if it is one of SETS or MEDICAL, else None."""
    return name if name in SETS or name in MEDICAL else None


def rank(method: str) -> int:
    """Order of a method's line; unknown methods are last."""
    return list(METHODS).index(method) if method in METHODS else len(METHODS)


def encoder_of(name: str, source: str) -> str:
    """Encoder of the papers' tables: one of ENCODERS, "biomedclip", "clip" or "" (any other).

    "clip" is OpenAI's ViT-B/32.
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
    tuned = "+" in name  # an image encoder from a file
    return "clip" if is_b32 and "openai" in text and not tuned else ""
