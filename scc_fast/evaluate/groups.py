"""Runs put together: only what has one model, data set and protocol, and differs in its seed.

And what is asked of them: which attacks are the papers', which know the defense.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from scc_fast.config import format_epsilon, parse_epsilon
from scc_fast.evaluate.collect import CLEAN, WORST, Data, Measure, Model, Run
from scc_fast.evaluate.paper import METHODS, known_set

T = TypeVar("T")
NO_ATTACK = CLEAN, format_epsilon(0.0)


def base_of(one: Measure) -> str:
    """The attack's name without its steps: "pgd" of "pgd10"."""
    name = one.settings.get("attack")
    return name if isinstance(name, str) else re.sub(r"\d*(:.*)?$", "", one.attack)


def is_oblivious(one: Measure) -> bool:
    """An attack that does not know the defense."""
    return one.attack not in (CLEAN, WORST) and not one.aware


def is_control(one: Measure) -> bool:
    """An attack that cannot give the true label away: on the model's own, or a random class."""
    return base_of(one) in ("pgd-own", "pgd-random")


def steps_of(one: Measure) -> int | None:
    """The attack's steps, from its settings, else from its name."""
    steps = one.settings.get("steps")
    if type(steps) is int:
        return steps
    match = re.fullmatch(r"[^:]*?(\d+)", one.attack)
    return int(match[1]) if match else None


def paper_attack(one: Measure) -> str:
    """Which of the papers' attacks this is: "pgd10", "cw", "aa", or "" for any other."""
    base, steps = base_of(one), steps_of(one)
    if not is_oblivious(one):
        return ""
    if base in ("pgd", "cw"):
        try:
            small = abs(parse_epsilon(one.settings.get("alpha", "1/255")) * 255 - 1) < 1e-6
        except ValueError:
            return ""
        alike = steps == 10 and small and one.settings.get("restarts", 1) == 1
        return ("pgd10" if base == "pgd" else "cw") if alike else ""
    plain = steps == 100 and one.settings.get("complete", False) is False
    return "aa" if base == "aa" and plain else ""


def is_standard(one: Measure) -> bool:
    """AutoAttack 'standard' as published: all four attacks with its own steps and queries."""
    same = {"steps": 100, "queries": 5000, "complete": False}
    plain = all(one.settings.get(name) == value for name, value in same.items())
    return is_oblivious(one) and base_of(one) == "autoattack" and plain


@dataclass(frozen=True)
class Group:
    """Runs that may be put together: one model, data set and protocol, one run a seed.

    Args:
        rows: (defense, attack, eps) -> one measure for each seed, in the order of the seeds.
        left_out: what another run of the same seed had with more images, as text.
    """

    model: Model
    data: Data
    runs: tuple[Run, ...]
    rows: dict[tuple[str, str, str], tuple[Measure, ...]]
    left_out: tuple[str, ...]

    def get(self, defense: str, attack: str, eps: str) -> tuple[Measure, ...]:
        """The measures of a defense under an attack, one for each seed; () if there are none."""
        return self.rows.get((defense, attack, eps), ())

    def defenses(self) -> list[str]:
        """The defenses, undefended first, else in the order of METHODS.md's tables."""
        order = list(METHODS)
        method = {found[0].defense: found[0].method for found in self.rows.values()}
        rank = {m: order.index(m) if m in order else len(order) for m in method.values()}
        return sorted(method, key=lambda spec: (rank[method[spec]], method[spec], len(spec), spec))

    def budgets(self) -> list[str]:
        """The attacks' budgets, in order."""
        return list(dict.fromkeys(one.eps for one in self.attacks() if one.attack != CLEAN))

    def clean(self, defense: str) -> tuple[Measure, ...]:
        """The measures of a defense without an attack."""
        return self.get(defense, *NO_ATTACK)

    def worst(self, defense: str, eps: str) -> tuple[Measure, ...]:
        """Under the worst, image by image, of all attacks of a budget, some knowing the defense.

        Where no such row is there: under the attack that knows the defense and hurts most, which
        is the weaker of the two statements. () if there is none.
        """
        if found := self.get(defense, WORST, eps):
            return found
        aware = [
            found
            for (spec, _, budget), found in self.rows.items()
            if spec == defense and budget == eps and found[0].aware
        ]
        return min(aware, key=lambda ms: statistics.mean(m.accuracy for m in ms), default=())

    def headlines(self) -> list[Measure]:
        """For each budget the attack that figures are about: PGD-10 as published, else the first.

        It does not know the defense, and is no control.
        """
        found = []
        for eps in self.budgets():
            some = [one for one in self.attacks() if one.eps == eps and is_oblivious(one)]
            some = [one for one in some if not is_control(one)]
            published = [one for one in some if paper_attack(one) == "pgd10"]
            found += [*published, *some][:1]
        return found

    def first(self, defense: str) -> Measure:
        """Any measure of a defense, for what all of them say alike."""
        return next(found[0] for key, found in self.rows.items() if key[0] == defense)

    def attacks(self) -> list[Measure]:
        """One measure for each (attack, eps): clean, by budget, "worst" last of each."""
        seen = {key[1:]: found[0] for key, found in self.rows.items()}
        return sorted(
            seen.values(),
            key=lambda one: (
                one.attack != CLEAN,
                parse_epsilon(one.eps),
                one.attack == WORST,
                one.aware,
            ),
        )


def attack_of(group: Group, attack: str, eps: str) -> str | None:
    """The spec under which a group has a paper's attack at a budget."""
    for one in group.attacks():
        if one.eps == eps and paper_attack(one) == attack:
            return one.attack
    return None


def once_a_set(
    groups: Sequence[Group], defense: str, attack: str, eps: str
) -> dict[str, list[Group]]:
    """By data set the groups that have a defense, the one that an average may count first.

    That is the one with the most images under a paper's attack, then when clean: a full and a
    sampled run, or two splits, are the same data set. Groups that have neither are not named.

    Args:
        groups: of one model and protocol.
        attack: as paper_attack names it.
    """
    found: dict[str, list[tuple[int, int, Group]]] = {}
    for group in groups:
        spec = attack_of(group, attack, eps)
        hit = () if spec is None else group.get(defense, spec, eps)
        clean = group.clean(defense)
        if hit or clean:
            name = known_set(group.data.name) or group.data.name
            attacked, whole = (max((m.n for m in some), default=0) for some in (hit, clean))
            found.setdefault(name, []).append((attacked, whole, group))
    for some in found.values():
        some.sort(key=lambda item: item[:2], reverse=True)
    return {name: [group for _, _, group in some] for name, some in found.items()}


def groups(runs: Sequence[Run]) -> list[Group]:
    """Runs by model and data set; where two have a row of one seed, the one with more images.

    Raises:
        ValueError: two runs of one seed and n contradict each other; both files are named.
    """
    found: dict[tuple[Model, Data], list[Run]] = {}
    for run in runs:
        found.setdefault((run.model, run.data), []).append(run)
    return [_group(model, data, some) for (model, data), some in found.items()]


def _group(model: Model, data: Data, runs: Sequence[Run]) -> Group:
    best: dict[tuple[tuple[str, str, str], int], tuple[Measure, Run]] = {}
    left: dict[tuple[Path, Path], int] = {}
    for measure, run in _all(runs):
        key = measure.key, measure.seed
        if key not in best:
            best[key] = measure, run
            continue
        other, other_run = best[key]
        if measure.n == other.n and measure.hits != other.hits:
            raise ValueError(
                f"{run.path} and {other_run.path} contradict each other: {measure.defense} under "
                f"{measure.attack} at {measure.eps}, seed {measure.seed}, has {measure.hits} and "
                f"{other.hits} of {measure.n} right; give a folder that holds one of them"
            )
        loser, winner = (run, other_run) if measure.n <= other.n else (other_run, run)
        if measure.n > other.n:
            best[key] = measure, run
        if measure.n != other.n:
            left[loser.path, winner.path] = left.get((loser.path, winner.path), 0) + 1
    rows: dict[tuple[str, str, str], list[Measure]] = {}
    for (row, _), (measure, _) in sorted(best.items(), key=lambda item: item[0][1]):
        rows.setdefault(row, []).append(measure)
    notes = tuple(
        f"{count} rows of {loser} are left out: {winner} has them with more images"
        for (loser, winner), count in left.items()
    )
    return Group(model, data, tuple(runs), {k: tuple(v) for k, v in rows.items()}, notes)


def _all(runs: Sequence[Run]) -> Iterator[tuple[Measure, Run]]:
    for run in runs:
        for measure in run.measures:
            yield measure, run


class Attacked(Protocol):
    """What names an attack: Measure and Row."""

    @property
    def attack(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def eps(self) -> str: ...


def attack_titles(some: Sequence[Attacked]) -> dict[tuple[str, str], str]:
    """{(attack, eps): title}, in order; where two of one budget share a title, with the spec."""
    named = {(one.attack, one.eps): one.title for one in some}
    seen = [(title, eps) for (_, eps), title in named.items()]
    return {
        key: title if seen.count((title, key[1])) == 1 else f"{title} ({key[0]})"
        for key, title in named.items()
    }


def titles(things: Sequence[T]) -> dict[T, str]:
    """A short name for each Model or Data, with what else tells it from others of that name."""
    named = {thing: getattr(thing, "title", getattr(thing, "name", "")) for thing in things}
    found = {}
    for thing, name in named.items():
        twins = [other for other in named if named[other] == name and other != thing]
        extra = []
        for field in dataclasses.fields(thing):  # type: ignore[arg-type]
            value = getattr(thing, field.name)
            if field.name != "title" and any(getattr(t, field.name) != value for t in twins):
                short = value[:8] if field.name in ("weights", "prompts") else value
                extra.append(f"{field.name} {short}" if field.name != "name" else value)
        found[thing] = f"{name} ({', '.join(extra)})" if extra else name
    return found
