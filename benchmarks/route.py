"""Route of a call from Defender to the first view: files, stack depth, Python calls.

python benchmarks/route.py
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import scc_fast
from scc_fast import tiny

PACKAGE = Path(scc_fast.__file__).parent
END = "ops/views.py"


@dataclass(frozen=True)
class Route:
    """Route between a call of a Defender and its first view.

    Args:
        way: files of scc_fast on the stack at the first view, one for each run of frames in it.
        visits: all that were entered until then, helpers that had returned included.
        depth: frames of scc_fast on that stack.
        calls: of Python functions, anyone's.
    """

    way: tuple[str, ...]
    visits: tuple[str, ...]
    depth: int
    calls: int


def route(call: Any) -> Route:
    """Route of call()."""
    entered: list[str] = []
    stack: list[str] = []
    calls = 0

    def note(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        if event != "call" or stack:
            return
        calls += 1
        name = _ours(frame)
        if name:
            entered.append(name)
        if name == END:
            above: FrameType | None = frame
            while above is not None:
                stack.insert(0, _ours(above))
                above = above.f_back

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    way = [name for name in stack if name]
    return Route(_runs(way), _runs(entered), len(way), calls)


def _ours(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    return str(path.relative_to(PACKAGE)) if path.is_relative_to(PACKAGE) else ""


def _runs(names: list[str]) -> tuple[str, ...]:
    return tuple(name for name, _ in itertools.groupby(names))


def of_a_defender() -> Route:
    """Route of a Defender's second call, on a tensor."""
    defender = scc_fast.Defender(scc_fast.load_model("tiny", device="cpu"), tiny.prompts())
    x, seeds = torch.rand(1, 3, 64, 64), torch.zeros(1, dtype=torch.int64)
    defender(x, seeds)
    return route(lambda: defender(x, seeds))


if __name__ == "__main__":
    found = of_a_defender()
    print("way down:", " › ".join(found.way))
    print("visited: ", " › ".join(found.visits))
    changes = len(found.way) - 1
    print(f"{changes} changes of file, depth {found.depth}, {found.calls} Python calls")
