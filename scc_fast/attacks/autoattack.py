"""AutoAttack and Square, by the package pyautoattack on the undefended model.

As in that package:

- Images that are misclassified clean, or withstand all attacks, come back clean. A defense then
  sees a mixture of attacked and clean images: see `complete`.
- Fooled images leave the batch, and random numbers are drawn per batch, so the result for an image
  depends on its batch. The same call gives the same images.

It seeds the global generators; they are restored afterwards, as are its log and the tracing
function. Other threads see them meanwhile.
"""

from __future__ import annotations

import importlib
import logging
import sys
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from scc_fast._plain import plain
from scc_fast.api import Defender
from scc_fast.attacks.apgd import APGDCE
from scc_fast.attacks.base import Attack, prepared
from scc_fast.attacks.margin import Distinct
from scc_fast.attacks.module import BareLogits, DefendedLogits
from scc_fast.config import shown
from scc_fast.reference import philox

SEED = 162  # Philox purpose: pyautoattack's seed
_STEPS, _QUERIES = 100, 5000  # those of 'standard'


def package() -> Any:
    """The module pyautoattack.

    Raises:
        ImportError: not installed.
    """
    try:
        return importlib.import_module("pyautoattack")
    except ImportError as error:
        raise ImportError(
            "autoattack, aa and square need the package pyautoattack: "
            f"pip install 'scc_fast[attacks]' ({error})"
        ) from error


@contextmanager
def undisturbed() -> Iterator[None]:
    """Restore the global generators, the tracing function and pyautoattack's log."""
    log, tracing = logging.getLogger("auto-attack"), sys.gettrace()
    disabled, state = log.disabled, np.random.get_state()  # noqa: NPY002
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=devices):
        log.disabled = True
        try:
            yield
        finally:
            log.disabled = disabled
            sys.settrace(tracing)
            np.random.set_state(state)  # noqa: NPY002


@dataclass(frozen=True)
class Packaged(Attack):
    """Base: pyautoattack's 'standard' with another list of attacks."""

    module: ClassVar[type[BareLogits]] = BareLogits  # what is attacked

    @abstractmethod
    def parts(self, classes: int) -> list[str]:
        """pyautoattack's names of the attacks to run, for K classes."""

    def tune(self, standard: Any) -> None:
        """Change settings of 'standard'."""

    def run(self, target: Defender, x: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
        installed = package()
        x, labels, seeds = prepared(target, x, labels, seeds)
        if len(x) == 0:
            return x.clone()
        with plain(x.device), undisturbed():
            classes = Distinct.of(target, labels)
            standard = installed.AutoAttack(
                self.module(target, classes.columns),
                device=x.device,
                eps=self.epsilon,
                seed=int(philox.derive(seeds, SEED, 0).sum()) & ((1 << 63) - 1),
            )
            standard.attacks_to_run = self.parts(len(classes))
            goals = min(9, len(classes) - 1)
            standard.apgd_targeted.n_target_classes = standard.fab.n_target_classes = goals
            self.tune(standard)
            found, _ = standard.run_standard_evaluation(x, classes.labels, batch_size=len(x))
        return found


@dataclass(frozen=True)
class PaperAA(Packaged):
    """AutoAttack of TTC's and SCC's tables: apgd-ce, then apgd-dlr on the remaining images.

    Only apgd-ce with two classes, which have no DLR loss.

    Args:
        steps: iterations of each; 100 in AutoAttack.
        complete: attack images that would come back clean with our APGD-CE, so that a defense
            sees only attacked images.
    """

    steps: int = _STEPS
    complete: bool = False

    name: ClassVar[str] = "aa"
    label: ClassVar[str] = "AutoAttack (apgd-ce, apgd-dlr)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.complete, bool):
            raise ValueError(f"complete must be true or false, got {shown(self.complete)}")

    @property
    def title(self) -> str:
        return ", ".join([self.label, *self._departures()])

    def _departures(self) -> list[str]:
        steps = [f"{self.steps} steps"] * (self.steps != _STEPS)
        return steps + ["all images"] * self.complete

    def parts(self, classes: int) -> list[str]:
        return ["apgd-ce", "apgd-dlr"] if classes > 2 else ["apgd-ce"]

    def tune(self, standard: Any) -> None:
        if self.steps == _STEPS:
            return
        for part in ("apgd", "apgd_targeted"):
            old = getattr(standard, part)
            same = {"eps": old.eps, "device": old.device, "logger": old.logger}
            setattr(standard, part, type(old)(old.model, n_iter=self.steps, **same))
        standard.apgd_targeted.n_target_classes = standard.fab.n_target_classes
        standard.fab.n_iter = self.steps

    def run(self, target: Defender, x: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
        x, labels, seeds = prepared(target, x, labels, seeds)
        found = super().run(target, x, labels, seeds)
        if self.complete:
            clean = (found == x).flatten(1).all(dim=1)
            rest = APGDCE(epsilon=self.epsilon, steps=self.steps)
            with plain(x.device):
                found[clean] = rest.run(target, x[clean], labels[clean], seeds[clean])
        return found


@dataclass(frozen=True)
class AutoAttack(PaperAA):
    """AutoAttack 'standard' (arXiv 2003.01690): apgd-ce, apgd-t, fab-t and square.

    With fewer than ten classes the targeted attacks try all wrong classes. With three classes
    apgd-dlr replaces apgd-t, whose loss needs four; with two nothing does.

    Args:
        steps: iterations of apgd and fab; 100 in AutoAttack.
        complete: see PaperAA.
        queries: of square; 5000 in AutoAttack.
    """

    queries: int = _QUERIES

    name: ClassVar[str] = "autoattack"
    label: ClassVar[str] = "AutoAttack"

    def _departures(self) -> list[str]:
        queries = [f"{self.queries} queries"] * (self.queries != _QUERIES)
        return queries + super()._departures()

    def parts(self, classes: int) -> list[str]:
        second = {2: [], 3: ["apgd-dlr"]}.get(classes, ["apgd-t"])
        return ["apgd-ce", *second, "fab-t", "square"]

    def tune(self, standard: Any) -> None:
        super().tune(standard)
        standard.square.n_queries = self.queries


@dataclass(frozen=True)
class ThroughAutoAttack(AutoAttack):
    """AutoAttack 'standard' on a defense that draws nothing and has an exact gradient.

    A defense that optimises at inference has no such gradient: BPDA is for that.
    """

    name: ClassVar[str] = "autoattack-through"
    label: ClassVar[str] = "AutoAttack on the defense"
    aware: ClassVar[bool] = True
    module: ClassVar[type[BareLogits]] = DefendedLogits

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.complete:
            raise ValueError("complete must be false: it attacks the undefended model; use bpda")

    def suits(self, target: Defender) -> bool:
        return target.defense.repairs == "none" and not target.is_randomized

    def run(self, target: Defender, x: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
        if not self.suits(target):
            raise ValueError(
                f"attack {self.name!r} needs a defense without draws or optimisation; "
                f"{target.method} is none: use bpda"
            )
        return super().run(target, x, labels, seeds)


@dataclass(frozen=True)
class Square(Packaged):
    """The Square attack (arXiv 1912.00049): random search on the margin, logits only.

    Images that are misclassified clean, or withstand it, come back clean.

    Args:
        queries: forward passes per image.
    """

    queries: int = _QUERIES

    name: ClassVar[str] = "square"
    conclusive: ClassVar[bool] = False

    @property
    def title(self) -> str:
        return f"Square ({self.queries} queries)"

    def parts(self, classes: int) -> list[str]:
        return ["square"]

    def tune(self, standard: Any) -> None:
        standard.square.n_queries = self.queries
