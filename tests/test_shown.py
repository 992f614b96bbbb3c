"""shown(): values in messages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from scc_fast.config import shown


class Silent:
    def __repr__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a dog", "'a dog'"),
        (["x"] * 3, "['x', 'x', 'x']"),
        ("x" * 78, repr("x" * 78)),
        ("x" * 79, "'" + "x" * 76 + "..."),
        (list(range(5000)), str(list(range(5000)))[:77] + "..."),
        pytest.param(10**5000, "an object of type int", id="int"),  # pytest would print it
        (Silent(), "an object of type Silent"),
        (torch.zeros(1000, 3), "Tensor of shape (1000, 3) and torch.float32"),
        (np.zeros((2, 3)), "ndarray of shape (2, 3) and float64"),
        (np.float32(0.5), repr(np.float32(0.5))),
        (torch.tensor(3), "tensor(3)"),
    ],
)
def test_values_are_short_and_arrays_tell_their_shape(value: Any, text: str) -> None:
    assert shown(value) == text
    assert len(text) <= 80
