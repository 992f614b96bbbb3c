"""How attacks are written on a command line, and what they are called in a table."""

from __future__ import annotations

from typing import Any

import pytest

from scc_fast.attacks import ATTACKS, parse_attack

TITLES = {
    "pgd": "PGD-10",
    "pgd10": "PGD-10",
    "pgd100": "PGD-100",
    "pgd:steps=20:alpha=2/255": "PGD-20",
    "cw": "CW-10 (margin)",
    "cw30": "CW-30 (margin)",
    "apgd-ce": "APGD-CE",
    "apgd-ce50": "APGD-CE-50",
    "apgd-dlr:restarts=5": "APGD-DLR (5 restarts)",
    "apgd-t": "APGD-T",
    "apgd-t30:targets=3": "APGD-T-30 (3 targets)",
    "aa": "AutoAttack (apgd-ce, apgd-dlr)",
    "aa20:complete=true": "AutoAttack (apgd-ce, apgd-dlr), 20 steps, all images",
    "autoattack": "AutoAttack",
    "autoattack:queries=100": "AutoAttack, 100 queries",
    "square": "Square (5000 queries)",
    "square:queries=1000": "Square (1000 queries)",
    "pgd-own10": "PGD-10 (own prediction)",
    "pgd-random7": "PGD-7 (random target)",
    "transfer:source=ViT-B-16@openai:steps=10": "Transfer PGD-10 (ViT-B-16@openai)",
    "transfer7:source=hf-hub:org/a-model": "Transfer PGD-7 (hf-hub:org/a-model)",
}


@pytest.mark.parametrize("spec", TITLES)
def test_titles_and_the_way_back(spec: str) -> None:
    attack = parse_attack(spec, 2 / 255)
    assert attack.title == TITLES[spec]
    assert attack.epsilon == 2 / 255
    assert parse_attack(attack.spec, 2 / 255) == attack
    assert attack.settings()["epsilon"] == "2/255"
    assert attack.settings()["attack"] == attack.name


def test_fields_arrive() -> None:
    fields = {
        "pgd:steps=20:alpha=2/255": {"steps": 20, "alpha": 2 / 255},
        "pgd100": {"steps": 100, "alpha": 1 / 255},
        "apgd-t50:restarts=2:targets=3": {"steps": 50, "restarts": 2, "targets": 3},
        "aa": {"steps": 100, "complete": False},
        "autoattack20:queries=7:complete=true": {"steps": 20, "queries": 7, "complete": True},
        "square": {"queries": 5000},
        "transfer:source=local-dir:/a=b:c:steps=3": {"source": "local-dir:/a=b:c", "steps": 3},
    }
    for spec, expected in fields.items():
        found = {name: getattr(parse_attack(spec, 0.1), name) for name in expected}
        assert found == expected


def test_who_knows_what_and_what_must_work() -> None:
    oblivious = {"pgd", "cw", "apgd-ce", "apgd-dlr", "apgd-t", "aa", "autoattack"}
    need_not = {"square", "transfer", "pgd-own", "pgd-random", "damaged"}
    assert oblivious | need_not <= set(ATTACKS)
    for name in oblivious | need_not:
        assert not ATTACKS[name].aware
        assert ATTACKS[name].conclusive is (name in oblivious)


ERRORS = {
    "": "attack must be one of pgd,.*got ''",
    "pgd-": "attack must be one of.*'pgd-'",
    "deepfool": "attack must be one of.*'deepfool'",
    "10pgd": "attack must be one of.*'10pgd'",
    "pgd10:20": "'pgd10:20': '20' must be FIELD=VALUE",
    "pgd:": "'pgd:': '' must be FIELD=VALUE",
    "pgd10:epsilon=8/255": "the budget is given apart; 'epsilon' must be one of steps, alpha",
    "pgd10:speed=3": "'speed' must be one of steps, alpha",
    "pgd10:steps=20": "'pgd10:steps=20': steps is given twice",
    "pgd:alpha=1/255:alpha=2/255": "alpha is given twice",
    "pgd0": "'pgd0': steps must be a whole number >= 1, got 0",
    "pgd:steps=1.5": "steps must be a whole number >= 1, got 1.5",
    "pgd:steps=true": "steps must be a whole number >= 1, got True",
    "pgd:alpha=2": "alpha.*got 2",
    "pgd:alpha=NaN": "alpha.*nan",
    "pgd:alpha=null": "alpha.*got None",
    "transfer:source=tiny:alpha=null": "alpha.*got None",
    "square100": "square has no steps; it has queries",
    "square:queries=0": "queries must be a whole number >= 1, got 0",
    "apgd-ce:restarts=0": "restarts must be a whole number >= 1, got 0",
    "apgd-t:targets=0": "targets must be a whole number >= 1, got 0",
    "aa:complete=1": "complete must be true or false, got 1",
    "transfer": "source must name the other model.*no part may be empty; got ''",
    "transfer:source=ViT-B-16": "'ViT-B-16' is not a folder and names no weights.*ViT-B-16@openai",
    "transfer:source=ViT-B-16@": "source must name the other model.*got 'ViT-B-16@'",
    "transfer:source=@openai": "source must name the other model.*got '@openai'",
}


@pytest.mark.parametrize("spec", ERRORS)
def test_errors(spec: str) -> None:
    with pytest.raises(ValueError, match=ERRORS[spec]):
        parse_attack(spec, 4 / 255)


@pytest.mark.parametrize("epsilon", [1, "4", "four", -0.1])
def test_budgets_that_are_none(epsilon: Any) -> None:
    with pytest.raises(ValueError, match=r"epsilon.*4/255|epsilon.*got"):
        parse_attack("pgd10", epsilon)
    assert parse_attack("pgd10", "4/255").epsilon == 4 / 255  # type: ignore[arg-type]
