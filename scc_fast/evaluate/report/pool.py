"""Rows put together over their seeds, and what is asked of an attack: a line for each figure.

Only rows of one model, data set and protocol are put together.
"""

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
    place,
    wilson,
)

DAGGER = "†"
# A figure: percent where it has an interval or a spread, text where it is published; its 95 %
# interval, or its sample standard deviation over `seeds` seeds; the images that it rests on
# ("1000", "100–1000" where seeds differ); how many data sets it is an average of (0: none); what is
# said behind it; digits behind the point.
FIGURE = ("value", "ci_low", "ci_high", "std", "n", "seeds", "sets", "note", "digits")


@dataclass(frozen=True)
class Measured:
    """Everything that was measured.

    Args:
        runs: a line for each results.json: read()'s columns of a run, with `group`, a number for
            each model and data set, and `where`, its name.
        rows: a line for each accuracy of one seed: read()'s columns, with the same two; `used`
            unless another run of that seed has it with as many images or more.
        figures: a line for each accuracy over its seeds: FIGURE, with `group`, `where`, what all
            seeds share, and what pool() adds; by group, defense (undefended first, else in the
            order of METHODS) and attack (by budget, clean and damaged first; else as place() says).
        left_out: sentences by group: what another run of the same seed had with more images.
    """

    runs: DataFrame
    rows: DataFrame
    figures: DataFrame
    left_out: dict[int, list[str]]


def measured(frame: DataFrame) -> Measured:
    """The table of read(), put together.

    Raises:
        ValueError: two runs of one seed and n contradict each other; both files are named.
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
    """Of rows that two runs have of one seed, those with more images; and what is left out."""
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


# What all seeds of a figure share, and what pool() says of it beside FIGURE.
_SHARED = ("group", "where", *MODEL, *DATA, "defense", "method", "attack", "title", "aware", "eps")
_MORE = ("traits", "config", "label", "set", "most", "by_seed", "right", "wrong", "flagged", "ms")
_ATTACK = ("over", "base", "steps", "oblivious", "control", "papers")
_TYPES = {"group": int, "aware": bool, "oblivious": bool, "control": bool, "most": int}


def pool(rows: DataFrame) -> DataFrame:
    """A line for each figure over its seeds, in the order of tables.

    Beside FIGURE and what its rows share it has `label`, the defense as tables show it; `set`, one
    name for a data set; `most`, the largest n; `by_seed`, (seed, accuracy, ci_low, ci_high) of
    each; `right` and `wrong`, figures of the images that the undefended model gets right (wrong)
    when clean, or {}; `flagged`, percent, and `ms`, means, None if not known; `over`, the attacks
    that a worst row is over; the attack's `base` name and `steps`; whether it is `oblivious` (does
    not know the defense; damage is no attack), a `control` (cannot give the label away), the
    `headline` of its budget (PGD-10 as published, else the first that is oblivious and no control);
    `papers`, which of the papers' attacks it is: "pgd10", "cw", "aa" or "". `defense_order` and
    `attack_order` are their places in tables.
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
        key=lambda one: (parse_epsilon(one[1]), place(*one)),
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
    """One line of pool(), of one row a seed."""
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
    """FIGURE of a value; {} where it is None."""
    blank = {"ci_low": None, "ci_high": None, "std": None, "n": "", "seeds": 1, "sets": 0}
    return {} if value is None else {"value": value, **blank, "note": "", "digits": 1, **more}


def figure_of(line: Any) -> dict[str, Any]:
    """The figure of a line of pool()."""
    return {name: getattr(line, name) for name in FIGURE}


def beside(lines: DataFrame, others: DataFrame) -> list[dict[str, Any]]:
    """For each line the figure that its defense has among others; {} where it has none."""
    found = {one.defense: figure_of(one) for one in each(others)}
    return [found.get(spec, {}) for spec in lines.defense]


def shares(counts: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """The figure of (hits, n) of each seed: one alone has its Wilson interval, several have mean
    and spread; {} where there is none, or one without an image."""
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
    """The unweighted mean over data sets, of measured figures alone; {} over none.

    One seed each: the interval puts the sets' Wilson intervals together as independent ones,
    mean ± √Σ(distance to the limit)²/k (MOVER: Zou and Donner, Statistics in Medicine 2008).
    The same seeds everywhere: the spread is that of the seeds' means. Else neither is said.

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
    """A figure as "94.1 [92.5, 95.4] (n=1000)", "94.1 ± 0.4 (3 seeds, n=1000)" or "59.18†"."""
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
    """The attack's name without its steps, "pgd" of "pgd10", and these; settings go first."""
    settings, spec = one["attack_settings"], one["attack"]
    base, steps = settings.get("attack"), settings.get("steps")
    if type(steps) is not int:
        match = re.fullmatch(r"[^:]*?(\d+)", spec)
        steps = int(match[1]) if match else None
    return base if isinstance(base, str) else base_of(spec), steps


def _paper_attack(one: Mapping[str, Any], base: str, steps: int | None) -> str:
    """Which of the papers' attacks an oblivious one is."""
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
    """Of each group, defense and budget the worst, image by image, of all attacks.

    Some of these know the defense. Where no such row is there: the attack that knows it and hurts
    most, which is the weaker of the two statements, and which `over` then names.
    """
    aware = figures[figures.aware]
    aware = aware.assign(stands_in=aware.attack != WORST)
    aware = aware.sort_values(["stands_in", "value"], kind="stable")
    first = aware.drop_duplicates(["group", "defense", "eps"]).sort_index()
    alone = first.title + " alone"
    return first.assign(over=first.over.where(~first.stands_in, alone))


def clean(figures: DataFrame) -> DataFrame:
    """The figures without an attack."""
    return figures[figures.attack == CLEAN]


def once_a_set(hit: DataFrame, kept: DataFrame) -> DataFrame:
    """Which group an average takes a data set from: that with the most images under the attack,
    then when clean. A full and a sampled run, or two splits, are the same data set.

    Args:
        hit: figures under one attack.
        kept: clean ones.

    Returns:
        `group`, `defense`, MODEL, `protocol` and `set` of both, the first of each set `counted`.
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
    """SCC with one of its two parts switched off."""
    off = [
        one.method == "scc" and False in (one.config.get("semantic"), one.config.get("spatial"))
        for one in each(figures)
    ]
    return pd.Series(off, figures.index, dtype=bool)


# -------------------------------------------------------------------------------------------- names


def each(frame: DataFrame) -> Iterable[Any]:
    """The lines, with the columns as attributes."""
    return frame.itertuples(index=False, name="Line")


def select(frame: DataFrame, flags: Iterable[object]) -> DataFrame:
    """The lines whose flag is set."""
    return frame[pd.Series([bool(flag) for flag in flags], frame.index, dtype=bool)]


def titles(frame: DataFrame, fields: Sequence[str]) -> pd.Series:
    """For each line a short name of its MODEL or DATA, with what tells it from others of it."""
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
    """The parts of a spec, ["semantic=false"], written with colons or as JSON."""
    head, brace, rest = spec.partition("{")
    try:
        config = json.loads(brace + rest) if brace else {}
    except json.JSONDecodeError:
        return [brace + rest]
    return head.split(":")[1:] + [f"{name}={json.dumps(value)}" for name, value in config.items()]
