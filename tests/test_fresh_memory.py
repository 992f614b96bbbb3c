"""During the tests fresh memory is NaN (conftest.py), so that an element left unwritten is seen."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import op_cases
from scc_fast import ops

MAKERS: dict[str, Callable[[Tensor], Tensor]] = {
    "empty": lambda like: torch.empty(like.shape, dtype=like.dtype),
    "empty_like": torch.empty_like,
    "empty_strided": lambda like: torch.empty_strided((7,), (1,), dtype=like.dtype),
    "new_empty": lambda like: like.new_empty(7),
    "resize_": lambda like: like.new_empty(0).resize_(7),
}


@pytest.mark.parametrize("dtype", [torch.float64, *op_cases.DTYPES], ids=str)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_fresh_numbers_are_nan(make: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    assert make(torch.ones(7, dtype=dtype)).isnan().all()


def test_fresh_integers_are_the_largest() -> None:
    assert torch.empty(3, dtype=torch.int64).tolist() == [2**63 - 1] * 3


def test_what_the_compiled_kernels_allocate_is_filled_too() -> None:
    """They allocate by new_empty of torch's stable ABI, which the dispatcher sees."""
    if (why := ops.backends_of("gelu", "cpu")["cpp"]) is not None:
        pytest.skip(why)
    with torch.autograd.profiler.profile(use_kineto=False) as profile:
        ops.gelu(op_cases.random(2, 8), backend="cpp")
    called = [event.name for event in profile.function_events]
    assert called[-3:] == ["aten::new_empty", "aten::empty", "aten::fill_"]
