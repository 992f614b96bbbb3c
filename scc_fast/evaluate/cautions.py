"""What a reader must know before the figures: warnings at the head of a report."""

from __future__ import annotations

from collections.abc import Sequence

from scc_fast.evaluate import paper
from scc_fast.evaluate.attack_tables import place
from scc_fast.evaluate.cells import over, pooled
from scc_fast.evaluate.collect import WORST
from scc_fast.evaluate.groups import (
    Group,
    attack_of,
    is_control,
    is_oblivious,
    once_a_set,
    titles,
)

FEW = 500


def cautions(groups: Sequence[Group]) -> list[str]:
    """Sentences, the gravest first; none if there is nothing to say."""
    models = titles([group.model for group in groups])
    datas = titles([group.data for group in groups])
    named = [(group, place(group, models, datas)) for group in groups]
    found = [text for group, where in named for text in _alone(group, where)]
    found += [text for group, where in named for text in _leaks(group, where)]
    found += [text for group, where in named for text in _uneven(group, where)]
    found += _twice(groups, {id(group): where for group, where in named})
    protocols = list(dict.fromkeys(group.data.protocol or "unnamed" for group in groups))
    if len(protocols) > 1:
        found.append(
            f"Protocols are mixed ({', '.join(protocols)}): pixels, prompts and splits differ, so "
            "figures compare within a protocol only. Tables are apart, and nothing is averaged "
            "over them."
        )
    for group, where in named:
        found += _small(group, where) + _partial(group, where)
    return found


def _alone(group: Group, where: str) -> list[str]:
    """Figures under attacks that do not know the defense, without one that does beside them."""
    missing: dict[tuple[str, ...], list[str]] = {}
    for eps in group.budgets():
        alone = tuple(defense for defense in group.defenses() if _is_alone(group, defense, eps))
        if alone:
            missing.setdefault(alone, []).append(eps)
    return [
        f"{where}, at {', '.join(budgets)}: no attack that knows the defense was made on "
        f"{', '.join(alone)}. Robust accuracy without one says nothing about an attacker who "
        "knows (add adaptive to the attacks)."
        for alone, budgets in missing.items()
    ]


def _is_alone(group: Group, defense: str, eps: str) -> bool:
    if group.first(defense).method == "none" or group.worst(defense, eps):
        return False
    return any(
        key[0] == defense and found[0].eps == eps and is_oblivious(found[0])
        for key, found in group.rows.items()
    )


def _uneven(group: Group, where: str) -> list[str]:
    """Where defenses met different attacks that know them, or on different numbers of images."""
    found = []
    for eps in group.budgets():
        met: dict[str, list[str]] = {}
        for defense in group.defenses():
            if text := over(group.worst(defense, eps)):
                met.setdefault(text, []).append(defense)
        if len(met) > 1 or any(" / " in text for text in met):
            found.append(
                f"{where}, at {eps}: the worst adaptive is not over the same attacks everywhere "
                f"({_by(met)}). An attack is missing where it does not suit a defense (one on the "
                "gate where there is none) or was not run; every attack more can only lower the "
                "figure."
            )
    for one in group.attacks():
        if not one.aware and one.attack != WORST:
            continue
        counts: dict[str, list[str]] = {}
        for defense in group.defenses():
            if measures := group.get(defense, one.attack, one.eps):
                n = "/".join(str(n) for n in sorted({m.n for m in measures}))
                counts.setdefault(f"n={n}", []).append(defense)
        if len(counts) > 1:
            found.append(
                f"{where}: {one.title} at {one.eps} rests on other numbers of images for some "
                f"defenses than for others ({_by(counts)}); compare them with that in mind."
            )
    return found


def _by(found: dict[str, list[str]]) -> str:
    return "; ".join(f"{', '.join(names)}: {what}" for what, names in found.items())


def _twice(groups: Sequence[Group], where: dict[int, str]) -> list[str]:
    """Groups that an average leaves out, because it has their data set from another one."""
    left: dict[tuple[int, int], dict[str, None]] = {}
    for sets, attacks in ((paper.SETS, paper.SIXTEEN), (paper.MEDICAL, paper.SIX)):
        for attack, eps in attacks:
            of: dict[tuple[object, str], list[Group]] = {}
            for group in groups:
                if paper.known_set(group.data.name) in sets and attack_of(group, attack, eps):
                    of.setdefault((group.model, group.data.protocol), []).append(group)
            for some in of.values():
                for defense in dict.fromkeys(d for group in some for d in group.defenses()):
                    for first, *rest in once_a_set(some, defense, attack, eps).values():
                        for other in rest:
                            left.setdefault((id(other), id(first)), {})[defense] = None
    return [
        f"{where[other]}: in no average for {', '.join(defenses)}; {where[first]} is the same data "
        "set with as many images or more, and is counted in its place."
        for (other, first), defenses in left.items()
    ]


def _leaks(group: Group, where: str) -> list[str]:
    """Robust above clean accuracy."""
    found: dict[tuple[str, float], list[str]] = {}
    for (defense, _, eps), measures in group.rows.items():
        clean, robust = pooled(group.clean(defense)).value, pooled(measures).value
        one = measures[0]
        if not is_oblivious(one) or is_control(one) or clean is None or robust is None:
            continue
        if robust > clean:
            text = f"{robust:.1f} % under {one.title} at {eps}"
            found.setdefault((defense, clean), []).append(text)
    return [
        f"{where}: {defense} has {', '.join(attacks)}, but {clean:.1f} % on clean images. Robust "
        "above clean is the signature of an attack that gives the true label away; see the table "
        "of the label leak."
        for (defense, clean), attacks in found.items()
    ]


def _small(group: Group, where: str) -> list[str]:
    few = sorted({m.n for ms in group.rows.values() for m in ms if m.n < FEW})
    if not few:
        return []
    total = sum(len(ms) for ms in group.rows.values())
    some = sum(m.n < FEW for ms in group.rows.values() for m in ms)
    span = f"{few[0]}" if len(few) == 1 else f"{few[0]} to {few[-1]}"
    return [
        f"{where}: {some} of {total} figures rest on fewer than {FEW} images (n = {span}); mind "
        "their intervals."
    ]


def _partial(group: Group, where: str) -> list[str]:
    """Runs that are not done, are of a part of the data, or have prompts twice."""
    found = [f"{where}: {note}." for note in group.left_out]
    for run in group.runs:
        if not run.measures:
            found.append(f"{where}, seed {run.seed}: no figure yet.")
        elif run.expected is not None and run.pictures not in (None, run.expected):
            found.append(
                f"{where}, seed {run.seed}: the data set has {run.pictures} pictures here, "
                f"{run.expected} in the protocol."
            )
    short = sorted(
        {
            (run.asked, m.n)
            for run in group.runs
            for m in run.measures
            if m.n < run.asked and not (m.aware or m.attack == WORST)
        }
    )
    if short:
        counts = ", ".join(f"{n} of {asked}" for asked, n in short)
        found.append(f"{where}: some figures rest on a part of the pictures ({counts}).")
    uneven = [
        key[0] for key, ms in group.rows.items() if len({m.n for m in ms}) > 1 and len(ms) > 1
    ]
    if uneven:
        names = ", ".join(dict.fromkeys(uneven))
        found.append(f"{where}: seeds of different numbers of images are averaged for {names}.")
    duplicates = max((run.duplicates for run in group.runs), default=0)
    if duplicates:
        found.append(
            f"{where}: prompts that name two classes or more: {duplicates}; between such classes "
            "the answer is arbitrary."
        )
    return list(dict.fromkeys(found))
