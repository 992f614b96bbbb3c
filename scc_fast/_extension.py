"""Import of the compiled extension scc_fast._C, and the reason if it fails.

Importing _C registers the C++ kernels of scc_fast.ops. Nothing here raises: without _C every op
runs its reference.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch  # must come first: _C finds torch's libraries in the process

BUILT: str = "none"
"""Target of the loaded extension: "cuda" (and CPU), "cpu", or "none" if not loaded."""

WHY: str | None = None
"""Reason why the extension is not loaded, or None."""


def available() -> bool:
    """Whether the compiled extension is loaded."""
    return WHY is None


if importlib.util.find_spec("scc_fast._C") is None:
    WHY = (
        "scc_fast was installed without its compiled extension: SCC_FAST_BUILD was 'none', or the "
        "build failed (SCC_FAST_BUILD=cpu pip install -v … shows the compiler's error)"
    )
else:
    try:
        # `from scc_fast import _C` would report a circular import on failure.
        BUILT = importlib.import_module("scc_fast._C").BUILT
    except (ImportError, OSError) as error:  # e.g. a CUDA build beside a CPU-only torch
        WHY = (
            f"scc_fast._C is installed but did not load: {error} "
            f"(this torch is built for CUDA {torch.version.cuda})"
        )
