"""Every case is quick or says why not, without a word in its own file (conftest.py)."""

from __future__ import annotations

import pytest
import torch

KINDS = {"quick", "compile", "interpreted", "ray", "gpu", "slow"}


def test_a_case_is_quick_or_says_why_not(request: pytest.FixtureRequest) -> None:
    for item in request.session.items:
        kinds = {mark.name for mark in item.iter_markers()} & KINDS
        assert kinds == {"quick"} or (kinds and "quick" not in kinds), item.nodeid
        assert "gpu" not in kinds or torch.cuda.is_available(), item.nodeid
        given = getattr(item, "callspec", None)
        if given and (given.params.get("device"), given.params.get("backend")) == ("cpu", "triton"):
            assert "interpreted" in kinds, item.nodeid
