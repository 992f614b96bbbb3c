"""Text tower as a function of its prompts' context, for per-image prompt tuning."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scc_fast._plain import default_device
from scc_fast.models import FrozenModel, OpenCLIPModel, TransformersModel, frozen_twin


class Context:
    """Context: the embeddings of the first `count` content tokens of every prompt, with an offset.

    Content tokens are those between the start token (if any) and the end token. In "a photo of a
    dog" they are the context, as in R-TPT's prompts; in general the offset is shared by all
    classes, and in short prompts it also changes the class name.

    The tower is a float32 copy that shares float32 weights with the model. It is cut to the longest
    prompt if that changes nothing. Thread-safe.

    Args:
        model: an open_clip or transformers CLIP, loaded by scc_fast.load_model.
        prompts: K strings, one per class; equal ones are encoded once.
        count: tokens to tune.
        at_once: prompts per pass of the tower, to bound memory.
        need: the caller, for errors.

    Raises:
        ValueError: the model has no tunable text tower.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[str],
        count: int,
        *,
        at_once: int = 256,
        need: str = "prompt tuning",
    ) -> None:
        if not isinstance(model, OpenCLIPModel | TransformersModel):
            raise ValueError(
                f"{need} tunes the text tower's token embeddings, which {type(model).__name__} "
                "does not show: load an open_clip or transformers CLIP with scc_fast.load_model"
            )
        place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        self.count, self.at_once = count, at_once
        self.group = torch.tensor([place[prompt] for prompt in prompts], device=model.device)
        with default_device():
            self._ids, self._attention, (self._first, length) = _tokens(model, list(place), count)
        reach = self._first + torch.arange(count, device=model.device)
        self._tuned = reach < self._first + length[:, None]  # (U, count)
        self._local = threading.local()
        want = model.encode_text(list(place))
        self._tower, self.base = self._checked(model, want, int(length.max()), need)

    def features(self, offset: Tensor, keep: float = 1.0) -> Tensor:
        """Text embeddings, not normalised, with each image's context.

        Args:
            offset: (B, count, W), added to the tuned tokens' embeddings times `keep`.

        Returns:
            (B, U, D), U different prompts; classes are [:, self.group].
        """
        parts = []
        with torch.no_grad():
            for _, image, prompt in self._pieces(len(offset)):
                parts.append(self._run(prompt, offset[image], keep))
        return torch.cat(parts).unflatten(0, (len(offset), -1))

    def pull(self, offset: Tensor, slope: Tensor, keep: float = 1.0) -> Tensor:
        """∂/∂offset of the sum of slope·features(offset, keep): (B, U, D) → (B, count, W)."""
        total = torch.zeros_like(offset)
        flat = slope.flatten(0, 1)
        for rows, image, prompt in self._pieces(len(offset)):
            with torch.enable_grad():
                leaf = offset.detach()[image].requires_grad_()
                found = self._run(prompt, leaf, keep)
            (gradient,) = torch.autograd.grad(found, leaf, flat[rows])
            # Per image, in a fixed order: the backward of indexing is not deterministic on threads.
            for one in image.unique().tolist():
                total[one] += gradient[image == one].sum(dim=0)
        return total

    def _pieces(self, images: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Pieces of (image, prompt) pairs, as indices."""
        count = len(self._ids)
        rows = torch.arange(images * count, device=self._ids.device)
        return [(part, part // count, part % count) for part in rows.split(self.at_once)]

    def _run(self, prompt: Tensor, offset: Tensor, keep: float) -> Tensor:
        """Run the tower on prompts (n,) with offsets (n, count, W)."""
        self._local.change = (self._tuned[prompt], offset, keep)
        try:
            mask = None if self._attention is None else self._attention[prompt]
            return self._tower(self._ids[prompt], mask).float()
        finally:
            self._local.change = None

    def _hook(self, module: nn.Module, arguments: Any, embedded: Tensor) -> Tensor:
        tuned, offset, keep = self._local.change
        here = slice(self._first, self._first + self.count)
        context = embedded[:, here]
        changed = torch.where(tuned[..., None], keep * context + offset, context)
        return torch.cat([embedded[:, : self._first], changed, embedded[:, here.stop :]], dim=1)

    def _checked(
        self, model: FrozenModel, want: Tensor, content: int, need: str
    ) -> tuple[Callable[[Tensor, Tensor | None], Tensor], Tensor]:
        """Tower, checked against the model on unchanged prompts: (tower, features (U, D))."""
        full = self._ids, self._attention
        bound = 1e-4 if model.dtype == torch.float32 else 0.05
        for size in (self._first + max(content, self.count) + 1, full[0].shape[1]):
            size = min(size, full[0].shape[1])
            self._ids = full[0][:, :size]
            self._attention = None if full[1] is None else full[1][:, :size]
            self._tower, width = _tower(model, size, self._hook, need)
            start = want.new_zeros(1, self.count, width)
            try:
                base = self.features(start)[0]
            except RuntimeError:  # the tower needs full-length rows
                if size == full[0].shape[1]:
                    raise
                continue
            if (F.normalize(base, dim=-1) - want).abs().max() <= bound:
                self.start = start
                return self._tower, base
        raise ValueError(
            f"{need}: the text tower of {model.name} ({type(model.module).__name__}) gives other "
            "features than its encode_text when its token embeddings are given by hand"
        )


def _tokens(
    model: FrozenModel, prompts: list[str], count: int
) -> tuple[Tensor, Tensor | None, tuple[int, Tensor]]:
    """Ids (U, T), attention mask (U, T) or None, and (first content token, number of them (U,))."""
    texts = [*prompts, "", "a", "zebra"]
    inputs = {key: value.to(model.device) for key, value in model.text_inputs(texts).items()}
    ids, attention = inputs["input_ids"], inputs.get("attention_mask")
    starts = bool((ids[-2:, 0] == ids[-3, 0]).all())
    first = int(starts)
    ends = ids == ids[-3, first]
    length = torch.where(ends.any(dim=1), ends.int().argmax(dim=1), ids.shape[1]) - first
    if first + count > ids.shape[1]:
        raise ValueError(f"context must be at most {ids.shape[1] - first} tokens, got {count}")
    kept = len(prompts)
    mask = None if attention is None else attention[:kept]
    return ids[:kept], mask, (first, length[:kept].clamp_min(0))


def _tower(
    model: FrozenModel, size: int, hook: Callable[..., Tensor], need: str
) -> tuple[Callable[[Tensor, Tensor | None], Tensor], int]:
    """Function from ids (n, size) and mask to features (n, D), and the embedding width."""
    twin = cast(Any, frozen_twin(model.module))
    if type(twin).__module__.split(".")[0] in ("open_clip", "transformers"):
        for vision in ("visual", "vision_model"):  # read by OpenAI's package
            if isinstance(getattr(twin, vision, None), nn.Module):
                setattr(twin, vision, nn.Identity())
    holder, embedding = _embedding(twin)
    if embedding is None:
        raise ValueError(
            f"{need} tunes the text tower's token embeddings; {model.name} "
            f"({type(model.module).__name__}) has none that is known: no token_embedding in the "
            "model, in its .text or in its .text_model"
        )
    twin.float()
    mask = getattr(holder, "attn_mask", None)
    if isinstance(mask, Tensor) and len(mask) > size:
        holder.attn_mask = mask[:size, :size]
    position = getattr(holder, "positional_embedding", None)
    if isinstance(position, nn.Parameter) and len(position) > size:
        holder.positional_embedding = nn.Parameter(position[:size], requires_grad=False)
    embedding.register_forward_hook(hook)
    if isinstance(model, TransformersModel):

        def transformers(ids: Tensor, attention: Tensor | None) -> Tensor:
            found = twin.get_text_features(
                input_ids=ids, **({} if attention is None else {"attention_mask": attention})
            )
            return cast(Tensor, found if isinstance(found, Tensor) else found.pooler_output)

        return transformers, embedding.embedding_dim
    plain = cast(OpenCLIPModel, model)._plain

    def open_clip(ids: Tensor, attention: Tensor | None) -> Tensor:
        return cast(Tensor, twin.encode_text(ids, **plain))

    return open_clip, embedding.embedding_dim


def _embedding(twin: Any) -> tuple[Any, nn.Embedding | None]:
    """Parent module of the token embedding, and the embedding."""
    text = getattr(twin, "text_model", None)
    holders = (twin, getattr(twin, "text", None), getattr(text, "embeddings", None))
    for holder in holders:
        found = getattr(holder, "token_embedding", None)
        if isinstance(found, nn.Embedding):
            return holder, found
    return None, None
