"""What a session holds, and what is left when it is gone."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

import scc_fast
from scc_fast import Defender
from scc_fast.defenses import DEFENSES, State
from scc_fast.engine import cuda_graph, drive
from toys import FIVE, Tuned, defender_of, model_of, pictures, small_open_clip, small_tokenizer

SEEDS = torch.arange(2)


def test_a_defender_is_gone_with_its_last_name() -> None:
    """Not when the cyclic collector comes by: a snapshot on a GPU is nothing to wait with."""
    model = scc_fast.load_model(small_open_clip(), tokenizer=small_tokenizer)
    defender = Defender(model, FIVE)
    defender(pictures("open_clip", 1), 0)
    seen = weakref.ref(defender.snapshot), weakref.ref(defender.session)
    gc.collect()
    gc.disable()
    try:
        del defender, model
        assert [one() for one in seen] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("method", DEFENSES)
def test_what_an_attacker_sees_in_any_mode(method: str) -> None:
    x, defender = pictures("open_clip", 2), defender_of("open_clip", method=method, config={})
    want = defender.run(x, SEEDS).logits.detach()
    with torch.inference_mode():
        inside = defender.bpda_logits(x + 0, SEEDS)
    with torch.no_grad():
        outside = defender.bpda_logits(x.clone().requires_grad_(), SEEDS)
    for found in (inside, outside):
        assert not found.requires_grad
        torch.testing.assert_close(found, want, rtol=1e-3, atol=2e-2)


def test_a_gradient_can_be_asked_for_twice() -> None:
    leaf = pictures("open_clip", 2).requires_grad_()
    logits = defender_of("open_clip").bpda_logits(leaf, SEEDS)
    first, second = (
        torch.autograd.grad(logits[:, 0].sum(), leaf, retain_graph=more)[0]
        for more in (True, False)
    )
    assert torch.equal(first, second)


def test_graphs_of_a_tuned_model_are_shared() -> None:
    """The key of a set is equal for every Defender of the model."""
    model = Tuned(model_of("open_clip"))
    keys = []
    for _ in range(2):
        session = Defender(model, FIVE, method="ttc").session
        assert session.judge is not None
        keys.append(cuda_graph.key_of(session, DEFENSES["ttc"](DEFENSES["ttc"].Config())))
    assert keys[0] == keys[1]
    assert hash(keys[0]) == hash(keys[1])


def test_every_method_takes_as_many_pictures_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU 1024, or what half of the free memory holds; not what a CPU takes."""
    for method in DEFENSES:
        defender = defender_of("open_clip", method=method, config={})
        given: Any = torch.device("cuda")
        monkeypatch.setattr(defender.model, "device", given)
        for free, most in ((2**40, 1024), (2**24, 512)):
            monkeypatch.setattr("scc_fast.api.free_memory", lambda _, free=free: free)
            pictures_held = defender._default_max_batch()
            assert pictures_held == 1024 if most == 1024 else 1 <= pictures_held <= most, method
        monkeypatch.undo()


def test_the_gate_is_shut_on_its_threshold() -> None:
    """As METHOD.md has it: an image with τ ≥ τ* is left; what is not a number is left too."""
    ttc, none, hd = (DEFENSES[name](DEFENSES[name].Config()) for name in ("ttc", "none", "hd"))
    margin = torch.tensor([0.0, 1e-30, -1.0, torch.nan])
    flagged = drive.gate(ttc, State(margin, margin=margin))
    assert flagged.tolist() == [False, True, False, False]
    chosen = drive.chosen_rows(ttc, flagged)
    assert chosen is not None
    assert chosen.tolist() == [1]
    assert drive.chosen_rows(ttc, torch.ones(3).bool()) is None
    empty = drive.chosen_rows(none, drive.gate(none, State(margin)))
    assert empty is not None
    assert empty.tolist() == []
    assert drive.chosen_rows(hd, drive.gate(hd, State(margin))) is None
