"""Tables of a report: in the SCC paper's layout, of all attacks, of the label leak."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd
from pandas import DataFrame

from scc_fast.evaluate.report import paper
from scc_fast.evaluate.report.pool import (
    DAGGER,
    FIGURE,
    Measured,
    average,
    beside,
    clean,
    each,
    figure,
    figure_of,
    is_ablation,
    once_a_set,
    select,
    settings_of,
    text,
    titles,
    worst,
)
from scc_fast.evaluate.results import DATA, MODEL, NO_BUDGET, WORST, attack_titles, footnotes

ROBUST, ADAPTIVE, ACCURACY, WORST_ADAPTIVE = "Rob.", "Adapt.", "Acc.", "worst adaptive"
_ATTACKS = {"pgd10": "PGD-10", "cw": "CW", "aa": "AutoAttack (apgd-ce, apgd-dlr)"}
_MEASURED = (
    "Measured: percent correct with the 95 % Wilson interval; with several seeds mean ± standard "
    "deviation over them, which is the noise of attack and defense, not that of the choice of "
    "pictures. n: images."
)
_ADAPTIVE = (
    "Adapt.: image by image the worst of all attacks of that budget, those that know the defense "
    "among them; Rob. alone is against an attacker who does not know of the defense. Where lines "
    "are not over the same attacks, each figure says its own."
)
_BESIDE = (
    f"{WORST_ADAPTIVE}: image by image the worst of all attacks of that budget, those that know "
    "the defense among them; where defenses did not meet the same attacks, each figure says its "
    "own. Read it before the columns on its left."
)
_SUITS = "Each is made against each defense. Empty: it does not suit it, or was not run."
_MADE = ("scc_fast", "torch", "device")


@dataclass(frozen=True)
class Table:
    """Table of figures.

    Args:
        kind: name of its file: "table-1", "attacks", …
        title: above it.
        keys: columns of `cells` that name a line.
        columns: (heading, column) of each column; neighbours may share a heading.
        cells: a line per cell: the keys, `line` (its order), `published` (from a paper),
            `heading`, `column` and FIGURE.
        notes: below it.
    """

    kind: str
    title: str
    keys: tuple[str, ...]
    columns: tuple[tuple[str, str], ...]
    cells: DataFrame
    notes: tuple[str, ...] = ()

    def common(self) -> list[str]:
        """Number of images common to each column's measured cells, or ""."""
        ours = self.cells[~self.cells.published]
        found = ours.groupby(["heading", "column"]).n.agg(lambda n: n.iloc[0] * (n.nunique() == 1))
        return [found.get(column, "") for column in self.columns]

    def wide(self, show: Callable[[Mapping[str, Any], bool], Any] = text) -> DataFrame:
        """Displayed table: labels and figures as text, by (heading, column).

        Args:
            show: (figure, with n) -> text.
        """
        alone = {column: not n for column, n in zip(self.columns, self.common(), strict=True)}
        shown = [show(one, alone[one["heading"], one["column"]]) for one in _records(self.cells)]
        figures = self.cells.assign(shown=shown).pivot(
            index="line", columns=["heading", "column"], values="shown"
        )
        columns = pd.MultiIndex.from_tuples(self.columns)
        figures = figures.reindex(columns=columns).astype(object).fillna("")
        labels = self.lines()[list(self.keys)]
        labels.columns = pd.MultiIndex.from_tuples([("", key) for key in self.keys])
        return pd.concat([labels, figures], axis=1)

    def lines(self) -> DataFrame:
        """Labels of each line, with published ones marked."""
        found = self.cells.drop_duplicates("line").set_index("line").sort_index()
        mark = found.published.map({True: f" {DAGGER} published", False: ""})
        return found.assign(**{self.keys[-1]: found[self.keys[-1]] + mark})

    def names(self) -> list[str]:
        """Column names, with the number of images if common."""
        common = zip(self.columns, self.common(), strict=True)
        return [f"{name} (n={n})" if n else name for (_, name), n in common]

    def headers(self) -> list[str]:
        """Headings on one line: "CIFAR-10 Rob. (n=1000)"."""
        both = zip(self.columns, self.names(), strict=True)
        return [*self.keys, *(f"{heading} {name}".strip() for (heading, _), name in both)]

    def spans(self) -> list[tuple[str, int]]:
        """(heading, number of columns), in order."""
        return [(name, len(list(some))) for name, some in groupby(one for one, _ in self.columns)]


def _records(cells: DataFrame) -> list[dict[str, Any]]:
    return cells[["heading", "column", *FIGURE]].to_dict("records")


def _cells(parts: Sequence[DataFrame], order: Sequence[str], **labels: str) -> DataFrame:
    """Cells of a table, from figures with `heading` and `column`.

    Args:
        order: columns that identify and order lines.
        labels: key of the table -> column.
    """
    found = pd.concat([part.assign(published=part.get("published", False)) for part in parts])
    line = found.groupby(list(order), sort=True).ngroup()
    keys = {key: found[column] for key, column in labels.items()}
    return found.assign(line=line, **keys).astype({"published": bool})


def _replaced(lines: DataFrame, figures: Sequence[Mapping[str, Any]], **more: Any) -> DataFrame:
    """Lines with replaced figures; those without one ({}) are dropped."""
    some = select(lines, figures)
    columns = {
        name: pd.Series([one[name] for one in figures if one], some.index, dtype=object)
        for name in FIGURE
    }
    return some.assign(**columns, **more)


def _noted(known: DataFrame) -> tuple[DataFrame, dict[str, str]]:
    """Worst figures with notes on their attacks, and the attacks common to a heading, or "".

    A figure has its own note if they differ, or if one attack stands in.
    """
    common = dict.fromkeys(known.heading, "")
    for heading, some in known[known.attack == WORST].groupby("heading", sort=False):
        common[heading] = some.over.iloc[0] if some.over.nunique() == 1 else ""
    notes = [
        one.over
        if one.attack != WORST
        else f"worst of {one.over}" * (one.over != common[one.heading])
        for one in each(known)
    ]
    return known.assign(note=pd.Series(notes, known.index, dtype=object)), common


def _over_notes(column: str, common: Mapping[str, str], of: str = "") -> list[str]:
    """Notes below a table on the attacks of worst columns."""
    labels: dict[str, list[str]] = {}
    for heading, over in common.items():
        if over:
            labels.setdefault(over, []).append(of + heading)
    return [
        f"{column} {', '.join(some)}".strip() + f": the worst of {over}."
        for over, some in labels.items()
    ]


def make_tables(found: Measured) -> Iterator[Table]:
    """Make all applicable tables: the papers', then those of all attacks."""
    layouts = (
        ("table-1", paper.SETS, ("table-1", "table-4", "doc")),
        ("table-3", paper.MEDICAL, ("table-3",)),
    )
    for kind, sets, sources in layouts:
        printed = dict.fromkeys((p.attack, p.eps) for p in paper.FIGURES if p.source in sources)
        for attack, eps in printed:
            published = list(paper.figures(*sources, attack=attack, eps=eps))
            yield from _set_tables(kind, found.figures, sets, published)
    groups = [group for _, group in found.figures.groupby("group", sort=False)]
    for group in groups:
        for _, hit in group[group.headline].groupby("attack_order"):
            yield _table_4(group, hit)
    yield from _ablations(found.figures)
    for group in groups:
        yield from _attacks(group)
    for group in groups:
        yield from _leak(group)


# --------------------------------------------------------- data sets beside each other: Tables 1, 3


def paper_hits(figures: DataFrame, sets: Sequence[str], attack: str, eps: str) -> DataFrame:
    """Figures under a paper's attack, one spec per group."""
    known = (figures.papers == attack) & (figures.eps == eps) & figures.dataset.isin(sets)
    hit = figures[known].sort_values("attack_order", kind="stable")
    return hit[hit.attack == hit.groupby("group").attack.transform("first")].sort_index()


def _set_tables(
    kind: str, figures: DataFrame, sets: Sequence[str], published: Sequence[paper.Published]
) -> Iterator[Table]:
    """A table per protocol: methods by data sets."""
    attack, eps = published[0].attack, published[0].eps
    number = kind.replace("table-", "Table ")
    for protocol, hit in paper_hits(figures, sets, attack, eps).groupby("protocol", sort=False):
        some = _named(figures[figures.group.isin(hit.group)], sets)
        headings = list(some.sort_values(["column_order", "group"], kind="stable").heading.unique())
        keys = dict(zip(some.heading, some.set, strict=True))
        some = some[~is_ablation(some)]
        hit = some[some.index.isin(hit.index)]
        parts, columns, common = _by_set(headings, some, hit, eps)
        counted = once_a_set(hit, clean(some)).query("counted")[["group", "defense"]]
        for kept, name in ((hit, ROBUST), (clean(some), ACCURACY)):
            chosen = kept.merge(counted, on=["group", "defense"])
            of = chosen.groupby(["model_order", "defense_order"], sort=False)
            means = [average(list(part.by_seed)) for _, part in of]
            parts.append(_replaced(of.head(1), means, heading="Average", column=name))
        theirs = [p for p in published if p.dataset in (paper.AVERAGE, *keys.values())]
        parts.append(_printed(theirs, {**keys, "Average": paper.AVERAGE}))
        where = f"{_ATTACKS[attack]} at {eps}, protocol {protocol or 'unnamed'}"
        yield Table(
            kind,
            f"{number} ({where})" if eps == "1/255" else f"{number}'s layout ({where})",
            ("model", "method"),
            (*columns, ("Average", ROBUST), ("Average", ACCURACY)),
            _cells(parts, _ORDER, model="model_title", method="label"),
            (
                _MEASURED,
                *([_ADAPTIVE] if common else []),
                *_over_notes(ADAPTIVE, common, "of "),
                "Average: unweighted, over the sets that a line has, each once, with the most "
                "images it has there; lines with other sets do not compare. Its interval takes the "
                "sets as independent.",
                f"{DAGGER} published, not measured here, and in no average of measured figures: "
                + "; ".join(dict.fromkeys(paper.SOURCES[p.source] for p in theirs))
                + ". Compare with a measured line only where model, protocol and pictures agree.",
            ),
        )


_ORDER = ("rank", "published", "model_order", "defense_order")


def _named(some: DataFrame, sets: Sequence[str] = ()) -> DataFrame:
    """Add names of data sets and models, and their order, to figures."""
    encoders = [_encoder(one) for one in each(some)]
    either = list(zip(encoders, some.method, some.label, strict=True))
    return some.assign(
        heading=titles(some, DATA),
        model_title=titles(some, MODEL),
        model_order=some.groupby(list(MODEL), sort=False).ngroup(),
        column_order=[sets.index(name) if name in sets else len(sets) for name in some.set],
        rank=[paper.rank(encoder or method) for encoder, method, _ in either],
        label=[paper.METHODS[encoder] if encoder else label for encoder, _, label in either],
    )


def _encoder(one: Any) -> str:
    """Name of a fine-tuned encoder of the papers' tables, or ""."""
    found = paper.encoder_of(one.model, one.source)
    return found if found in paper.ENCODERS and one.method == "none" else ""


def _by_set(
    headings: Sequence[str], some: DataFrame, hit: DataFrame, eps: str
) -> tuple[list[DataFrame], list[tuple[str, str]], dict[str, str]]:
    """Cells of robust, adaptive and clean accuracy by heading; columns; common notes."""
    known, common = _noted(worst(some[some.eps == eps]))
    columns = [
        (heading, name)
        for heading in headings
        for name in (ROBUST, *([ADAPTIVE] if heading in common else []), ACCURACY)
    ]
    parts = [(hit, ROBUST), (known, ADAPTIVE), (clean(some), ACCURACY)]
    cells = [figures.assign(column=name) for figures, name in parts]
    return cells, columns, {name: common[name] for name in headings if name in common}


def _printed(published: Sequence[paper.Published], keys: Mapping[str, str]) -> DataFrame:
    """Cells of published figures; `keys`: data sets of the headings."""
    models = (paper.CLIP_MODEL, paper.BIOMEDCLIP_MODEL)
    return DataFrame(
        [
            {
                "rank": paper.rank(one.method),
                "published": True,
                "model_order": models.index(one.model),
                "defense_order": 0,
                "model_title": one.model,
                "label": paper.METHODS[one.method],
                "semantic": one.semantic,
                "spatial": one.spatial,
                "heading": heading,
                "column": column,
                **figure(value, sets=one.sets if one.sets > 1 else 0),
            }
            for one in published
            for heading, name in keys.items()
            for column, value in ((ROBUST, one.robust), (ACCURACY, one.clean))
            if name == one.dataset and value
        ]
    )


# ------------------------------------------------------------------ Table 4: accuracy and its price


def _table_4(group: DataFrame, hit: DataFrame) -> Table:
    """Table of accuracy, passes and milliseconds, for one data set and attack."""
    attack = hit.iloc[0]
    plain = group[~is_ablation(group)]
    plain = plain.assign(heading="", rank=plain.method.map(paper.rank))
    hit = plain[plain.index.isin(hit.index)]
    known, common = _noted(worst(plain[plain.eps == attack.eps]))
    shown = pd.concat([hit, known]).drop_duplicates("defense_order")
    kept = clean(plain)
    traits = [(_number(t.get("forward")), _number(t.get("backward"))) for t in shown.traits]
    both = [None if None in pair else sum(pair) for pair in traits]  # type: ignore[arg-type]
    parts = [
        hit.assign(column=ROBUST),
        known.assign(column=ADAPTIVE),
        kept[kept.defense_order.isin(shown.defense_order)].assign(column=ACCURACY),
        _replaced(hit, [figure(ms) for ms in hit.ms], column="ms/image"),
        _replaced(shown, [_passes(forward) for forward, _ in traits], column="F"),
        _replaced(shown, [_passes(backward) for _, backward in traits], column="B"),
        _replaced(shown, [_passes(passes) for passes in both], column="F+B"),
        _replaced(hit, [figure(share) for share in hit.flagged], column="flagged %"),
    ]
    layout, notes = "Accuracy and its price, the layout of Table 4", list[str]()
    if (attack.set, attack.papers, attack.eps) == ("dtd", "pgd10", "1/255"):
        layout = "Table 4"
        published = list(paper.figures("table-4"))
        theirs = _printed(published, {"": "dtd"})
        times = theirs.assign(value=[one.ms for one in published], column="ms/image")
        theirs = pd.concat([theirs, times])
        parts.append(theirs.assign(label=theirs.label + f", {paper.CLIP_MODEL}"))
        notes.append(
            f"{DAGGER} published, not measured here: {paper.SOURCES['table-4']}. Times of other "
            "machines do not compare."
        )
    where = f"{attack.paper}, {attack.model}, protocol {attack.protocol or 'unnamed'}"
    names = (ROBUST, ADAPTIVE, ACCURACY, "ms/image", "F", "B", "F+B", "flagged %")
    return Table(
        "table-4",
        f"{layout} ({where}, {attack.title} at {attack.eps})",
        ("method",),
        tuple(("", name) for name in names),
        _cells(parts, ("rank", "published", "defense_order"), method="label"),
        (
            _MEASURED,
            _ADAPTIVE,
            *_over_notes(ADAPTIVE, common),
            "F, B: images through the encoder, forward and back to the pixels, for one image that "
            "is repaired. ms: median over the batches of the defense's time an image, attack not "
            "counted. flagged: percent that the gate took as attacked.",
            *notes,
        ),
    )


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _passes(value: float | None) -> dict[str, Any]:
    """Encoder passes per image."""
    return figure(value, digits=0 if value is not None and value == int(value) else 1)


# ------------------------------------------------------------------------------- SCC's two switches


def _ablations(figures: DataFrame) -> Iterator[Table]:
    """Ablation tables of SCC, per protocol and attack."""
    some = figures[figures.group.isin(figures.group[is_ablation(figures)])]
    for _, same in some.groupby("protocol", sort=False):
        for order in sorted(set(same.attack_order[same.headline])):
            yield _ablation(same, same[same.attack_order == order])


def _ablation(same: DataFrame, hit: DataFrame) -> Table:
    attack = hit.iloc[0]
    some = _named(same, (*paper.SETS, *paper.MEDICAL))
    headings = list(some.sort_values(["column_order", "group"], kind="stable").heading.unique())
    some = some[some.method == "scc"]
    some = _switched(
        some.assign(
            semantic=[config.get("semantic", True) for config in some.config],
            spatial=[config.get("spatial", True) for config in some.config],
            others=[_others(spec) for spec in some.defense],
        )
    )
    hit = some[some.index.isin(hit.index)]
    parts, columns, common = _by_set(headings, some, hit, attack.eps)
    keys = dict(zip(some.heading, some.set, strict=True))
    notes = [_MEASURED, *([_ADAPTIVE] if common else []), *_over_notes(ADAPTIVE, common, "of ")]
    notes.append("Both switches off is TTC.")
    protocol = attack.protocol or "unnamed"
    published = [p for p in paper.figures("ablation") if p.dataset in keys.values()]
    if published and (attack.papers, attack.eps) == ("pgd10", "1/255"):
        parts.append(_switched(_printed(published, keys).assign(others="as published")))
        notes.append(f"{DAGGER} published, not measured here: {paper.SOURCES['ablation']}.")
    return Table(
        "ablation",
        f"Ablation of SCC ({attack.title} at {attack.eps}, protocol {protocol})",
        ("model", "semantic", "spatial", "other settings"),
        tuple(columns),
        _cells(
            parts,
            _ORDER,
            model="model_title",
            semantic="semantic",
            spatial="spatial",
            **{"other settings": "others"},
        ),
        tuple(notes),
    )


def _switched(cells: DataFrame) -> DataFrame:
    """Cells with switches in words; both on comes first."""
    words = {True: "on", False: "off"}
    return cells.assign(
        rank=[2 * (not a) + (not b) for a, b in zip(cells.semantic, cells.spatial, strict=True)],
        semantic=cells.semantic.map(words),
        spatial=cells.spatial.map(words),
    )


def _others(spec: str) -> str:
    """Settings of a spec beside the two switches."""
    rest = [part for part in settings_of(spec) if part.split("=")[0] not in ("semantic", "spatial")]
    return ", ".join(rest) or "–"


# ---------------------------------------------------------------------- all attacks of one data set


def _attacks(group: DataFrame) -> Iterator[Table]:
    """Tables of oblivious attacks with the worst per budget, and of adaptive ones."""
    where = group["where"].iloc[0]
    for aware in (False, True):
        some = group[group.aware == aware]
        if some.empty:
            continue
        named = attack_titles(each(some.sort_values("attack_order", kind="stable")))
        headings = {key: "" if key[1] == NO_BUDGET else f"at {key[1]}" for key in named}
        keys = list(zip(some.attack, some.eps, strict=True))
        some = some.assign(heading=[headings[k] for k in keys], column=[named[k] for k in keys])
        columns = [(headings[key], title) for key, title in named.items()]
        if aware:
            known, some = some[some.attack == WORST], some[some.attack != WORST]
        else:
            known = worst(group[group.eps.isin(some.eps)])
            known = known.assign(heading="at " + known.eps, column=WORST_ADAPTIVE)
            for heading in known.heading.unique():
                last = max(at for at, (other, _) in enumerate(columns) if other == heading)
                columns.insert(last + 1, (heading, WORST_ADAPTIVE))
        known, common = _noted(known)
        yield Table(
            "attacks",
            f"Attacks that {'know' if aware else 'do not know'} the defense ({where})",
            ("defense",),
            tuple(columns),
            _cells([some, known], ("defense_order",), defense="label"),
            (
                _MEASURED,
                _SUITS if aware else _BESIDE,
                *(f"{note}." for note in footnotes(attack for attack, _ in named)),
                *(_over_notes(known.column.iloc[0], common) if len(known) else ()),
            ),
        )


def _leak(group: DataFrame) -> Iterator[Table]:
    """Tables of the label leak: images right and wrong when undefended, and controls."""
    some = group[group.oblivious & ~group.control].sort_values("attack_order", kind="stable")
    named = attack_titles(each(some))
    some = select(some, [one.right or one.wrong for one in each(some)])
    if some.empty:
        return
    names = [f"{named[one.attack, one.eps]} at {one.eps}" for one in each(some)]
    some = some.assign(heading="", attack_name=names)
    controls: dict[tuple[Any, ...], dict[str, Any]] = {}
    for one in each(group[group.control].sort_values("attack_order", kind="stable")):
        controls.setdefault((one.defense, one.base, one.eps, one.steps), figure_of(one))

    def control(name: str) -> list[dict[str, Any]]:
        """Control of a PGD, with its steps and budget."""
        return [
            controls.get((one.defense, name, one.eps, one.steps), {}) if one.base == "pgd" else {}
            for one in each(some)
        ]

    parts = {
        "Acc.": beside(some, clean(group)),
        "Rob.": [figure_of(one) for one in each(some)],
        "Rob., clean-right": list(some.right),
        "Rob., clean-wrong": list(some.wrong),
        "own answer": control("pgd-own"),
        "random class": control("pgd-random"),
    }
    cells = [_replaced(some, figures, column=name) for name, figures in parts.items()]
    yield Table(
        "label-leak",
        f"Does the attack give the label away? ({group['where'].iloc[0]})",
        ("attack", "defense"),
        tuple(("", name) for name in parts),
        _cells(cells, ("attack_order", "defense_order"), attack="attack_name", defense="label"),
        (
            "clean-right, clean-wrong: the images that the undefended model gets right (wrong) "
            "when they are clean. An attack that pushes away from the true class tells a defense "
            "which class that was: right answers on clean-wrong images that appear only under "
            "attack come from the label, and so does robust above clean accuracy.",
            "own answer, random class: the same attack away from the model's own answer, and "
            "towards a random wrong class; neither gives the true label away.",
            _MEASURED,
        ),
    )


# --------------------------------------------------------------------------------------------- runs


def provenance(found: Measured, folder: Path) -> Table:
    """Table of source files, by path in `folder`, and environments."""
    runs, counts = found.runs, found.rows.groupby("file").size()
    labels = {
        "file": [os.path.relpath(path, folder) for path in runs.file],
        "run": list(runs["where"]),
        "weights": [digest[:12] for digest in runs.weights],
        "precision": list(runs.precision),
        "split": list(runs.split),
        "template": list(runs.template),
        "made with": [
            "; ".join(dict.fromkeys(filter(None, map(_made, found)))) for found in runs.environments
        ],
    }
    numbers = {
        "seed": runs.seed,
        "n": runs.asked,
        "pictures": runs.pictures,
        "expected": runs.expected,
        "classes": runs.classes,
        "figures": [counts.get(path, 0) for path in runs.file],
    }
    lines = DataFrame(labels, dtype=object).assign(heading="", attack_order=range(len(runs)))
    parts = [
        _replaced(lines, [figure(one, digits=0) for one in values], column=name)
        for name, values in numbers.items()
    ]
    return Table(
        "runs",
        "Where the figures come from",
        tuple(labels),
        tuple(("", name) for name in numbers),
        _cells(parts, ("attack_order",), **{key: key for key in labels}),
        ("weights: the first digits of their SHA-256. expected: pictures that the protocol has.",),
    )


def _made(environment: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {environment[key]}" for key in _MADE if environment.get(key))
