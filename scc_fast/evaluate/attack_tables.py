"""Tables of everything that was measured on one data set: all attacks, and the label leak."""

from __future__ import annotations

from collections.abc import Sequence

from scc_fast.evaluate.cells import (
    Cell,
    common_over,
    over_notes,
    pooled,
    pooled_counts,
    worst_cell,
)
from scc_fast.evaluate.collect import CLEAN, WORST, Data, Measure, Model
from scc_fast.evaluate.groups import (
    Group,
    attack_titles,
    base_of,
    is_control,
    is_oblivious,
    steps_of,
    titles,
)
from scc_fast.evaluate.paper_tables import MEASURED_NOTE, method_title
from scc_fast.evaluate.tables import Line, Table

ADAPTIVE = "worst adaptive"


def attack_tables(groups: Sequence[Group]) -> list[Table]:
    """For each group: attacks that do not know the defense, those that do, and the label leak."""
    models = titles([group.model for group in groups])
    datas = titles([group.data for group in groups])
    found: list[Table] = []
    for group in groups:
        where = place(group, models, datas)
        found += _oblivious(group, where) + _aware(group, where)
    for group in groups:
        found += _leak(group, place(group, models, datas))
    return found


def place(group: Group, models: dict[Model, str], datas: dict[Data, str]) -> str:
    """Data set, model and protocol of a group, as text."""
    protocol = group.data.protocol or "unnamed"
    return f"{datas[group.data]}, {models[group.model]}, protocol {protocol}"


def _oblivious(group: Group, where: str) -> list[Table]:
    """Attack columns by defense rows, the worst adaptive of each budget beside them."""
    some = [one for one in group.attacks() if one.attack == CLEAN or is_oblivious(one)]
    if not some:
        return []
    columns: list[tuple[str, str]] = []
    readers: list[tuple[str, str]] = []
    named, common = attack_titles(some), _common(group)
    for one in some:
        title = named[one.attack, one.eps]
        columns.append(("" if one.attack == CLEAN else f"at {one.eps}", title))
        readers.append((one.attack, one.eps))
        last = [other for other in some if other.eps == one.eps][-1]
        if one is last and any(group.worst(d, one.eps) for d in group.defenses()):
            columns.append((f"at {one.eps}", ADAPTIVE))
            readers.append((WORST, one.eps))
    lines = []
    for defense in group.defenses():
        cells = [
            worst_cell(group.worst(defense, eps), common[eps])
            if attack == WORST
            else pooled(group.get(defense, attack, eps))
            for attack, eps in readers
        ]
        lines.append(_line(group, defense, cells))
    return [
        Table(
            "attacks",
            f"Attacks that do not know the defense ({where})",
            ("defense",),
            tuple(columns),
            _filled(lines),
            (
                MEASURED_NOTE,
                f"{ADAPTIVE}: image by image the worst of all attacks of that budget, those that "
                "know the defense among them; where defenses did not meet the same attacks, each "
                "figure says its own. Read it before the columns on its left.",
                *over_notes(ADAPTIVE, {f"at {eps}": text for eps, text in common.items()}),
            ),
        )
    ]


def _aware(group: Group, where: str) -> list[Table]:
    """The attacks that know the defense, and the worst of each budget."""
    some = [one for one in group.attacks() if one.aware]
    if not some:
        return []
    named, common = attack_titles(some), _common(group)
    lines = []
    for defense in group.defenses():
        found = [group.get(defense, one.attack, one.eps) for one in some]
        cells = [
            worst_cell(ms, common[one.eps]) if one.attack == WORST else pooled(ms)
            for one, ms in zip(some, found, strict=True)
        ]
        lines.append(_line(group, defense, cells))
    worst = [one for one in some if one.attack == WORST]
    over = {f"at {one.eps}": common[one.eps] for one in worst}
    return [
        Table(
            "attacks",
            f"Attacks that know the defense ({where})",
            ("defense",),
            tuple((f"at {one.eps}", named[one.attack, one.eps]) for one in some),
            _filled(lines),
            (
                MEASURED_NOTE,
                "Each is made against each defense. Empty: it does not suit it, or was not run.",
                *(over_notes(worst[0].title, over) if worst else ()),
            ),
        )
    ]


def _common(group: Group) -> dict[str, str]:
    """For each budget what the worst of every defense is over, "" where they differ."""
    return {
        eps: common_over(group.worst(defense, eps) for defense in group.defenses())
        for eps in group.budgets()
    }


def _line(group: Group, defense: str, cells: Sequence[Cell]) -> Line:
    return Line((method_title(group.first(defense).method, defense),), tuple(cells))


def _filled(lines: Sequence[Line]) -> tuple[Line, ...]:
    return tuple(line for line in lines if any(cell.measured for cell in line.cells))


# ------------------------------------------------------------------------------------ label leak


def _leak(group: Group, where: str) -> list[Table]:
    """Images that the undefended model gets right and wrong apart, and the control attacks."""
    lines = []
    some = [one for one in group.attacks() if is_oblivious(one) and not is_control(one)]
    named = attack_titles(some)
    for attack in some:
        for defense in group.defenses():
            found = group.get(defense, attack.attack, attack.eps)
            right = [m.right for m in found if m.right is not None]
            wrong = [m.wrong for m in found if m.wrong is not None]
            if not right and not wrong:
                continue
            cells = (
                pooled(group.clean(defense)),
                pooled(found),
                pooled_counts(right),
                pooled_counts(wrong),
                _control(group, defense, attack, "pgd-own"),
                _control(group, defense, attack, "pgd-random"),
            )
            title = method_title(found[0].method, defense)
            name = f"{named[attack.attack, attack.eps]} at {attack.eps}"
            lines.append(Line((name, title), cells))
    if not lines:
        return []
    names = ("Acc.", "Rob.", "Rob., clean-right", "Rob., clean-wrong", "own label", "random target")
    return [
        Table(
            "label-leak",
            f"Does the attack give the label away? ({where})",
            ("attack", "defense"),
            tuple(("", name) for name in names),
            tuple(lines),
            (
                "clean-right, clean-wrong: the images that the undefended model gets right "
                "(wrong) when they are clean. An attack that pushes away from the true class "
                "tells a defense which class that was: right answers on clean-wrong images that "
                "appear only under attack come from the label, and so does robust above clean "
                "accuracy.",
                "own label, random target: the same attack away from the model's own prediction, "
                "and towards a random wrong class; neither uses the true label.",
                MEASURED_NOTE,
            ),
        )
    ]


def _control(group: Group, defense: str, attack: Measure, name: str) -> Cell:
    """The control attack of a PGD: as many steps, the same budget."""
    if base_of(attack) != "pgd":
        return Cell()
    for one in group.attacks():
        if base_of(one) == name and one.eps == attack.eps and steps_of(one) == steps_of(attack):
            return pooled(group.get(defense, one.attack, one.eps))
    return Cell()
