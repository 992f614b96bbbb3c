"""Results: rows of accuracies, and reading of folders as one table."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scc_fast.config import format_epsilon, parse_epsilon, shown

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.table import Table

FORMAT = 1  # of results.json
CLEAN, WORST = "clean", "worst"
NO_BUDGET = format_epsilon(0.0)  # clean and damaged pictures
# Column heads of attacks in plain words, and their footnotes.
_WORDS = {"pgd-own": "own answer", "pgd-random": "random class"}
_NOTES = {
    "damaged": "damaged: no attacker, but ordinary damage, one of nine kinds a picture: JPEG of "
    "quality 50 or 20, noise of 8/255 or 16/255, blur of 1.5 pixels, half the resolution, half "
    "the brightness, grey, 15° of rotation",
    "pgd-own": "own answer: PGD driven by the model's own answer, so that no label leaks",
    "pgd-random": "random class: PGD towards a random class",
}


def wilson(hits: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % Wilson score interval of hits out of n."""
    if n == 0:
        return 0.0, 1.0
    p, zz = hits / n, z * z
    centre = (p + zz / (2 * n)) / (1 + zz / n)
    half = z / (1 + zz / n) * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    return min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half))


@dataclass(frozen=True)
class Row:
    """One accuracy with its settings; accuracy and interval in [0, 1].

    Args:
        defense, method: requested spec ("scc:semantic=false"), and name ("scc").
        attack, title: of the attack ("pgd10", "PGD-10"); "clean": none; "worst": right only if
            right under every attack of `of`.
        aware: the attack knew the defense.
        eps: budget, as "4/255"; "0/255" without one.
        clean_right, clean_wrong: {"n", "hits"} of the images that the undefended model gets right
            (wrong) when clean; hits on the latter may show a leak of the label.
        flagged: share flagged by the gate; None without a gate.
        traits, config, attack_settings: of defense and attack.
    """

    defense: str
    method: str
    attack: str
    title: str
    aware: bool
    eps: str
    seed: int
    n: int
    hits: int
    accuracy: float
    ci_low: float
    ci_high: float
    clean_right: dict[str, int] = field(default_factory=dict)
    clean_wrong: dict[str, int] = field(default_factory=dict)
    flagged: float | None = None
    traits: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    attack_settings: dict[str, Any] = field(default_factory=dict)
    of: list[str] = field(default_factory=list)


def row_of(right: str, clean: str, flagged: str = "", **facts: Any) -> Row:
    """Make a row from one character per image: "1" if the answer is right, if the undefended model
    is right on the clean image, and if the gate flagged it ("" without a gate)."""
    n, hits = len(right), right.count("1")
    low, high = wilson(hits, n)

    def among(kind: str) -> dict[str, int]:
        chosen = [a for a, b in zip(right, clean, strict=False) if b == kind]
        return {"n": len(chosen), "hits": chosen.count("1")}

    return Row(
        n=n,
        hits=hits,
        accuracy=hits / n,
        ci_low=low,
        ci_high=high,
        clean_right=among("1"),
        clean_wrong=among("0"),
        flagged=flagged.count("1") / n if flagged else None,
        **facts,
    )


def worst_of(bits: Sequence[str]) -> str:
    """Images right every time, over the common length."""
    return "".join("1" if set(column) == {"1"} else "0" for column in zip(*bits, strict=False))


class AttackFailed(RuntimeError):
    """The attack does not break the undefended model; accuracies under it mean nothing."""


def check_attack(row: Row, least: float = 0.1) -> None:
    """Raise AttackFailed unless the attack breaks the undefended model.

    Args:
        row: of "none" under the attack.
        least: least share of its correct pictures that must turn wrong.
    """
    n, hits = row.clean_right["n"], row.clean_right["hits"]
    if n and hits > (1 - least) * n:
        raise AttackFailed(
            f"the attack does not work: under {row.title} at {row.eps} the undefended model keeps "
            f"{hits} of the {n} pictures it gets right ({hits / n:.1%}); accuracies under it would "
            "mean nothing (--allow-weak-attack continues anyway)"
        )


def format_rows(rows: Sequence[Row | Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows as in results.json, without an empty `of`."""
    plain = [asdict(row) if isinstance(row, Row) else dict(row) for row in rows]
    return [{k: v for k, v in row.items() if k != "of" or v} for row in plain]


def timed_rows(rows: Sequence[Row], times: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows as in --json: those of results.json, with times or None."""
    known = {(time["defense"], time["attack"], time["eps"]): time for time in times}
    names = ("ms_per_image", "attack_ms_per_image", "rounds")
    found = []
    for row in format_rows(rows):
        time = known.get((row["defense"], row["attack"], row["eps"]), {})
        found.append(row | {name: time.get(name) for name in names})
    return found


def base_of(spec: str) -> str:
    """Name of an attack: "pgd" of "pgd10" and "pgd:steps=20"."""
    return re.sub(r"\d*(:.*)?$", "", spec)


def column_order(attack: str, eps: str, aware: bool) -> int:
    """Order of an attack's column within its budget.

    Clean, damaged, PGD, its two controls, other oblivious ones, adaptive ones, the worst.
    """
    if attack in (CLEAN, WORST):
        return 0 if attack == CLEAN else 7
    if eps == NO_BUDGET or aware:
        return 6 if aware else 1
    return {"pgd": 2, "pgd-own": 3, "pgd-random": 4}.get(base_of(attack), 5)


def footnotes(specs: Iterable[str]) -> list[str]:
    """Footnotes of columns with short heads, each once."""
    bases = {base_of(spec) for spec in specs}
    return [note for base, note in _NOTES.items() if base in bases]


def _column_head(spec: str, title: str) -> str:
    """Column head of an attack; controls in words, with the spec unless it has 10 steps."""
    base = base_of(spec)
    if base not in _WORDS:
        return title
    return _WORDS[base] + f" ({spec})" * (spec not in (base, f"{base}10"))


def attack_titles(some: Iterable[Any]) -> dict[tuple[str, str], str]:
    """{(attack, eps): column head}, in order; equal heads of one budget get the spec."""
    named = {(one.attack, one.eps): _column_head(one.attack, one.title) for one in some}
    seen = [(title, eps) for (_, eps), title in named.items()]
    return {
        key: title if seen.count((title, key[1])) == 1 else f"{title} ({key[0]})"
        for key, title in named.items()
    }


def cell(row: Row | None) -> str:
    """Accuracy in percent with its 95 % interval, as "94.8 [93.2, 96.0]"."""
    if row is None:
        return "–"
    return f"{100 * row.accuracy:.1f} [{100 * row.ci_low:.1f}, {100 * row.ci_high:.1f}]"


_WIDEST = 9  # columns of attacks that 80 letters have room for


def tables(
    rows: Sequence[Row], title: str, times: Sequence[Mapping[str, Any]] = ()
) -> Iterator[Table]:
    """Accuracy tables for a terminal of 80 columns; adaptive attacks apart if they do not fit.

    Args:
        rows: one line per defense, one column per attack.
        title: above each table.
        times: of the rows; the first table shows those of clean pictures.
    """
    heads = attack_titles(
        sorted(rows, key=lambda row: column_order(row.attack, row.eps, row.aware))
    )
    aware = {(row.attack, row.eps) for row in rows if row.aware}
    parts = [list(heads)]
    if len(heads) > _WIDEST:
        parts = [[key for key in heads if (key in aware) == knows] for knows in (False, True)]
    for part in parts:
        pieces = -(-len(part) // _WIDEST)
        for turn in range(pieces):
            piece = part[turn * len(part) // pieces : (turn + 1) * len(part) // pieces]
            some = {key: heads[key] for key in piece}
            yield _table([row for row in rows if (row.attack, row.eps) in some], some, title, times)
            times = ()


def _table(
    rows: Sequence[Row],
    titles: Mapping[tuple[str, str], str],
    title: str,
    times: Sequence[Mapping[str, Any]],
) -> Table:
    """One table of tables()."""
    from rich import box
    from rich.table import Table

    found = {(row.defense, row.attack, row.eps): row for row in rows}
    notes = footnotes(attack for attack, _ in titles)
    drawn = Table(
        title=title,
        caption="\n".join(["percent correct, 95 % Wilson interval", *notes]),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    drawn.add_column("defense")
    for (attack, eps), name in titles.items():
        counts = sorted({row.n for row in rows if (row.attack, row.eps) == (attack, eps)})
        budget = "" if eps == NO_BUDGET else f"\n{eps}"
        head = re.sub(r" |(?<=:)|(?<=\w{4}-)", "\n", name)
        drawn.add_column(f"{head}{budget}\nn={'/'.join(map(str, counts))}", justify="right")
    ms = {time["defense"]: time["ms_per_image"] for time in times if time["attack"] == CLEAN}
    if ms:
        drawn.add_column("ms/\nimage", justify="right")
    for name in dict.fromkeys(row.defense for row in rows):
        cells = [_narrow(found.get((name, *column))) for column in titles]
        last = [f"{ms[name]:.1f}" if name in ms else "–"] if ms else []
        drawn.add_row(name, *cells, *last)
    return drawn


def _narrow(row: Row | None) -> str:
    """Accuracy, and its interval in whole percent on another line."""
    if row is None:
        return "–"
    return f"{100 * row.accuracy:.1f}\n{100 * row.ci_low:.0f}–{100 * row.ci_high:.0f}"


# ---------------------------------------------------------------------------- reading of a folder

# Identity of a model and of a data set: results that differ in any of these are never pooled.
MODEL = ("model", "source", "weights", "size", "precision")
DATA = ("dataset", "paper", "split", "protocol", "template", "prompts", "sample")


def read(folder: Path) -> DataFrame:
    """Read every results.json below a folder, with its timings.json, as one table.

    A line is a Row with its `ms_per_image` (None if unknown) and facts of the run: `file`; MODEL;
    DATA (`paper`: the papers' name, `sample`: seed of the drawn pictures, "" for all); `asked`
    pictures of `pictures`, `expected` by the protocol; `classes`; `duplicates`, number of prompts
    shared by classes; `environments`. Rows without images are left out. A run without rows has one
    line, with n = 0.

    Raises:
        ImportError: pandas is not installed.
        ValueError: no file, or a damaged or foreign one.
    """
    try:
        from pandas import DataFrame
    except ImportError as error:
        raise ImportError('results need pandas: pip install "scc_fast[evaluate]"') from error
    if not folder.is_dir():
        raise ValueError(f"{folder}: not a folder; give the one that scc-fast evaluate wrote to")
    paths = sorted(folder.rglob("results.json"))
    if not paths:
        raise ValueError(
            f"{folder}: no results.json in it or below; give the folder that scc-fast evaluate "
            "wrote to"
        )
    numbers = {"n": int, "hits": int, "accuracy": float, "ci_low": float, "ci_high": float}
    lines = [line for path in paths for line in _lines(path)]
    return DataFrame(lines, dtype=object).astype(numbers)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of one results.json; fields of newer versions may be missing."""
    top = _Fields(path, "", _load(path))
    version = top.value.get("format")
    if version != FORMAT or isinstance(version, bool):
        raise ValueError(
            f"{path}: format must be {FORMAT}, got {shown(version)}; it is not what this version "
            "of scc-fast evaluate writes"
        )
    run = top.inside("run")
    model, data = run.inside("model"), run.inside("dataset")
    asked, pictures = data.get("n", int), data.get("pictures", int, None)
    whole = pictures is not None and asked >= pictures
    first = top.get("environment", dict, {})
    places = [first, *(place.value for place in top.each("environments", []))]
    facts = {
        "file": path,
        "model": model.get("name", str),
        "source": model.get("source", str, ""),
        "weights": model.get("weights_sha256", str, ""),
        "size": "x".join(map(str, model.get("image_size", list, []))),
        "precision": model.get("precision", str, ""),
        "dataset": data.get("name", str),
        "paper": data.get("paper", str, "") or data.get("name", str),
        "split": data.get("split", str, ""),
        "protocol": data.get("protocol", str, ""),
        "template": _text(data.value.get("template")),
        "prompts": data.get("prompts_sha256", str, ""),
        "sample": "" if whole else _text(data.get("sampling_seed", int, None)),
        "asked": asked,
        "pictures": pictures,
        "expected": data.get("pictures_expected", int, None),
        "classes": _size(data.value.get("classes")),
        "duplicates": _size(data.value.get("duplicate_prompts")) or 0,
        "environments": tuple(p for at, p in enumerate(places) if p and p not in places[:at]),
    }
    times = _times(path.with_name("timings.json"))
    keys, found = set[tuple[str, ...]](), 0
    for value in top.each("rows"):
        row = _row(value)
        key = row["defense"], row["attack"], row["eps"]
        if key in keys:
            raise ValueError(f"{path}: two rows for {row['defense']} under {row['attack']}")
        keys.add(key)
        if row["n"]:
            found += 1
            yield {**facts, **row, "ms_per_image": times.get(key)}
    if not found:
        none = Row("", "", "", "", False, "", run.get("seed", int), 0, 0, 0.0, 0.0, 1.0)
        yield {**facts, **asdict(none), "ms_per_image": None}


def _row(row: _Fields) -> dict[str, Any]:
    """Checked fields of a Row."""
    found = {
        "defense": row.get("defense", str),
        "method": row.get("method", str),
        "attack": row.get("attack", str),
        "title": row.get("title", str, row.get("attack", str)),
        "aware": row.get("aware", bool, False),
        "eps": row.budget(),
        "seed": row.get("seed", int),
        **row.counts(),
        **{name: row.get(name, float) for name in ("accuracy", "ci_low", "ci_high")},
        "flagged": row.get("flagged", float, None),
        "of": [str(spec) for spec in row.get("of", list, [])],
    }
    for name in ("traits", "config", "attack_settings"):
        found[name] = row.get(name, dict, {})
    for name in ("clean_right", "clean_wrong"):
        found[name] = row.inside(name).counts() if row.value.get(name) else {}
    n, hits, accuracy = found["n"], found["hits"], found["accuracy"]
    low, high = found["ci_low"], found["ci_high"]
    if n and abs(accuracy - hits / n) > 1e-6:
        raise row.wrong(f"accuracy must be hits/n = {hits / n:g}, got {accuracy!r}")
    if not 0 <= low <= accuracy + 1e-9 or not accuracy - 1e-9 <= high <= 1:
        raise row.wrong(f"the interval [{low!r}, {high!r}] must hold the accuracy {accuracy!r}")
    return found


def _times(path: Path) -> dict[tuple[str, ...], float | None]:
    """(defense, attack, eps) -> milliseconds per image of the defense."""
    rows = _Fields(path, "", _load(path)).each("rows") if path.exists() else ()
    return {
        (row.get("defense", str), row.get("attack", str), row.budget()): row.get(
            "ms_per_image", float, None
        )
        for row in rows
    }


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as JSON, it may be cut short: {error}") from None


def _text(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def _size(value: Any) -> int | None:
    """A count, written as a number or as the counted list."""
    if isinstance(value, list | dict):
        return len(value)
    return value if type(value) is int else None


class _Fields:
    """JSON object with typed access; errors name file and place."""

    def __init__(self, path: Path, where: str, value: Any) -> None:
        self.path, self.where = path, where
        if not isinstance(value, dict):
            raise self.wrong(f"must be an object, got {shown(value)}")
        self.value = value

    def wrong(self, what: str) -> ValueError:
        place = f" {self.where}" if self.where else ""
        return ValueError(f"{self.path}:{place} {what}; it is not what scc-fast evaluate writes")

    def get(self, name: str, kind: type, default: Any = ...) -> Any:
        """Field of a type, or `default` if missing or null."""
        if default is not ... and self.value.get(name) is None:
            return default
        if name not in self.value:
            raise self.wrong(f"has no {name!r}")
        value: Any = self.value[name]
        if kind is float and type(value) is int:
            value = float(value)
        # Neither a bool nor NaN counts as a number.
        if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
            raise self.wrong(f"{name!r} must be {kind.__name__}, got {shown(value)}")
        return value

    def inside(self, name: str) -> _Fields:
        return _Fields(self.path, f"{self.where}.{name}".strip("."), self.get(name, dict))

    def each(self, name: str, default: Any = ...) -> Iterator[_Fields]:
        for index, value in enumerate(self.get(name, list, default)):
            yield _Fields(self.path, f"{name}[{index}]", value)

    def counts(self) -> dict[str, int]:
        """Fields n and hits."""
        n, hits = self.get("n", int), self.get("hits", int)
        if not 0 <= hits <= n:
            raise self.wrong(f"must have 0 <= hits <= n, got {hits} of {n}")
        return {"n": n, "hits": hits}

    def budget(self) -> str:
        """Budget of a row, normalised: "4/255"."""
        value: Any = self.value.get("eps")
        if self.get("attack", str) == CLEAN:
            return format_epsilon(0.0)
        try:
            return format_epsilon(parse_epsilon(value))
        except ValueError:
            raise self.wrong(f"eps must be a budget such as '4/255', got {shown(value)}") from None
