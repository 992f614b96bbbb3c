"""Progress bar of long loops."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def with_progress(items: Sequence[T], what: str) -> Iterator[T]:
    """Iterate, with a progress bar on a terminal after two seconds."""
    start, bar, task = time.monotonic(), None, None
    try:
        for done, item in enumerate(items, 1):
            yield item
            if bar is None and time.monotonic() - start > 2 and sys.stderr.isatty():
                try:
                    from rich.console import Console
                    from rich.progress import Progress
                except ImportError:
                    continue
                bar = Progress(console=Console(stderr=True), transient=True)
                task = bar.add_task(what, total=len(items))
                bar.start()
            if bar is not None and task is not None:
                bar.update(task, completed=done)
    finally:
        if bar is not None:
            bar.stop()
