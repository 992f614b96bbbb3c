"""Worker: makes the attacked images of a batch, and runs defenses on them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import scc_fast
from scc_fast import attacks
from scc_fast.api import Defender, image_seeds, make_defense
from scc_fast.attacks import Attack
from scc_fast.config import format_epsilon, whole
from scc_fast.evaluate.data import Dataset, open_dataset
from scc_fast.evaluate.results import CLEAN
from scc_fast.models import VisionLanguage, load_spec

_ATTACKERS = 1 << 32  # added to the seed of attackers, whose draws differ from the defenses'


@dataclass(frozen=True)
class Setting:
    """Setting that all results of a run depend on.

    Args:
        model: "tiny", "ViT-B-32@openai", "ViT-B-32@openai+FILE.pth.tar", "hf-hub:…", "local-dir:…".
        dataset, split, protocol, root, download, n_samples, sample_seed: see open_dataset().
        seed: of the noise of attackers and defenses.
        batch: images per batch.
        precision, engine: of the encoder, for attackers and defenses.
        device: "cpu", "cuda", …; None: CUDA if available.
    """

    model: str = "tiny"
    dataset: str = "emoji"
    split: str | None = None
    protocol: str = "ttc"
    root: Path | None = None
    download: bool = False
    n_samples: int | None = None
    sample_seed: int = 0
    seed: int = 0
    batch: int = 50
    precision: str = "auto"
    engine: str = "auto"
    device: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch", whole("batch", self.batch, 1))


@dataclass(frozen=True)
class Task:
    """One batch of an attack, and the defenses to judge on it.

    Args:
        attack: a spec such as "pgd10", or "clean".
        epsilon: its budget, 0 without one.
        owner: the defense that the attack knows; None: oblivious.
        batch: index.
        count: number of images.
        defenses: specs of defenses to judge.
    """

    attack: str
    epsilon: float
    owner: str | None
    batch: int
    count: int
    defenses: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Made:
    """Stored attack of a batch.

    Args:
        delta: perturbation, (n, 3, H, W) float16.
        seconds: time to make it.
        undone: number of images that fool the undefended model only before rounding.
    """

    delta: Tensor
    seconds: float
    undone: int


@dataclass(frozen=True)
class Judged:
    """Answers of a defense for a batch.

    Args:
        right, flagged: one character per image, "1" for yes; flagged is "" without a gate.
        drift: the gate's measure, empty without a gate.
        seconds: for the batch, after a warm-up.
    """

    defense: str
    right: str
    flagged: str
    drift: tuple[float, ...]
    seconds: float


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware."""
    cuda = device.type == "cuda"
    return {
        "torch": torch.__version__,
        "scc_fast": scc_fast.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "threads": torch.get_num_threads(),
    }


@dataclass(frozen=True)
class Origin:
    """Origin of the results that follow; see environment()."""

    environment: dict[str, Any]


class Worker:
    """Model, data and defenses of a run, loaded once.

    Args:
        setting: of the run.
        model, dataset: if loaded already.
    """

    def __init__(
        self,
        setting: Setting,
        model: VisionLanguage | None = None,
        dataset: Dataset | None = None,
    ) -> None:
        self.setting = setting
        self.model = load_spec(setting.model, setting.device) if model is None else model
        self.data = self._opened() if dataset is None else dataset
        self.defense: Callable[[str], Defender] = functools.cache(self._made)
        self._warm: set[tuple[str, int]] = set()

    def _opened(self) -> Dataset:
        s = self.setting
        return open_dataset(
            s.dataset,
            self.model,
            root=s.root,
            split=s.split,
            protocol=s.protocol,
            n_samples=s.n_samples,
            seed=s.sample_seed,
            download=s.download,
        )

    def _made(self, spec: str) -> Defender:
        s = self.setting
        options = {"precision": s.precision, "engine": s.engine}
        return make_defense(spec, self.model, self.data.prompts, **options)

    def facts(self) -> dict[str, Any]:
        """Facts that results depend on, for results.json."""
        s = self.setting
        return {
            "model": {
                "name": self.model.name,
                "spec": s.model,
                "source": self.model.source,
                "weights_sha256": weights_hash(self.model),
                **self._text_facts(),
                "image_size": list(self.model.image_size),
                "precision": self.defense("none").precision,
            },
            "dataset": self.data.facts(),
            "seed": s.seed,
            "batch": s.batch,
        }

    def _text_facts(self) -> dict[str, Any]:
        """What no weights tell of a model whose texts are a function or a table."""
        if getattr(self.model, "whole", True):
            return {}
        found = hashlib.sha256(self.model.encode_text(self.data.prompts).cpu().numpy().tobytes())
        scale, bias = self.model.logit_scale, self.model.logit_bias
        return {"text_sha256": found.hexdigest(), "logit_scale": scale, "logit_bias": bias}

    def describe(self, spec: str) -> dict[str, Any]:
        """Facts of a defense for rows."""
        defense = self.defense(spec)
        return {
            "method": defense.method,
            "traits": dataclasses.asdict(defense.traits),
            "config": _readable(dataclasses.asdict(defense.config)),
        }

    def origin(self) -> Origin:
        """Environment of this worker."""
        return Origin(environment(self.model.device))

    def batches(self, limit: int | None = None) -> Iterator[tuple[int, int]]:
        """(index, images) of each batch of the first `limit` images."""
        last = len(self.data) if limit is None else min(len(self.data), limit)
        size = self.setting.batch
        for start in range(0, last, size):
            yield start // size, min(size, last - start)

    def work(self, task: Task, delta: Tensor | None = None) -> Iterator[Made | Judged]:
        """Make the attack of a batch, unless given as `delta`, and run each defense on it."""
        device = self.model.device
        start = task.batch * self.setting.batch
        stop = start + task.count
        x, labels = (tensor.to(device) for tensor in self.data.batch(start, stop))
        seen = x
        if task.attack != CLEAN:
            attack = attacks.parse_attack(task.attack, task.epsilon)
            if delta is None:
                made = self._attack(attack, task.owner, x, labels, self._seeds(start, stop, True))
                yield made
                delta = made.delta
            seen = restored(x, delta[: len(x)].to(device), attack, task.batch)
        for spec in task.defenses:
            defense = self.defense(spec)
            seeds = self._seeds(start, stop, False)
            if (spec, task.count) not in self._warm:  # warm-up: compile and capture
                self._warm.add((spec, task.count))
                _ = defense(seen, seeds).labels
            began = time.perf_counter()
            found = defense(seen, seeds)
            answer = found.labels  # synchronises
            seconds = time.perf_counter() - began
            gated = defense.has_gate
            flagged = _bits(found.flagged) if gated else ""
            drift = tuple(round(value, 5) for value in found.drift.tolist()) if gated else ()
            yield Judged(spec, _bits(answer == labels), flagged, drift, seconds)

    def _attack(
        self, attack: Attack, owner: str | None, x: Tensor, labels: Tensor, seeds: Tensor
    ) -> Made:
        target = self.defense(owner or "none")
        began = time.perf_counter()
        found = attack.run(target, x, labels, seeds)
        delta = (found.clamp(0, 1) - x).clamp(-attack.reach, attack.reach)
        # Rounded to nearest: a relative error of at most 2^-11.
        stored = delta.to(torch.float16)
        seconds = time.perf_counter() - began
        bare = self.defense("none")
        as_made = bare.run((x + delta).clamp(0, 1), seeds).logits.argmax(dim=-1)
        as_kept = bare.run(restored(x, stored, attack, 0), seeds).logits.argmax(dim=-1)
        undone = int(((as_made != labels) & (as_kept == labels)).sum())
        return Made(stored.cpu(), seconds, undone)

    def _seeds(self, start: int, stop: int, attacker: bool) -> Tensor:
        seed = self.setting.seed + _ATTACKERS * attacker
        return image_seeds(seed, stop, self.model.device)[start:]


def restored(x: Tensor, delta: Tensor, attack: Attack, batch: int) -> Tensor:
    """Attacked images from a stored perturbation.

    Raises:
        ValueError: wrong shape, non-finite, or outside the ball by more than rounding.
    """
    budget = f" at {format_epsilon(attack.epsilon)}" if attack.budgeted else ""
    where = f"images kept of {attack.title}{budget}, batch {batch}"
    if delta.shape != x.shape:
        raise ValueError(f"{where}: shape {tuple(delta.shape)}, the pictures have {tuple(x.shape)}")
    delta = delta.float()
    # Half an ulp of float16.
    room = attack.reach * (1 + 2.0**-11) + 2.0**-25
    if not bool((delta.abs() <= room).all()):  # NaN is not
        raise ValueError(f"{where}: not within the budget; remove the file to make them again")
    return (x + delta.clamp(-attack.reach, attack.reach)).clamp(0, 1)


def _bits(flags: Tensor) -> str:
    return "".join("1" if flag else "0" for flag in flags.tolist())


def _readable(config: dict[str, Any]) -> dict[str, Any]:
    """Config with budgets as "4/255"."""
    return {
        name: format_epsilon(value) if name in ("epsilon", "alpha") and value is not None else value
        for name, value in config.items()
    }


def weights_hash(model: VisionLanguage) -> str:
    """SHA-256 of a model's weights and buffers; "" if none are known."""
    found, weights = hashlib.sha256(), getattr(model, "module", nn.Module()).state_dict()
    if not weights:
        return ""
    for name, value in weights.items():
        found.update(name.encode())
        found.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
