"""Class names for prompts, from class names on disk."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

Clean = Callable[[str], str]
# By label: the name in prompts, then other spellings on disk
Table = tuple[tuple[str, ...], ...]

_WORDNET = re.compile(r"n\d{8}")
_WORDNET_ENDS = ("n01440764", "n15075141")  # tench and toilet paper, the ends of ILSVRC 2012
_COUNTRIES = Path(__file__).with_name("countries.txt")


def as_stored(name: str) -> str:
    """Unchanged: CIFAR, STL-10."""
    return name


def spaced(name: str) -> str:
    """Lower case, "_" and "-" as spaces: Pets, Flowers102, Food101, DTD."""
    return name.lower().replace("_", " ").replace("-", " ").strip()


def caltech101(name: str) -> str:
    """Unchanged, but both classes of faces are "person"."""
    return "person" if name in ("Faces", "Faces_easy") else name


def caltech256(name: str) -> str:
    """Without leading number and "-101": "252.car-side-101" is "car side"."""
    return spaced(re.sub(r"^\d{3}\.", "", name).replace("-101", ""))


def cars(name: str) -> str:
    """Without the year at the end."""
    return spaced(re.sub(r" \d{4}$", "", name))


def aircraft(name: str) -> str:
    """ "Boeing" before variants that begin with 7."""
    return f"Boeing {name}" if name.startswith("7") else name


def sun397(name: str) -> str:
    """Without the letter's folder: "/a/abbey/outdoor" is "abbey/outdoor"."""
    return re.sub(r"^/[a-z]/", "", name)


def words(name: str) -> str:
    """ "_" and "/" as spaces."""
    return name.replace("_", " ").replace("/", " ")


@cache
def countries() -> Table:
    """Country211: ISO 3166-1 names in the order of their codes, dashes as spaces; 211 rows."""
    lines = _COUNTRIES.read_text(encoding="utf-8").splitlines()
    rows = (line.split(" ", 1) for line in lines if not line.startswith("#"))
    return tuple((name.replace("-", " "), code) for code, name in rows)


@cache
def flowers() -> Table:
    """Flowers102: torchvision's names by label, with clip-benchmark's spellings."""
    from torchvision.datasets import Flowers102  # type: ignore[import-untyped]

    known = {"colt's foot": "colts foot"}  # as in the lists of the protocol's code
    others = {"ball moss": ("air plant",), "pink-yellow dahlia?": ("pink and yellow dahlia",)}
    return tuple(
        (spaced(known.get(name, name)), name, *others.get(name, ())) for name in Flowers102.classes
    )


@cache
def imagenet() -> Table:
    """ImageNet: open_clip's names by sorted wordnet id; 1000 rows.

    The label file of the TTC release lacks n03710637 (maillot). Here all 1000 classes count.
    """
    from open_clip import IMAGENET_CLASSNAMES

    return tuple((name,) for name in IMAGENET_CLASSNAMES)


def resolve(stored: Sequence[str], clean: Clean, table: Table | None) -> tuple[list[str], bool]:
    """Names for prompts by label, and whether the table or rule covers them.

    A table maps numbers (from 0 or 1), wordnet ids and known spellings to its names, in any order.
    Unknown names are cleaned, and the second value is False.

    Args:
        stored: names on disk, by label; with a table all of its classes, or a known part.

    Raises:
        ValueError: unexpected numbers or wordnet ids, or two classes of one name.
    """
    # By place, names may repeat: ImageNet has two missiles
    if len(set(stored)) < len(stored) and (table is None or len(table) != len(stored)):
        twice = sorted({name for name in stored if list(stored).count(name) > 1})
        raise ValueError(f"classes: {twice[:3]} stand for two classes each on disk")
    numbers = all(name.isdecimal() for name in stored)
    if table is None:
        if numbers and stored:
            raise ValueError(
                f"classes: stored as numbers ({stored[0]!r}, …), which prompts cannot use; "
                "name the folders after the classes"
            )
        return [clean(name) for name in stored], True
    if len(stored) == len(table):
        if numbers:
            return [table[i][0] for i in _numbers(stored, len(table))], True
        if all(_WORDNET.fullmatch(name) for name in stored):
            return [table[i][0] for i in _wordnet(stored)], True
        if _in_order(stored, table):
            return [row[0] for row in table], True
    if knows(stored, table):
        where = _spellings(table)
        return [where[_key(name)] for name in stored], True
    return [clean(name) for name in stored], False


def knows(stored: Sequence[str], table: Table) -> bool:
    """Whether every class on disk is a known spelling of the table."""
    where = _spellings(table)
    return all(_key(name) in where for name in stored)


def _spellings(table: Table) -> dict[str, str]:
    return {_key(spelling): row[0] for row in table for spelling in row}


def _in_order(stored: Sequence[str], table: Table) -> bool:
    """Whether most names are the table's, in its order, and the others unknown spellings.

    clip-benchmark spells many countries differently.
    """
    known = _spellings(table)
    keys = [{_key(spelling) for spelling in row} for row in table]
    here = [_key(name) in row for name, row in zip(stored, keys, strict=True)]
    strangers = [name for name, ok in zip(stored, here, strict=True) if not ok]
    return 2 * sum(here) > len(stored) and not any(_key(name) in known for name in strangers)


def _numbers(stored: Sequence[str], count: int) -> list[int]:
    values = [int(name) for name in stored]
    for first in (0, 1):
        if sorted(values) == list(range(first, first + count)):
            return [value - first for value in values]
    raise ValueError(
        f"classes: numbers from {min(values)} to {max(values)} on disk, "
        f"0 to {count - 1} or 1 to {count} were expected"
    )


def _wordnet(stored: Sequence[str]) -> list[int]:
    order = sorted(stored)
    if (order[0], order[-1]) != _WORDNET_ENDS:
        raise ValueError(
            f"classes: wordnet ids from {order[0]} to {order[-1]}, which are not the 1000 of "
            f"ILSVRC 2012 ({_WORDNET_ENDS[0]} to {_WORDNET_ENDS[1]})"
        )
    rank = {name: i for i, name in enumerate(order)}
    return [rank[name] for name in stored]


def _key(name: str) -> str:
    """Key common to all spellings of a name."""
    return re.sub(r"[\W_]", "", name.casefold())
