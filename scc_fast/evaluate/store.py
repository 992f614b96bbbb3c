"""Folder of a run: durable records of everything that is done.

    RUN/run.json                 facts that all results depend on
    RUN/defenses.json            traits and config of each defense
    RUN/ATTACK/attack.json       one folder per attack and budget
    RUN/ATTACK/records.jsonl     a line per defense and batch, appended
    RUN/ATTACK/images/*.safetensors   perturbations, float16
    RUN/results.json, timings.json    made from the records, written atomically

An attack's folder is locked by one process; several processes may share a run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from scc_fast._files import atomic, write_json
from scc_fast.config import format_epsilon
from scc_fast.evaluate.results import CLEAN
from scc_fast.evaluate.worker import Judged, Made, Task

_RECORD = {
    "defense": str,
    "batch": int,
    "right": str,
    "flagged": str,
    "drift": list,
    "seconds": float,
}


Kept = tuple[str, int, float, int]  # owner, batch, seconds, undone


class Busy(RuntimeError):
    """Another process works in the folder."""


@contextlib.contextmanager
def locked(folder: Path, wait: bool) -> Iterator[None]:
    """Exclusive lock of a folder, released when the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        try:
            import fcntl
        except ImportError:  # no locks on this system
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise Busy(f"another process works in {folder}") from None
        yield


def slug(text: str, whole: str = "") -> str:
    """File name from `text`, with a hash of `whole` if it differs."""
    plain = re.sub(r"[^A-Za-z0-9.=-]+", "_", text).strip("_.")
    whole = whole or text
    if plain == whole:
        return plain
    return f"{plain[:100]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def owner_folder(owner: str | None) -> str:
    """Subfolder of images, by the defense that the attack knows."""
    return "shared" if owner is None else slug(owner)


def differences(known: dict[str, Any], facts: dict[str, Any], names: str = "") -> str:
    """Differences, as "batch is 50 there and 20 here"."""
    found = []
    for key in sorted({*known, *facts}):
        there, here = known.get(key), facts.get(key)
        if isinstance(there, dict) and isinstance(here, dict):
            found.append(differences(there, here, f"{names}{key} "))
        elif there != here:
            short = [text if len(text := repr(v)) < 80 else text[:80] + "…" for v in (there, here)]
            found.append(f"{names}{key} is {short[0]} there and {short[1]} here")
    return ", ".join(text for text in found if text)


class AttackFolder:
    """Folder of one attack and budget; records are cached, for files only grow.

    Args:
        path: of the folder.
        spec, epsilon: attack and budget.
    """

    def __init__(self, path: Path, spec: str, epsilon: float) -> None:
        self.path, self.spec, self.epsilon = path, spec, epsilon
        self._records: dict[tuple[str, int], dict[str, Any]] = {}
        self._read = 0, 0  # inode of records.jsonl, bytes of it in _records
        self._kept: dict[tuple[Path, int], Kept | None] = {}

    def records(self) -> dict[tuple[str, int], dict[str, Any]]:
        """Records by defense and batch; damaged lines are skipped."""
        try:
            with (self.path / "records.jsonl").open("rb") as file:
                facts = os.fstat(file.fileno())
                inode, start = self._read
                if facts.st_ino != inode or facts.st_size < start:  # a new file
                    self._records, start = {}, 0
                file.seek(start)
                added = file.read()
        except FileNotFoundError:
            self._records, self._read = {}, (0, 0)
            return {}
        whole = added.rfind(b"\n") + 1  # a line being written is read again
        self._records.update(_records(added[:whole]))
        self._read = facts.st_ino, start + whole
        return {**self._records, **_records(added[whole:])}

    def append_record(self, task: Task, judged: Judged) -> None:
        """Append a record as one line."""
        record = {**dataclasses.asdict(judged), "batch": task.batch}
        file = self.path / "records.jsonl"
        self.path.mkdir(parents=True, exist_ok=True)
        with file.open("ab+") as stream:
            stream.seek(0, os.SEEK_END)
            if stream.tell():
                stream.seek(-1, os.SEEK_END)
                if stream.read(1) != b"\n":  # after a truncated line
                    stream.write(b"\n")
            stream.write(json.dumps(record).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())

    def images_path(self, task: Task) -> Path:
        """Path of a batch's perturbation."""
        return self.path / "images" / owner_folder(task.owner) / f"{task.batch:05d}.safetensors"

    def load_images(self, task: Task) -> Tensor | None:
        """Perturbation of a batch; None if not complete.

        Raises:
            ValueError: damaged file.
        """
        path = self.images_path(task)
        if task.attack == CLEAN or not path.exists():
            return None
        try:
            delta = load_file(path)["delta"]
        except (SafetensorError, KeyError, OSError) as error:
            raise ValueError(
                f"{path}: not a file of kept images ({error}); remove it to make them again"
            ) from error
        return delta if len(delta) >= task.count else None

    def save_images(self, task: Task, made: Made) -> None:
        """Write the perturbation of a batch."""
        assert made.delta.dtype == torch.float16
        with atomic(self.images_path(task)) as partial:
            facts = {"seconds": str(made.seconds), "undone": str(made.undone)}
            save_file({"delta": made.delta.contiguous()}, partial, facts)

    def kept_images(self) -> Iterator[Kept]:
        """(owner, batch, seconds, undone) of every stored batch of images."""
        for path in sorted((self.path / "images").glob("*/*.safetensors")):
            with contextlib.suppress(FileNotFoundError):
                key = path, path.stat().st_mtime_ns
                if key not in self._kept:
                    self._kept[key] = _kept(path)
                if (found := self._kept[key]) is not None:
                    yield found


def _records(lines: bytes) -> dict[tuple[str, int], dict[str, Any]]:
    """Valid records in lines of JSON."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for line in lines.decode("utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            if {key: type(record[key]) for key in _RECORD} == _RECORD:
                found[record["defense"], record["batch"]] = record
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    return found


def _kept(path: Path) -> Kept | None:
    """Facts stored in a file of images; None if it cannot be read (load_images() raises)."""
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata()
            return path.parent.name, int(path.stem), float(facts["seconds"]), int(facts["undone"])
    except (SafetensorError, KeyError, TypeError, ValueError, OSError):
        return None


class Store:
    """Folder of a run.

    Args:
        folder: created if missing.
        facts: what its results depend on; a folder with other facts raises ValueError.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder = folder
        self._folders: dict[Path, AttackFolder] = {}
        facts = json.loads(json.dumps(facts))
        with locked(folder, wait=True):
            known = self._read("run.json")
            if known is None:
                write_json(folder / "run.json", facts)
            elif known != facts:
                raise ValueError(
                    f"{folder} holds another run: {differences(known, facts)}; give another --out, "
                    "or remove it"
                )
        self.facts = facts

    def _read(self, name: str) -> Any:
        path = self.folder / name
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not JSON ({error}); remove it") from None
        if not isinstance(found, dict):
            raise ValueError(f"{path}: not what the runner wrote there; remove it")
        return found

    def attack(
        self, spec: str, epsilon: float, settings: dict[str, Any] | None = None
    ) -> AttackFolder:
        """Folder of an attack; `settings` create it, or must equal the stored ones."""
        budget = "@" + format_epsilon(epsilon).replace("/", "_") if epsilon else ""
        found = self._attack(self.folder / (slug(spec) + budget), spec, epsilon)
        if settings is not None:
            path = found.path / "attack.json"
            facts = json.loads(json.dumps({"spec": spec, "epsilon": epsilon, **settings}))
            known = self._read(str(path.relative_to(self.folder)))
            if known is None:
                write_json(path, facts)
            elif known != facts:
                raise ValueError(
                    f"{path}: the attack had other settings when it was begun; give another "
                    "--out, or remove the folder"
                )
        return found

    def attacks(self) -> Iterator[tuple[AttackFolder, dict[str, Any]]]:
        """All attacks with a folder, and their settings."""
        for path in sorted(self.folder.glob("*/attack.json")):
            facts = self._read(str(path.relative_to(self.folder)))
            if not {"spec", "epsilon", "title", "aware", "settings"} <= set(facts):
                raise ValueError(f"{path}: not what the runner wrote there; remove its folder")
            yield self._attack(path.parent, facts["spec"], facts["epsilon"]), facts

    def _attack(self, path: Path, spec: str, epsilon: float) -> AttackFolder:
        """One cached object per folder."""
        return self._folders.setdefault(path, AttackFolder(path, spec, epsilon))

    def add_defenses(self, defenses: dict[str, dict[str, Any]]) -> None:
        """Store facts of defenses; a changed defense raises ValueError."""
        with locked(self.folder, wait=True):
            known = self._read("defenses.json") or {}
            for spec, facts in json.loads(json.dumps(defenses)).items():
                if known.get(spec, facts) != facts:
                    raise ValueError(
                        f"{self.folder}: {spec} had other settings when it was judged there; give "
                        "another --out"
                    )
                known[spec] = facts
            write_json(self.folder / "defenses.json", dict(sorted(known.items())))

    def defenses(self) -> dict[str, dict[str, Any]]:
        """Stored facts of the defenses."""
        return self._read("defenses.json") or {}

    def add_environment(self, environment: dict[str, Any]) -> None:
        """Store an environment in which results were made."""
        with locked(self.folder, wait=True):
            known = self.environments()
            if environment not in known:
                every = sorted(
                    [*known, environment], key=lambda one: json.dumps(one, sort_keys=True)
                )
                write_json(self.folder / "environments.json", {"environments": every})

    def environments(self) -> list[dict[str, Any]]:
        """Stored environments, in an order independent of time."""
        return (self._read("environments.json") or {"environments": []})["environments"]

    def keep_counts(self, folder: AttackFolder, counts: dict[str, int]) -> None:
        """Store the number of images requested of an adaptive attack, by defense.

        The smallest request counts: an existing row stays, and grows.
        """
        with locked(self.folder, wait=True):
            name = f"{folder.path.name}/asked.json"
            known = self._read(name) or {}
            fewest = {spec: min(n, known.get(spec, n)) for spec, n in counts.items()}
            write_json(self.folder / name, {**known, **fewest})

    def counts(self, folder: AttackFolder) -> dict[str, int]:
        """Counts stored by keep_counts()."""
        return self._read(f"{folder.path.name}/asked.json") or {}

    def write_results(self, results: dict[str, Any], timings: dict[str, Any]) -> None:
        """Write both files atomically."""
        write_json(self.folder / "results.json", results)
        write_json(self.folder / "timings.json", timings)
