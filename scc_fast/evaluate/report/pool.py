"""Pool: figures from rows over seeds, within one model, data set and protocol."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from pandas import DataFrame

from scc_fast.config import parse_epsilon
from scc_fast.evaluate.report import paper
from scc_fast.evaluate.results import (
    CLEAN,
    DATA,
    MODEL,
    NO_BUDGET,
    WORST,
    base_of,
    column_order,
    wilson,
)

DAGGER = "†"
# A figure: percent if measured, text if published; its 95 % interval, or its sample standard
# deviation over `seeds` seeds; number of images ("1000", "100–1000" over seeds); number of averaged
# data sets (0: none); note; digits after the point.
FIGURE = ("value", "ci_low", "ci_high", "std", "n", "seeds", "sets", "note", "digits")


@dataclass(frozen=True)
class Measured:
    """Pooled results.

    Args:
        runs: a line per results.json: read()'s columns of a run, `group` (number of a model and
            data set) and `where` (its name).
        rows: a line per accuracy of one seed: read()'s columns, `group` and `where`; `used` unless
            another run of the seed has it with as many images or more.
        figures: a line per accuracy over seeds: FIGURE, `group`, `where`, columns common to the
            seeds, and those of pool(); by group, defense (undefended first, else by METHODS) and
            attack (by budget, clean and damaged first, else by column_order()).
        left_out: sentences by group: rows replaced by a larger run of the same seed.
    """

    runs: DataFrame
    rows: DataFrame
    figures: DataFrame
    left_out: dict[int, list[str]]


def measured(frame: DataFrame) -> Measured:
    """Pool the table of read().

    Raises:
        ValueError: two runs of one seed and n contradict each other.
    """
    frame = frame.assign(group=frame.groupby([*MODEL, *DATA], sort=False).ngroup())
    models, datas = titles(frame, MODEL), titles(frame, DATA)
    protocol = frame.protocol.where(frame.protocol != "", "unnamed")
    frame = frame.assign(where=datas + ", " + models + ", protocol " + protocol)
    rows = frame[frame.n > 0]
    used, left_out = _once(rows)
    rows = rows.assign(used=used)
    return Measured(frame.drop_duplicates("file"), rows, pool(rows[used]), left_out)


def _once(rows: DataFrame) -> tuple[pd.Series, dict[int, list[str]]]:
    """Rows with the most images per seed, and notes on the others."""
    key = ["group", "defense", "attack", "eps", "seed"]
    ordered = rows.sort_values("n", ascending=False, kind="stable")
    left: dict[tuple[int, Any, Any], int] = {}
    for _, same in ordered[ordered.duplicated(key, keep=False)].groupby(key, sort=False):
        best = same.iloc[0]
        for _, other in same.iloc[1:].iterrows():
            if other.n < best.n:
                files = best.group, other.file, best.file
                left[files] = left.get(files, 0) + 1
            elif other.hits != best.hits:
                raise ValueError(
                    f"{other.file} and {best.file} contradict each other: {best.defense} under "
                    f"{best.attack} at {best.eps}, seed {best.seed}, has {other.hits} and "
                    f"{best.hits} of {best.n} right; give a folder that holds one of them"
                )
    notes: dict[int, list[str]] = {}
    for (group, loser, winner), count in left.items():
        text = f"{count} rows of {loser} are left out: {winner} has them with more images"
        notes.setdefault(group, []).append(text)
    return ~ordered.duplicated(key).sort_index(), notes


# Columns common to the seeds of a figure, and columns of pool() beside FIGURE.
_SHARED = ("group", "where", *MODEL, *DATA, "defense", "method", "attack", "title", "aware", "eps")
_MORE = ("traits", "config", "label", "set", "most", "by_seed", "right", "wrong", "flagged", "ms")
_ATTACK = ("over", "base", "steps", "oblivious", "control", "papers")
_TYPES = {"group": int, "aware": bool, "oblivious": bool, "control": bool, "most": int}


def pool(rows: DataFrame) -> DataFrame:
    """One line per figure over seeds, in the order of tables.

    Columns beside FIGURE and those common to its rows: `label`, the defense in tables; `set`, name
    of the data set; `most`, the largest n; `by_seed`, (seed, accuracy, ci_low, ci_high) of each;
    `right` and `wrong`, figures of the images that the undefended model gets right (wrong) when
    clean, or {}; `flagged`, percent, and `ms`, means, or None; `over`, attacks of a worst row; the
    attack's `base` name and `steps`; `oblivious` (an attack without knowledge of the defense),
    `control` (without the label), `headline` of its budget (PGD-10 as published, else the first
    oblivious attack that is no control); `papers`, the papers' attack: "pgd10", "cw", "aa" or "";
    `defense_order` and `attack_order`, order in tables.
    """
    parts = rows.sort_values("seed", kind="stable").groupby(
        ["group", "defense", "attack", "eps"], sort=False
    )
    columns = [*_SHARED, *_MORE, *_ATTACK, *FIGURE]
    lines = [_pooled(part.to_dict("records")) for _, part in parts]
    found = DataFrame(lines, columns=columns, dtype=object).astype(_TYPES)
    defenses = sorted(
        {(paper.rank(one.method), one.method, len(one.defense), one.defense) for one in each(found)}
    )
    attacks = sorted(
        dict.fromkeys((one.attack, one.eps, one.aware) for one in each(found)),
        key=lambda one: (parse_epsilon(one[1]), column_order(*one)),
    )
    defense_order = {spec: order for order, (*_, spec) in enumerate(defenses)}
    attack_order = {one[:2]: order for order, one in enumerate(attacks)}
    found = found.assign(
        defense_order=[defense_order[one.defense] for one in each(found)],
        attack_order=[attack_order[one.attack, one.eps] for one in each(found)],
    )
    by_turn = found.sort_values(["group", "attack_order", "defense_order"], kind="stable")
    some = by_turn[by_turn.oblivious & ~by_turn.control]
    some = some.sort_values("papers", key=lambda name: name != "pgd10", kind="stable")
    first = some.groupby(["group", "eps"], sort=False).attack.transform("first")
    headline = (some.attack == first).reindex(found.index, fill_value=False)
    found = found.assign(headline=headline.astype(bool))
    return found.sort_values(
        ["group", "defense_order", "attack_order"], kind="stable", ignore_index=True
    )


def _pooled(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Line of pool() from one row per seed."""
    one = rows[0]
    figure = shares([(row["hits"], row["n"]) for row in rows])
    if len(rows) == 1:
        figure |= {"ci_low": 100 * one["ci_low"], "ci_high": 100 * one["ci_high"]}
    oblivious = one["attack"] != WORST and one["eps"] != NO_BUDGET and not one["aware"]
    base, steps = _base_and_steps(one)
    of = [" + ".join(spec for spec in row["of"] if spec != CLEAN) for row in rows]
    over = [names or "attacks that are not named" for names in of]
    return {
        **{name: one[name] for name in (*_SHARED, "traits", "config")},
        **figure,
        "aware": one["aware"] or one["attack"] == WORST,
        "label": method_label(one["method"], one["defense"]),
        "set": paper.known_set(one["dataset"]) or one["dataset"],
        "most": max(row["n"] for row in rows),
        "by_seed": [(row["seed"], row["accuracy"], row["ci_low"], row["ci_high"]) for row in rows],
        "right": _part(rows, "clean_right"),
        "wrong": _part(rows, "clean_wrong"),
        "flagged": _mean([row["flagged"] for row in rows], 100),
        "ms": _mean([row["ms_per_image"] for row in rows], 1),
        "over": " / ".join(dict.fromkeys(over)) if one["attack"] == WORST else "",
        "base": base,
        "steps": steps,
        "oblivious": oblivious,
        "control": base in ("pgd-own", "pgd-random"),
        "papers": _paper_attack(one, base, steps) if oblivious else "",
    }


def _part(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    counts = [(row[name]["hits"], row[name]["n"]) for row in rows if row[name]]
    return shares(counts)


def _mean(values: Sequence[float | None], factor: int) -> float | None:
    known = [factor * value for value in values if value is not None]
    return sum(known) / len(known) if known else None


# ------------------------------------------------------------------------------------------ figures


def figure(value: float | str | None = None, **more: Any) -> dict[str, Any]:
    """FIGURE of a value; {} for None."""
    blank = {"ci_low": None, "ci_high": None, "std": None, "n": "", "seeds": 1, "sets": 0}
    return {} if value is None else {"value": value, **blank, "note": "", "digits": 1, **more}


def figure_of(line: Any) -> dict[str, Any]:
    """FIGURE of a line of pool()."""
    return {name: getattr(line, name) for name in FIGURE}


def beside(lines: DataFrame, others: DataFrame) -> list[dict[str, Any]]:
    """For each line, the figure of its defense among others, or {}."""
    found = {one.defense: figure_of(one) for one in each(others)}
    return [found.get(spec, {}) for spec in lines.defense]


def shares(counts: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Figure of (hits, n) per seed: Wilson interval of one seed, mean and spread of several;
    {} without seeds, or with an empty one."""
    if not counts or not all(n for _, n in counts):
        return {}
    percent = [100 * hits / n for hits, n in counts]
    sizes = sorted({n for _, n in counts})
    n = f"{sizes[0]}–{sizes[-1]}" if len(sizes) > 1 else str(sizes[0])
    if len(counts) > 1:
        spread = statistics.stdev(percent)
        return figure(statistics.mean(percent), std=spread, n=n, seeds=len(counts))
    low, high = wilson(*counts[0])
    return figure(percent[0], ci_low=100 * low, ci_high=100 * high, n=n)


def average(sets: Sequence[Sequence[tuple[int, float, float, float]]]) -> dict[str, Any]:
    """Unweighted mean over data sets with measured figures; {} without any.

    One seed each: the interval combines independent Wilson intervals,
    mean ± √Σ(distance to the limit)²/k (MOVER: Zou and Donner, Statistics in Medicine 2008).
    Equal seeds: the spread is that of the seeds' means. Otherwise neither is given.

    Args:
        sets: pool()'s `by_seed` of each data set.
    """
    if not sets:
        return {}
    k = len(sets)
    mean = statistics.mean(statistics.mean(100 * one[1] for one in some) for some in sets)
    seeds = [tuple(one[0] for one in some) for some in sets]
    if all(len(some) == 1 for some in seeds):
        below = math.sqrt(sum((100 * (a - low)) ** 2 for ((_, a, low, _),) in sets)) / k
        above = math.sqrt(sum((100 * (high - a)) ** 2 for ((_, a, _, high),) in sets)) / k
        low, high = max(0.0, mean - below), min(100.0, mean + above)
        return figure(mean, ci_low=low, ci_high=high, sets=k)
    if len(set(seeds)) == 1:
        means = [statistics.mean(100 * some[i][1] for some in sets) for i in range(len(seeds[0]))]
        return figure(mean, std=statistics.stdev(means), seeds=len(means), sets=k)
    return figure(mean, sets=k, note="seeds differ")


def text(one: Mapping[str, Any], with_n: bool = True) -> str:
    """Figure as text: "94.1 [92.5, 95.4] (n=1000)", "94.1 ± 0.4 (3 seeds, n=1000)" or "59.18†"."""
    value, digits = one["value"], one["digits"]
    sets = f"{one['sets']} set{'s' * (one['sets'] != 1)}"
    if isinstance(value, str):
        return value + DAGGER + (f" ({sets})" if one["sets"] > 1 else "")
    found = f"{value:.{digits}f}"
    if one["std"] is not None:
        found += f" ± {one['std']:.{digits}f}"
    elif one["ci_low"] is not None:
        found += f" [{one['ci_low']:.{digits}f}, {one['ci_high']:.{digits}f}]"
    behind = [f"{one['seeds']} seeds"] if one["seeds"] > 1 else []
    behind += [sets] if one["sets"] else []
    behind += [f"n={one['n']}"] if with_n and one["n"] else []
    behind += [one["note"]] if one["note"] else []
    return found + (f" ({', '.join(behind)})" if behind else "")


# ----------------------------------------------------------------------------- attacks and defenses


def _base_and_steps(one: Mapping[str, Any]) -> tuple[str, int | None]:
    """Name and steps of an attack: "pgd" and 10 of "pgd10"."""
    settings, spec = one["attack_settings"], one["attack"]
    base, steps = settings.get("attack"), settings.get("steps")
    if type(steps) is not int:
        match = re.fullmatch(r"[^:]*?(\d+)", spec)
        steps = int(match[1]) if match else None
    return base if isinstance(base, str) else base_of(spec), steps


def _paper_attack(one: Mapping[str, Any], base: str, steps: int | None) -> str:
    """The papers' name of an oblivious attack, or ""."""
    settings = one["attack_settings"]
    if base in ("pgd", "cw"):
        try:
            small = abs(parse_epsilon(settings.get("alpha", "1/255")) * 255 - 1) < 1e-6
        except ValueError:
            return ""
        alike = steps == 10 and small and settings.get("restarts", 1) == 1
        return ("pgd10" if base == "pgd" else "cw") if alike else ""
    plain = steps == 100 and settings.get("complete", False) is False
    return "aa" if base == "aa" and plain else ""


def worst(figures: DataFrame) -> DataFrame:
    """Worst over all attacks, image by image, per group, defense and budget.

    Without such a row: the strongest adaptive attack, a weaker statement, named in `over`.
    """
    aware = figures[figures.aware]
    aware = aware.assign(stands_in=aware.attack != WORST)
    aware = aware.sort_values(["stands_in", "value"], kind="stable")
    first = aware.drop_duplicates(["group", "defense", "eps"]).sort_index()
    alone = first.title + " alone"
    return first.assign(over=first.over.where(~first.stands_in, alone))


def clean(figures: DataFrame) -> DataFrame:
    """Figures without an attack."""
    return figures[figures.attack == CLEAN]


def once_a_set(hit: DataFrame, kept: DataFrame) -> DataFrame:
    """Choose one group per data set for an average: the one with the most images under the
    attack, then when clean. Full and sampled runs, and splits, are the same data set.

    Args:
        hit: figures under one attack.
        kept: clean ones.

    Returns:
        `group`, `defense`, MODEL, `protocol` and `set`; `counted` for the chosen group.
    """
    key = ["group", "defense", *MODEL, "protocol", "set"]
    both = pd.concat(
        [hit.assign(attacked=hit.most, whole=0), kept.assign(attacked=0, whole=kept.most)]
    )
    found = both.groupby(key, sort=False, as_index=False)[["attacked", "whole"]].max()
    found = found.sort_values("group", kind="stable")
    found = found.sort_values(["attacked", "whole"], ascending=False, kind="stable")
    return found.assign(counted=~found.duplicated(["defense", *MODEL, "protocol", "set"]))


def is_ablation(figures: DataFrame) -> pd.Series:
    """Whether a spec is SCC with one of its two parts off."""
    off = [
        one.method == "scc" and False in (one.config.get("semantic"), one.config.get("spatial"))
        for one in each(figures)
    ]
    return pd.Series(off, figures.index, dtype=bool)


# -------------------------------------------------------------------------------------------- names


def each(frame: DataFrame) -> Iterable[Any]:
    """Lines with columns as attributes."""
    return frame.itertuples(index=False, name="Line")


def select(frame: DataFrame, flags: Iterable[object]) -> DataFrame:
    """Lines with a flag set."""
    return frame[pd.Series([bool(flag) for flag in flags], frame.index, dtype=bool)]


def titles(frame: DataFrame, fields: Sequence[str]) -> pd.Series:
    """Short name of each line's MODEL or DATA, with distinguishing columns."""
    things = list(frame[list(fields)].itertuples(index=False, name=None))
    shown = list(fields).index("paper") if "paper" in fields else 0
    found: dict[tuple[str, ...], str] = {}
    for thing in dict.fromkeys(things):
        twins = [one for one in {*things} if one[shown] == thing[shown] and one != thing]
        extra = []
        for at, (field, value) in enumerate(zip(fields, thing, strict=True)):
            if any(twin[at] != value for twin in twins):
                short = value[:8] if field in ("weights", "prompts") else value
                extra.append(value if field == "dataset" else f"{field} {short}")
        found[thing] = f"{thing[shown]} ({', '.join(extra)})" if extra else thing[shown]
    return pd.Series([found[thing] for thing in things], frame.index, dtype=object)


def method_label(method: str, spec: str) -> str:
    """ "SCC" of "scc", "SCC (semantic=false)" of "scc:semantic=false"."""
    title = paper.METHODS.get(method, method)
    rest = ", ".join(settings_of(spec))
    return f"{title} ({rest})" if rest else title


def settings_of(spec: str) -> list[str]:
    """Settings of a spec, as ["semantic=false"], from colons or JSON."""
    head, brace, rest = spec.partition("{")
    try:
        config = json.loads(brace + rest) if brace else {}
    except json.JSONDecodeError:
        return [brace + rest]
    return head.split(":")[1:] + [f"{name}={json.dumps(value)}" for name, value in config.items()]
