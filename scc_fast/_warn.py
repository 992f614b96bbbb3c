"""Warnings that point at the caller's line, however deep inside the package they arise."""

from __future__ import annotations

import sys
import warnings


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """A warning at the first line outside scc_fast, past torch's wrappers."""
    level, frame = 1, sys._getframe(1)
    inside = ("scc_fast.", "torch.")
    while frame.f_back is not None and frame.f_globals["__name__"].startswith(inside):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level + 1)
