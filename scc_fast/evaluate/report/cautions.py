"""Cautions: warnings at the head of a report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import pandas as pd
from pandas import DataFrame

from scc_fast.evaluate.report import paper
from scc_fast.evaluate.report.pool import Measured, clean, each, once_a_set, select, worst
from scc_fast.evaluate.report.tables import paper_hits
from scc_fast.evaluate.results import MODEL, WORST

FEW = 500


def cautions(found: Measured) -> list[str]:
    """Warnings as sentences, by falling severity."""
    groups = [group for _, group in found.figures.groupby("group", sort=False)]
    said = [text for group in groups for text in _alone(group)]
    said += [text for group in groups for text in _leaks(group)]
    said += [text for group in groups for text in _uneven(group)]
    said += _twice(found.figures)
    protocols = [name or "unnamed" for name in dict.fromkeys(found.runs.protocol)]
    if len(protocols) > 1:
        said.append(
            f"Protocols are mixed ({', '.join(protocols)}): pixels, prompts and splits differ, so "
            "figures compare within a protocol only. Tables are apart, and nothing is averaged "
            "over them."
        )
    for group, runs in found.runs.groupby("group", sort=False):
        rows = found.rows[found.rows.group == group]
        said += _small(rows[rows.used])
        said += [f"{runs['where'].iloc[0]}: {note}." for note in found.left_out.get(group, [])]
        said += dict.fromkeys(_partial(runs, rows))
    return said


def _where(group: DataFrame) -> str:
    return str(group["where"].iloc[0])


def _gathered(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Group (what, who) by what, without repeats, in order."""
    found: dict[str, list[str]] = {}
    for what, who in dict.fromkeys(pairs):
        found.setdefault(what, []).append(who)
    return found


def _by(found: Mapping[str, list[str]]) -> str:
    return "; ".join(f"{', '.join(names)}: {what}" for what, names in found.items())


def _alone(group: DataFrame) -> Iterator[str]:
    """Oblivious attacks without an adaptive one."""
    known = {(one.eps, one.defense) for one in each(worst(group))}
    some = group[group.oblivious & (group.method != "none")]
    some = select(some, [(one.eps, one.defense) not in known for one in each(some)])
    missing = _gathered(
        (", ".join(dict.fromkeys(alone.sort_values("defense_order").defense)), eps)
        for eps, alone in some.sort_values("attack_order").groupby("eps", sort=False)
    )
    for specs, budgets in missing.items():
        yield (
            f"{_where(group)}, at {', '.join(budgets)}: no attack that knows the defense was made "
            f"on {specs}. Robust accuracy without one says nothing about an attacker who knows "
            "(add adaptive to the attacks)."
        )


def _leaks(group: DataFrame) -> Iterator[str]:
    """Robust accuracy above clean accuracy."""
    kept = {one.defense: one.value for one in each(clean(group))}
    some = group[group.oblivious & ~group.control & group.defense.isin(list(kept))]
    found = _gathered(
        (one.defense, f"{one.value:.1f} % under {one.title} at {one.eps}")
        for one in each(some)
        if one.value > kept[one.defense]
    )
    for defense, attacks in found.items():
        yield (
            f"{_where(group)}: {defense} has {', '.join(attacks)}, but {kept[defense]:.1f} % on "
            "clean images. Robust above clean is the signature of an attack that gives the true "
            "label away; see the table of the label leak."
        )


def _uneven(group: DataFrame) -> Iterator[str]:
    """Different adaptive attacks, or numbers of images, between defenses."""
    for eps, known in worst(group).groupby("eps", sort=False):
        met = _gathered((one.over, one.defense) for one in each(known))
        if len(met) > 1 or any(" / " in text for text in met):
            yield (
                f"{_where(group)}, at {eps}: the worst adaptive is not over the same attacks "
                f"everywhere ({_by(met)}). An attack is missing where it does not suit a defense "
                "(one on the gate where there is none) or was not run; every attack more can only "
                "lower the figure."
            )
    for _, under in group[group.aware].groupby("attack_order"):
        counts = _gathered((f"n={one.n}", one.defense) for one in each(under))
        if len(counts) > 1:
            one = under.iloc[0]
            yield (
                f"{_where(group)}: {one.title} at {one.eps} rests on other numbers of images for "
                f"some defenses than for others ({_by(counts)}); compare them with that in mind."
            )


def _twice(figures: DataFrame) -> Iterator[str]:
    """Groups left out of an average, whose data set another group has."""
    found = []
    for sets in (paper.SETS, paper.MEDICAL):
        for attack, eps in dict.fromkeys((one.attack, one.eps) for one in paper.FIGURES):
            hit = paper_hits(figures, sets, attack, eps)
            seen = once_a_set(hit, clean(figures[figures.group.isin(hit.group)]))
            same = ["defense", *MODEL, "protocol", "set"]
            found.append(seen[~seen.counted].merge(seen[seen.counted], on=same))
    left = pd.concat(found).drop_duplicates(["group_x", "group_y", "defense"])
    names = dict(zip(figures.group, figures["where"], strict=True))
    for (other, first), some in left.groupby(["group_x", "group_y"]):
        yield (
            f"{names[other]}: in no average for {', '.join(some.defense)}; {names[first]} is the "
            "same data set with as many images or more, and is counted in its place."
        )


def _small(rows: DataFrame) -> Iterator[str]:
    few = sorted(set(rows.n[rows.n < FEW]))
    if few:
        span = f"{few[0]}" if len(few) == 1 else f"{few[0]} to {few[-1]}"
        yield (
            f"{_where(rows)}: {(rows.n < FEW).sum()} of {len(rows)} figures rest on fewer than "
            f"{FEW} images (n = {span}); mind their intervals."
        )


def _partial(runs: DataFrame, rows: DataFrame) -> Iterator[str]:
    """Unfinished runs, samples of the data, duplicate prompts."""
    where = _where(runs)
    for run in each(runs.rename(columns={"where": "title"})):
        if run.n == 0:
            yield f"{where}, seed {run.seed}: no figure yet."
        elif run.expected is not None and run.pictures not in (None, run.expected):
            yield (
                f"{where}, seed {run.seed}: the data set has {run.pictures} pictures here, "
                f"{run.expected} in the protocol."
            )
    short = rows[(rows.n < rows.asked) & ~rows.aware.astype(bool) & (rows.attack != WORST)]
    if len(short):
        pairs = sorted(set(zip(short.asked, short.n, strict=True)))
        counts = ", ".join(f"{n} of {asked}" for asked, n in pairs)
        yield f"{where}: some figures rest on a part of the pictures ({counts})."
    sizes = rows[rows.used].groupby(["defense", "attack", "eps"], sort=False).n.nunique()
    uneven = dict.fromkeys(defense for (defense, _, _), count in sizes.items() if count > 1)
    if uneven:
        yield (
            f"{where}: seeds of different numbers of images are averaged for {', '.join(uneven)}."
        )
    if duplicates := runs.duplicates.max():
        yield (
            f"{where}: prompts that name two classes or more: {duplicates}; between such classes "
            "the answer is arbitrary."
        )
