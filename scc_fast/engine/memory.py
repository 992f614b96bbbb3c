"""Memory: free bytes, and the error for a batch that does not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error is a failed allocation (on the CPU by its message)."""
    known = ("can't allocate memory", "not enough memory", "CUDA out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in known)


def free_memory(device: torch.device) -> int | None:
    """Free bytes of a device; None: unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[
            0
        ]  # without torch's cache, which may belong to a graph
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if "MemAvailable" in line).split()[1])
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def out_of_memory(
    device: torch.device,
    batch: int,
    size: tuple[int, int],
    width: int,
    estimate: Callable[[int, tuple[int, int]], int],
) -> RuntimeError:
    """Error for `batch` images (H, W) that did not fit; suggests a max_batch.

    Args:
        width: pictures per image in the encoder at once.
        estimate: (images, size) -> bytes; RuntimeError: unknown.
    """
    free, needs, fits = free_memory(device), "", batch // 2
    try:
        needs = f": they need about {estimate(batch, size) / 2**20:.0f} MiB"
        while free and fits > 1 and estimate(fits, size) > free // 2:
            fits //= 2
    except RuntimeError:  # unknown cost
        pass
    there = "" if free is None else f", {free / 2**20:.0f} MiB are free"
    advice = (
        f"max_batch={max(1, fits) * width} ({max(1, fits)} images at once) should fit"
        if batch > 1
        else "even one image does not fit: use smaller pictures, a smaller model, bf16 or "
        "fewer views"
    )
    return torch.OutOfMemoryError(
        f"out of memory with {batch} images of {size[0]}x{size[1]} at once in {width} views"
        f"{needs}{there}; {advice}"
    )
