"""What the caller's PyTorch is set to, kept out of what is computed here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def plain(device: torch.device) -> Iterator[None]:
    """Outside the caller's inference mode, gradients, autocast and default device.

    A default dtype belongs to the process, not to a thread: who makes a tensor says its dtype.
    """
    autocast = torch.autocast(device.type, enabled=False)
    with torch.inference_mode(False), torch.no_grad(), autocast, default_device():
        yield


def default_device() -> contextlib.AbstractContextManager[object]:
    """The CPU for tensors made without a device, as libraries expect it."""
    if torch.get_default_device().type == "cpu":
        return contextlib.nullcontext()
    return torch.device("cpu")


@contextlib.contextmanager
def default_dtype() -> Iterator[None]:
    """float32 for what a library makes without a dtype; for the whole process, so for loading."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
