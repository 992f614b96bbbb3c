"""Runs defenses against attacks, chunk by chunk, and can be interrupted at any time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scc_fast import attacks
from scc_fast.api import Defender, image_seeds
from scc_fast.config import format_epsilon

# (start, stop) -> images (n, 3, H, W) in [0, 1] and labels (n,).
Pictures = Callable[[int, int], tuple[Tensor, Tensor]]


class AttackFailed(RuntimeError):
    """The undefended model survives the attack, so nothing measured under it means anything."""


@dataclass(frozen=True)
class Attack:
    """One attack to evaluate under; n images at most where `limit` is set."""

    kind: Literal["clean", "pgd", "view-aware", "adaptive"] = "clean"
    epsilon: float = 0.0
    steps: int = 10
    eot: int = 1
    limit: int | None = None

    @property
    def name(self) -> str:
        """As it stands in tables: "clean", "PGD-10", "view-aware PGD-30", …"""
        match self.kind:
            case "clean":
                return "clean"
            case "pgd":
                return f"PGD-{self.steps}"
            case "view-aware":
                return f"view-aware PGD-{self.steps}"
        return f"adaptive PGD-{self.steps} EOT-{self.eot}"

    def run(self, defender: Defender, x: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
        """The attacked images."""
        match self.kind:
            case "clean":
                return x
            case "pgd":
                return attacks.pgd(
                    defender, x, labels, seeds, epsilon=self.epsilon, steps=self.steps
                )
            case "view-aware":
                return attacks.view_aware(
                    defender, x, labels, seeds, epsilon=self.epsilon, steps=self.steps
                )
        return attacks.adaptive(
            defender, x, labels, seeds, epsilon=self.epsilon, steps=self.steps, eot=self.eot
        )


@dataclass(frozen=True)
class Row:
    """One accuracy with all that is needed to read it; accuracy and interval in [0, 1]."""

    defense: str
    attack: str
    eps: str
    accuracy: float
    n: int
    ci_low: float
    ci_high: float
    ms_per_image: float
    seed: int
    settings: dict[str, Any]


def wilson(hits: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % Wilson score interval of hits out of n."""
    if n == 0:
        return 0.0, 1.0
    p, zz = hits / n, z * z
    centre = (p + zz / (2 * n)) / (1 + zz / n)
    half = z / (1 + zz / n) * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    return min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half))


def evaluate(
    defenders: Mapping[str, Defender],
    views_of: str,
    pictures: Pictures,
    n: int,
    plan: Sequence[Attack],
    *,
    seed: int = 0,
    chunk: int = 50,
    state: Path | None = None,
) -> Iterator[list[Row]]:
    """Accuracy of every defender under every attack; yields the rows so far after each chunk.

    Oblivious and view-aware attacks are made once and shown to all defenders, adaptive ones are
    made against each. With `state`, finished chunks are appended to that file, and a later call
    with the same arguments goes on where it stopped.

    Args:
        defenders: by the name they have in the table; "none" must be the undefended model.
        views_of: name of the defender whose views the view-aware attack knows.
        pictures: where images and labels come from.
        n: number of images.
        plan: attacks, in the order of the table.

    Raises:
        AttackFailed: see check_attack().
    """
    book = _Book(state, _fingerprint(defenders, views_of, plan, seed, chunk))
    for attack in plan:
        last = min(n, attack.limit or n)
        for start in range(0, last, chunk):
            stop = min(start + chunk, last)
            todo = [name for name in defenders if not book.has(name, attack, start, stop)]
            if todo:
                device = defenders[views_of].model.device
                x, labels = (tensor.to(device) for tensor in pictures(start, stop))
                attacker = image_seeds(seed + 1, n, device)[start:stop]
                judge = image_seeds(seed, n, device)[start:stop]
                shared = None
                for name in todo:
                    if attack.kind == "adaptive":
                        seen = attack.run(defenders[name], x, labels, attacker)
                    else:
                        if shared is None:
                            shared = attack.run(defenders[views_of], x, labels, attacker)
                        seen = shared
                    began = time.perf_counter()
                    hits = defenders[name](seen, judge).labels == labels
                    book.add(name, attack, start, stop, hits, time.perf_counter() - began)
            yield book.rows(defenders, plan, n, seed)
        if attack.kind == "pgd" and "none" in defenders:
            check_attack(book.rows(defenders, plan, n, seed), plan)


def check_attack(rows: Sequence[Row], plan: Sequence[Attack]) -> None:
    """Raise AttackFailed unless the strongest PGD halves the undefended model's accuracy."""
    strongest = max((a for a in plan if a.kind == "pgd"), key=lambda a: a.epsilon, default=None)
    if strongest is None:
        return
    found = {
        row.attack: row.accuracy
        for row in rows
        if row.defense == "none"
        and (row.attack == "clean" or row.eps == format_epsilon(strongest.epsilon))
    }
    if strongest.name not in found:
        return
    clean, robust = found.get("clean", 1.0), found[strongest.name]
    if robust > 0.5 * clean:
        raise AttackFailed(
            f"the attack does not work: under {strongest.name} at "
            f"{format_epsilon(strongest.epsilon)} the undefended model keeps {robust:.1%} of its "
            f"{clean:.1%}; accuracies under it would mean nothing"
        )


class _Book:
    """Hits per image of every finished chunk, in memory and, line by line, on disk."""

    def __init__(self, path: Path | None, fingerprint: str) -> None:
        self.hits: dict[tuple[str, str], dict[tuple[int, int], tuple[str, float]]] = {}
        self.path = path
        if path is None:
            return
        if path.exists():
            text = path.read_text()
            if "\n" not in text and fingerprint.startswith(text):  # cut in its first line
                path.write_text(fingerprint + "\n")
                return
            if not text.endswith("\n"):  # the next line must not be glued to a cut one
                with path.open("a") as file:
                    file.write("\n")
            first, *lines = text.splitlines()
            if first != fingerprint:
                raise ValueError(
                    f"state file {path} belongs to another evaluation: give another name, or "
                    "remove it"
                )
            for line in lines:
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the line an interruption cut short
                self._keep(*entry)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(fingerprint + "\n")

    def _keep(self, defense: str, key: str, start: int, stop: int, hits: str, s: float) -> None:
        self.hits.setdefault((defense, key), {})[start, stop] = hits, s

    def has(self, defense: str, attack: Attack, start: int, stop: int) -> bool:
        return (start, stop) in self.hits.get((defense, _key(attack)), {})

    def add(
        self, defense: str, attack: Attack, start: int, stop: int, hits: Tensor, seconds: float
    ) -> None:
        bits = "".join("1" if hit else "0" for hit in hits.tolist())
        self._keep(defense, _key(attack), start, stop, bits, seconds)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps([defense, _key(attack), start, stop, bits, seconds]) + "\n")

    def rows(
        self, defenders: Mapping[str, Defender], plan: Sequence[Attack], n: int, seed: int
    ) -> list[Row]:
        rows = []
        for name, defender in defenders.items():
            for attack in plan:
                bits, seconds = self._upto(name, attack, min(n, attack.limit or n))
                if bits:
                    rows.append(_row(name, defender, attack, bits, seconds, seed))
            rows += self._worst(name, plan, n, seed)
        return rows

    def _upto(self, name: str, attack: Attack, last: int) -> tuple[str, float]:
        chunks = self.hits.get((name, _key(attack)), {})
        inside, at = [], 0
        # A smaller n may have left a shorter chunk with the same start: the longest one counts.
        while spans := [span for span in chunks if span[0] == at and span[1] <= last]:
            at = max(stop for _, stop in spans)
            inside.append(chunks[min(spans)[0], at])
        return "".join(bits for bits, _ in inside), sum(seconds for _, seconds in inside)

    def _worst(self, name: str, plan: Sequence[Attack], n: int, seed: int) -> list[Row]:
        """An image counts only if it survives every attack of one budget."""
        rows = []
        for epsilon in sorted({a.epsilon for a in plan if a.kind == "adaptive"}):
            same = [a for a in plan if a.epsilon == epsilon]
            bits = [self._upto(name, a, min(n, a.limit or n))[0] for a in same]
            common = min(len(b) for b in bits)
            if common:
                survive = [all(b[i] == "1" for b in bits) for i in range(common)]
                low, high = wilson(sum(survive), common)
                settings = {"of": [a.name for a in same]}
                rows.append(
                    Row(
                        name,
                        "worst per image",
                        format_epsilon(epsilon),
                        sum(survive) / common,
                        common,
                        low,
                        high,
                        0.0,
                        seed,
                        settings,
                    )
                )
        return rows


def _row(
    name: str, defender: Defender, attack: Attack, bits: str, seconds: float, seed: int
) -> Row:
    hits, n = bits.count("1"), len(bits)
    low, high = wilson(hits, n)
    return Row(
        defense=name,
        attack=attack.name,
        eps=format_epsilon(attack.epsilon),
        accuracy=hits / n,
        n=n,
        ci_low=low,
        ci_high=high,
        ms_per_image=1e3 * seconds / n,
        seed=seed,
        settings={
            "method": defender.method,
            "config": dataclasses.asdict(defender.config),
            "attack": dataclasses.asdict(attack),
            "model": defender.model.name,
            "torch": torch.__version__,
        },
    )


def _key(attack: Attack) -> str:
    return json.dumps({**dataclasses.asdict(attack), "limit": None})


def _fingerprint(
    defenders: Mapping[str, Defender], views_of: str, plan: Sequence[Attack], seed: int, chunk: int
) -> str:
    """What results depend on, apart from how many images and which attacks are asked for."""
    first = next(iter(defenders.values()))
    weights = hashlib.sha256()
    for value in getattr(first.model, "module", nn.Module()).state_dict().values():
        weights.update(value.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    if first.classes is None:
        weights.update(first.text_features.cpu().numpy().tobytes())
    model = [first.model.name, first.classes, weights.hexdigest()]
    configs = {name: d.config.to_json() for name, d in defenders.items()}
    return json.dumps([configs, views_of, seed, chunk, model], sort_keys=True)
