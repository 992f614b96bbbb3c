"""Class lists: duplicates, how often they are encoded, text features, twenty thousand classes."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import scc_fast
from scc_fast import Defender
from scc_fast.models import OpenCLIPModel
from toys import (
    FIVE,
    KINDS,
    METHODS,
    assert_same,
    defender_of,
    model_of,
    pictures,
    small_open_clip,
    small_tokenizer,
)


@pytest.mark.parametrize("kind", KINDS)
def test_duplicate_prompts(kind: str) -> None:
    model, x = model_of(kind), pictures(kind, 3)
    with pytest.warns(UserWarning, match=r"classes has duplicates \('a red apple'"):
        defender = Defender(model, [*FIVE, "a red apple"], config={"tau": 100.0})
    result = defender(x, 1)
    assert torch.equal(result.logits[:, 3], result.logits[:, 5])
    # The twin is never the negative: all classes but one equal, the only other one is
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pair = Defender(model, ["a cat", "a dog"], config={"tau": 100.0, "temperature": 0.001})
        many = Defender(model, ["a cat", "a dog", "a dog", "a cat"], config=pair.config)
    torch.testing.assert_close(many(x, 1).logits[:, :2], pair(x, 1).logits, atol=2e-3, rtol=1e-3)


def test_the_warning_points_at_the_caller() -> None:
    model, x = model_of("open_clip"), pictures("open_clip", 1)
    with pytest.warns(UserWarning, match="classes has duplicates") as caught:
        scc_fast.defend(x, model, ["a cat", "a dog", "a cat"], method="none")
    assert [w.filename for w in caught] == [__file__]
    with pytest.warns(UserWarning, match="classes has duplicates") as caught:
        Defender(model, ["a cat", "a dog", "a cat"])
    assert [w.filename for w in caught] == [__file__]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The class lists that open_clip models were asked to encode."""
    found: list[tuple[str, ...]] = []
    encode = OpenCLIPModel.encode_text

    def counted(self: OpenCLIPModel, prompts: Sequence[str], batch_size: int = 256) -> Tensor:
        found.append(tuple(prompts))
        return encode(self, prompts, batch_size)

    monkeypatch.setattr(OpenCLIPModel, "encode_text", counted)
    return found


def test_prompts_are_encoded_once(calls: list[tuple[str, ...]]) -> None:
    original = small_open_clip(text_cfg={"context_length": 77, "width": 32, "heads": 2})
    model, x = scc_fast.load_model(original), pictures("open_clip", 1)
    for method in METHODS:
        scc_fast.defend(x, model, FIVE, method=method)
        Defender(model, list(FIVE), method=method)(x)
    assert calls.count(FIVE) == 1
    scc_fast.defend(x, model, FIVE[:3])
    assert calls.count(FIVE[:3]) == 1
    other = scc_fast.load_model(small_open_clip(), tokenizer=small_tokenizer)
    assert not torch.equal(Defender(other, FIVE).text_features, Defender(model, FIVE).text_features)


def test_prompts_are_encoded_once_for_a_model_object(calls: list[tuple[str, ...]]) -> None:
    original = small_open_clip(text_cfg={"context_length": 77, "width": 32, "heads": 2})
    for _ in range(3):
        scc_fast.defend(pictures("open_clip", 1), original, FIVE)
    assert calls.count(FIVE) == 1


def test_text_features_instead_of_prompts() -> None:
    model, x = model_of("hf_clip"), pictures("hf_clip", 2)
    by_name = defender_of("hf_clip")
    given = 7.5 * model.encode_text(FIVE).double()
    by_features = Defender(model, text_features=given.requires_grad_())
    torch.testing.assert_close(by_features.text_features, by_name.text_features)
    assert not by_features.text_features.requires_grad
    assert_same(by_features(x, 3), by_name(x, 3))
    assert by_features.classes is None


def test_twenty_thousand_classes() -> None:
    model, x = model_of("tiny"), pictures(n=2)
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(20_000, model.embed_dim, generator=generator)
    result = Defender(model, text_features=text)(x, 0)
    assert result.logits.shape == (2, 20_000)
    prompts = [f"a photo of a thing, number {i}" for i in range(19_999)]
    with pytest.warns(UserWarning, match="classes has duplicates"):
        defender = Defender(model, [*prompts, prompts[-1]])
    result = defender(x, 0)
    assert torch.equal(result.logits[:, -1], result.logits[:, -2])
    assert result.logits.isfinite().all()


def test_looking_for_duplicates_takes_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("hf_siglip")
    monkeypatch.setattr(model, "encode_text", lambda prompts: torch.eye(5)[:2].repeat(1, 8)[:, :32])
    prompts = [f"number {i}" for i in range(20_000)]
    began = time.perf_counter()
    with pytest.warns(UserWarning, match="classes has duplicates"):
        Defender(model, [*prompts, prompts[-1]])
    assert time.perf_counter() - began < 1


def test_defend_follows_a_model_that_was_trained_in_between() -> None:
    module = small_open_clip(text_cfg={"context_length": 77, "width": 32, "heads": 2})
    x = pictures("open_clip", 2)
    before = scc_fast.defend(x, module, FIVE, method="none")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    after = scc_fast.defend(x, module, FIVE, method="none")
    fresh = Defender(scc_fast.load_model(module), FIVE, method="none")(x)
    torch.testing.assert_close(after.logits, fresh.logits)
    assert not torch.allclose(before.logits, after.logits)


def test_a_module_that_is_a_vision_language_is_used_as_it_is() -> None:
    inner = model_of("open_clip")

    class Module(torch.nn.Module):
        def __getattr__(self, name: str) -> object:
            return getattr(inner, name)

    module, x = Module(), pictures("open_clip", 1)
    assert scc_fast.load_model(module) is module
    assert_same(scc_fast.defend(x, module, FIVE, seeds=1), Defender(inner, FIVE)(x, 1))
