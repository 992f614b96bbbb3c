"""What one process does of a run: what it opens, whom it attacks, and what it says of that."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from runs import BATCH, FOUR, N, setting
from scc_fast import Defender, image_seeds
from scc_fast.attacks import BPDA
from scc_fast.evaluate.worker import Judged, Made, Task, Worker
from toys import model_of


def worker(**options: Any) -> Worker:
    return Worker(setting(**options), model_of("tiny"))


def test_the_data_is_opened_as_the_setting_says(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(
        "scc_fast.evaluate.worker.open_dataset",
        lambda name, model, **options: told.extend((name, options)),
    )
    options = {"root": Path("x"), "split": "train", "protocol": "open_clip", "download": True}
    worker(dataset="cifar10", sample_seed=7, **options)
    assert told == ["cifar10", {**options, "n_samples": N, "seed": 7}]


def test_the_precision_is_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scc_fast.engine.choose.is_native", lambda *_: True)  # on every processor
    assert worker(precision="bf16").facts()["model"]["precision"] == "bf16"


def test_attacks_that_know_a_defense_are_made_against_it(monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[str] = []
    attack = BPDA.run

    def run(self: BPDA, target: Defender, *rest: Tensor) -> Tensor:
        met.append(target.method)
        return attack(self, target, *rest)

    monkeypatch.setattr(BPDA, "run", run)
    ours = worker()
    for owner in ("none", "rn"):
        list(ours.work(Task("bpda:steps=1:warmup=0", FOUR, owner, 0, BATCH, ())))
    assert met == ["none", "rn"]


def test_images_that_rounding_undoes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    # What is restored is the picture as it was: all that fooled is undone
    monkeypatch.setattr("scc_fast.evaluate.worker.restored", lambda x, *_: x)
    ours = worker()
    (made,) = ours.work(Task("pgd5", 16 / 255, None, 0, N, ()))
    assert isinstance(made, Made)
    x, labels = ours.data.batch(0, N)
    bare = ours.defense("none")
    right = bare(x, 0).labels == labels
    fooled = bare((x + made.delta.float()).clamp(0, 1), 0).labels != labels
    assert made.undone == int((right & fooled).sum()) > 0


def test_what_the_gate_said_is_told_of_each_image() -> None:
    ours, specs = worker(), ("none", "scc:gate=false", "ttc")
    *open_, gated = ours.work(Task("clean", 0.0, None, 0, N, specs))
    for one in open_:
        assert isinstance(one, Judged)
        assert (one.flagged, one.drift) == ("", ())
    assert isinstance(gated, Judged)
    found = ours.defense("ttc")(ours.data.batch(0, N)[0], image_seeds(3, N))
    assert gated.flagged == "".join("01"[flag] for flag in found.flagged.tolist())
    assert gated.drift == pytest.approx(found.drift.tolist(), abs=1e-5)


def test_a_first_call_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each size of batch; what a defense answers is that of the timed call."""
    ours, calls = worker(), list[int]()
    defense = ours.defense("none")

    def slow_at_first(seen: Tensor, seeds: Tensor) -> Any:
        calls.append(len(seen))
        if calls.count(len(seen)) == 1:
            time.sleep(0.5)
        return defense(seen, seeds)

    slow_at_first.has_gate = defense.has_gate  # type: ignore[attr-defined]
    monkeypatch.setattr(ours, "defense", lambda spec: slow_at_first)
    found = []
    for batch, count in ((0, 2), (1, 2), (2, 1)):
        found += list(ours.work(Task("clean", 0.0, None, batch, count, ("none",))))
    assert calls == [2, 2, 2, 1, 1]
    assert all(isinstance(one, Judged) and 0 < one.seconds < 0.5 for one in found)
