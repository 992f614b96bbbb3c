"""A whole defense as CUDA graphs: captured once per bucket of the batch, replayed by any thread.

A graph reads and writes fixed memory. Pictures and classes are copied into it, in buckets of powers
of two; what fills a bucket up is thrown away. Another set of classes of the same bucket is copied
in, not captured. All graphs of an encoder share one pool of memory, and so one lock: nothing
outlives a call in it but what the call returns, as copies.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from scc_fast import ops
from scc_fast.config import RNConfig, SCCConfig, TTCConfig, View
from scc_fast.engine import methods
from scc_fast.engine.methods import Begun, Setting, Sight
from scc_fast.reference.ttc import Outcome

Config = SCCConfig | TTCConfig | RNConfig | None

_KEPT = 8  # settings whose graphs are kept per encoder; the one used longest ago goes first


def bucket(count: int, least: int = 1) -> int:
    """The smallest power of two that holds `count`, at least `least`."""
    return max(least, 1 << max(0, count - 1).bit_length())


class Pool:
    """Memory that the graphs of one encoder share, and the stream they are captured on.

    One stream, or the allocator would not give one graph what another has freed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.handle = device, torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)


_CAPTURING = threading.Lock()  # torch allows one capture in a process


class Captured:
    """A CUDA graph of `call`, after the calls that compile and choose its kernels.

    `result` lies in the graph's own memory, and is rewritten by every replay. `final`, where it is
    given, is captured instead: it may use up what `call` must leave for the next call.
    """

    def __init__(
        self, call: Callable[[], Any], pool: Pool, final: Callable[[], Any] | None = None
    ) -> None:
        before = torch.cuda.current_stream(pool.device)
        self._graph = torch.cuda.CUDAGraph()
        with _CAPTURING, torch.cuda.stream(pool.stream):
            pool.stream.wait_stream(before)
            for _ in range(3):
                call()
            # Another thread may go on with its own work meanwhile.
            options: Any = {"stream": pool.stream, "capture_error_mode": "thread_local"}
            try:
                with torch.cuda.graph(self._graph, pool=pool.handle, **options):
                    self.result = (final or call)()
            except BaseException:
                # Else the allocator goes on as if it were captured.
                with contextlib.suppress(RuntimeError):
                    torch._C._cuda_endAllocateToPool(pool.device.index or 0, pool.handle)
                raise
        before.wait_stream(pool.stream)

    def __call__(self) -> Any:
        self._graph.replay()
        return self.result


class Classes:
    """A table of classes in fixed memory, of as many rows and classes as its bucket."""

    def __init__(self, table: ops.ClassTable) -> None:
        padded = self._padded(table)
        fixed = {name: getattr(padded, name).clone() for name in ("text", "count", "group")}
        self.table = replace(padded, **fixed)
        self._held = table

    @staticmethod
    def size(table: ops.ClassTable) -> tuple[int, int]:
        """The bucket: rows and classes."""
        classes = len(table.text) if table.group is None else len(table.group)
        return bucket(len(table.text), 32), bucket(classes, 32)

    def _padded(self, table: ops.ClassTable) -> ops.ClassTable:
        return table.padded(*self.size(table))

    def hold(self, table: ops.ClassTable) -> None:
        """Copy another table of the same bucket in."""
        if table is self._held:
            return
        new = self._padded(table)
        for name in ("text", "count", "group"):
            getattr(self.table, name).copy_(getattr(new, name))
        self._held = table


@dataclass(frozen=True)
class Key:
    """What a set of graphs was captured for, but for the batch and the classes themselves."""

    config: Config
    views: tuple[View, ...]
    backend: str | None
    size: tuple[int, int]  # rows and classes
    numbers: tuple[float, ...]  # logit scale and bias: captured by value


@dataclass(frozen=True, eq=False)
class First:
    """What the first pass leaves in fixed memory; `begun` until the repair is captured."""

    delta: Tensor
    drift: Tensor
    logits: Tensor | None  # those at δ⁰, where a gate may leave an image there
    begun: Begun | None


class Slot:
    """The graphs of one bucket: the first pass with its prediction, and the repair."""

    def __init__(self, setting: Setting, key: Key, batch: int, x: Tensor, pool: Pool) -> None:
        self.batch = batch
        # Real pictures: the calls before the capture compute with them.
        place = torch.arange(batch, device=x.device) % len(x)
        seeds = torch.arange(batch, device=x.device)
        self.sight = Sight(setting, x[place].contiguous(), seeds, key.views)
        config = key.config
        if not isinstance(config, SCCConfig | TTCConfig):
            self.first = Captured(lambda: methods.control(self.sight, config), pool)
            return
        ascent = config

        def first() -> First:
            begun = methods.begin(self.sight, ascent.epsilon)
            gated = methods.has_gate(ascent)
            logits = methods.predict(self.sight, begun.features) if gated else None
            return First(begun.delta, begun.drift, logits, begun)

        def repair() -> tuple[Tensor, Tensor]:
            begun = self.first.result.begun
            # A way can be gone once, but this is called several times before it is captured.
            return methods.repair(self.sight, ascent, replace(begun, way=copy.copy(begun.way)))

        def final() -> tuple[Tensor, Tensor]:
            begun = self.first.result.begun
            # From here on nothing holds it, so that what the first pass kept is free as soon as its
            # way back is gone: for the rest of the repair, and for graphs captured later. Nothing
            # reads it but the repair, which always comes right after the first pass.
            self.first.result = replace(self.first.result, begun=None)
            return methods.repair(self.sight, ascent, begun)

        self.first = Captured(first, pool)
        self.first()  # the repair's first calls read what this has written
        self.repair = Captured(repair, pool, final)

    def load(self, x: Tensor, seeds: Tensor) -> None:
        """Copy pictures in; the rest of the bucket repeats the first."""
        count = len(x)
        self.sight.x[:count].copy_(x)
        self.sight.seeds[:count].copy_(seeds)
        if count < self.batch:
            self.sight.x[count:].copy_(x[:1].expand(self.batch - count, -1, -1, -1))
            self.sight.seeds[count:].copy_(seeds[:1].expand(self.batch - count))


class Graphs:
    """The graphs of one encoder."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pool: Pool | None = None
        self._last: Any = None  # an event: the end of the last call, on whatever stream it was
        self._sets: OrderedDict[Key, tuple[Classes, dict[int, Slot]]] = OrderedDict()

    def run(
        self, setting: Setting, x: Tensor, seeds: Tensor, views: Sequence[View], config: Config
    ) -> Outcome:
        """A whole defense of x (B, 3, H, W), of the encoder's size, with seeds (B,)."""
        table = setting.table
        numbers = (table.scale, table.bias)
        key = Key(config, tuple(views), setting.backend, Classes.size(table), numbers)
        # Fixed memory serves callers in every autograd mode.
        with self._lock, on(x.device), torch.inference_mode(False), torch.no_grad():
            if self._last is not None:
                torch.cuda.current_stream().wait_event(self._last)
            try:
                slots = self._slots(setting, key)
                outcome = self._run(setting, key, slots, x, seeds)
            finally:
                self._last = record()
        count = len(table.text) if table.group is None else len(table.group)
        return replace(outcome, logits=outcome.logits[:, :count])

    def _slots(self, setting: Setting, key: Key) -> dict[int, Slot]:
        if key not in self._sets:
            self._sets[key] = Classes(setting.table), {}
            if len(self._sets) > _KEPT:
                if self._last is not None:
                    self._last.synchronize()  # a replay on another stream may still read it
                self._sets.popitem(last=False)
        self._sets.move_to_end(key)
        classes, slots = self._sets[key]
        classes.hold(setting.table)
        return slots

    def _slot(
        self, setting: Setting, key: Key, slots: dict[int, Slot], x: Tensor, seeds: Tensor
    ) -> Slot:
        size = bucket(len(x))
        if size not in slots:
            if self._pool is None:
                self._pool = Pool(x.device)
            fixed = replace(setting, table=self._sets[key][0].table, modules=None)
            try:
                slots[size] = Slot(fixed, key, size, x, self._pool)
            except RuntimeError as error:
                # What is left of the pool after a capture that failed is nobody's.
                self._sets.clear()
                self._pool = None
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                raise RuntimeError(
                    f"engine='graph': a pass through the {setting.encoder.name} encoder could not "
                    f'be captured: {error}; use engine="runner" or "eager"'
                ) from error
        slots[size].load(x, seeds)
        return slots[size]

    def _run(
        self, setting: Setting, key: Key, slots: dict[int, Slot], x: Tensor, seeds: Tensor
    ) -> Outcome:
        config, count = key.config, len(x)
        slot = self._slot(setting, key, slots, x, seeds)
        first = slot.first()
        if not isinstance(config, SCCConfig | TTCConfig):
            parts = (first.logits, first.delta, first.drift, first.flagged)
            return Outcome(*(part[:count].clone() for part in parts))
        drift = first.drift[:count].clone()
        if first.logits is None:
            delta, logits = slot.repair()
            flagged = torch.ones_like(drift, dtype=torch.bool)
            return Outcome(logits[:count].clone(), delta[:count].clone(), drift, flagged)
        flagged = drift < config.tau
        repaired = int(flagged.sum())
        if repaired == count:
            delta, logits = slot.repair()
            return Outcome(logits[:count].clone(), delta[:count].clone(), drift, flagged)
        logits, delta = first.logits[:count].clone(), first.delta[:count].clone()
        if repaired and bucket(repaired) == slot.batch:
            mended, answer = slot.repair()
            delta = torch.where(flagged.view(-1, 1, 1, 1), mended[:count], delta)
            logits = torch.where(flagged.view(-1, 1), answer[:count], logits)
        elif repaired:
            # The next smaller bucket makes the first pass of the flagged ones once more.
            index = flagged.nonzero().squeeze(1)
            slot = self._slot(setting, key, slots, x[index], seeds[index])
            slot.first()
            mended, answer = slot.repair()
            delta.index_copy_(0, index, mended[:repaired])
            logits.index_copy_(0, index, answer[:repaired])
        return Outcome(logits, delta, drift, flagged)


def on(device: torch.device) -> Any:
    """The device as the current one."""
    return torch.cuda.device(device)


def record() -> Any:
    """An event on the current stream."""
    event = torch.cuda.Event()
    event.record()
    return event
