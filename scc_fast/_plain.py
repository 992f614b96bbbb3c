"""Context managers that shield computations from the caller's PyTorch settings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def plain(device: torch.device) -> Iterator[None]:
    """Disable inference mode, gradients, autocast and default device.

    The default dtype is per process, so tensors are created with an explicit dtype.
    """
    autocast = torch.autocast(device.type, enabled=False)
    with torch.inference_mode(False), torch.no_grad(), autocast, default_device():
        yield


def default_device() -> contextlib.AbstractContextManager[object]:
    """Make the CPU the default device, as libraries expect."""
    if torch.get_default_device().type == "cpu":
        return contextlib.nullcontext()
    return torch.device("cpu")


@contextlib.contextmanager
def default_dtype() -> Iterator[None]:
    """Make float32 the default dtype of the process, while loading."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
