"""Tables in the layout of the SCC paper: its Tables 1, 3 and 4, and its ablation."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence

from scc_fast.evaluate import paper
from scc_fast.evaluate.cells import (
    DAGGER,
    EMPTY,
    Cell,
    average,
    common_over,
    number,
    over_notes,
    passes,
    pooled,
    printed,
    worst_cell,
)
from scc_fast.evaluate.collect import Data, Measure, Model
from scc_fast.evaluate.groups import Group, attack_of, once_a_set, paper_attack, titles
from scc_fast.evaluate.paper import AVERAGE, METHODS, Published
from scc_fast.evaluate.tables import Line, Table

ROBUST, ADAPTIVE, ACCURACY = "Rob.", "Adapt.", "Acc."
_ATTACKS = {"pgd10": "PGD-10", "cw": "CW", "aa": "AutoAttack (apgd-ce, apgd-dlr)"}
MEASURED_NOTE = (
    "Measured: percent correct with the 95 % Wilson interval; with several seeds mean ± standard "
    "deviation over them, which is the noise of attack and defense, not that of the choice of "
    "pictures. n: images."
)
ADAPTIVE_NOTE = (
    "Adapt.: image by image the worst of all attacks of that budget, those that know the defense "
    "among them; Rob. alone is against an attacker who does not know of the defense. Where lines "
    "are not over the same attacks, each figure says its own."
)


def method_title(method: str, spec: str) -> str:
    """ "SCC" of "scc", "SCC (semantic=false)" of "scc:semantic=false"."""
    title = METHODS[method].title if method in METHODS else method
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


def is_ablation(one: Measure) -> bool:
    """SCC with one of its two parts switched off."""
    config = one.config
    off = config.get("semantic") is False or config.get("spatial") is False
    return one.method == "scc" and off


def paper_tables(groups: Sequence[Group]) -> list[Table]:
    """All that apply, in the papers' order."""
    found = []
    for (attack, eps), figures in paper.SIXTEEN.items():
        published = {paper.CLIP_MODEL: figures}
        found += _set_tables("table-1", groups, paper.SETS, attack, eps, published)
    for (attack, eps), backbones in paper.SIX.items():
        found += _set_tables("table-3", groups, paper.MEDICAL, attack, eps, backbones)
    return [*found, *(table for group in groups for table in _table_4(group)), *_ablations(groups)]


# ------------------------------------------------------------------------------- Tables 1 and 3


def _set_tables(
    kind: str,
    groups: Sequence[Group],
    sets: Sequence[str],
    attack: str,
    eps: str,
    published: Mapping[str, paper.Figures],
) -> list[Table]:
    """A table for each protocol: methods by data sets, never a mean over two protocols."""
    some = [
        group
        for group in groups
        if paper.known_set(group.data.name) in sets and attack_of(group, attack, eps)
    ]
    found = []
    for protocol in dict.fromkeys(group.data.protocol for group in some):
        same = [group for group in some if group.data.protocol == protocol]
        found.append(_set_table(kind, same, sets, attack, eps, published))
    return found


def _set_table(
    kind: str,
    groups: Sequence[Group],
    order: Sequence[str],
    attack: str,
    eps: str,
    published: Mapping[str, paper.Figures],
) -> Table:
    named = titles([group.data for group in groups])
    keys = {data: paper.known_set(data.name) or "" for data in named}
    datas = sorted(named, key=lambda data: order.index(keys[data]))
    models = titles([group.model for group in groups])
    of = {(group.model, group.data): group for group in groups}
    methods = _methods(groups, models)
    adaptive: dict[Data, str] = {}
    for data in datas:
        met = [of[m, data].worst(spec, eps) for _, m, spec in methods if (m, data) in of]
        if any(met):
            adaptive[data] = common_over(met)
    columns = [
        (named[data], name)
        for data in datas
        for name in (ROBUST, *([ADAPTIVE] if data in adaptive else []), ACCURACY)
    ]
    lines = []
    for key, model, defense in methods:
        cells: list[Cell] = []
        counted = once_a_set([g for g in groups if g.model == model], defense, attack, eps)
        first = [some[0].data for some in counted.values()]
        robust, clean = [], []
        for data in datas:
            group = of.get((model, data))
            spec = None if group is None else attack_of(group, attack, eps)
            hit = () if group is None or spec is None else group.get(defense, spec, eps)
            kept = () if group is None else group.clean(defense)
            if data in first:
                robust.append(hit)
                clean.append(kept)
            cells.append(pooled(hit))
            if data in adaptive:
                worst = () if group is None else group.worst(defense, eps)
                cells.append(worst_cell(worst, adaptive[data]))
            cells.append(pooled(kept))
        if any(cell.measured for cell in cells):
            labels = models[model], _label(key, model, of, defense)
            lines.append((key, Line(labels, (*cells, average(robust), average(clean)))))
    for backbone, figures in published.items():
        for method, by_set in figures.items():
            line = _published_line(backbone, method, by_set, datas, keys, adaptive)
            if any(cell.printed for cell in line.cells):
                lines.append((method, line))
    rank = list(METHODS)
    lines.sort(key=lambda item: rank.index(item[0]) if item[0] in rank else len(rank))
    protocol = groups[0].data.protocol or "unnamed"
    number_of = {"table-1": "Table 1", "table-3": "Table 3"}[kind]
    where = f"{_ATTACKS[attack]} at {eps}, protocol {protocol}"
    sources = dict.fromkeys(
        figure.source
        for figures in published.values()
        for by_set in figures.values()
        for name, figure in by_set.items()
        if name == AVERAGE or name in keys.values()
    )
    return Table(
        kind,
        f"{number_of} ({where})" if eps == "1/255" else f"{number_of}'s layout ({where})",
        ("model", "method"),
        (*columns, ("Average", ROBUST), ("Average", ACCURACY)),
        tuple(line for _, line in lines),
        (
            MEASURED_NOTE,
            *([ADAPTIVE_NOTE] if adaptive else []),
            *over_notes(ADAPTIVE, {f"of {named[data]}": text for data, text in adaptive.items()}),
            "Average: unweighted, over the sets that a line has, each once, with the most images "
            "it has there; lines with other sets do not compare. Its interval takes the sets as "
            "independent.",
            f"{DAGGER} published, not measured here, and in no average of measured figures: "
            + "; ".join(sources)
            + ". Compare with a measured line only where model, protocol and pictures agree.",
        ),
    )


def _methods(groups: Sequence[Group], models: Mapping[Model, str]) -> list[tuple[str, Model, str]]:
    """(what it is in a paper's table or else its spec, model, defense), the ablation apart."""
    found = []
    for model in models:
        encoder = paper.encoder_of(model.name, model.source)
        specs = {
            spec: group.first(spec)
            for group in groups
            if group.model == model
            for spec in group.defenses()
        }
        for spec, one in specs.items():
            if not is_ablation(one):
                tuned = encoder in paper.ENCODERS and one.method == "none"
                found.append((encoder if tuned else one.method, model, spec))
    return found


def _label(key: str, model: Model, of: Mapping[tuple[Model, Data], Group], defense: str) -> str:
    """A fine-tuned encoder alone stands under its own name."""
    if key in paper.ENCODERS:
        return METHODS[key].title
    group = next(g for (m, _), g in of.items() if m == model and defense in g.defenses())
    return method_title(group.first(defense).method, defense)


def _published_line(
    backbone: str,
    method: str,
    by_set: Mapping[str, Published],
    datas: Sequence[Data],
    keys: Mapping[Data, str],
    adaptive: Container[Data],
) -> Line:
    cells: list[Cell] = []
    for data in datas:
        figure = by_set.get(keys[data])
        cells.append(printed(figure))
        cells += [EMPTY] * (data in adaptive)
        cells.append(printed(figure, clean=True))
    figure = by_set.get(AVERAGE)
    cells += [printed(figure), printed(figure, clean=True)]
    return Line((backbone, METHODS[method].title), tuple(cells), published=True)


# --------------------------------------------------------------------------------------- Table 4


def _table_4(group: Group) -> list[Table]:
    """Accuracy beside its price, for each budget of one data set."""
    return [_priced(group, one) for one in group.headlines()]


def _priced(group: Group, attack: Measure) -> Table:
    lines = []
    specs = [spec for spec in group.defenses() if not is_ablation(group.first(spec))]
    common = common_over(group.worst(spec, attack.eps) for spec in specs)
    for defense in specs:
        hit = group.get(defense, attack.attack, attack.eps)
        worst = worst_cell(group.worst(defense, attack.eps), common)
        if not (hit or worst.measured):
            continue
        traits = group.first(defense).traits
        forward, backward = _float(traits.get("forward")), _float(traits.get("backward"))
        both = None if forward is None or backward is None else forward + backward
        flagged = [m.flagged for m in hit if m.flagged is not None]
        cells = (
            pooled(hit),
            worst,
            pooled(group.clean(defense)),
            number(_mean([m.ms for m in hit if m.ms is not None]), 1),
            passes(forward),
            passes(backward),
            passes(both),
            number(_mean([100 * share for share in flagged]), 1),
        )
        method = group.first(defense).method
        lines.append((method, Line((method_title(method, defense),), cells)))
    is_dtd = paper.known_set(group.data.name) == "dtd"
    papers = is_dtd and paper_attack(attack) == "pgd10" and attack.eps == "1/255"
    if papers:
        for method, ms in paper.DTD_MS.items():
            figure = paper.SIXTEEN["pgd10", "1/255"][method]["dtd"]
            time = Cell(printed=ms)
            cells = printed(figure), EMPTY, EMPTY, time, EMPTY, EMPTY, EMPTY, EMPTY
            title = f"{METHODS[method].title}, {paper.CLIP_MODEL}"
            lines.append((method, Line((title,), cells, published=True)))
    rank = list(METHODS)
    lines.sort(key=lambda item: rank.index(item[0]) if item[0] in rank else len(rank))
    notes = [
        MEASURED_NOTE,
        ADAPTIVE_NOTE,
        *over_notes(ADAPTIVE, {"": common}),
        "F, B: images through the encoder, forward and back to the pixels, for one image that is "
        "repaired. ms: median over the batches of the defense's time an image, attack not "
        "counted. flagged: percent that the gate took as attacked.",
    ]
    if papers:
        notes.append(
            f"{DAGGER} published, not measured here: {paper.TABLE_4}. Times of other machines do "
            "not compare."
        )
    return Table(
        "table-4",
        f"{'Table 4' if papers else 'Accuracy and its price, the layout of Table 4'} "
        f"({group.data.title}, {group.model.name}, protocol {group.data.protocol or 'unnamed'}, "
        f"{attack.title} at {attack.eps})",
        ("method",),
        tuple(
            ("", name)
            for name in (ROBUST, ADAPTIVE, ACCURACY, "ms/image", "F", "B", "F+B", "flagged %")
        ),
        tuple(line for _, line in lines),
        tuple(notes),
    )


def _float(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


# -------------------------------------------------------------------------------------- ablation


def _ablations(groups: Sequence[Group]) -> list[Table]:
    """SCC's switches, for each protocol and attack, where one of them was off."""
    some = [g for g in groups if any(is_ablation(g.first(d)) for d in g.defenses())]
    found = []
    for protocol in dict.fromkeys(group.data.protocol for group in some):
        same = [group for group in some if group.data.protocol == protocol]
        attacks = {(one.attack, one.eps): one for group in same for one in group.headlines()}
        found += [_ablation(same, one) for one in attacks.values()]
    return found


def _ablation(groups: Sequence[Group], attack: Measure) -> Table:
    named = titles([group.data for group in groups])
    models = titles([group.model for group in groups])
    of = {(group.model, group.data): group for group in groups}
    columns = [(named[d], name) for d in named for name in (ROBUST, ADAPTIVE, ACCURACY)]
    lines: list[tuple[tuple[bool, bool], Line]] = []
    common = {
        data: common_over(
            group.worst(spec, attack.eps)
            for group in groups
            for spec in group.defenses()
            if group.data == data and group.first(spec).method == "scc"
        )
        for data in named
    }
    for model in models:
        specs = {
            spec: group.first(spec)
            for (m, _), group in of.items()
            if m == model
            for spec in group.defenses()
            if group.first(spec).method == "scc"
        }
        for spec, one in specs.items():
            switches = one.config.get("semantic", True), one.config.get("spatial", True)
            cells: list[Cell] = []
            for data in named:
                group = of.get((model, data))
                if group is None:
                    cells += [EMPTY] * 3
                    continue
                cells.append(pooled(group.get(spec, attack.attack, attack.eps)))
                cells.append(worst_cell(group.worst(spec, attack.eps), common[data]))
                cells.append(pooled(group.clean(spec)))
            if any(cell.measured for cell in cells):
                labels = models[model], *map(_on, switches), _others(spec)
                lines.append((switches, Line(labels, tuple(cells))))
    known = {data: paper.known_set(data.name) for data in named}
    papers = paper_attack(attack) == "pgd10" and attack.eps == "1/255"
    papers = papers and any(name in paper.SWITCHES[True, True] for name in known.values())
    if papers:
        for switches, by_set in paper.SWITCHES.items():
            cells = []
            for data in named:
                cells += [printed(by_set.get(known[data] or "")), EMPTY, EMPTY]
            labels = paper.CLIP_MODEL, *map(_on, switches), "as published"
            lines.append((switches, Line(labels, tuple(cells), published=True)))
    lines.sort(key=lambda item: (not item[0][0], not item[0][1]))
    over = over_notes(ADAPTIVE, {f"of {named[data]}": text for data, text in common.items()})
    notes = [MEASURED_NOTE, ADAPTIVE_NOTE, *over, "Both switches off is TTC."]
    if papers:
        notes.append(f"{DAGGER} published, not measured here: {paper.ABLATION}.")
    protocol = groups[0].data.protocol or "unnamed"
    return Table(
        "ablation",
        f"Ablation of SCC ({attack.title} at {attack.eps}, protocol {protocol})",
        ("model", "semantic", "spatial", "other settings"),
        tuple(columns),
        tuple(line for _, line in lines),
        tuple(notes),
    )


def _on(switch: bool) -> str:
    return "on" if switch else "off"


def _others(spec: str) -> str:
    """What a spec sets beside the two switches."""
    rest = [part for part in settings_of(spec) if part.split("=")[0] not in ("semantic", "spatial")]
    return ", ".join(rest) or "–"
