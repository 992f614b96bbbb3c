"""Class prompts and text embeddings of a Defender, cached with the model."""

from __future__ import annotations

import math
import re
import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scc_fast._arguments import listed
from scc_fast._warn import warn
from scc_fast.config import shown
from scc_fast.engine.snapshot import not_finite, structure
from scc_fast.engine.trust import Surroundings
from scc_fast.images import check_dense
from scc_fast.models import VisionLanguage, load_model, missing_members

LOCK = threading.RLock()
_LARGEST_SCALE = 1e6
_NAMED: dict[str, VisionLanguage] = {}
_WRAPPED: weakref.WeakKeyDictionary[nn.Module, tuple[Any, VisionLanguage]] = (
    weakref.WeakKeyDictionary()
)
_Text = tuple[tuple[str, ...], Surroundings, Tensor]
_TEMPLATE = re.compile(r"\{\w*\}")
_TEXT: weakref.WeakKeyDictionary[Any, _Text] = weakref.WeakKeyDictionary()


def as_model(model: Any) -> VisionLanguage:
    """A VisionLanguage from a model, a name or an object; the latter two are cached."""
    with LOCK:
        if isinstance(model, str):
            if model not in _NAMED:
                _NAMED[model] = load_model(model)
            return _NAMED[model]
        if isinstance(model, nn.Module) and missing_members(model):
            now = _layout(model)
            known = _WRAPPED.get(model)
            if known is None or now is None or known[0] != now:
                known = _WRAPPED[model] = now, load_model(model)
            return known[1]
    return load_model(model)


def _layout(module: nn.Module) -> Any:
    """Structure of a module and addresses of its weights, shared by twins; None: unknown."""
    found = structure(module)
    if found is None:
        return None
    skeleton, tensors = found
    try:
        return skeleton, [(t.data_ptr(), t.dtype, t.device, t.shape, t.stride()) for t in tensors]
    except RuntimeError:  # tensors without memory of their own
        return None


def check_prompts(classes: Iterable[str] | None) -> tuple[str, ...] | None:
    """Prompts as a tuple; of a mapping, its keys. Warns of duplicates and templates.

    Raises:
        TypeError: not an ordered collection. ValueError: not strings, or fewer than two.
    """
    if classes is None:
        return None
    given = listed(classes.keys() if isinstance(classes, Mapping) else classes)
    if given is None:
        raise TypeError(f"classes must be a list of prompts, got {shown(classes)}{_hint(classes)}")
    prompts = []
    for prompt in given:
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"classes must hold non-empty strings, got {shown(prompt)}")
        prompts.append(str(prompt))
    (twice, count), *more = Counter(prompts).most_common(2) or [("", 0)]
    if not more:
        raise ValueError(f"classes must hold at least two different prompts, got {shown(prompts)}")
    if count > 1:
        warn(
            f"classes has duplicates ({shown(twice)} is there {count} times): they get equal "
            "logits and never count as each other's negative"
        )
    template = next(filter(_TEMPLATE.search, prompts), None)
    if template is not None:
        warn(
            f"classes holds the template {shown(template)}; prompts are used as they are: fill it "
            "with each class's name"
        )
    return tuple(prompts)


def _hint(classes: Any) -> str:
    if isinstance(classes, str):
        return '; put it in a list: ["a dog", "a cat"]'
    if isinstance(classes, set | frozenset):
        return ", which has no order: use sorted(...)"
    if hasattr(classes, "shape"):
        return "; embeddings are given as text_features="
    return ""


def text_embeddings(
    model: VisionLanguage,
    snapshot: VisionLanguage,
    classes: tuple[str, ...] | None,
    given: Any,
) -> Tensor:
    """Unit embeddings (K, D) float32 of `classes`, or `given` normalised.

    Embeddings of `classes` are cached with the model's snapshot, whose key covers the text side; a
    model that is its own snapshot, or TwoTowers, is encoded every time.

    Raises:
        ValueError: non-finite embeddings.
    """
    if (classes is None) == (given is None):
        raise ValueError("give exactly one of classes= and text_features=")
    if classes is not None:
        if snapshot is model or not getattr(snapshot, "whole", True):
            return _encode(model, classes)
        with LOCK:
            known = _TEXT.get(snapshot)  # one class list per snapshot
            if known is None or known[0] != classes or not known[1].hold():
                text = _encode(model, classes)
                module: Any = getattr(model, "module", None)
                known = _TEXT[snapshot] = classes, Surroundings(module), text
            return known[2]
    return _unit_rows(given, model.embed_dim).to(model.device)


def _unit_rows(given: Any, dim: int) -> Tensor:
    """Unit rows (K, dim) of text_features in any container, float32 on the CPU."""
    wrong = f"text_features must be numbers of shape (K, {dim}), got {shown(given)}"
    if isinstance(given, list | tuple) and all(isinstance(row, Tensor) for row in given):
        shapes = {row.shape for row in given}
        if len(shapes) != 1:
            raise ValueError(wrong)
        given = torch.stack(list(given))
    if isinstance(given, Tensor):
        check_dense("text_features", given)
        real = not given.is_complex() and given.dtype != torch.bool
        values = given.detach().to("cpu", torch.float64) if real else None
    else:
        try:
            array = np.asarray(given)
        except ValueError:  # rows of different lengths
            raise ValueError(wrong) from None
        real = array.dtype.kind in "fiu"
        values = torch.from_numpy(array.astype(np.float64)) if real else None
    if values is None or values.ndim != 2 or values.shape[1] != dim:
        raise ValueError(wrong)
    if len(values) < 2:
        raise ValueError(f"text_features must hold at least two classes, got {len(values)}")
    # Divided by the largest first: squares of 1e-200 or 1e200 leave float64's range
    largest = values.abs().amax(dim=-1, keepdim=True)
    bad = (~(largest > 0) | ~largest.isfinite()).nonzero()
    if len(bad):
        raise ValueError(f"text_features must be finite and not zero, row {int(bad[0, 0])} is not")
    return nn.functional.normalize(values / largest, dim=-1).float()


def _encode(model: VisionLanguage, classes: tuple[str, ...]) -> Tensor:
    text = model.encode_text(classes).to(model.device)
    if bool(text.isfinite().all()):
        return text
    module = getattr(model, "module", None)
    bad = not_finite(module) if isinstance(module, nn.Module) else ""
    why = (
        f"{bad} holds NaN or infinity"
        if bad
        else f"its text tower overflows in {getattr(model, 'dtype', 'its precision')}; "
        'load it with precision="fp32"'
    )
    raise ValueError(f"model: the text embeddings of {model.name} are not finite: {why}")


def scale_of(model: VisionLanguage) -> tuple[float, float]:
    """Logit scale and bias.

    Raises:
        ValueError: implausible numbers.
    """
    scale, bias = float(model.logit_scale), float(model.logit_bias)
    if not 0 < scale <= _LARGEST_SCALE:
        raise ValueError(
            f"model: the logit scale of {model.name} must be a number in (0, {_LARGEST_SCALE:g}], "
            f"got {scale}; its parameter holds the logarithm"
        )
    if not math.isfinite(bias):
        raise ValueError(f"model: the logit bias of {model.name} must be finite, got {bias}")
    return scale, bias
