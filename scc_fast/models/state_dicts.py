"""Weights files as plain state dicts; other formats are named in the error."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scc_fast.config import shown
from scc_fast.models.hub import short

# Keys of the model's state dict in a training checkpoint, likeliest first
_NESTS = ("state_dict", "model_state_dict", "model", "module", "net", "weights")
_NO_MODEL = re.compile(r"optim|.*sched|.*scaler")
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Not weights: counts of AveragedModel and batch norm, positions of old transformers, metadata of
# OpenAI's archives
_COUNTS = {"n_averaged", "num_batches_tracked", "position_ids"}
_COUNTS |= {"input_resolution", "context_length", "vocab_size"}
_SIGNS = (
    (b"version https://git-lfs", "a git-LFS pointer that stands for weights; run git lfs pull"),
    (b"\x1f\x8b", "a gzip archive; unpack it"),
    (b"\x89HDF", "an HDF5 file, as Keras writes it, not weights of PyTorch"),
    (b"GGUF", "a GGUF file, not weights of PyTorch"),
    (b"\x93NUMPY", "a NumPy array, not a state dict"),
)


def located(path: str | Path) -> str:
    """Quoted path for a message, cut to its end if long."""
    text = str(path)
    return repr(text if len(text) <= 120 else f"...{text[-117:]}")


def as_path(path: str | Path, argument: str) -> Path:
    """Path with "~" expanded; TypeError or ValueError if invalid."""
    if not isinstance(path, str | Path) or not str(path):
        kind = ValueError if isinstance(path, str) else TypeError
        raise kind(f"{argument}: a path is needed, got {shown(path)}")
    try:
        found = Path(path).expanduser()
        found.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{argument}: {located(path)} is not a valid path: {short(error)[:100]}"
        ) from None
    return found


def kind_of(path: Path, what: str) -> str:
    """Format of a file by its first bytes: "safetensors", "torch" or "npz".

    Raises:
        ValueError: any other format; begins with ``what`` and names it.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(512)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    length = int.from_bytes(head[:8], "little")
    if not head:
        raise ValueError(f"{what} is empty (0 bytes)")
    for sign, name in _SIGNS:
        if head.startswith(sign):
            raise ValueError(f"{what} is {name}")
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<svg")):
        raise ValueError(f"{what} is a web page (HTML), not weights; download the file itself")
    if head[257:262] == b"ustar":
        raise ValueError(f"{what} is a tar archive; unpack it")
    if head[8:9] == b"{" and length < 100_000_000:
        return "safetensors"
    if text.startswith((b"{", b"[")):
        raise ValueError(f"{what} is JSON text, such as a config or an index of weights files")
    if head.startswith(b"PK"):
        return _kind_of_zip(path, what)
    if head.startswith(b"\x80"):
        return "torch"
    if path.suffix == ".safetensors":
        raise ValueError(f"{what} cannot be read: {size} bytes without safetensors' header")
    raise ValueError(f"{what} is not a checkpoint that torch can read")


def _kind_of_zip(path: Path, what: str) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.rpartition("/")[2] for name in archive.namelist()]
    except zipfile.BadZipFile:
        raise ValueError(f"{what} is truncated or damaged; get it again") from None
    if "constants.pkl" in names:
        raise ValueError(
            f"{what} is a TorchScript archive, which holds code; save its weights alone: "
            "torch.save(torch.jit.load(FILE).state_dict(), NEW_FILE)"
        )
    if names and all(name.endswith(".npy") for name in names):
        return "npz"
    if "data.pkl" not in names:
        raise ValueError(f"{what} is a zip archive that torch.save did not write")
    return "torch"


def content(path: Path, what: str) -> Any:
    """Load a safetensors or torch.save file, whatever its suffix.

    No code is run: only tensors, numbers, strings and containers of these are read.

    Raises:
        ValueError: another format, a damaged file, or other objects.
    """
    kind = kind_of(path, what)
    if kind == "npz":
        raise ValueError(f"{what} is a NumPy archive (.npz), not a state dict of PyTorch")
    if kind == "safetensors":
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except Exception as error:
            raise ValueError(
                f"{what} cannot be read: safetensors that are truncated or damaged ({short(error)})"
            ) from error
    # best_acc1 is a NumPy number in files of the training scripts. Old NumPy called its module
    # numpy.core, new NumPy calls it numpy._core; a file may come from either
    number = np.float64(0).__reduce__()[0]
    names = [f"numpy.{module}.multiarray.scalar" for module in ("core", "_core")]
    types = [type(np.dtype(code)) for code in ("f8", "f4")]
    wanted: list[Any] = [*((number, name) for name in names), np.dtype, *types]
    # Without the caller's own: the context removes what it adds
    safe = [entry for entry in wanted if entry not in torch.serialization.get_safe_globals()]
    try:
        # A handle: torch.load() would judge a path by its suffix
        with torch.serialization.safe_globals(safe), path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        refused = re.search(r"(?:GLOBAL|[Uu]nsupported class) (\S+)", str(error))
        if refused and isinstance(error, pickle.UnpicklingError):
            raise ValueError(
                f"{what} holds a {refused[1]}, and only tensors, numbers, strings and containers "
                "of these are read: other objects can run code; save the state dict alone"
            ) from error
        raise ValueError(
            f"{what} is not a checkpoint that torch can read: truncated, damaged or a plain pickle"
        ) from error


def state_dict(
    found: Any, what: str, nests: tuple[str, ...] = (), hint: str = ""
) -> dict[str, Tensor]:
    """The state dict in a checkpoint, at the top or under a key such as "model".

    Args:
        nests: keys tried before the usual ones.
        hint: end of the message if there are no tensors.

    Raises:
        ValueError: no tensors, several state dicts, other values, or non-finite weights.
    """
    while isinstance(found, Mapping):
        inner = [key for key, value in found.items() if _has_tensors(value)]
        inner = [key for key in inner if not _NO_MODEL.match(str(key))]
        if not inner:
            break
        known = [key for key in (*nests, *_NESTS) if key in inner]
        if not known and len(inner) > 1:
            raise ValueError(f"{what} holds several state dicts, {some(inner)}; save one alone")
        found = found[known[0] if known else inner[0]]
    if not isinstance(found, Mapping) or not found:
        raise ValueError(f"{what} holds {type(found).__name__} without tensors{hint}")
    state = {str(key): value for key, value in found.items()}
    odd = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise ValueError(f"{what} holds {some(sorted(odd))}, not only tensors{hint}")
    check_finite(state, what)
    return state


def _has_tensors(value: Any) -> bool:
    """Whether a mapping holds tensors under string keys, at any depth."""
    return isinstance(value, Mapping) and any(
        isinstance(key, str) and (isinstance(entry, Tensor) or _has_tensors(entry))
        for key, entry in value.items()
    )


def check_finite(state: Mapping[str, Tensor], what: str) -> None:
    """Raise ValueError for weights with NaN or infinity."""
    for key, value in state.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(f"{what}: {key} has values that are not finite")


def plain(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under the model's names, without wrapper prefixes and counters.

    Dropped are "module.", "_orig_mod." and similar parts anywhere; a prefix of all names, such as
    "model." or "visual.", while no name is the model's; and counters. Other names are kept.
    """
    found = {
        key if key in own else ".".join(p for p in key.split(".") if p not in _WRAPPERS): key
        for key in state
    }
    if len(found) < len(state):  # names would collide
        found = {key: key for key in state}
    found = {k: v for k, v in found.items() if k in own or k.rpartition(".")[2] not in _COUNTS}
    while own.keys().isdisjoint(found):
        heads = {key.partition(".")[0] for key in found}
        if len(heads) != 1 or any("." not in key for key in found):
            return dict(state)
        found = {key.partition(".")[2]: value for key, value in found.items()}
    counts = {k: v for k, v in own.items() if k.rpartition(".")[2] in _COUNTS}
    return {**counts, **{key: state[name] for key, name in found.items()}}


def misfit(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """Differences between a state dict and the model's, as text; "" if it fits."""
    lacking = [key for key in own if key not in state]
    others = [key for key in state if key not in own]
    wrong = [f"lacks {some(lacking)}"] if lacking else []
    wrong += [f"has {some(others)} besides"] if others else []
    wrong += [
        f"has {key} of shape {tuple(state[key].shape)}, not {tuple(value.shape)}"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    ]
    hint = ""
    if any("vision_model." in key or "text_model." in key for key in others):
        hint = "; these are transformers' names: pass the folder with its config.json as model"
    elif others and all(f"visual.{key}" in own for key in others):
        hint = "; an image tower alone is passed as image_encoder="
    return "; it ".join(wrong[:3]) + hint


def some(keys: Iterable[Any]) -> str:
    """Up to five names, and the count of the others."""
    names = [str(key) for key in keys]
    first = names[:5]
    while len(first) > 1 and len(", ".join(first)) > 170:
        first.pop()
    more = f" and {len(names) - len(first)} more" if len(names) > len(first) else ""
    return ", ".join(first) + more
