"""Small runs of the evaluation on the bundled model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scc_fast.evaluate.data import open_dataset
from scc_fast.evaluate.runner import Run
from scc_fast.evaluate.worker import Setting, Worker
from toys import model_of

N, BATCH = 5, 2
FOUR = 4 / 255


def setting(**options: Any) -> Setting:
    return Setting(**{"n_samples": N, "batch": BATCH, "seed": 3, "device": "cpu", **options})


def run_in(folder: Path, **options: Any) -> Run:
    asked = setting(**options)
    data = open_dataset("emoji", model_of("tiny"), n_samples=asked.n_samples)
    return Run(asked, folder, Worker(asked, model_of("tiny"), data))


def results(folder: Path) -> bytes:
    (found,) = folder.glob("*/results.json")
    return found.read_bytes()
