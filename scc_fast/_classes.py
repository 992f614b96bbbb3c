"""The class list of a Defender: checked, embedded once per model, kept as long as the model."""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scc_fast.models import VisionLanguage, load_model, missing_members

LOCK = threading.RLock()
_NAMED: dict[str, VisionLanguage] = {}
_Wrapped = tuple[tuple[tuple[int, int], ...], VisionLanguage]
_WRAPPED: weakref.WeakKeyDictionary[nn.Module, _Wrapped] = weakref.WeakKeyDictionary()
_Text = dict[tuple[tuple[str, ...], Any], Tensor]
_TEXT: weakref.WeakKeyDictionary[Any, _Text] = weakref.WeakKeyDictionary()


def as_model(model: Any) -> VisionLanguage:
    """`model` itself, or what load_model makes of a name or an object, made once."""
    with LOCK:
        if isinstance(model, str):
            if model not in _NAMED:
                _NAMED[model] = load_model(model)
            return _NAMED[model]
        if isinstance(model, nn.Module) and missing_members(model):
            weights = weights_of(model)
            known = _WRAPPED.get(model)
            if known is None or known[0] != weights:  # trained or moved since: embed anew
                known = _WRAPPED[model] = weights, load_model(model)
            return known[1]
    return load_model(model)


def weights_of(module: Any) -> tuple[tuple[int, int], ...]:
    """Where the weights of a module are, and how often they have been written (not by `.data`)."""
    if not isinstance(module, nn.Module):
        return ()
    return tuple((p.data_ptr(), p._version) for p in (*module.parameters(), *module.buffers()))


def checked(classes: Sequence[str] | None) -> tuple[str, ...] | None:
    """The prompts as a tuple; duplicates are warned about where the caller called us."""
    if classes is None:
        return None
    if isinstance(classes, str) or not isinstance(classes, Sequence):
        raise TypeError(f"classes must be a list of prompts, got {classes!r}")
    for prompt in classes:
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"classes must hold non-empty strings, got {prompt!r}")
    (twice, count), *more = Counter(classes).most_common(2) or [("", 0)]
    if not more:
        raise ValueError(f"classes must hold at least two different prompts, got {list(classes)}")
    if count > 1:
        warnings.warn(
            f"classes has duplicates ({twice!r} is there {count} times): they get equal logits "
            "and never count as each other's negative",
            stacklevel=_callers_level(),
        )
    return tuple(classes)


def _callers_level() -> int:
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("scc_fast."):
        level, frame = level + 1, frame.f_back
    return level


def embedded(
    model: VisionLanguage, classes: tuple[str, ...] | None, given: Tensor | None
) -> Tensor:
    """The (K, D) float32 unit embeddings of `classes`, or `given` checked and scaled."""
    if (classes is None) == (given is None):
        raise ValueError("give exactly one of classes= and text_features=")
    if classes is not None:
        with LOCK:
            try:
                known = _TEXT.setdefault(model, {})
            except TypeError:  # a model that cannot be a key is embedded every time
                known = {}
            key = classes, weights_of(getattr(model, "module", None))
            if key not in known:
                known.clear()  # one class list per model bounds the memory
                known[key] = model.encode_text(classes).to(model.device)
            return known[key]
    if not isinstance(given, Tensor) or given.ndim != 2 or given.shape[1] != model.embed_dim:
        came = tuple(given.shape) if isinstance(given, Tensor) else given
        raise ValueError(f"text_features must be (K, {model.embed_dim}), got {came!r}")
    if len(given) < 2:
        raise ValueError(f"text_features must hold at least two classes, got {len(given)}")
    text = given.detach().to(model.device, torch.float32)
    bad = (~torch.isfinite(text).all(dim=-1) | (text.norm(dim=-1) == 0)).nonzero()
    if len(bad):
        raise ValueError(f"text_features must be finite and not zero, row {int(bad[0])} is not")
    return nn.functional.normalize(text, dim=-1)
