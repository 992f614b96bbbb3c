"""The one source of inputs, tolerances and backends for the tests of the ops.

SCC_FAST_TEST_BACKENDS=cpp,triton promises those backends: a case whose backend is missing then
fails instead of being skipped, so that a green suite cannot hide a build that did not happen.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from scc_fast import ops

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))

# Tolerances, in units in the last place of the dtype, against a float64 evaluation.
ULPS = {torch.float32: 4, torch.bfloat16: 1, torch.float16: 1}

PROMISED = frozenset(filter(None, os.environ.get("SCC_FAST_TEST_BACKENDS", "").split(",")))
if not PROMISED.issubset(ops.BACKENDS):
    raise ValueError(f"SCC_FAST_TEST_BACKENDS: {sorted(PROMISED)} must be among {ops.BACKENDS}")


def backends_under_test(op: str, backends: tuple[str, ...] = ops.BACKENDS) -> Iterator:
    """Parameters (device, backend) for every device; a missing backend is skipped, with the reason.

    A promised one is not skipped: the op itself then fails, and says why. Triton is promised on
    the GPU where there is one, else in its interpreter on the CPU.
    """
    triton_device = "cuda" if torch.cuda.is_available() else "cpu"
    for device in ("cpu", "cuda"):
        for backend in backends:
            why_not = ops.backends_of(op, device)[backend]
            promised = backend in PROMISED and (backend != "triton" or device == triton_device)
            marks = [pytest.mark.gpu] if device == "cuda" else []
            if why_not is not None and not promised:
                marks.append(pytest.mark.skip(reason=f"{backend} on {device}: {why_not}"))
            yield pytest.param(device, backend, marks=marks, id=f"{device}-{backend}")


def ulp_error(got: Tensor, want: Tensor, floor: float = 0.0) -> float:
    """The largest |got - want| in units in the last place of got's dtype, want being float64.

    Below `floor` an error counts in the units of `floor`: where want itself is not exact.
    """
    if got.numel() == 0:
        return 0.0
    info = torch.finfo(got.dtype)
    scale = want.double().abs().clamp(min=max(floor, info.tiny)).cpu().numpy()
    unit = torch.from_numpy(np.exp2(np.floor(np.log2(scale)))) * info.eps
    return ((got.double() - want.double()).abs().cpu() / unit).max().item()


# Images seeded alone and in an odd batch, with every kind of 64-bit seed.
_EDGES = [0, -1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, -(2**32), 2**63 - 1, -(2**63)]
SEEDS = {0: [], 1: [-1], 17: [*_EDGES, 1, 2, -2, 42, 7, -987654321, 1234567890123456789, -(2**62)]}

# (batch, numel): around Philox's four words, then past a kernel's block, one image and many.
SIZES = [(batch, numel) for batch in SEEDS for numel in (0, 1, 3, 4, 5)]
SIZES += [(1, 2**16 + 1), (17, 2**12 + 1), (17, 2**12)]

# (purpose, view), with both ends of their range.
STREAMS = ((0, 0), (1, 0), (0, 1), (2**32 - 1, 2**31), (5, 2**32 - 1))


def seeds(batch: int, device: str = "cpu") -> Tensor:
    """(batch,) int64 seeds, batch one of SEEDS."""
    return torch.tensor(SEEDS[batch], dtype=torch.int64, device=device)
