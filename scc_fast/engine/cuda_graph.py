"""A defense's two functions as CUDA graphs: captured once per bucket of the batch.

Any thread replays them. A graph reads and writes fixed memory. Pictures and classes are copied
into it, in buckets of powers of two; what fills a bucket up is thrown away. Another set of classes
of the same bucket is copied in, not captured. All graphs of an encoder share one pool of memory,
and so one lock: nothing outlives a call in it but what the call returns, as copies.
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


class Graph:
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

    method: str
    config: MethodConfig
    flip: bool
    judge: Encoder | None  # kept on its snapshot, so that it is the same for all sessions
    backend: str | None
    size: tuple[int, int]  # rows and classes
    numbers: tuple[float, ...]  # logit scale and bias: captured by value


def key_of(session: Session, defense: Defense) -> Key:
    """Equal where one set of graphs serves."""
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
    """The graphs of one bucket: a defense's first pass, and what comes after its gate."""

    def __init__(
        self, session: Session, defense: Defense, batch: int, x: Tensor, pool: Pool
    ) -> None:
        self.count = batch
        # Real pictures: the calls before the capture compute with them.
        place = torch.arange(batch, device=x.device) % len(x)
        seeds = torch.arange(batch, device=x.device)
        self.batch = Batch(x[place].contiguous(), seeds)
        self.first = Graph(lambda: defense.first_pass(session, self.batch), pool)
        if defense.repairs == "none":
            return
        self.first()  # the repair's first calls read what this has written

        def repair() -> Repaired:
            state = self.first.result
            return defense.after_gate(
                session, self.batch, replace(state, backward=state.backward.again())
            )

        def final() -> Repaired:
            # From here on nothing holds what the first pass kept for its backward, so that it is
            # free for the rest of the repair, and for graphs captured later. Nothing reads it but
            # the repair, which always comes right after the first pass.
            state = self.first.result
            self.first.result = replace(state, backward=None)
            return defense.after_gate(session, self.batch, state)

        self.repair = Graph(repair, pool, final)

    def load(self, batch: Batch) -> None:
        """Copy pictures in; the rest of the bucket repeats the first."""
        count, rest = len(batch), self.count - len(batch)
        self.batch.x[:count].copy_(batch.x)
        self.batch.seeds[:count].copy_(batch.seeds)
        if rest:
            self.batch.x[count:].copy_(batch.x[:1].expand(rest, -1, -1, -1))
            self.batch.seeds[count:].copy_(batch.seeds[:1].expand(rest))


class Graphs:
    """The graphs of one encoder."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pool: Pool | None = None
        self._last: Any = None  # an event: the end of the last call, on whatever stream it was
        self._sets: OrderedDict[Key, tuple[Classes, dict[int, BucketGraphs]]] = OrderedDict()

    @contextlib.contextmanager
    def passes(
        self, session: Session, defense: Defense, device: torch.device
    ) -> Iterator[GraphPasses]:
        """A defense's two functions as graphs, for one call.

        What they give lies in the graphs' own memory, and is only good until the next call.
        """
        key = key_of(session, defense)
        # Fixed memory serves callers in every autograd mode.
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
                    self._last.synchronize()  # a replay on another stream may still read it
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
        """The graphs of a batch's bucket, its pictures copied in."""
        size = bucket(len(batch))
        if size not in buckets:
            if self._pool is None:
                self._pool = Pool(batch.x.device)
            fixed = replace(_without_model(session), table=self._sets[key][0].table)
            try:
                buckets[size] = BucketGraphs(fixed, defense, size, batch.x, self._pool)
            except RuntimeError as error:
                # What is left of the pool after a capture that failed is nobody's.
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
    """A defense's two functions as graphs, in one call."""

    graphs: Graphs
    session: Session
    defense: Defense
    key: Key
    buckets: dict[int, BucketGraphs]

    def first_pass(self, batch: Batch) -> State:
        """What decides about the images of a batch, as copies."""
        found = self._first(batch)
        return State(
            self._copy(found.drift),
            margin=None if found.margin is None else self._copy(found.margin),
            logits=None if found.logits is None else self._copy(found.logits[:, : self._classes]),
            delta=None if found.delta is None else self._copy(found.delta),
        )

    def after_gate(self, batch: Batch, state: State, chosen: Tensor | None) -> Repaired:
        """The repair of the batch of the first pass, or of its rows `chosen` (b,).

        Of a flagged minority the next smaller bucket makes the first pass once more; where there
        is none, all of the bucket are repaired, and the chosen rows are taken out.
        """
        rows: Any = slice(len(batch)) if chosen is None else chosen
        if chosen is not None and bucket(len(chosen)) != self._bucket.count:
            self._first(batch.rows(chosen))
            rows = slice(len(chosen))
        found = self._bucket.repair()
        logits = found.logits[rows, : self._classes].clone()
        return Repaired(logits, None if found.delta is None else found.delta[rows].clone())

    def _first(self, batch: Batch) -> State:
        """In fixed memory, of as many rows as the bucket."""
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
    """A session for graphs, which are kept on a snapshot and must not hold its model."""
    nothing: Any = None
    judge = None if session.judge is None else _without_model(session.judge)
    return replace(session, model=nothing, snapshot=nothing, judge=judge)


def graphs_of(encoder: Encoder) -> Graphs:
    """Those captured of an encoder, which keeps them."""
    found: Graphs = vars(encoder).setdefault("graphs", Graphs())
    return found


def on(device: torch.device) -> Any:
    """The device as the current one."""
    return torch.cuda.device(device)


def record() -> Any:
    """An event on the current stream."""
    event = torch.cuda.Event()
    event.record()
    return event
