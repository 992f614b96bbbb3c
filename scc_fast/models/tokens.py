"""Tokenization of prompts, with checked ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scc_fast.config import shown

Tokenizer = Callable[..., Any]
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class TextSize(NamedTuple):
    """Limits of a text tower: ids below ``vocabulary``, ``length`` ids a prompt; None: unknown.

    ``fixed``: exactly ``length``, else at most.
    """

    vocabulary: int | None
    length: int | None
    fixed: bool


def check_tokenizer(tokenizer: Any) -> None:
    """TypeError unless it is None, a name or something to call."""
    if not (tokenizer is None or isinstance(tokenizer, str) or callable(tokenizer)):
        raise TypeError(
            "tokenizer: a callable is needed, such as open_clip.get_tokenizer(name), or the name "
            f"of an open_clip architecture, got {shown(tokenizer)}"
        )


def open_clip_ids(tokenizer: Tokenizer, prompts: Sequence[str], size: TextSize) -> Tensor:
    """Ids (n, length) int64 on the CPU, from a tokenizer with open_clip's signature.

    Raises:
        TypeError, ValueError: the tokenizer fails or does not fit the model.
    """
    ids = _called(tokenizer, prompts, "")
    if isinstance(ids, Mapping):
        raise TypeError(
            f"tokenizer: must return a tensor of ids, got {type(ids).__name__}, as transformers' "
            "do; an open_clip model takes open_clip.get_tokenizer(name)"
        )
    return _checked(ids, len(prompts), size)


def transformers_inputs(
    tokenizer: Tokenizer, prompts: Sequence[str], size: TextSize
) -> dict[str, Tensor]:
    """input_ids, and attention_mask if there is one, both (n, length) on the CPU.

    Prompts are padded to the full length, as in SigLIP's training; a row is then independent of
    its batch.

    Raises:
        TypeError, ValueError: the tokenizer fails or does not fit the model.
    """
    hint = "; a transformers model takes AutoTokenizer's or AutoProcessor's, with padding="
    options = {"padding": "max_length", "truncation": True, "max_length": size.length}
    found = _called(tokenizer, prompts, hint, **options, return_tensors="pt")
    if not isinstance(found, Mapping) or "input_ids" not in found:
        keys = shown(list(found)) if isinstance(found, Mapping) else type(found).__name__
        raise TypeError(f"tokenizer: must return a mapping with input_ids, got {keys}{hint}")
    inputs = {"input_ids": _checked(found["input_ids"], len(prompts), size)}
    if (mask := found.get("attention_mask")) is not None:
        if not isinstance(mask, Tensor) or mask.shape != inputs["input_ids"].shape:
            raise TypeError(
                "tokenizer: attention_mask must be a tensor of the ids' shape "
                f"(return_tensors='pt'), got {shown(mask)}"
            )
        inputs["attention_mask"] = mask
    return inputs


def cut_prompts(
    prompts: Sequence[str], ids: Tensor, ids_of: Callable[[list[str]], Tensor]
) -> list[str]:
    """Prompts truncated by the context length.

    Dropping their last letter or appending a word leaves their ids unchanged.

    Args:
        ids: (n, length), ids_of(prompts).
    """
    if ids.shape[1] < 2:
        return []
    # A row that ends with padding has room left, unless the padding is a single id
    rows = (ids[:, -1] != ids[:, -2]).nonzero().flatten().tolist()
    long, full = [prompts[row] for row in rows], ids[rows]
    if not long:
        return []
    try:
        less, more = (ids_of([p.rstrip()[:-1] for p in long]), ids_of([f"{p} a" for p in long]))
    except (TypeError, ValueError):  # the tokenizer rejects long prompts
        return []
    if not less.shape == more.shape == full.shape:
        return []
    same = (less == full).all(dim=1) & (more == full).all(dim=1)
    return [prompt for prompt, cut in zip(long, same.tolist(), strict=True) if cut]


def _called(tokenizer: Tokenizer, prompts: Sequence[str], hint: str, **options: Any) -> Any:
    try:
        return tokenizer(list(prompts), **options)
    except Exception as error:
        raise ValueError(
            f"tokenizer: {type(tokenizer).__name__} fails on {shown(prompts[0])}: "
            f"{shown(error)}{hint}"
        ) from error


def _checked(ids: Any, rows: int, size: TextSize) -> Tensor:
    # On the CPU: on a GPU an index out of range ends the process's CUDA context
    if isinstance(ids, np.ndarray) and ids.dtype.kind in "iu":
        ids = torch.from_numpy(ids.astype(np.int64))
    if not isinstance(ids, Tensor):
        raise TypeError(
            f"tokenizer: must return a tensor of ids, got {type(ids).__name__} (transformers': "
            "return_tensors='pt')"
        )
    if ids.dtype not in _INTEGERS:
        raise TypeError(f"tokenizer: must return integer ids (torch.int64), got {ids.dtype}")
    if ids.ndim != 2 or len(ids) != rows:
        raise ValueError(
            f"tokenizer: must return one row of ids for each prompt, ({rows}, length) here, got "
            f"shape {tuple(ids.shape)}"
        )
    ids = ids.to("cpu", torch.int64)
    low, high = (int(ids.min()), int(ids.max())) if ids.numel() else (0, 0)
    if low < 0:
        raise ValueError(f"tokenizer: gives id {low}, below 0")
    if size.vocabulary and high >= size.vocabulary:
        raise ValueError(
            f"tokenizer: gives id {high}, but the model's vocabulary has {size.vocabulary}"
        )
    length = ids.shape[1]
    if not length or (
        size.length and (length != size.length if size.fixed else length > size.length)
    ):
        most = "" if size.fixed else "at most "
        raise ValueError(
            f"tokenizer: gives {length} ids a prompt, but the model's context length is "
            f"{most}{size.length}; pass the tokenizer of this model"
        )
    return ids
