"""The folder of a run: what is known is on disk, and nothing that is there is ever lost.

    RUN/run.json                 what all results depend on
    RUN/defenses.json            traits and config of each defense
    RUN/ATTACK/attack.json       one folder for each attack and budget
    RUN/ATTACK/records.jsonl     a line for each defense and batch, appended
    RUN/ATTACK/images/*.safetensors   the perturbations, float16
    RUN/results.json, timings.json    made of the records, always whole

One process works in an attack's folder at a time; several may share a run.
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
    """The folder for this process alone; gone with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        try:
            import fcntl
        except ImportError:  # not on this system: the user must see to it
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise Busy(f"another process works in {folder}") from None
        yield


def slug(text: str, whole: str = "") -> str:
    """A file name that reads as `text` and tells `whole`, if it is more, from others."""
    plain = re.sub(r"[^A-Za-z0-9.=-]+", "_", text).strip("_.")
    whole = whole or text
    if plain == whole:
        return plain
    return f"{plain[:100]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def owner_folder(owner: str | None) -> str:
    """Where the images are kept that know a defense, or none."""
    return "shared" if owner is None else slug(owner)


def differences(known: dict[str, Any], facts: dict[str, Any], names: str = "") -> str:
    """What differs, as "batch is 50 there and 20 here"."""
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
    """The folder of one attack and budget. What was read of it is kept: files only grow.

    Args:
        path: where it is.
        spec, epsilon: which it is.
    """

    def __init__(self, path: Path, spec: str, epsilon: float) -> None:
        self.path, self.spec, self.epsilon = path, spec, epsilon
        self._records: dict[tuple[str, int], dict[str, Any]] = {}
        self._read = 0, 0  # inode of records.jsonl, and how many of its bytes are in _records
        self._kept: dict[tuple[Path, int], Kept | None] = {}

    def records(self) -> dict[tuple[str, int], dict[str, Any]]:
        """What has been judged, by defense and batch. A line that was damaged is not there."""
        try:
            with (self.path / "records.jsonl").open("rb") as file:
                facts = os.fstat(file.fileno())
                inode, start = self._read
                if facts.st_ino != inode or facts.st_size < start:  # another file
                    self._records, start = {}, 0
                file.seek(start)
                added = file.read()
        except FileNotFoundError:
            self._records, self._read = {}, (0, 0)
            return {}
        whole = added.rfind(b"\n") + 1  # a line that is being written is read again
        self._records.update(_records(added[:whole]))
        self._read = facts.st_ino, start + whole
        return {**self._records, **_records(added[whole:])}

    def append_record(self, task: Task, judged: Judged) -> None:
        """Append what a defense said, as a line of its own."""
        record = {**dataclasses.asdict(judged), "batch": task.batch}
        file = self.path / "records.jsonl"
        self.path.mkdir(parents=True, exist_ok=True)
        with file.open("ab+") as stream:
            stream.seek(0, os.SEEK_END)
            if stream.tell():
                stream.seek(-1, os.SEEK_END)
                if stream.read(1) != b"\n":  # a line that was cut short stands alone
                    stream.write(b"\n")
            stream.write(json.dumps(record).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())

    def images_path(self, task: Task) -> Path:
        """Where the perturbation of a batch is kept."""
        return self.path / "images" / owner_folder(task.owner) / f"{task.batch:05d}.safetensors"

    def load_images(self, task: Task) -> Tensor | None:
        """The perturbation of a batch; None where it, or some of it, has not been made.

        Raises:
            ValueError: a file that is not whole.
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
        """Keep what was made of a batch."""
        assert made.delta.dtype == torch.float16
        with atomic(self.images_path(task)) as partial:
            facts = {"seconds": str(made.seconds), "undone": str(made.undone)}
            save_file({"delta": made.delta.contiguous()}, partial, facts)

    def kept_images(self) -> Iterator[Kept]:
        """(owner, batch, seconds, undone) of every batch whose images are kept."""
        for path in sorted((self.path / "images").glob("*/*.safetensors")):
            with contextlib.suppress(FileNotFoundError):
                key = path, path.stat().st_mtime_ns
                if key not in self._kept:
                    self._kept[key] = _kept(path)
                if (found := self._kept[key]) is not None:
                    yield found


def _records(lines: bytes) -> dict[tuple[str, int], dict[str, Any]]:
    """The records among some lines of JSON."""
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
    """The folder of a run.

    Args:
        folder: made if it is not there.
        facts: what its results depend on; a folder with other facts is refused.
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
        """The folder of an attack; with its settings it is made, and held against them."""
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
        """Every attack that was begun, with its settings."""
        for path in sorted(self.folder.glob("*/attack.json")):
            facts = self._read(str(path.relative_to(self.folder)))
            if not {"spec", "epsilon", "title", "aware", "settings"} <= set(facts):
                raise ValueError(f"{path}: not what the runner wrote there; remove its folder")
            yield self._attack(path.parent, facts["spec"], facts["epsilon"]), facts

    def _attack(self, path: Path, spec: str, epsilon: float) -> AttackFolder:
        """One object for each folder, which keeps what it has read."""
        return self._folders.setdefault(path, AttackFolder(path, spec, epsilon))

    def add_defenses(self, defenses: dict[str, dict[str, Any]]) -> None:
        """Keep what rows say of the defenses; one that differs from before is refused."""
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
        """What rows say of the defenses."""
        return self._read("defenses.json") or {}

    def add_environment(self, environment: dict[str, Any]) -> None:
        """Keep where some of the numbers were made."""
        with locked(self.folder, wait=True):
            known = self.environments()
            if environment not in known:
                every = sorted(
                    [*known, environment], key=lambda one: json.dumps(one, sort_keys=True)
                )
                write_json(self.folder / "environments.json", {"environments": every})

    def environments(self) -> list[dict[str, Any]]:
        """Where the numbers were made, in an order that does not depend on time."""
        return (self._read("environments.json") or {"environments": []})["environments"]

    def keep_counts(self, folder: AttackFolder, counts: dict[str, int]) -> None:
        """Keep how many images an attack that knows the defense was asked for, by defense.

        The fewest count, so that a row that was known stays when more are asked for, and grows.
        """
        with locked(self.folder, wait=True):
            name = f"{folder.path.name}/asked.json"
            known = self._read(name) or {}
            fewest = {spec: min(n, known.get(spec, n)) for spec, n in counts.items()}
            write_json(self.folder / name, {**known, **fewest})

    def counts(self, folder: AttackFolder) -> dict[str, int]:
        """What keep_counts() kept."""
        return self._read(f"{folder.path.name}/asked.json") or {}

    def write_results(self, results: dict[str, Any], timings: dict[str, Any]) -> None:
        """Write both files whole."""
        write_json(self.folder / "results.json", results)
        write_json(self.folder / "timings.json", timings)
