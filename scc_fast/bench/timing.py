"""Clocks, ceilings and peak memory on CPU and CUDA."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]

REPLAYS = 200
_CYCLES_PER_S = 2e9  # clock of a GPU, at least
_UNKNOWN_CACHE = 64 * 2**20  # bytes
_LONGEST_HOLD_S = 0.02  # bounds the hold after a slow first call


def keep_memory() -> bool:
    """Make the C library keep freed memory, as an engine with static buffers would.

    Otherwise every call maps a large result (154 MB) again, and page faults on a small virtual
    machine take 20 times as long as the work. False if the C library has no such switch.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    no_mapping, never_trim = (-4, 0), (-1, 2**31 - 1)  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
    return bool(mallopt(*no_mapping) and mallopt(*never_trim))


class Clock:
    """Clock of calls on a device.

    Wall time on the CPU. On CUDA events, with the stream held until the call is enqueued: device
    time without launch overhead, which is in `wall`.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._enqueue: dict[str, float] = {}  # s, longest so far per label

    def wall(self, call: Call) -> float:
        """Wall time in ms, until the device is idle."""
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return (time.perf_counter() - start) * 1e3

    def __call__(self, call: Call, label: str) -> float:
        """Time in ms; `label` names the call, to look up its enqueue time."""
        if self.kind == "cpu":
            return self.wall(call)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.wait()
        hold = min(2 * self._enqueue.get(label, 1e-3) + 50e-6, _LONGEST_HOLD_S)
        torch.cuda._sleep(int(hold * _CYCLES_PER_S))
        began = time.perf_counter()
        start.record()
        call()
        end.record()
        self._enqueue[label] = max(self._enqueue.get(label, 0.0), time.perf_counter() - began)
        end.synchronize()
        return start.elapsed_time(end)

    def wait(self) -> None:
        """Wait until the device is idle."""
        if self.kind == "cuda":
            torch.cuda.synchronize()


class Others:
    """Number of cores kept busy by other processes since the object was made.

    Beside one busy neighbour, two threads that wait for each other take a scheduler quantum (8 ms)
    for anything, evenly: the spread does not show it.
    """

    def __init__(self) -> None:
        self.start = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            return None
        user, nice, system, _, _, irq, soft, steal = map(int, fields)
        busy = (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")
        children = os.times()
        own = time.process_time() + children.children_user + children.children_system
        return busy, own, time.perf_counter()

    def cores(self) -> float | None:
        """Busy cores; None if unknown."""
        end = self._read()
        if self.start is None or end is None:
            return None
        busy, own, wall = (b - a for a, b in zip(self.start, end, strict=True))
        return max(0.0, (busy - own) / max(wall, 1e-9))


class Copy:
    """`out.copy_(x)` with `bytes_moved` of traffic: the measured ceiling."""

    def __init__(self, bytes_moved: int, device: str) -> None:
        size = max(1, bytes_moved // 8)
        self.x = torch.rand(size, device=device)
        self.out = torch.zeros(size, device=device)
        self.bytes = 2 * self.x.nbytes

    def __call__(self) -> None:
        self.out.copy_(self.x)


def matmul_rate(kind: str, quick: bool, dtype: torch.dtype = torch.float32) -> float:
    """Best FLOP/s of a square product; float32 without TF32.

    On a CPU the faster of MKL and oneDNN, which is twice as fast on AMD.
    """
    size = 512 if quick else 2048 if kind == "cpu" else 8192
    a, b = (torch.randn(size, size, device=kind).to(dtype) for _ in range(2))
    products: list[Call] = [lambda: a @ b]
    if kind == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    clock = Clock(kind)
    times = [clock(product, "matmul") for _ in range(5 if quick else 8) for product in products]
    return 2 * size**3 / min(times) * 1e3


def copy_rate(kind: str, quick: bool) -> float:
    """Best bytes/s of a copy (reads and writes) beyond the last cache."""
    size = 2**25 if quick else 2**28 if kind == "cpu" else 2**31
    copy, clock = Copy(size, kind), Clock(kind)
    return copy.bytes / min(clock(copy, "copy") for _ in range(6)) * 1e3


def last_cache(kind: str) -> int:
    """Bytes of the last cache; smaller data may stay there between calls."""
    if kind == "cuda":
        return int(torch.cuda.get_device_properties().L2_cache_size)
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(text[:-1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[text[-1]]
    except (OSError, ValueError, IndexError, KeyError):
        return _UNKNOWN_CACHE


def peak_mib(call: Call, kind: str) -> float:
    """Peak of torch's allocator during a call beyond its result, in MiB."""
    if kind == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        return max(0, peak - _bytes(result)) / 2**20
    from torch.profiler import ProfilerActivity, profile

    with (
        _no_stderr(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        result = call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return max(0, peak - _bytes(result)) / 2**20


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Mute native writes to stderr: the profiler announces its start."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _bytes(result: Any) -> int:
    if isinstance(result, Tensor):
        return result.untyped_storage().nbytes()
    return sum(map(_bytes, result)) if isinstance(result, tuple | list) else 0


class Graph:
    """A CUDA graph of CALLS calls; calling it replays REPLAYS calls.

    Several calls per graph, so that gaps between graphs do not count.
    """

    CALLS = 20

    def __init__(self, call: Call) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for _ in range(self.CALLS):
                self.result = call()  # kept: its memory belongs to the graph

    def __call__(self, _: int = 0) -> None:
        for _ in range(REPLAYS // self.CALLS):
            self.graph.replay()
