"""One figure of a table: a measured accuracy with what it rests on, or a published one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from scc_fast.evaluate.collect import CLEAN, WORST, Count, Measure
from scc_fast.evaluate.paper import Published
from scc_fast.evaluate.rows import wilson

DAGGER = "†"


@dataclass(frozen=True)
class Cell:
    """A figure; empty without `value` and `printed`.

    Args:
        value: percent where it has an interval or a spread.
        low, high: 95 % interval, of the same unit.
        spread: sample standard deviation over `seeds` seeds.
        n: the numbers of images it rests on, one where all seeds have as many.
        sets: how many data sets it is an average of; 0 for none.
        printed: a published figure, digits as printed. Such a cell has no value.
        note: said behind it.
        digits: behind the point.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    spread: float | None = None
    seeds: int = 1
    n: tuple[int, ...] = ()
    sets: int = 0
    printed: str = ""
    note: str = ""
    digits: int = 1

    @property
    def measured(self) -> bool:
        """Whether it is ours."""
        return self.value is not None

    def counted(self) -> str:
        """The number of images, as text."""
        return f"{self.n[0]}–{self.n[-1]}" if len(self.n) > 1 else "".join(map(str, self.n))

    def text(self, with_n: bool = True) -> str:
        """As "94.1 [92.5, 95.4] (n=1000)", "94.1 ± 0.4 (3 seeds, n=1000)" or "59.18†"."""
        if self.printed:
            return self.printed + DAGGER + (f" ({_sets(self.sets)})" if self.sets > 1 else "")
        if self.value is None:
            return ""
        found = f"{self.value:.{self.digits}f}"
        if self.spread is not None:
            found += f" ± {self.spread:.{self.digits}f}"
        elif self.low is not None and self.high is not None:
            found += f" [{self.low:.{self.digits}f}, {self.high:.{self.digits}f}]"
        behind = [f"{self.seeds} seeds"] if self.seeds > 1 else []
        behind += [_sets(self.sets)] if self.sets else []
        behind += [f"n={self.counted()}"] if with_n and self.n else []
        behind += [self.note] if self.note else []
        return found + (f" ({', '.join(behind)})" if behind else "")


EMPTY = Cell()


def _sets(count: int) -> str:
    return f"{count} set" if count == 1 else f"{count} sets"


def number(value: float | None, digits: int = 0, note: str = "") -> Cell:
    """A figure without an interval, such as milliseconds."""
    return Cell(value=value, digits=digits, note=note) if value is not None else EMPTY


def passes(value: float | None) -> Cell:
    """Encoder passes an image: whole where they are whole."""
    return number(value, 0 if value is not None and value == int(value) else 1)


def printed(figure: Published | None, clean: bool = False) -> Cell:
    """A published figure; empty where it is not known."""
    if figure is None:
        return EMPTY
    text = figure.clean if clean else figure.robust
    return Cell(printed=text, sets=figure.sets) if text else EMPTY


def pooled(measures: Sequence[Measure], note: str = "") -> Cell:
    """One measure a seed: one alone has its Wilson interval, several mean and spread."""
    counts = [Count(measure.n, measure.hits) for measure in measures]
    cell = pooled_counts(counts, note)
    if len(measures) != 1:
        return cell
    only = measures[0]
    return Cell(cell.value, 100 * only.low, 100 * only.high, n=cell.n, note=note)


def over(measures: Sequence[Measure]) -> str:
    """What a "worst adaptive" figure is the worst of, as "pgd10 + bpda"; "" for no measure.

    One attack that stands in for it is "BPDA alone"; where seeds differ, "pgd10 + bpda / pgd10".
    """
    if measures and measures[0].attack != WORST:
        return f"{measures[0].title} alone"
    named = [" + ".join(spec for spec in m.of if spec != CLEAN) for m in measures]
    return " / ".join(dict.fromkeys(text or "attacks that are not named" for text in named))


def common_over(column: Iterable[Sequence[Measure]]) -> str:
    """What every worst row of a column is over; "" where they differ, or there is none."""
    found = {over(measures) for measures in column if measures and measures[0].attack == WORST}
    return found.pop() if len(found) == 1 else ""


def worst_cell(measures: Sequence[Measure], common: str = "") -> Cell:
    """A "worst adaptive" figure, which says what it is over unless that is `common`."""
    text = over(measures)
    if measures and measures[0].attack == WORST:
        text = "" if text == common else f"worst of {text}"
    return pooled(measures, text)


def over_notes(column: str, common: Mapping[str, str]) -> tuple[str, ...]:
    """What the columns of one name are over, for below a table.

    Args:
        column: their name.
        common: common_over() of each, by what tells it from the others ("at 1/255", or "").
    """
    labels: dict[str, list[str]] = {}
    for label, text in common.items():
        if text:
            labels.setdefault(text, []).append(label)
    return tuple(
        f"{f'{column} ' + ', '.join(some)}".strip() + f": the worst of {text}."
        for text, some in labels.items()
    )


def pooled_counts(counts: Sequence[Count], note: str = "") -> Cell:
    """The same of plain counts; empty where a seed has no image."""
    if not counts or any(count.n == 0 for count in counts):
        return EMPTY
    shares = [100 * count.hits / count.n for count in counts]
    n = tuple(sorted({count.n for count in counts}))
    if len(counts) > 1:
        mean, spread = statistics.mean(shares), statistics.stdev(shares)
        return Cell(mean, spread=spread, seeds=len(counts), n=n, note=note)
    low, high = wilson(counts[0].hits, counts[0].n)
    return Cell(shares[0], 100 * low, 100 * high, n=n, note=note)


def average(sets: Sequence[Sequence[Measure]]) -> Cell:
    """The unweighted mean over data sets, of measured figures alone.

    One seed each: the interval puts the sets' Wilson intervals together as independent ones,
    mean ± √Σ(distance to the limit)²/k (MOVER: Zou and Donner, Statistics in Medicine 2008).
    The same seeds everywhere: the spread is that of the seeds' means. Else neither is said.

    Args:
        sets: for each data set one measure a seed; those without any are left out.
    """
    some = [measures for measures in sets if measures]
    if not some:
        return EMPTY
    k = len(some)
    mean = statistics.mean(statistics.mean(100 * m.accuracy for m in ms) for ms in some)
    seeds = [tuple(m.seed for m in ms) for ms in some]
    if all(len(found) == 1 for found in seeds):
        below = math.sqrt(sum((100 * (ms[0].accuracy - ms[0].low)) ** 2 for ms in some)) / k
        above = math.sqrt(sum((100 * (ms[0].high - ms[0].accuracy)) ** 2 for ms in some)) / k
        return Cell(mean, max(0.0, mean - below), min(100.0, mean + above), sets=k)
    if len(set(seeds)) == 1:
        means = [statistics.mean(100 * ms[i].accuracy for ms in some) for i in range(len(seeds[0]))]
        return Cell(mean, spread=statistics.stdev(means), seeds=len(means), sets=k)
    return Cell(mean, sets=k, note="seeds differ")
