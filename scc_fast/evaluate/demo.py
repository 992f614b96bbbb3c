"""Demonstration: attack and defend the bundled model, as one table and one figure."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scc_fast import tiny
from scc_fast.api import image_seeds, make_defense
from scc_fast.attacks import PGD
from scc_fast.evaluate.pictures import comparison_figure
from scc_fast.evaluate.results import Row
from scc_fast.evaluate.runner import Asked, Run
from scc_fast.evaluate.worker import Setting
from scc_fast.images import to_batch
from scc_fast.models import load_model

DEFENSES = ("none", "rn", "views", "ttc", "scc")
BATCH = 12


@dataclass(frozen=True)
class Demo:
    """Demonstration; the default sizes take under 3 minutes on 2 cores."""

    n: int = 48
    adaptive_n: int = 12
    adaptive_steps: int = 10
    seed: int = 0

    def plan(self) -> list[Asked]:
        """Attacks of the demonstration."""
        budgets = (1 / 255, 2 / 255, 4 / 255)
        knowing = {
            "view-aware:steps=20": self.n,
            f"bpda:steps={self.adaptive_steps}": self.adaptive_n,
        }
        return [
            Asked(DEFENSES, ("pgd10",), budgets),
            *(Asked(DEFENSES, (spec,), budgets[-1:], count) for spec, count in knowing.items()),
        ]

    def run(
        self, start: Callable[[int], None], tick: Callable[[], None]
    ) -> tuple[list[Row], list[dict[str, Any]]]:
        """Rows of the table, and their times; `start` gets the number of calls of `tick`."""
        setting = Setting(
            "tiny",
            "emoji",
            n_samples=self.n,
            seed=self.seed,
            batch=BATCH,
            device="cpu",
        )
        with tempfile.TemporaryDirectory() as folder:
            run = Run(setting, Path(folder))
            start(sum(len(t.defenses) for t in {t for a in self.plan() for t in run.tasks(a)}))
            for asked in self.plan():
                rows = run.go(asked, tick=lambda _: tick())
            return rows, run.timings()

    def figure(self, path: Path, count: int = 4) -> None:
        """Draw sample pictures attacked at 4/255 (PGD-10), and repaired."""
        files = tiny.samples()[:count]
        names = list(tiny.class_names())
        truth = [names.index(file.stem.replace("_", " ")) for file in files]
        model, prompts = load_model("tiny", device="cpu"), tiny.prompts()
        bare, scc = (make_defense(name, model, prompts) for name in ("none", "scc"))
        pictures = to_batch(files, model)
        seeds = image_seeds(self.seed, len(files))
        wanted = pictures.new_tensor(truth).long()
        attacked = PGD(epsilon=4 / 255).run(bare, pictures, wanted, seeds + 1)
        comparison_figure(
            path,
            pictures,
            attacked,
            before=bare(attacked, seeds),
            after=scc(attacked, seeds),
            names=names,
            truth=truth,
            clean=bare(pictures, seeds),
        )
