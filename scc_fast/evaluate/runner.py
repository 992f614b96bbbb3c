"""Runner: defenses against attacks, batch by batch, resumable.

Each batch is stored before the next begins; after an interruption the same call continues, and
ends with the same results.json.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from scc_fast import attacks
from scc_fast.attacks import Attack
from scc_fast.config import format_epsilon, nearest, shown
from scc_fast.defenses import parse_defense
from scc_fast.evaluate.results import (
    CLEAN,
    FORMAT,
    WORST,
    Row,
    check_attack,
    format_rows,
    row_of,
    worst_of,
)
from scc_fast.evaluate.store import (
    AttackFolder,
    Busy,
    Store,
    locked,
    owner_folder,
    slug,
)
from scc_fast.evaluate.worker import Judged, Made, Origin, Setting, Task, Worker
from scc_fast.models.checkpoints import without_folders

# Names for all applicable adaptive attacks, and for the columns of the main table.
ADAPTIVE, STANDARD = "adaptive", "standard"
STANDARDS = ("damaged", "pgd10", "pgd-own10", "pgd-random10", ADAPTIVE)


class Executor(Protocol):
    """Executor of tasks, in this process or many."""

    def __call__(
        self, tasks: Sequence[Task], kept: Callable[[Task], Tensor | None]
    ) -> Iterable[tuple[Task, Origin | Made | Judged]]:
        """Results of tasks, in any order; `kept` gives stored images."""
        ...


@dataclass(frozen=True)
class Asked:
    """Request: defenses, attacks and budgets.

    Args:
        defenses: specs, see defenses.parse_defense; "none" is always included.
        attacks: specs, see attacks.parse_attack, "adaptive", or "standard" for STANDARDS; "clean"
            is always included.
        eps: budgets, pixel units; attacks without one ("damaged") are made once.
        adaptive_n: number of pictures under adaptive attacks, the first ones; None: all.
        allow_weak: continue if an attack does not break the undefended model.
    """

    defenses: tuple[str, ...] = ("none", "ttc", "scc")
    attacks: tuple[str, ...] = ("pgd10",)
    eps: tuple[float, ...] = (1 / 255,)
    adaptive_n: int | None = None
    allow_weak: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "defenses", tuple(dict.fromkeys(("none", *self.defenses))))
        alike: dict[
            str, str
        ] = {}  # "pgd10" and "pgd:steps=10" are equal; the first spelling counts
        sets = (STANDARDS if spec == STANDARD else (spec,) for spec in self.attacks)
        for spec in chain.from_iterable(sets):
            alike.setdefault(_plainly(spec), spec)
        object.__setattr__(self, "attacks", tuple(alike.values()))
        for spec in self.defenses:
            parse_defense(spec)
        grid = (round(255 * e) / 255 if abs(255 * e % 1 - 0.5) > 0.499999 else e for e in self.eps)
        object.__setattr__(self, "eps", tuple(dict.fromkeys(grid)))
        if not self.eps or not all(0 < epsilon < 1 for epsilon in self.eps):
            raise ValueError(f"eps must be budgets in (0, 1) such as 4/255, got {self.eps}")
        if self.adaptive_n is not None and self.adaptive_n < 1:
            raise ValueError(f"adaptive_n must be at least 1, got {self.adaptive_n}")


class Run:
    """Run of one model, data set and seed, in a folder.

    Args:
        setting: of all results.
        out: parent of the run's folder.
        worker: of this process.
    """

    def __init__(self, setting: Setting, out: Path, worker: Worker | None = None) -> None:
        self.worker = Worker(setting) if worker is None else worker
        data = self.worker.data
        count, seed = f"n{len(data)}", f"seed{setting.seed}"
        parts = "-".join(["", data.name, data.split, data.protocol, count, seed])
        name = slug(without_folders(setting.model) + parts, setting.model + parts)
        self.store = Store(out / name, self.worker.facts())

    # ------------------------------------------------------------------------------------ tasks

    def tasks(self, asked: Asked) -> list[Task]:
        """All tasks, done or not; the undefended model comes first under each attack."""
        others = tuple(spec for spec in asked.defenses if spec != "none")
        plain = [(CLEAN, 0.0)]
        for spec in asked.attacks:
            if spec in (CLEAN, ADAPTIVE):
                continue
            attack = attacks.parse_attack(spec, 4 / 255)
            if attack.aware:
                continue
            if not attack.suits(self.worker.defense("none")):
                raise ValueError(
                    f"attack {shown(spec)} cannot be made here: {self.worker.data.name} has "
                    f"{len(set(self.worker.data.prompts))} different classes"
                )
            plain += [(spec, epsilon) for epsilon in (asked.eps if attack.budgeted else (0.0,))]
        every = list(self.worker.batches())
        found = [Task(spec, e, None, *b, ("none",)) for spec, e in plain for b in every]
        found += [Task(spec, e, None, *b, others) for spec, e in plain for b in every if others]
        for spec, epsilon, owner in self._aware(asked):
            some = self.worker.batches(asked.adaptive_n)
            found += [Task(spec, epsilon, owner, *b, (owner,)) for b in some]
        return found

    def _aware(self, asked: Asked) -> Iterator[tuple[str, float, str]]:
        """(attack, budget, defense) of adaptive attacks."""
        for epsilon in asked.eps:
            for owner in asked.defenses:
                target = self.worker.defense(owner)
                suite = attacks.adaptive_suite(target, epsilon) if ADAPTIVE in asked.attacks else []
                alike = {one.spec: one.spec for one in suite}
                alike.update((_plainly(spec), spec) for spec in asked.attacks)
                for spec in alike.values():
                    if spec in (CLEAN, ADAPTIVE):
                        continue
                    attack = attacks.parse_attack(spec, epsilon)
                    if attack.aware and attack.suits(target):
                        yield spec, epsilon, owner

    def _left(self, tasks: Sequence[Task]) -> list[Task]:
        """Remaining tasks, with the defenses not yet judged."""
        known: dict[Path, dict[tuple[str, int], Any]] = {}
        left = []
        for task in tasks:
            folder = self._folder(task)
            if folder.path not in known:
                known[folder.path] = folder.records()
            done = {
                spec
                for (spec, batch), record in known[folder.path].items()
                if batch == task.batch and len(record["right"]) >= task.count
            }
            todo = tuple(spec for spec in task.defenses if spec not in done)
            if todo:
                left.append(replace(task, defenses=todo))
        return left

    def _folder(self, task: Task) -> AttackFolder:
        return self.store.attack(task.attack, task.epsilon)

    # --------------------------------------------------------------------------------- execution

    def go(
        self,
        asked: Asked,
        *,
        execute: Executor | None = None,
        start: Callable[[int, int], None] = lambda total, done: None,
        tick: Callable[[str], None] = lambda what: None,
        say: Callable[[str], None] = lambda what: None,
    ) -> list[Row]:
        """Do the remaining tasks, and return the rows.

        Waits for other processes that work on the same attack.

        Args:
            asked: the request.
            execute: executor; None: this process.
            start: gets the number of judgements, and of those done already.
            tick: gets each judgement, as text.
            say: gets messages for the user.

        Raises:
            AttackFailed: an attack does not break the undefended model; results so far are kept.
        """
        execute = self.execute if execute is None else execute
        self.store.add_defenses({spec: self.worker.describe(spec) for spec in asked.defenses})
        tasks = self.tasks(asked)
        for spec, epsilon in dict.fromkeys((task.attack, task.epsilon) for task in tasks):
            folder = self.store.attack(spec, epsilon, _settings(spec, epsilon))
            counts: dict[str, int] = {}
            for task in tasks:
                if task.owner and (task.attack, task.epsilon) == (spec, epsilon):
                    counts[task.owner] = counts.get(task.owner, 0) + task.count
            if counts:
                self.store.keep_counts(folder, counts)
        for spec in asked.attacks:
            aware = spec not in (CLEAN, ADAPTIVE) and attacks.parse_attack(spec, 4 / 255).aware
            if aware and all(task.attack != spec for task in tasks):
                say(f"attack {spec} applies to none of {', '.join(asked.defenses)}: left out")
        first = [t for t in tasks if t.owner is None and t.defenses == ("none",)]
        rest = [t for t in tasks if not (t.owner is None and t.defenses == ("none",))]
        done = sum(len(t.defenses) for t in tasks) - sum(len(t.defenses) for t in self._left(tasks))
        start(sum(len(task.defenses) for task in tasks), done)
        for phase in (first, rest):
            folders: dict[Path, list[Task]] = {}
            for task in phase:
                folders.setdefault(self._folder(task).path, []).append(task)
            for path, mine in folders.items():
                if self._left(mine):
                    with self._alone(path, say):
                        self._do(self._left(mine), execute, tick)
            if not asked.allow_weak:
                self._check(first)
        return self.publish()

    @contextmanager
    def _alone(self, path: Path, say: Callable[[str], None]) -> Iterator[None]:
        """Exclusive lock of an attack's folder."""
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(path, wait=False))
            except Busy:
                say(f"waiting for another process that works in {path}")
                stack.enter_context(locked(path, wait=True))
            yield

    def _do(self, tasks: Sequence[Task], execute: Executor, tick: Callable[[str], None]) -> None:
        remaining: dict[tuple[str, float, str], int] = {}
        for task in tasks:
            for spec in task.defenses:
                key = task.attack, task.epsilon, spec
                remaining[key] = remaining.get(key, 0) + 1
        origins: list[Origin] = []
        for task, found in execute(tasks, lambda task: self._folder(task).load_images(task)):
            folder = self._folder(task)
            if isinstance(found, Origin):
                if found not in origins:
                    self.store.add_environment(found.environment)
                    origins.append(found)
                continue
            if isinstance(found, Made):
                folder.save_images(task, found)
                continue
            folder.append_record(task, found)
            key = task.attack, task.epsilon, found.defense
            remaining[key] -= 1
            if not remaining[key]:  # the row is complete
                self.publish()
            tick(f"{found.defense} under {task.attack}")

    def execute(
        self, tasks: Sequence[Task], kept: Callable[[Task], Tensor | None]
    ) -> Iterator[tuple[Task, Origin | Made | Judged]]:
        """Execute tasks in this process, in order."""
        for task in tasks:
            yield task, self.worker.origin()
            for found in self.worker.work(task, kept(task)):
                yield task, found

    def _check(self, tasks: Sequence[Task]) -> None:
        rows = {(row.attack, row.eps): row for row in self.rows() if row.defense == "none"}
        for spec, epsilon in dict.fromkeys((task.attack, task.epsilon) for task in tasks):
            row = rows.get((spec, format_epsilon(epsilon)))
            if spec != CLEAN and row and attacks.parse_attack(spec, epsilon).conclusive:
                check_attack(row)

    # ----------------------------------------------------------------------------------- results

    def rows(self) -> list[Row]:
        """All complete rows: clean, oblivious, aware, worst, by name."""
        n = len(self.worker.data)
        described = self.store.defenses()
        bits: dict[tuple[str, float], dict[str, str]] = {}
        flags: dict[tuple[str, float], dict[str, str]] = {}
        settings: dict[tuple[str, float], dict[str, Any]] = {}
        for folder, facts in self.store.attacks():
            key = folder.spec, folder.epsilon
            settings[key] = facts
            records = folder.records()
            wanted = self.store.counts(folder) if facts["aware"] else {}
            for spec in dict.fromkeys(defense for defense, _ in records):
                found = list(_in_order(records, spec, self.worker.setting.batch))
                right = "".join(record["right"] for record in found)
                # An adaptive attack may be requested for the first images alone.
                if len(right) >= (wanted.get(spec, n) if facts["aware"] else n):
                    bits.setdefault(key, {})[spec] = right
                    flags.setdefault(key, {})[spec] = "".join(record["flagged"] for record in found)
        clean = bits.get((CLEAN, 0.0), {})
        base = clean.get("none", "")
        rows = []
        for key in sorted(bits, key=lambda k: (k[0] != CLEAN, settings[k]["aware"], k[0], k[1])):
            for spec in sorted(bits[key]):
                rows.append(
                    row_of(
                        bits[key][spec],
                        base,
                        flags[key][spec],
                        attack=key[0],
                        title=settings[key]["title"],
                        aware=settings[key]["aware"],
                        eps=format_epsilon(key[1]),
                        attack_settings=settings[key]["settings"],
                        **self._facts(spec, described),
                    )
                )
        for epsilon in sorted({e for s, e in bits if settings[s, e]["aware"]}):
            same = [k for k in bits if k[1] == epsilon or k[0] == CLEAN]
            same.sort(key=lambda k: (k[0] != CLEAN, settings[k]["aware"], k[0]))
            for spec in sorted({d for k in same if settings[k]["aware"] for d in bits[k]}):
                of = [k for k in same if spec in bits[k]]
                rows.append(
                    row_of(
                        worst_of([bits[k][spec] for k in of]),
                        base,
                        attack=WORST,
                        title="worst per image",
                        aware=True,
                        eps=format_epsilon(epsilon),
                        of=[k[0] for k in of],
                        **self._facts(spec, described),
                    )
                )
        return rows

    def _facts(self, spec: str, described: dict[str, dict[str, Any]]) -> dict[str, Any]:
        facts = described.get(spec) or self.worker.describe(spec)
        return {"defense": spec, "seed": self.worker.setting.seed, **facts}

    def timings(self) -> list[dict[str, Any]]:
        """Median milliseconds per image of defenses and attacks, over `rounds` batches."""
        found = []
        for folder, _ in self.store.attacks():
            made: dict[str, dict[int, float]] = {}
            for owner, batch, seconds, _ in folder.kept_images():
                made.setdefault(owner, {})[batch] = seconds
            judged: dict[str, dict[int, tuple[float, int]]] = {}
            for (spec, batch), record in sorted(folder.records().items()):
                judged.setdefault(spec, {})[batch] = record["seconds"], len(record["right"])
            for spec, batches in sorted(judged.items()):
                attack = made.get(owner_folder(None), made.get(owner_folder(spec), {}))
                making = [1e3 * attack[b] / n for b, (_, n) in batches.items() if b in attack]
                found.append(
                    {
                        "defense": spec,
                        "attack": folder.spec,
                        "eps": format_epsilon(folder.epsilon),
                        "ms_per_image": statistics.median(1e3 * s / n for s, n in batches.values()),
                        "attack_ms_per_image": statistics.median(making) if making else None,
                        "rounds": len(batches),
                    }
                )
        return found

    def rounded(self) -> list[dict[str, Any]]:
        """Numbers of attacked images that fool the undefended model only before rounding."""
        found = []
        for folder, _ in self.store.attacks():
            undone: dict[str, int] = {}
            for owner, _, _, count in folder.kept_images():
                undone[owner] = undone.get(owner, 0) + count
            for owner, count in sorted(undone.items()):
                facts = {"attack": folder.spec, "eps": format_epsilon(folder.epsilon)}
                found.append({**facts, "made_against": owner, "undone_by_rounding": count})
        return found

    def publish(self) -> list[Row]:
        """Write results.json and timings.json."""
        with locked(self.store.folder, wait=True):
            rows = self.rows()
            places = self.store.environments()
            results = {
                "format": FORMAT,
                "run": self.store.facts,
                "environment": places[0] if places else {},
                **({"environments": places} if len(places) > 1 else {}),
                "images": self.rounded(),
                "rows": format_rows(rows),
            }
            self.store.write_results(results, {"rows": self.timings()})
        return rows


def _in_order(
    records: dict[tuple[str, int], dict[str, Any]], spec: str, size: int
) -> Iterator[dict[str, Any]]:
    """Records of a defense from batch 0 to the first missing or short one."""
    batch, whole = 0, True
    while whole and (spec, batch) in records:
        yield records[spec, batch]
        whole = len(records[spec, batch]["right"]) == size
        batch += 1


def _plainly(spec: str) -> str:
    """Canonical spec of an attack."""
    if spec in (CLEAN, ADAPTIVE):
        return spec
    try:
        return attacks.parse_attack(spec, 4 / 255).spec
    except ValueError as error:
        raise ValueError(f"{error}{nearest(spec, (ADAPTIVE, STANDARD))}") from None


def _settings(spec: str, epsilon: float) -> dict[str, Any]:
    if spec == CLEAN:
        return {"title": CLEAN, "aware": False, "settings": {}}
    attack: Attack = attacks.parse_attack(spec, epsilon)
    return {"title": attack.title, "aware": attack.aware, "settings": attack.settings()}
