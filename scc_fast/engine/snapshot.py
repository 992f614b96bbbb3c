"""A model's image tower as it is now: what is written to the model later does not reach it.

Snapshots are shared: a model whose structure and bytes are those of a snapshot that somebody still
uses gets that one. Neither where weights lie nor how often torch counted them as written says that
they are the same: fused optimisers, `.data` and an EMA's swap write uncounted. So all bytes are
read: 0.3 s for ViT-B/32 on one CPU core, more on a busy one (benchmarks/NOTES.md).
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

# What the image side of these classes does not use.
_OPEN_CLIP = "transformer token_embedding positional_embedding ln_final text_projection attn_mask"
_TEXT_SIDE = {
    "open_clip.model.CLIP": _OPEN_CLIP.split(),
    "open_clip.model.CustomTextCLIP": ["text"],
    "transformers.models.clip.modeling_clip.CLIPModel": ["text_model", "text_projection"],
    "transformers.models.siglip.modeling_siglip.SiglipModel": ["text_model"],
}


class _Known:
    """The snapshots of one model: the last, and those that somebody still uses."""

    def __init__(self) -> None:
        self.live: weakref.WeakValueDictionary[Any, FrozenModel] = weakref.WeakValueDictionary()
        self.last: FrozenModel | None = None


_KNOWN: weakref.WeakKeyDictionary[FrozenModel, _Known] = weakref.WeakKeyDictionary()
_LOCK = threading.RLock()


def snapshot_of(model: VisionLanguage) -> VisionLanguage:
    """What encodes the pictures of a Defender: the image side of `model` on memory of its own.

    The text side of a known class is not in it. A model that is no adapter of load_model's is
    itself: where its weights are nobody can say.

    Raises:
        ValueError: a parameter is not finite; says which.
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
    """The name of the first parameter that holds NaN or infinity, or of a buffer with NaN."""
    parameters = [(name, p, torch.isfinite) for name, p in module.named_parameters()]
    masks = [(name, b, _is_number) for name, b in module.named_buffers()]  # may hold infinity
    plain = [
        (name, t.detach(), holds)
        for name, t, holds in (*parameters, *masks)
        if t.is_floating_point() and type(t.data) is Tensor
    ]
    if not plain:
        return ""
    # A sum that is finite has no other terms.
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


# ---------------------------------------------------------------------------------- what is equal


def _key(adapter: FrozenModel) -> Any:
    """Equal for two snapshots that compute the same; None where that cannot be told."""
    found = structure(adapter.module)
    if found is None:
        return None
    skeleton, tensors = found
    try:
        kinds = tuple((t.dtype, t.device, t.shape) for t in tensors)
        # The snapshot holds the tokenizer, so that no other can have its id.
        rest = adapter.image_size, adapter.logit_scale, adapter.logit_bias, id(adapter.tokenizer)
        return skeleton, kinds, digest(tensors), rest
    except (RuntimeError, TypeError, NotImplementedError):  # tensors that have no plain bytes
        return None


def structure(module: nn.Module) -> tuple[bytes, list[Tensor]] | None:
    """A module but for its tensors, which are listed; None where it cannot be pickled.

    Hooks and replaced methods are in it by name, or cannot be pickled.
    """
    out = io.BytesIO()
    pickler = _Pickler(out, protocol=4)
    try:
        pickler.dump(module)
    except Exception:  # what pickle raises has no common class
        return None
    return out.getvalue(), pickler.tensors


class _Pickler(pickle.Pickler):
    """Pickles a tensor as its place in a list."""

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
    """Sums over the bytes of tensors, which differ if these do; reads the result once.

    Each 8 bytes are multiplied with a random number of their place, and mixed. This is to notice
    training, not an adversary.
    """
    sums = [part for tensor in tensors for part in _sums(tensor.detach())]
    return tuple(torch.cat(sums).tolist()) if sums else ()


def _sums(tensor: Tensor) -> list[Tensor]:
    raw = tensor.contiguous().view(-1).view(torch.uint8)
    whole = raw.numel() // 8 * 8
    if raw.storage_offset() % 8:
        raw = raw.clone()
    found = [raw[whole:].long()]  # the last bytes, as they are
    factors = _factors(tensor.device)
    for lanes in raw[:whole].view(torch.int64).split(len(factors)) if whole else ():
        mixed = lanes * factors[: len(lanes)]
        mixed ^= mixed >> 32  # else what changes in the highest bits could cancel out
        found.append(mixed.sum()[None])
    return found


@functools.cache
def _factors(device: torch.device) -> Tensor:
    """Random odd numbers, as many as a cache holds."""
    count = 1 << (20 if device.type == "cuda" else 16)
    source = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.device("cpu"):
        low, high = (torch.randint(1 << 32, (count,), generator=source) for _ in range(2))
        return ((high << 32) | low | 1).to(device)
