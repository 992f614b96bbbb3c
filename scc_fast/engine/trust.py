"""Trust: proof that the runner computes what a model's modules do, checked at every call.

vit_from checks the classes of a tower's parts; other changes, such as a method replaced on a class,
show on a random picture.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scc_fast._plain import plain
from scc_fast.config import shown
from scc_fast.engine.vit import Tower
from scc_fast.engine.vit_from import tower_of
from scc_fast.engine.vit_from.parts import GLOBAL_HOOKS, HOOKS
from scc_fast.reference.views import from_patches, to_patches


class Surroundings:
    """State outside of modules: their classes, torch's functions and global hooks."""

    def __init__(self, *modules: nn.Module) -> None:
        parts = chain.from_iterable(module.modules() for module in modules)
        kinds = {kind for part in parts for kind in type(part).__mro__} - {object}
        places: list[Mapping[Any, Any]] = [*map(vars, kinds), vars(F), *GLOBAL_HOOKS]
        self._seen = [(place, dict(place)) for place in places]

    def hold(self) -> bool:
        """Whether nothing has changed."""
        return all(now == then for now, then in self._seen)


class Trust:
    """Proof that the runner computes what a snapshot's modules do.

    Args:
        model: the snapshot; only its modules are kept.
    """

    def __init__(self, model: Any) -> None:
        self._lock = threading.Lock()
        parts = list(model.module.modules())
        self._hooks = [getattr(part, name) for part in parts for name in HOOKS]
        self._own = [vars(part) for part in parts]
        kinds = ("_parameters", "_buffers", "_modules")
        self._content = [getattr(part, kind) for part in parts for kind in kinds]
        self._parameters = list(model.module.parameters())  # held, so ids stay unique
        self._storages = [p.detach() for p in self._parameters]
        self._taken = self._weights()
        self._prove(model)

    def reason(self, model: Any) -> str:
        """Reason why the runner does not match the modules of snapshot `model`; "" if it does."""
        if not self._holds():
            with self._lock:
                if not self._holds():
                    self._prove(model)
        return self._reason

    def _holds(self) -> bool:
        return self._seen == (self._weights(), self._state()) and self._surroundings.hold()

    def _weights(self) -> tuple[list[int], list[tuple[int, int]]]:
        found = chain.from_iterable(map(dict.values, self._content))
        return list(map(id, found)), [(p._version, p.data_ptr()) for p in self._parameters]

    def _only_moved(self, weights: tuple[list[int], list[tuple[int, int]]]) -> bool:
        """Whether only addresses changed, as when storages move to shared memory."""
        (ids, now), (taken, then) = weights, self._taken
        written = [version for version, _ in now] != [version for version, _ in then]
        pairs = zip(self._parameters, self._storages, strict=True)
        return ids == taken and not written and all(p.is_set_to(held) for p, held in pairs)

    def _state(self) -> tuple[bool, list[int], bool]:
        return any(self._hooks), list(map(len, self._own)), self._own[0]["training"]

    def _prove(self, model: Any) -> None:
        weights = self._weights()
        self._seen = weights, self._state()
        self._surroundings = Surroundings(model.module)
        if weights != self._taken and self._only_moved(weights):
            self._taken = weights
        if weights != self._taken:
            self._reason = "its modules or weights were changed in the snapshot"
            return
        found = tower_of(model, model.dtype)
        self._reason = found if isinstance(found, str) else difference(model, found)


def difference(model: Any, tower: Tower) -> str:
    """Difference of runner and modules on a random picture, forward and backward; "" if small."""
    source = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        numbers = torch.randn(shape, generator=source, dtype=torch.float32, device="cpu")
        return numbers.to(model.device)

    picture, slope = drawn(1, 3, *model.image_size), drawn(1, model.embed_dim)
    with plain(model.device):
        features, kept = tower(to_patches(picture, tower.size).to(tower.dtype))
        back = from_patches(tower.back(slope, kept).float(), tower.size, model.image_size)
        try:
            with torch.enable_grad():
                leaf = picture.requires_grad_()
                own = model.encode_image(leaf)
                (own_back,) = torch.autograd.grad(own, leaf, slope)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return f"its modules fail on a random picture: {shown(error)}"
    exact = tower.dtype == torch.float32
    bound = (1e-3 if model.device.type == "cpu" else 1e-2) if exact else 0.1  # TF32 on a GPU
    for what, ours, theirs in (("features", features, own.detach()), ("gradient", back, own_back)):
        off = float((ours - theirs).norm() / theirs.norm().clamp_min(1e-12))
        if off > bound:  # not for NaN: a call reports it
            return (
                f"the {what} of a random picture differ by {off:.2g} of their size from those of "
                "its modules, whose code was changed"
            )
    return ""
