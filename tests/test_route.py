"""The way of one call: how many files and calls lie before its first view."""

from __future__ import annotations

import route


def test_a_call_goes_straight_down() -> None:
    """At most 8 changes of file, none entered twice on the way down, under 300 Python calls."""
    found = route.of_a_defender()
    assert found.way[-1] == "ops/views.py"
    assert len(found.way) - 1 <= 8, found.way
    assert len(set(found.way)) == len(found.way), found.way
    assert 0 < found.calls < 300
