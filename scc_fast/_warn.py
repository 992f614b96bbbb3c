"""Warnings that point at the caller's line."""

from __future__ import annotations

import sys
import warnings


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the first frame outside scc_fast and torch."""
    level, frame = 1, sys._getframe(1)
    inside = ("scc_fast.", "torch.")
    while frame.f_back is not None and frame.f_globals["__name__"].startswith(inside):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level + 1)
