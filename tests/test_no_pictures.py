"""Zero pictures: attacks, defenses and the batch of a run give empty results, or a sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scc_fast.api import make_defense
from scc_fast.attacks import ATTACKS, BareLogits, parse_attack
from scc_fast.defenses import DEFENSES
from scc_fast.evaluate.data import Source, from_source
from scc_fast.evaluate.worker import Judged, Made, Setting, Task, Worker
from toys import FIVE, model_of

NO_X = torch.zeros(0, 3, 64, 64)
NONE = torch.zeros(0, dtype=torch.int64)


@pytest.mark.parametrize("name", DEFENSES)
def test_defenses_and_the_attacks_that_suit_them(name: str) -> None:
    target = make_defense(name, model_of("tiny"), FIVE)
    assert target.live(NO_X, NONE).logits.shape == (0, len(FIVE))
    assert target.view_logits(NO_X, NONE).shape[1:] == (0, len(FIVE))
    assert target.run(NO_X, NONE).logits.shape == (0, len(FIVE))
    made = 0
    for kind in ATTACKS:
        attack = parse_attack(kind + ":source=tiny" * (kind == "transfer"), 4 / 255)
        if attack.suits(target) and (attack.aware or name == "none"):
            found = attack.run(target, NO_X, NONE, NONE)
            assert (found.shape, found.dtype) == (NO_X.shape, torch.float32)
            made += 1
    assert made >= 2  # view-aware and BPDA suit them all


def test_the_bare_module() -> None:
    bare = BareLogits(make_defense("none", model_of("tiny"), FIVE))
    leaf = NO_X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(bare(leaf).sum(), leaf)
    assert slope.shape == NO_X.shape


def test_a_batch_of_a_run() -> None:
    worker = Worker(Setting(n_samples=3, batch=2, device="cpu"))
    assert list(worker.batches()) == [(0, 2), (1, 1)]
    assert list(worker.batches(0)) == []
    found = list(worker.work(Task("pgd1", 4 / 255, None, 0, 0, ("none", "scc"))))
    made, *judged = found
    assert isinstance(made, Made)
    assert made.delta.shape == (0, 3, 64, 64)
    assert [(one.defense, one.right) for one in judged if isinstance(one, Judged)] == [
        ("none", ""),
        ("scc", ""),
    ]


@pytest.mark.parametrize("batch", [0, -1, 1.5, True])
def test_a_run_s_batch_holds_a_picture(batch: Any) -> None:
    with pytest.raises(ValueError, match="batch must be a whole number >= 1, got"):
        Setting(batch=batch)


@pytest.mark.parametrize("labels", [[], [-1, 99]])
def test_a_data_set_without_pictures(labels: list[int]) -> None:
    def picture(_: int) -> Any:
        raise AssertionError

    source = Source("dtd", "test", ("banded", "blotchy"), labels, picture, "imagefolder")
    with pytest.raises(ValueError, match="dtd: none of the pictures found has a valid label"):
        from_source(source, model_of("tiny"))
