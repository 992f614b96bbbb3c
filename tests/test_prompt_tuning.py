"""The text tower with a context of each image's own, on every model, against the model's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scc_fast import Defender, tiny
from scc_fast.defenses.prompt_tuning import Context
from toys import FIVE, model_of

PROMPTS = [*tiny.prompts()[:6], "a dog", *tiny.prompts()[:1]]


def naive(model: Any, prompts: list[str], offset: Tensor, keep: float, count: int) -> Tensor:
    """The model's own tower on whole rows, its token embeddings changed by hand."""
    module, start = model.module, 1 if model.name == "tiny" else 0
    if hasattr(module, "text_model"):
        words, embedding = model.tokenizer, module.text_model.embeddings.token_embedding
        length = module.config.text_config.max_position_embeddings
        found = words(prompts, max_length=length)
        ids, mask = found["input_ids"], found["attention_mask"]
    else:
        ids, mask, embedding = model.tokenizer(prompts), None, module.token_embedding
    ends = ids.argmax(dim=1)

    def change(module: nn.Module, arguments: Any, embedded: Tensor) -> Tensor:
        rows = []
        for row, end in zip(embedded, ends.tolist(), strict=True):
            tuned = min(count, end - start)
            middle = keep * row[start : start + tuned] + offset[:tuned]
            rows.append(torch.cat([row[:start], middle, row[start + tuned :]]))
        return torch.stack(rows)

    hook = embedding.register_forward_hook(change)
    try:
        if mask is None:
            return module.encode_text(ids)
        siglip = module.config.model_type == "siglip"
        out = module.get_text_features(ids, attention_mask=None if siglip else mask)
        return out if isinstance(out, Tensor) else out.pooler_output
    finally:
        hook.remove()


@pytest.mark.parametrize("kind", ["tiny", "open_clip", "hf_clip", "hf_siglip"])
def test_the_tower_with_a_context_of_its_own(kind: str) -> None:
    model, prompts = model_of(kind), list(PROMPTS if kind == "tiny" else (*FIVE, FIVE[0]))
    context = Context(model, prompts, 4)
    different = list(dict.fromkeys(prompts))
    assert [different[i] for i in context.group] == prompts
    unit = F.normalize(context.base, dim=-1)[context.group]
    torch.testing.assert_close(unit, model.encode_text(prompts), atol=1e-5, rtol=0)
    whole = model.module.text_model.config.max_position_embeddings if "hf" in kind else 16
    assert (context._ids.shape[1] < whole) == (kind != "hf_siglip")  # it looks both ways

    generator = torch.Generator().manual_seed(0)
    offset = 0.02 * torch.randn(3, *context.start.shape[1:], generator=generator)
    slope = torch.randn(3, *context.base.shape, generator=generator)
    got, pulled = context.features(offset, 0.9), context.pull(offset, slope, 0.9)
    for i in range(3):
        leaf = offset[i].clone().requires_grad_()
        with torch.enable_grad():
            want = naive(model, different, leaf, 0.9, 4)
            (gradient,) = torch.autograd.grad(want, leaf, slope[i])
        torch.testing.assert_close(got[i], want.detach(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(pulled[i], gradient, atol=1e-3, rtol=1e-3)
    assert (got[0] - context.base).abs().amax(dim=1).min() > 1e-4  # every prompt has moved
    narrow = Context(model, prompts, 4, at_once=2)
    torch.testing.assert_close(narrow.features(offset, 0.9), got, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(narrow.pull(offset, slope, 0.9), pulled, atol=1e-4, rtol=1e-3)
    assert not any(p.requires_grad or p.grad is not None for p in model.module.parameters())


def test_what_cannot_be_tuned_says_why() -> None:
    class Other:
        def __getattr__(self, name: str) -> Any:
            return getattr(model_of("tiny"), name)

    with pytest.raises(ValueError, match="r_tpt tunes prompts: give classes"):
        Defender(model_of("tiny"), text_features=torch.eye(128)[:3], method="r_tpt")
    with pytest.raises(ValueError, match=r"Other does not show: load an open_clip"):
        Defender(Other(), FIVE, method="r_tpt")

    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(4096, 128)

        def encode_text(self, ids: Tensor, normalize: bool = False) -> Tensor:
            return self.words(ids).mean(dim=1)

    bag = copy.copy(model_of("tiny"))
    bag.module = Bag()  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"tiny \(Bag\) has none that is known: no token_embedd"):
        Context(bag, FIVE, 4, need="r_tpt")
    with pytest.raises(ValueError, match="context must be at most 15 tokens, got 40"):
        Defender(model_of("tiny"), FIVE, method="r_tpt", config={"context": 40})
