"""Reads what `nvcc -Xptxas -v` said: registers of each kernel; no spills and no stack.

ptxas.py LOG 80 89 90
"""

from __future__ import annotations

import collections
import re
import sys
from pathlib import Path

NEEDED = ("make_views_kernel", "adjoint_kernel", "step_kernel")
ENTRY = re.compile(
    r"Compiling entry function '(\w+)' for 'sm_(\d+)\w*'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers",
    re.S,
)


def name_of(mangled: str) -> str:
    """The last of the names in _ZN<length><name>…, without template arguments."""
    rest, name = mangled.removeprefix("_ZN"), mangled
    while match := re.match(r"\d+", rest):
        name = rest[match.end() :][: int(match[0])]
        rest = rest[match.end() + len(name) :]
    return name


def main(log: str, *architectures: str) -> None:
    text = Path(log).read_text("utf8", "replace")
    found = ENTRY.findall(text)
    if not found or len(found) != text.count("Compiling entry function"):
        raise SystemExit(f"{len(found)} kernels understood in {log}")
    registers: dict[str, list[int]] = collections.defaultdict(list)
    seen, wrong = set(), []
    for mangled, architecture, *memory, used in found:
        name = name_of(mangled)
        registers[name].append(int(used))
        seen.add((name, architecture))
        if memory != ["0", "0", "0"]:
            wrong.append(f"{mangled} for sm_{architecture}: stack, stores, loads: {memory} bytes")
    wrong += [
        f"no {name} for sm_{architecture}"
        for name in NEEDED
        for architecture in architectures
        if (name, architecture) not in seen
    ]
    for name, used in sorted(registers.items()):
        print(f"{name}: {min(used)} to {max(used)} registers in {len(used)} variants")
    if wrong:
        raise SystemExit("\n".join(wrong))
    print(f"{len(found)} kernels: nothing spilt, no stack")


if __name__ == "__main__":
    main(*sys.argv[1:])
