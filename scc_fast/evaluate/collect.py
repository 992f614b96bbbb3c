"""Reads what the runner left below a folder: results.json and timings.json, checked."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from scc_fast.config import format_epsilon, parse_epsilon, shown

FORMAT = 1
CLEAN, WORST = "clean", "worst"
T = TypeVar("T")


@dataclass(frozen=True)
class Count:
    """`hits` right out of `n` images."""

    n: int
    hits: int


@dataclass(frozen=True)
class Measure:
    """One measured accuracy: a row of results.json, with its times.

    Args:
        accuracy, low, high: with its 95 % interval, in [0, 1].
        right, wrong: the images that the undefended model gets right (wrong) when clean.
        flagged: share of the images that the gate took as attacked; None without a gate.
        ms: milliseconds an image, of the defense; None if not known.
        of: the attacks that a "worst" row is over.
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
    low: float
    high: float
    right: Count | None
    wrong: Count | None
    flagged: float | None
    traits: dict[str, Any]
    config: dict[str, Any]
    settings: dict[str, Any]
    of: tuple[str, ...]
    ms: float | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """What one run has once: (defense, attack, eps)."""
        return self.defense, self.attack, self.eps


@dataclass(frozen=True)
class Model:
    """A model as results name it; two that differ in any field are never put together."""

    name: str
    source: str
    weights: str
    size: str
    precision: str


@dataclass(frozen=True)
class Data:
    """A data set under a protocol; two that differ in any field are never put together.

    Args:
        name, title: as clip-benchmark and as the papers spell it.
        sample: seed of the choice of the pictures, "" where all are taken.
    """

    name: str
    title: str
    split: str
    protocol: str
    template: str
    prompts: str
    sample: str


@dataclass(frozen=True)
class Run:
    """One results.json.

    Args:
        asked: pictures that the run is over, of `pictures` there; the protocol expects `expected`.
        classes: how many; `duplicates`: prompts that name two or more.
        environments: where it was made, the first first; several machines may have had a part.
    """

    path: Path
    model: Model
    data: Data
    seed: int
    asked: int
    pictures: int | None
    expected: int | None
    classes: int | None
    duplicates: int
    environments: tuple[dict[str, Any], ...]
    measures: tuple[Measure, ...]


def read(folder: Path) -> list[Run]:
    """Every run below `folder`, by path.

    Raises:
        ValueError: there is none, or a file is cut short, not the runner's, or of another format;
            the file is named.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: not a folder; give the one that scc-fast evaluate wrote to")
    paths = sorted(folder.rglob("results.json"))
    if not paths:
        raise ValueError(
            f"{folder}: no results.json in it or below; give the folder that scc-fast evaluate "
            "wrote to"
        )
    return [_run(path) for path in paths]


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as JSON, it may be cut short: {error}") from None


class _Fields:
    """A JSON object whose fields are asked for by type; errors name the file and the place."""

    def __init__(self, path: Path, where: str, value: Any) -> None:
        self.path, self.where = path, where
        if not isinstance(value, dict):
            raise self.wrong(f"must be an object, got {shown(value)}")
        self.value = value

    def wrong(self, what: str) -> ValueError:
        place = f" {self.where}" if self.where else ""
        return ValueError(f"{self.path}:{place} {what}; it is not what scc-fast evaluate writes")

    def get(self, name: str, kind: type[T]) -> T:
        if name not in self.value:
            raise self.wrong(f"has no {name!r}")
        value = self.value[name]
        if kind is float and type(value) is int:
            value = float(value)
        # bool is an int, and NaN a float, but neither is a number here.
        good = type(value) is kind or (kind in (dict, list) and isinstance(value, kind))
        if not good or (isinstance(value, float) and not math.isfinite(value)):
            raise self.wrong(f"{name!r} must be {kind.__name__}, got {shown(value)}")
        return value  # type: ignore[no-any-return]

    def optional(self, name: str, kind: type[T], default: T) -> T:
        return default if self.value.get(name) is None else self.get(name, kind)

    def maybe(self, name: str, kind: type[T]) -> T | None:
        return None if self.value.get(name) is None else self.get(name, kind)

    def inside(self, name: str) -> _Fields:
        return _Fields(self.path, f"{self.where}.{name}".strip("."), self.get(name, dict))


def _run(path: Path) -> Run:
    top = _Fields(path, "", _load(path))
    version = top.value.get("format")
    if version != FORMAT or isinstance(version, bool):
        raise ValueError(
            f"{path}: format must be {FORMAT}, got {shown(version)}; it is not what this version "
            "of scc-fast evaluate writes"
        )
    run = top.inside("run")
    model, data = run.inside("model"), run.inside("dataset")
    times = _times(path.with_name("timings.json"))
    measures = []
    for index, value in enumerate(top.get("rows", list)):
        measure = _measure(_Fields(path, f"rows[{index}]", value))
        if measure is not None:
            measures.append(dataclasses.replace(measure, ms=times.get(measure.key)))
    name, asked = data.get("name", str), data.get("n", int)
    pictures = data.maybe("pictures", int)
    whole = pictures is not None and asked >= pictures
    return Run(
        path=path,
        model=Model(
            model.get("name", str),
            model.optional("source", str, ""),
            model.optional("weights_sha256", str, ""),
            "x".join(str(side) for side in model.optional("image_size", list, [])),
            model.optional("precision", str, ""),
        ),
        data=Data(
            name,
            data.maybe("paper", str) or name,
            data.optional("split", str, ""),
            data.optional("protocol", str, ""),
            _text(data.value.get("template")),
            data.optional("prompts_sha256", str, ""),
            "" if whole else _text(data.maybe("sampling_seed", int)),
        ),
        seed=run.get("seed", int),
        asked=asked,
        pictures=pictures,
        expected=data.maybe("pictures_expected", int),
        classes=_size(data.value.get("classes")),
        duplicates=_size(data.value.get("duplicate_prompts")) or 0,
        environments=_environments(top),
        measures=_once(path, measures),
    )


def _environments(top: _Fields) -> tuple[dict[str, Any], ...]:
    """The first under `environment`, all of them under `environments`; either may lack."""
    found = [top.optional("environment", dict, {})]
    for index, value in enumerate(top.optional("environments", list, [])):
        found.append(_Fields(top.path, f"environments[{index}]", value).value)
    return tuple(value for at, value in enumerate(found) if value and value not in found[:at])


def _text(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def _size(value: Any) -> int | None:
    """A count that may have been written as the things that it counts."""
    if isinstance(value, list | dict):
        return len(value)
    return value if type(value) is int else None


def _measure(row: _Fields) -> Measure | None:
    """A row; None where not one image was seen."""
    n, hits = row.get("n", int), row.get("hits", int)
    if not 0 <= hits <= n:
        raise row.wrong(f"must have 0 <= hits <= n, got {hits} of {n}")
    if n == 0:
        return None
    accuracy, low, high = (row.get(name, float) for name in ("accuracy", "ci_low", "ci_high"))
    if abs(accuracy - hits / n) > 1e-6:
        raise row.wrong(f"accuracy must be hits/n = {hits / n:g}, got {accuracy!r}")
    if not 0 <= low <= accuracy + 1e-9 or not accuracy - 1e-9 <= high <= 1:
        raise row.wrong(f"the interval [{low!r}, {high!r}] must hold the accuracy {accuracy!r}")
    attack = row.get("attack", str)
    return Measure(
        defense=row.get("defense", str),
        method=row.get("method", str),
        attack=attack,
        title=row.optional("title", str, attack),
        aware=row.optional("aware", bool, False),
        eps=_budget(row, attack),
        seed=row.get("seed", int),
        n=n,
        hits=hits,
        accuracy=hits / n,
        low=low,
        high=high,
        right=_count(row, "clean_right"),
        wrong=_count(row, "clean_wrong"),
        flagged=row.maybe("flagged", float),
        traits=row.optional("traits", dict, {}),
        config=row.optional("config", dict, {}),
        settings=row.optional("attack_settings", dict, {}),
        of=tuple(str(spec) for spec in row.optional("of", list, [])),
    )


def _budget(row: _Fields, attack: str) -> str:
    """A row's budget, written in one way: "4/255"."""
    value = row.value.get("eps")
    if attack == CLEAN:
        return format_epsilon(0.0)
    try:
        return format_epsilon(parse_epsilon(value))  # type: ignore[arg-type]
    except ValueError:
        raise row.wrong(f"eps must be a budget such as '4/255', got {shown(value)}") from None


def _count(row: _Fields, name: str) -> Count | None:
    if not row.value.get(name):
        return None
    part = row.inside(name)
    found = Count(part.get("n", int), part.get("hits", int))
    if not 0 <= found.hits <= found.n:
        raise part.wrong(f"must have 0 <= hits <= n, got {found.hits} of {found.n}")
    return found


def _once(path: Path, measures: Sequence[Measure]) -> tuple[Measure, ...]:
    seen: set[tuple[str, str, str]] = set()
    for measure in measures:
        if measure.key in seen:
            raise ValueError(f"{path}: two rows for {' under '.join(measure.key[:2])}")
        seen.add(measure.key)
    return tuple(measures)


def _times(path: Path) -> dict[tuple[str, str, str], float | None]:
    """(defense, attack, eps) -> milliseconds an image, of the defense."""
    if not path.exists():
        return {}
    found = {}
    for index, value in enumerate(_Fields(path, "", _load(path)).get("rows", list)):
        row = _Fields(path, f"rows[{index}]", value)
        attack = row.get("attack", str)
        key = row.get("defense", str), attack, _budget(row, attack)
        found[key] = row.maybe("ms_per_image", float)
    return found
