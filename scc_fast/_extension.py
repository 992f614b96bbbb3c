"""Loads the compiled extension scc_fast._C once, and remembers why it could not.

Importing _C registers its C++ kernels for the ops of scc_fast.ops, before or after those are
defined. Nothing here raises: without _C every op runs its reference.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch  # must come first: _C finds torch's libraries in the process

BUILT: str = "none"
"""For what the loaded extension was compiled: "cuda" (CPU too), "cpu", or "none" if not loaded."""

WHY: str | None = None
"""Why the extension is not loaded; None where it is."""


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
        # Not `from scc_fast import _C`, which blames a failing import on a circular one.
        BUILT = importlib.import_module("scc_fast._C").BUILT
    except (ImportError, OSError) as error:  # a CUDA build beside a CPU-only torch, for one
        WHY = (
            f"scc_fast._C is installed but did not load: {error} "
            f"(this torch is built for CUDA {torch.version.cuda})"
        )
