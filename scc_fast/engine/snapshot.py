"""Snapshot: a frozen copy of a model's image tower.

Snapshots with equal structure and bytes are shared while in use. Addresses and version counters do
not prove equality, for fused optimisers, `.data` and an EMA's swap do not count writes; so all
bytes are read: 0.3 s for ViT-B/32 on one CPU core (benchmarks/NOTES.md).
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
import threading
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from scc_fast._plain import plain
from scc_fast.engine.vit_from import adapter_of
from scc_fast.engine.vit_from.parts import UnknownPartError, name_of
from scc_fast.models import FrozenModel, VisionLanguage
from scc_fast.models.checkpoints import frozen_twin

# Attributes that the image side does not use.
_OPEN_CLIP = "transformer token_embedding positional_embedding ln_final text_projection attn_mask"
_TEXT_SIDE = {
    "open_clip.model.CLIP": _OPEN_CLIP.split(),
    "open_clip.model.CustomTextCLIP": ["text"],
    "transformers.models.clip.modeling_clip.CLIPModel": ["text_model", "text_projection"],
    "transformers.models.siglip.modeling_siglip.SiglipModel": ["text_model"],
}


class _Known:
    """Snapshots of one model: the last, and those still in use."""

    def __init__(self) -> None:
        self.live: weakref.WeakValueDictionary[Any, FrozenModel] = weakref.WeakValueDictionary()
        self.last: FrozenModel | None = None


_KNOWN: weakref.WeakKeyDictionary[FrozenModel, _Known] = weakref.WeakKeyDictionary()
_LOCK = threading.RLock()


def snapshot_of(model: VisionLanguage) -> VisionLanguage:
    """Snapshot of a model: its image side in memory of its own, without a known text side.

    A model that is not an adapter of load_model() is its own snapshot.

    Raises:
        ValueError: a parameter is not finite.
    """
    try:
        adapter = adapter_of(model)
    except UnknownPartError:
        return model
    with _LOCK, plain(adapter.device):
        known = _KNOWN.setdefault(adapter, _Known())
        key = _key(adapter)
        found = None if key is None else known.live.get(key)
        if found is None:
            found = _taken(adapter)
            if key is not None:
                known.live[key] = found
        known.last = found
        return found


def _taken(adapter: FrozenModel) -> FrozenModel:
    shared = frozen_twin(adapter.module)
    for name in _TEXT_SIDE.get(name_of(shared), ()):
        setattr(shared, name, None)
    bad = not_finite(shared)
    if bad:
        raise ValueError(
            f"model: {bad} of {adapter.name} holds NaN or infinity: weights must be finite"
        )
    taken = copy.copy(adapter)
    taken.module = copy.deepcopy(shared)
    taken.read()
    if adapter.as_read != (adapter.logit_scale, adapter.logit_bias):
        taken.logit_scale, taken.logit_bias = adapter.logit_scale, adapter.logit_bias
    return taken


def not_finite(module: nn.Module) -> str:
    """Name of the first parameter with NaN or infinity, or buffer with NaN; else ""."""
    parameters = [(name, p, torch.isfinite) for name, p in module.named_parameters()]
    masks = [(name, b, _is_number) for name, b in module.named_buffers()]  # masks may hold infinity
    plain = [
        (name, t.detach(), holds)
        for name, t, holds in (*parameters, *masks)
        if t.is_floating_point() and type(t.data) is Tensor
    ]
    if not plain:
        return ""
    # A finite sum has finite terms.
    first = plain[0][1].device
    wide = torch.promote_types
    sums = torch.stack([t.sum(dtype=wide(t.dtype, torch.float32)).to(first) for _, t, _ in plain])
    for i in (~sums.isfinite()).nonzero().flatten().tolist():
        name, tensor, holds = plain[i]
        if not bool(holds(tensor).all()):
            return name
    return ""


def _is_number(tensor: Tensor) -> Tensor:
    return ~tensor.isnan()


# -------------------------------------------------------------------------------------- equality


def _key(adapter: FrozenModel) -> Any:
    """Key of a snapshot, equal for equal computations; None: unknown."""
    found = structure(adapter.module)
    if found is None:
        return None
    skeleton, tensors = found
    try:
        kinds = tuple((t.dtype, t.device, t.shape) for t in tensors)
        # The snapshot keeps the tokenizer alive, so its id is unique.
        rest = adapter.image_size, adapter.logit_scale, adapter.logit_bias, id(adapter.tokenizer)
        return skeleton, kinds, digest(tensors), rest
    except (RuntimeError, TypeError, NotImplementedError):  # tensors without plain bytes
        return None


def structure(module: nn.Module) -> tuple[bytes, list[Tensor]] | None:
    """Pickle of a module without its tensors, and the tensors; None if it cannot be pickled.

    Includes hooks and replaced methods by name.
    """
    out = io.BytesIO()
    pickler = _Pickler(out, protocol=4)
    try:
        pickler.dump(module)
    except Exception:  # pickle's errors have no common class
        return None
    return out.getvalue(), pickler.tensors


class _Pickler(pickle.Pickler):
    """Pickler that replaces tensors by indices."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.tensors: list[Tensor] = []
        self._places: dict[int, int] = {}

    def persistent_id(self, thing: Any) -> int | None:
        if not isinstance(thing, Tensor):
            return None
        place = self._places.setdefault(id(thing), len(self.tensors))
        if place == len(self.tensors):
            self.tensors.append(thing)
        return place


def digest(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Checksums of tensors, with one device synchronisation.

    Each 8 bytes are multiplied by a random number of their position, and mixed. Detects training,
    not an adversary.
    """
    sums = [part for tensor in tensors for part in _sums(tensor.detach())]
    return tuple(torch.cat(sums).tolist()) if sums else ()


def _sums(tensor: Tensor) -> list[Tensor]:
    raw = tensor.contiguous().view(-1).view(torch.uint8)
    whole = raw.numel() // 8 * 8
    if raw.storage_offset() % 8:
        raw = raw.clone()
    found = [raw[whole:].long()]  # the remaining bytes
    factors = _factors(tensor.device)
    for lanes in raw[:whole].view(torch.int64).split(len(factors)) if whole else ():
        mixed = lanes * factors[: len(lanes)]
        mixed ^= mixed >> 32  # otherwise changes in the highest bits could cancel
        found.append(mixed.sum()[None])
    return found


@functools.cache
def _factors(device: torch.device) -> Tensor:
    """Random odd factors, as many as fit into a cache."""
    count = 1 << (20 if device.type == "cuda" else 16)
    source = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.device("cpu"):
        low, high = (torch.randint(1 << 32, (count,), generator=source) for _ in range(2))
        return ((high << 32) | low | 1).to(device)
