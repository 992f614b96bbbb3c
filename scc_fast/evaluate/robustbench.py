"""One JSON object for each model, data set and defense, in RobustBench's keys plus our own.

RobustBench (arXiv 2010.09670) writes accuracies as text in percent with two digits; `reported` is
what a paper claims, `autoattack_acc` what was measured under AutoAttack 'standard' with its own
settings, `external` the lowest that others found. `paper_autoattack_acc` is our own key: under the
two attacks of it that TTC's and SCC's papers call AutoAttack. `adaptive_over`: what `adaptive_acc`
is the worst of.
What was not measured is null. RobustBench itself takes no defense that is random or optimises at
inference: these are marked `unreliable`, and `adaptive_acc` is what to read.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from scc_fast.evaluate import paper
from scc_fast.evaluate.cells import Cell, over, pooled
from scc_fast.evaluate.collect import WORST, Measure
from scc_fast.evaluate.groups import Group, is_standard, paper_attack
from scc_fast.evaluate.paper_tables import method_title

_OWN = {"architecture", "dataset", "autoattack_acc", "adaptive_acc", "protocol", "results"}


def entries(groups: Sequence[Group]) -> dict[str, dict[str, Any]]:
    """{file name: entry} of every defense that met an attack."""
    found: dict[str, dict[str, Any]] = {}
    for group in groups:
        for defense in group.defenses():
            entry = _entry(group, defense)
            if entry is None:
                continue
            parts = [group.model.name, group.data.name, defense]
            name = _free(found, [*parts, group.data.protocol])
            found[name] = entry
    return found


def is_ours(name: str, value: object) -> bool:
    """Whether a file of that name and JSON content is what entries() makes, now or before."""
    if not isinstance(value, dict) or not set(value) >= _OWN:
        return False
    start = _slug(f"{value['architecture']}-{value['dataset']}")
    return name.startswith(start) and name.endswith(".json")


def _free(taken: dict[str, dict[str, Any]], parts: list[str]) -> str:
    """A file name; with the protocol, then a number, where the plain one is taken."""
    short, long = (_slug("-".join(some)) for some in (parts[:-1], parts))
    number = 2
    for name in (short, long):
        if f"{name}.json" not in taken:
            return f"{name}.json"
    while f"{long}-{number}.json" in taken:
        number += 1
    return f"{long}-{number}.json"


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=-]+", "_", text).strip("_.")[:150] or "unnamed"


def _entry(group: Group, defense: str) -> dict[str, Any] | None:
    eps = _budget(group, defense)
    if eps is None:
        return None
    one = group.first(defense)
    traits = one.traits
    known = paper.METHODS.get(one.method, paper.Method(one.method))
    clean = pooled(group.clean(defense))
    adaptive = pooled(group.worst(defense, eps))
    times = [m.ms for m in group.clean(defense) if m.ms is not None]
    dynamic, random = bool(traits.get("dynamic")), bool(traits.get("random"))
    source = str(traits.get("source", ""))
    return {
        "link": _link(source) or known.link,
        "name": method_title(one.method, defense),
        "authors": "",
        "additional_data": True,
        "number_forward_passes": traits.get("forward"),
        "dataset": group.data.name,
        "venue": known.venue,
        "architecture": group.model.name,
        "eps": eps,
        "clean_acc": _percent(clean),
        "reported": _reported(group, one, eps),
        "autoattack_acc": _percent(_under(group, defense, eps, is_standard)),
        "paper_autoattack_acc": _percent(
            _under(group, defense, eps, lambda one: paper_attack(one) == "aa")
        ),
        "external": None,
        "footnote": _footnote(group, dynamic or random, source),
        "unreliable": dynamic or random,
        "number_backward_passes": traits.get("backward"),
        "dynamic": dynamic,
        "randomized": random,
        "adaptive_acc": _percent(adaptive),
        "adaptive_over": over(group.worst(defense, eps)) or None,
        "latency_ms": round(statistics.mean(times), 3) if times else None,
        "env": [found for run in group.runs for found in run.environments],
        "protocol": group.data.protocol,
        "split": group.data.split,
        "seeds": sorted({run.seed for run in group.runs}),
        "model": dataclasses.asdict(group.model),
        "config": one.config,
        "results": [_result(found) for key, found in group.rows.items() if key[0] == defense],
    }


def _budget(group: Group, defense: str) -> str | None:
    """The largest budget under which attackers knew the defense, else the largest."""
    some = [
        eps
        for eps in group.budgets()
        if any(key[0] == defense and key[2] == eps for key in group.rows)
    ]
    known = [eps for eps in some if group.worst(defense, eps)]
    return [*some, *known][-1] if some else None


def _percent(cell: Cell) -> str | None:
    return None if cell.value is None else f"{cell.value:.2f}"


def _under(group: Group, defense: str, eps: str, chosen: Callable[[Measure], bool]) -> Cell:
    """A defense under the first attack of a budget that is chosen."""
    for (spec, _, budget), found in group.rows.items():
        if (spec, budget) == (defense, eps) and all(map(chosen, found)):
            return pooled(found)
    return Cell()


def _reported(group: Group, one: Measure, eps: str) -> str | None:
    """The published figure, where model, data set, protocol and settings are the paper's."""
    is_clip = paper.encoder_of(group.model.name, group.model.source) == "clip"
    name = paper.known_set(group.data.name)
    if not is_clip or name is None or one.defense != one.method or group.data.protocol != "ttc":
        return None
    pgd = any(paper_attack(a) == "pgd10" and a.eps == eps for a in group.attacks())
    figure = paper.SIXTEEN.get(("pgd10", eps), {}).get(one.method, {}).get(name) if pgd else None
    return figure.robust or None if figure is not None else None


def _link(source: str) -> str:
    match = re.search(r"\b(\d{4}\.\d{4,5})\b", source)
    return f"https://arxiv.org/abs/{match[1]}" if match else ""


def _footnote(group: Group, moving: bool, source: str) -> str:
    parts = [source] if source else []
    parts.append("adversarial images of AutoAttack are made on the undefended model")
    if moving:
        parts.append(
            "the defense is random or optimises at inference, so AutoAttack alone does not judge "
            "it: read adaptive_acc"
        )
    parts.append(f"protocol {group.data.protocol or 'unnamed'}")
    return "; ".join(parts)


def _result(measures: Sequence[Measure]) -> dict[str, Any]:
    """One accuracy over its seeds."""
    one, cell = measures[0], pooled(measures)
    return {
        "attack": one.attack,
        "title": one.title,
        "eps": one.eps,
        "aware": one.aware,
        "accuracy": None if cell.value is None else round(cell.value, 4),
        "ci_low": None if cell.low is None else round(cell.low, 4),
        "ci_high": None if cell.high is None else round(cell.high, 4),
        "std": None if cell.spread is None else round(cell.spread, 4),
        "n": list(cell.n),
        "seeds": [m.seed for m in measures],
        **({"over": over(measures)} if one.attack == WORST else {}),
    }
