"""Rows of results: what is known of one defense under one attack."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


def wilson(hits: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % Wilson score interval of hits out of n."""
    if n == 0:
        return 0.0, 1.0
    p, zz = hits / n, z * z
    centre = (p + zz / (2 * n)) / (1 + zz / n)
    half = z / (1 + zz / n) * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    return min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half))


@dataclass(frozen=True)
class Row:
    """One accuracy with all that is needed to read it; accuracy and interval in [0, 1].

    Args:
        defense, method: the spec as it was asked for ("scc:semantic=false"), and its name ("scc").
        attack, title: the same of the attack ("pgd10", "PGD-10"); "clean" is none, "worst" counts
            an image only if it is right under every attack of `of`.
        aware: the attack knew the defense.
        eps: budget, as "4/255".
        clean_right, clean_wrong: the images that the undefended model gets right (wrong) when they
            are clean, {"n", "hits"}: an oblivious attack may give the label away, and then the
            defense is right where the model was wrong.
        flagged: the share that the gate took as attacked; None without a gate.
        traits, config, attack_settings: of the defense and of the attack.
    """

    defense: str
    method: str
    attack: str
    title: str
    aware: bool
    eps: str
    seed: int
    n: int
    hits: int
    accuracy: float
    ci_low: float
    ci_high: float
    clean_right: dict[str, int] = field(default_factory=dict)
    clean_wrong: dict[str, int] = field(default_factory=dict)
    flagged: float | None = None
    traits: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    attack_settings: dict[str, Any] = field(default_factory=dict)
    of: list[str] = field(default_factory=list)


def row_of(right: str, clean: str, flagged: str = "", **facts: Any) -> Row:
    """A row from one character an image: "1" where the answer is right, where the undefended model
    is right on the clean image, and where the gate took it as attacked ("" without a gate)."""
    n, hits = len(right), right.count("1")
    low, high = wilson(hits, n)

    def among(kind: str) -> dict[str, int]:
        chosen = [a for a, b in zip(right, clean, strict=False) if b == kind]
        return {"n": len(chosen), "hits": chosen.count("1")}

    return Row(
        n=n,
        hits=hits,
        accuracy=hits / n,
        ci_low=low,
        ci_high=high,
        clean_right=among("1"),
        clean_wrong=among("0"),
        flagged=flagged.count("1") / n if flagged else None,
        **facts,
    )


def worst_of(bits: Sequence[str]) -> str:
    """An image counts only if it is right every time; as far as all have been seen."""
    return "".join("1" if set(column) == {"1"} else "0" for column in zip(*bits, strict=False))


class AttackFailed(RuntimeError):
    """The undefended model survives the attack, so nothing measured under it means anything."""


def check_attack(row: Row, least: float = 0.1) -> None:
    """Raise AttackFailed unless the attack costs the undefended model what it was right about.

    Args:
        row: that of "none" under the attack.
        least: the share of the pictures it got right that must fall.
    """
    n, hits = row.clean_right["n"], row.clean_right["hits"]
    if n and hits > (1 - least) * n:
        raise AttackFailed(
            f"the attack does not work: under {row.title} at {row.eps} the undefended model keeps "
            f"{hits} of the {n} pictures it gets right ({hits / n:.1%}); accuracies under it would "
            "mean nothing (--allow-weak-attack goes on all the same)"
        )


def format_rows(rows: Sequence[Row | Mapping[str, Any]]) -> list[dict[str, Any]]:
    """As they stand in results.json, `of` only where it means something."""
    from dataclasses import asdict

    plain = [asdict(row) if isinstance(row, Row) else dict(row) for row in rows]
    return [{k: v for k, v in row.items() if k != "of" or v} for row in plain]


def timed_rows(rows: Sequence[Row], times: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """As --json has them: those of results.json, each with its times; None where it has none."""
    known = {(time["defense"], time["attack"], time["eps"]): time for time in times}
    names = ("ms_per_image", "attack_ms_per_image", "rounds")
    found = []
    for row in format_rows(rows):
        time = known.get((row["defense"], row["attack"], row["eps"]), {})
        found.append(row | {name: time.get(name) for name in names})
    return found
