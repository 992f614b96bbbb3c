"""What holds for every method on every engine that serves it here."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import scc_fast
from scc_fast import Defender, DefenseResult, VisionLanguage, image_seeds
from scc_fast.defenses import DEFENSES
from toys import FIVE, assert_same, pictures, small_open_clip, small_tokenizer

KIND = "open_clip"
SEEDS = image_seeds(7, 3)
ENGINES = ("eager", "runner")  # graphs are test_graph.py's, compiled modules test_engine.py's
EACH = [(method, engine) for method in DEFENSES for engine in ENGINES]


@functools.cache
def model() -> VisionLanguage:
    """One of its own: others' tests write to the snapshot that equal models share."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return scc_fast.load_model(small_open_clip(), tokenizer=small_tokenizer)


def made(method: str, engine: str, **options: Any) -> Defender:
    return Defender(model(), FIVE, method=method, engine=engine, **{"config": {}, **options})


def equal(a: DefenseResult, b: DefenseResult) -> bool:
    return torch.equal(a.logits, b.logits) and torch.equal(a.delta, b.delta)


@pytest.mark.parametrize(("method", "engine"), EACH)
def test_a_result_is_of_the_image_and_its_seed(method: str, engine: str) -> None:
    x, defender = pictures(KIND, 3), made(method, engine)
    before, state = x.clone(), torch.get_rng_state()
    whole = defender(x, SEEDS)
    assert (whole.method, whole.engine) == (method, engine)
    assert equal(defender(x, SEEDS), whole)
    assert_same(defender(x[1:2], SEEDS[1:2]), whole, [1])
    assert_same(made(method, engine, max_batch=1)(x, SEEDS), whole)
    assert (not equal(defender(x, 5), defender(x, 6))) == defender.is_randomized
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("method", "engine"), EACH)
def test_modes_empty_batches_and_refusals(method: str, engine: str) -> None:
    x, defender = pictures(KIND, 2), made(method, engine)
    want = defender(x, SEEDS[:2])
    with torch.inference_mode():
        inside = defender(x, SEEDS[:2])
    with torch.enable_grad():
        live = defender(x.clone().requires_grad_(), SEEDS[:2])
    for found in (inside, live):
        assert equal(found, want)
        assert not found.logits.is_inference()
        assert not found.logits.requires_grad
    assert defender(x[:0]).logits.shape == (0, len(defender.text_features))
    with pytest.raises(ValueError, match=r"images: values from .* outside"):
        defender(2 * x)
    with pytest.raises(ValueError, match="seeds must be one whole number or 2"):
        defender(x, SEEDS)
    with pytest.raises(ValueError, match=r"has no field 'nothing'"):
        made(method, engine, config={"nothing": 1})
