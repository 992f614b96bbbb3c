"""Checks of arguments: ordered collections, and hints for unknown names."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, KeysView, Sequence, ValuesView
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

from scc_fast.config import MethodConfig, nearest

P = ParamSpec("P")
R = TypeVar("R")

# Names in other libraries, and ours.
_CALLED = {
    "batch_size": "max_batch",
    "checkpoint": "pretrained",
    "class_names": "classes",
    "defense": "method",
    "dtype": "precision",
    "eps": "epsilon",
    "labels": "classes",
    "names": "classes",
    "normalized": "is_normalized",
    "preprocess": "processor",
    "prompts": "classes",
    "seed": "seeds",
    "seeds": "seed",
    "text_embeddings": "text_features",
    "weights": "pretrained",
}
_PLACES = {
    "load_model()": (
        *("device", "pretrained", "tokenizer", "processor", "mean", "std", "cache_dir"),
        "image_encoder",
    ),
    "Defender()": (
        *("classes", "text_features", "method", "config", "precision", "backend", "engine"),
        "max_batch",
    ),
    "the call, defender(images, ...)": ("images", "seeds", "is_normalized", "clamp"),
    "DefendedCLIP()": ("gradient", "seed"),
}


def listed(value: Any) -> Iterable[Any] | None:
    """Items of an ordered collection or iterator; None for anything else.

    Accepts sequences, iterators, dict views, one-dimensional arrays and Series; not strings, bytes,
    files, sets or tensors.
    """
    if isinstance(value, str | bytes | bytearray | memoryview | Tensor) or hasattr(value, "read"):
        return None
    if isinstance(value, Sequence | Iterator | KeysView | ValuesView):
        return value
    return list(value) if getattr(value, "ndim", None) == 1 else None


def explained(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: the TypeError for an unknown argument suggests the right one."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except TypeError:
            reason = _misfit(function.__qualname__, signature, args, kwargs)
            if reason is None:
                raise
        raise TypeError(reason)

    return called


def _misfit(
    qualname: str, signature: inspect.Signature, args: Sequence[Any], kwargs: dict[str, Any]
) -> str | None:
    """Reason why a call does not fit a signature, or None."""
    try:
        signature.bind(*args, **kwargs)
        return None
    except TypeError as error:
        reason = str(error)
    name = qualname.removesuffix(".__init__")
    parameters = [p for p in signature.parameters.values() if p.name != "self"]
    known = [p.name for p in parameters]
    for given in kwargs:
        if given not in known:
            return f"{name}() has no argument {given!r}: {_advice(given, known)}"
    placed = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(args) > len(placed) + ("self" in signature.parameters):
        others = ", ".join(f"{other}=" for other in known if other not in placed)
        return f"{name}() takes {', '.join(placed)} by position, all else by name: {others}"
    return f"{name}(): {reason}"


def _advice(given: str, known: Sequence[str]) -> str:
    name = _CALLED.get(given, given)
    if name in known:
        return f"it is called {name}="
    for place, names in _PLACES.items():
        if name in names:
            return f"{name}= belongs to {place}"
    fields = {
        field.name for kind in MethodConfig.__subclasses__() for field in dataclasses.fields(kind)
    }
    if name in fields:
        whose = "" if "config" in known else " of Defender()"
        return f'it is a field of the method\'s config{whose}: config={{"{name}": ...}}'
    return f"it has {', '.join(known)}{nearest(given, known)}"
