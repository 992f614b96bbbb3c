"""What a class is called in a prompt, from what it is called on disk."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

Clean = Callable[[str], str]
# By label: the name that prompts use, then other spellings found on disk
Table = tuple[tuple[str, ...], ...]

_WORDNET = re.compile(r"n\d{8}")
_WORDNET_ENDS = ("n01440764", "n15075141")  # tench and toilet paper, the ends of ILSVRC 2012
_COUNTRIES = Path(__file__).with_name("countries.txt")


def as_stored(name: str) -> str:
    """CIFAR, STL-10: "aquarium_fish" stays so."""
    return name


def spaced(name: str) -> str:
    """Lower case, "_" and "-" as spaces: Pets, Flowers102, Food101, DTD."""
    return name.lower().replace("_", " ").replace("-", " ").strip()


def caltech101(name: str) -> str:
    """As stored, but both classes of faces are persons."""
    return "person" if name in ("Faces", "Faces_easy") else name


def caltech256(name: str) -> str:
    """Without the number in front and "-101" at the end: "252.car-side-101" is a "car side"."""
    return spaced(re.sub(r"^\d{3}\.", "", name).replace("-101", ""))


def cars(name: str) -> str:
    """Without the year, which is the last five characters."""
    return spaced(re.sub(r" \d{4}$", "", name))


def aircraft(name: str) -> str:
    """Variants that begin with a 7 are Boeing's."""
    return f"Boeing {name}" if name.startswith("7") else name


def sun397(name: str) -> str:
    """Only the letter's folder is cut: "/a/apartment_building/outdoor" keeps the rest."""
    return re.sub(r"^/[a-z]/", "", name)


def words(name: str) -> str:
    """Spaces for "_" and "/", on top of the data set's own cleaning."""
    return name.replace("_", " ").replace("/", " ")


@cache
def countries() -> Table:
    """Country211: ISO 3166-1 names in the order of their codes, dashes as spaces; 211 rows."""
    lines = _COUNTRIES.read_text(encoding="utf-8").splitlines()
    rows = (line.split(" ", 1) for line in lines if not line.startswith("#"))
    return tuple((name.replace("-", " "), code) for code, name in rows)


@cache
def flowers() -> Table:
    """Flowers102: torchvision's names by label, and clip-benchmark's other spellings."""
    from torchvision.datasets import Flowers102  # type: ignore[import-untyped]

    known = {"colt's foot": "colts foot"}  # as in the lists of the protocol's code
    others = {"ball moss": ("air plant",), "pink-yellow dahlia?": ("pink and yellow dahlia",)}
    return tuple(
        (spaced(known.get(name, name)), name, *others.get(name, ())) for name in Flowers102.classes
    )


@cache
def imagenet() -> Table:
    """ImageNet: open_clip's names in the order of the sorted wordnet ids; 1000 rows.

    The label file of the TTC release has 999 entries, because n03710637 (maillot) is missing: with
    it a complete validation set either stops or loses a class. Here all 1000 classes count.
    """
    from open_clip import IMAGENET_CLASSNAMES

    return tuple((name,) for name in IMAGENET_CLASSNAMES)


def resolve(stored: Sequence[str], clean: Clean, table: Table | None) -> tuple[list[str], bool]:
    """The names for prompts, by label, and whether they are those that the table or rule means.

    Where there is a table, classes stored as numbers (from 0 or 1), as wordnet ids or under a
    spelling that it knows get its names, in whatever order they are stored. Names that it does not
    know are cleaned and kept, and the second value is False.

    Args:
        stored: on disk, by label; with a table as many as it has, or some that :func:`knows` knows.

    Raises:
        ValueError: numbers or wordnet ids that stand for no class, or two classes of one name.
    """
    # Where places tell classes apart, names need not: ImageNet's words have two missiles
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
    """Whether every class on disk is a spelling of the table's."""
    where = _spellings(table)
    return all(_key(name) in where for name in stored)


def _spellings(table: Table) -> dict[str, str]:
    return {_key(spelling): row[0] for row in table for spelling in row}


def _in_order(stored: Sequence[str], table: Table) -> bool:
    """Most names are the table's in its order, and the others are spellings it does not know.

    clip-benchmark has its own for many countries.
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
    """What spellings of a name have in common."""
    return re.sub(r"[\W_]", "", name.casefold())
