"""One schema of a row: every command's fields are documented once, and its rows are held to it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from scc_fast.bench.rows import KEYS
from scc_fast.evaluate.results import Row, row_of, timed_rows
from scc_fast.evaluate.schema import FIELDS, misfits, table

ROOT = Path(__file__).parents[1]
FACTS = {"defense": "scc", "method": "scc", "title": "PGD-10", "aware": False, "seed": 0}


def test_every_field_has_one_meaning_and_the_page_shows_it() -> None:
    assert {field.name for field in dataclasses.fields(Row)} <= set(FIELDS)
    assert set(KEYS) <= set(FIELDS)
    assert table() in (ROOT / "docs" / "evaluate.md").read_text()


def test_times_join_their_rows() -> None:
    rows = [
        row_of("110", "111", attack="pgd10", eps="4/255", **FACTS),
        row_of("110", "111", attack="worst", eps="4/255", of=["pgd10"], **FACTS),
    ]
    time = {"defense": "scc", "attack": "pgd10", "eps": "4/255", "ms_per_image": 2.5, "rounds": 3}
    one, worst = timed_rows(rows, [time, time | {"eps": "1/255", "ms_per_image": 9.0}])
    assert (one["ms_per_image"], one["rounds"], one["hits"]) == (2.5, 3, 2)
    assert (worst["ms_per_image"], worst["rounds"]) == (None, None)
    assert misfits(one) == misfits(worst) == []


def test_what_does_not_fit_is_named() -> None:
    row = {"hits": True, "ms": 3.0, "rounds": 2.0, "accuracy": 1, "aware": False}
    assert misfits(row) == ["ms is not a field", "hits is of type bool", "rounds is of type float"]
