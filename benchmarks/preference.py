"""Derivation of _PREFERENCE of scc_fast/ops/__init__.py from stored rows.

    python benchmarks/preference.py                    # the newest results of every device
    python benchmarks/preference.py results.json …     # these

The value of a kind of device is a tuple that serves all of its ops, or, where they differ, a dict
of tuples by op with the rest under "default".
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Ranking = tuple[str, ...]
Preference = Mapping[str, "Ranking | Mapping[str, Ranking]"]
Scores = dict[str, dict[str, float]]  # op → backend → share of the fastest's speed

RESULTS = Path(__file__).parent / "results"
EQUAL = 0.05  # a smaller difference is none
_CONFIGURATION = ("name", "shape", "precision", "baseline", "engine")


def newest() -> dict[str, Path]:
    """Newest <date>.json or ops-<date>.json of each folder with rows of ops, without quick runs."""
    found = {}
    dated = [*RESULTS.glob("*/[0-9]*.json"), *RESULTS.glob("*/ops-*.json")]
    for path in sorted(dated, key=lambda path: path.name.removeprefix("ops-")):
        rows = [r for r in json.loads(path.read_text())["rows"] if r["group"] == "ops"]
        if rows and not any(row["quick"] for row in rows):
            found[path.parent.name] = path
    return found


def scores(rows: Iterable[Mapping[str, Any]]) -> Scores:
    """Per op and backend, the geometric mean over sizes and precisions of its relative speed.

    Speed is the ratio to the baseline, measured in turns, so that a load that comes and goes hits
    all backends alike. A configuration counts if every backend of its op was measured in it (the
    reference may be missing: it is not captured in graphs); noisy ones count only for an op that
    has no others.
    """
    by_op: dict[str, dict[tuple[Any, ...], dict[str, Mapping[str, Any]]]] = {}
    for row in rows:
        if row["group"] == "ops" and row["ratio"] and not row["quick"]:
            configurations = by_op.setdefault(row["name"].split()[0], defaultdict(dict))
            configurations[tuple(row[key] for key in _CONFIGURATION)][row["backend"]] = row
    found = {}
    for op, configurations in by_op.items():
        backends = set().union(*configurations.values()) - {"reference"}
        complete = [seen for seen in configurations.values() if backends <= set(seen)]
        calm = [seen for seen in complete if not any(row["loaded"] for row in seen.values())]
        speeds: dict[str, list[float]] = defaultdict(list)
        for seen in calm or complete or configurations.values():
            best = max(row["ratio"] for row in seen.values())
            for backend, row in seen.items():
                speeds[backend].append(math.log(row["ratio"] / best))
        found[op] = {b: math.exp(sum(v) / len(v)) for b, v in sorted(speeds.items())}
    return found


def agrees(ranking: Ranking, speed: Mapping[str, float]) -> bool:
    """Whether no backend that was measured stands behind one that is clearly slower."""
    order = [backend for backend in ranking if backend in speed]
    pairs = itertools.combinations(order, 2)
    return set(order) == set(speed) and all(
        speed[later] <= speed[first] * (1 + EQUAL) for first, later in pairs
    )


def ranking_of(preference: Preference, kind: str, op: str) -> Ranking:
    """Ranking of an op in a preference of either form."""
    value = preference.get(kind, ("reference",))
    if isinstance(value, Mapping):
        return tuple(value.get(op, value["default"]))
    return tuple(value)


def disagreements(preference: Preference, kind: str, found: Scores) -> list[str]:
    """Lines on ops whose ranking contradicts the rows."""
    lines = []
    for op, speed in found.items():
        ranking = ranking_of(preference, kind, op)
        if not agrees(ranking, speed):
            measured = ", ".join(f"{b} {s:.2f}" for b, s in _sorted(speed))
            lines.append(f"{op} on {kind}: _PREFERENCE has {ranking}, measured speeds: {measured}")
    return lines


def proposal(found: Scores) -> Ranking | dict[str, Ranking]:
    """Simplest preference that agrees with the rows of a device."""
    # Most general last, as it is the one that is always there.
    names = sorted({b for speed in found.values() for b in speed}, key=lambda b: b == "reference")
    votes = Counter(
        {
            ranking: sum(agrees(ranking, speed) for speed in found.values())
            for ranking in itertools.permutations(names)
        }
    )
    default, count = votes.most_common(1)[0]
    if count == len(found):
        return default
    own = {
        op: tuple(b for b, _ in _sorted(speed))
        for op, speed in found.items()
        if not agrees(default, speed)
    }
    return {"default": default, **own}


def _sorted(speed: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(speed.items(), key=lambda item: -item[1])


def main(paths: list[str]) -> int:
    """Print rankings, the value proposed, and what contradicts the present one."""
    from scc_fast import ops

    wrong = 0
    for path in [Path(p) for p in paths] or list(newest().values()):
        stored = json.loads(path.read_text())
        kind, found = stored["environment"]["kind"], scores(stored["rows"])
        print(f"{path} ({stored['environment']['device']})")
        for op, speed in found.items():
            print(f"  {op:20}", "  ".join(f"{b} {s:.2f}" for b, s in _sorted(speed)))
        if not found:
            print("  no rows to rank by (a quick run?)")
            continue
        print(f"  _PREFERENCE[{kind!r}] = {proposal(found)!r}")
        lines = disagreements(ops._PREFERENCE, kind, found)
        wrong += len(lines)
        print("\n".join(f"  CONTRADICTED: {line}" for line in lines) or "  as it is now: agrees")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
