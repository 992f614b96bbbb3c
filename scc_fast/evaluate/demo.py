"""The demonstration: the bundled model attacked and defended, as one table and one figure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scc_fast import attacks, tiny
from scc_fast.api import Defender, image_seeds
from scc_fast.evaluate.report import comparison_figure
from scc_fast.evaluate.runner import Attack, Row, evaluate
from scc_fast.images import to_batch
from scc_fast.models import load_model

METHOD_ORDER = ("none", "rn", "tte", "ttc", "scc")
CHUNK = 16


@dataclass(frozen=True)
class Demo:
    """Sizes of the demonstration; the defaults finish in under 3 minutes on 2 cores."""

    n: int = 48
    adaptive_n: int = 12
    adaptive_steps: int = 10
    seed: int = 0

    def plan(self) -> list[Attack]:
        """The columns of the table."""
        oblivious = [Attack("pgd", steps / 255) for steps in (1, 2, 4)]
        aware = Attack("view-aware", 4 / 255, steps=20)
        adaptive = Attack(
            "adaptive", 4 / 255, steps=self.adaptive_steps, eot=2, limit=self.adaptive_n
        )
        return [Attack(), *oblivious, aware, adaptive]

    def chunks(self) -> int:
        """How many times run() calls `tick`."""
        return sum(-(-min(self.n, a.limit or self.n) // CHUNK) for a in self.plan())

    def run(self, tick: Callable[[], None]) -> tuple[list[Row], dict[str, Defender]]:
        """The rows of the table, and the defenders that made them."""
        model = load_model("tiny", device="cpu")
        prompts = tiny.prompts()
        defenders = {name: Defender(model, prompts, method=name) for name in METHOD_ORDER}
        rows: list[Row] = []
        for so_far in evaluate(
            defenders,
            "scc",
            lambda start, stop: tiny.generate("test", range(start, stop)),
            self.n,
            self.plan(),
            seed=self.seed,
            chunk=CHUNK,
        ):
            rows = so_far
            tick()
        return rows, defenders

    def figure(self, path: Path, defenders: dict[str, Defender], count: int = 4) -> None:
        """The figure: a few sample pictures attacked at 4/255 (PGD-10), and repaired."""
        files = tiny.samples()[:count]
        names = list(tiny.class_names())
        truth = [names.index(file.stem.replace("_", " ")) for file in files]
        bare, scc = defenders["none"], defenders["scc"]
        pictures = to_batch(files, scc.model)
        seeds = image_seeds(self.seed, len(files))
        attacked = attacks.pgd(
            scc, pictures, pictures.new_tensor(truth).long(), seeds + 1, epsilon=4 / 255
        )
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
