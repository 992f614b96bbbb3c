"""CUDA graphs of a defense's two functions, captured once per bucket of the batch size.

A graph reads and writes static memory. Pictures and classes are copied in and padded to buckets,
powers of two. Other classes of the same bucket are copied, not captured. All graphs of an encoder
share one memory pool and one lock; results leave the pool as copies.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from scc_fast import ops
from scc_fast.config import MethodConfig
from scc_fast.engine.batch import Batch
from scc_fast.engine.defense import Defense, Repaired, State
from scc_fast.engine.encoder import Encoder
from scc_fast.engine.session import Session

_KEPT = 8  # LRU: sets of graphs per encoder


def bucket(count: int, least: int = 1) -> int:
    """Smallest power of two >= `count` and `least`."""
    return max(least, 1 << max(0, count - 1).bit_length())


class Pool:
    """Memory pool and capture stream of an encoder's graphs.

    One stream, so that graphs reuse each other's memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.handle = device, torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)


_CAPTURING = threading.Lock()  # one capture per process


class Graph:
    """CUDA graph of `call`, captured after warm-up calls.

    `result` is static memory, rewritten by every replay. `final`, if given, is captured instead of
    `call`; it may free the state that `call` preserves.
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
            # Other threads may continue.
            options: Any = {"stream": pool.stream, "capture_error_mode": "thread_local"}
            try:
                with torch.cuda.graph(self._graph, pool=pool.handle, **options):
                    self.result = (final or call)()
            except BaseException:
                # Otherwise the allocator stays in capture mode.
                with contextlib.suppress(RuntimeError):
                    torch._C._cuda_endAllocateToPool(pool.device.index or 0, pool.handle)
                raise
        before.wait_stream(pool.stream)

    def __call__(self) -> Any:
        self._graph.replay()
        return self.result


class Classes:
    """Class table in static memory, padded to its bucket."""

    def __init__(self, table: ops.ClassTable) -> None:
        padded = self._padded(table)
        fixed = {name: getattr(padded, name).clone() for name in ("text", "count", "group")}
        self.table = replace(padded, **fixed)
        self._held = table

    @staticmethod
    def size(table: ops.ClassTable) -> tuple[int, int]:
        """Bucket of a table: (rows, classes)."""
        classes = len(table.text) if table.group is None else len(table.group)
        return bucket(len(table.text), 32), bucket(classes, 32)

    def _padded(self, table: ops.ClassTable) -> ops.ClassTable:
        return table.padded(*self.size(table))

    def hold(self, table: ops.ClassTable) -> None:
        """Copy in another table of the same bucket."""
        if table is self._held:
            return
        new = self._padded(table)
        for name in ("text", "count", "group"):
            getattr(self.table, name).copy_(getattr(new, name))
        self._held = table


@dataclass(frozen=True)
class Key:
    """Key of a set of graphs; batch and classes are copied in."""

    method: str
    config: MethodConfig
    flip: bool
    judge: Encoder | None  # one object per snapshot
    backend: str | None
    size: tuple[int, int]  # rows and classes
    numbers: tuple[float, ...]  # logit scale and bias, captured by value


def key_of(session: Session, defense: Defense) -> Key:
    """Key of the set of graphs for a session and a defense."""
    table = session.table
    return Key(
        defense.name,
        defense.config,
        session.flip,
        None if session.judge is None else session.judge.encoder,
        session.backend,
        Classes.size(table),
        (table.scale, table.bias),
    )


class BucketGraphs:
    """Graphs of one bucket: first pass and repair."""

    def __init__(
        self, session: Session, defense: Defense, batch: int, x: Tensor, pool: Pool
    ) -> None:
        self.count = batch
        # Real pictures, for the warm-up calls.
        place = torch.arange(batch, device=x.device) % len(x)
        seeds = torch.arange(batch, device=x.device)
        self.batch = Batch(x[place].contiguous(), seeds)
        self.first = Graph(lambda: defense.first_pass(session, self.batch), pool)
        if defense.repairs == "none":
            return
        self.first()  # input of the repair's warm-up

        def repair() -> Repaired:
            state = self.first.result
            return defense.after_gate(
                session, self.batch, replace(state, backward=state.backward.again())
            )

        def final() -> Repaired:
            # Drop the first pass's backward state: only the repair reads it, and its memory is
            # free for the rest of the repair and for later graphs.
            state = self.first.result
            self.first.result = replace(state, backward=None)
            return defense.after_gate(session, self.batch, state)

        self.repair = Graph(repair, pool, final)

    def load(self, batch: Batch) -> None:
        """Copy in a batch, padded with its first image."""
        count, rest = len(batch), self.count - len(batch)
        self.batch.x[:count].copy_(batch.x)
        self.batch.seeds[:count].copy_(batch.seeds)
        if rest:
            self.batch.x[count:].copy_(batch.x[:1].expand(rest, -1, -1, -1))
            self.batch.seeds[count:].copy_(batch.seeds[:1].expand(rest))


class Graphs:
    """Graphs of one encoder."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pool: Pool | None = None
        self._last: Any = None  # event at the end of the last call
        self._sets: OrderedDict[Key, tuple[Classes, dict[int, BucketGraphs]]] = OrderedDict()

    @contextlib.contextmanager
    def passes(
        self, session: Session, defense: Defense, device: torch.device
    ) -> Iterator[GraphPasses]:
        """A defense's two functions as graphs, for one call."""
        key = key_of(session, defense)
        # Static memory must not depend on the caller's autograd mode.
        with self._lock, on(device), torch.inference_mode(False), torch.no_grad():
            if self._last is not None:
                torch.cuda.current_stream().wait_event(self._last)
            try:
                yield GraphPasses(self, session, defense, key, self._buckets(session, key))
            finally:
                self._last = record()

    def _buckets(self, session: Session, key: Key) -> dict[int, BucketGraphs]:
        if key not in self._sets:
            self._sets[key] = Classes(session.table), {}
            if len(self._sets) > _KEPT:
                if self._last is not None:
                    self._last.synchronize()  # a replay on another stream may be running
                self._sets.popitem(last=False)
        self._sets.move_to_end(key)
        classes, buckets = self._sets[key]
        classes.hold(session.table)
        return buckets

    def bucket_graphs(
        self,
        session: Session,
        defense: Defense,
        key: Key,
        buckets: dict[int, BucketGraphs],
        batch: Batch,
    ) -> BucketGraphs:
        """Graphs of a batch's bucket, with the batch copied in."""
        size = bucket(len(batch))
        if size not in buckets:
            if self._pool is None:
                self._pool = Pool(batch.x.device)
            fixed = replace(_without_model(session), table=self._sets[key][0].table)
            try:
                buckets[size] = BucketGraphs(fixed, defense, size, batch.x, self._pool)
            except RuntimeError as error:
                # A failed capture leaves the pool unusable.
                self._sets.clear()
                self._pool = None
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                raise RuntimeError(
                    f"engine='graph': a pass through the {session.encoder.name} encoder could not "
                    f'be captured: {error}; use engine="runner" or "eager"'
                ) from error
        buckets[size].load(batch)
        return buckets[size]


@dataclass(eq=False)
class GraphPasses:
    """drive.Passes by replay of graphs, for one call."""

    graphs: Graphs
    session: Session
    defense: Defense
    key: Key
    buckets: dict[int, BucketGraphs]

    def first_pass(self, batch: Batch) -> State:
        """State after the first pass, as copies."""
        found = self._first(batch)
        return State(
            self._copy(found.drift),
            margin=None if found.margin is None else self._copy(found.margin),
            logits=None if found.logits is None else self._copy(found.logits[:, : self._classes]),
            delta=None if found.delta is None else self._copy(found.delta),
        )

    def after_gate(self, batch: Batch, state: State, chosen: Tensor | None) -> Repaired:
        """Repair the first pass's batch, or its rows `chosen` (b,).

        If `chosen` fits a smaller bucket, its first pass is repeated there; else the whole bucket
        is repaired and the rows are selected.
        """
        rows: Any = slice(len(batch)) if chosen is None else chosen
        if chosen is not None and bucket(len(chosen)) != self._bucket.count:
            self._first(batch.rows(chosen))
            rows = slice(len(chosen))
        found = self._bucket.repair()
        logits = found.logits[rows, : self._classes].clone()
        return Repaired(logits, None if found.delta is None else found.delta[rows].clone())

    def _first(self, batch: Batch) -> State:
        """First pass in static memory, with all rows of the bucket."""
        self._count = len(batch)
        self._bucket = self.graphs.bucket_graphs(
            self.session, self.defense, self.key, self.buckets, batch
        )
        return self._bucket.first()

    def _copy(self, part: Tensor) -> Tensor:
        return part[: self._count].clone()

    @property
    def _classes(self) -> int:
        table = self.session.table
        return len(table.text) if table.group is None else len(table.group)


def _without_model(session: Session) -> Session:
    """Session without its model: graphs live on the snapshot and must not keep it alive."""
    nothing: Any = None
    judge = None if session.judge is None else _without_model(session.judge)
    return replace(session, model=nothing, snapshot=nothing, judge=judge)


def graphs_of(encoder: Encoder) -> Graphs:
    """Graphs of an encoder, stored on it."""
    found: Graphs = vars(encoder).setdefault("graphs", Graphs())
    return found


def on(device: torch.device) -> Any:
    """Context manager: make a device current."""
    return torch.cuda.device(device)


def record() -> Any:
    """Recorded event on the current stream."""
    event = torch.cuda.Event()
    event.record()
    return event
