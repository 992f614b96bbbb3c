"""The presets cost what they say, and a budget gets the strongest that fits."""

from __future__ import annotations

from typing import Any

import pytest

from scc_fast import Defender
from scc_fast.evaluate import presets
from scc_fast.evaluate.presets import PRESETS, recommended
from toys import FIVE, model_of, pictures


def test_presets_cost_what_they_say() -> None:
    for preset in PRESETS:
        plan = Defender(model_of("tiny"), FIVE, method=preset.method, config=preset.config).plan()
        assert plan.forward + plan.backward == preset.passes, preset.name
    assert [p.passes for p in PRESETS] == sorted((p.passes for p in PRESETS), reverse=True)
    assert len({p.name for p in PRESETS}) == len(PRESETS)


@pytest.mark.parametrize("place", range(len(PRESETS)))
def test_the_strongest_that_fits(monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    timed: list[tuple[int, int]] = []

    def clock(defender: Defender, batch: int, rounds: int) -> float:
        plan = defender.plan()
        timed.append((batch, rounds))
        return float(plan.forward + plan.backward)  # a millisecond a pass

    monkeypatch.setattr(presets, "_median_ms", clock)
    budget = PRESETS[place].passes
    found = recommended(model_of("open_clip"), FIVE, budget_ms=budget, batch=3, backend="reference")
    assert found.method == PRESETS[place].method
    assert found.plan().forward + found.plan().backward == budget
    assert found.backend == "reference"
    assert timed == [(3, 5)] * (place + 1)


def test_on_a_clock() -> None:
    defender = recommended(model_of("open_clip"), FIVE, budget_ms=60_000, rounds=1)
    assert defender.method == PRESETS[0].method
    assert len(defender(pictures("open_clip", 2), 0)) == 2
    with pytest.raises(ValueError, match=r"budget_ms=1e-06 is too little: .*'views', takes .* ms"):
        recommended(model_of("open_clip"), FIVE, budget_ms=1e-6, rounds=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget_ms": 0}, "budget_ms must be milliseconds > 0, got 0"),
        ({"budget_ms": "5"}, "budget_ms must be milliseconds"),
        ({"budget_ms": 5, "batch": 0}, "batch must be a whole number >= 1, got 0"),
        ({"budget_ms": 5, "rounds": 1.5}, "rounds must be a whole number >= 1, got 1.5"),
    ],
)
def test_wrong_budgets(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recommended(model_of("open_clip"), FIVE, **options)
