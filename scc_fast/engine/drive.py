"""Driver of a call, common to all defenses and engines.

Input, seeds, pieces, first pass, gate, compaction, repair, result.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from scc_fast._plain import plain
from scc_fast.engine.batch import Batch
from scc_fast.engine.cuda_graph import graphs_of
from scc_fast.engine.defense import Defense, Repaired, State
from scc_fast.engine.memory import is_out_of_memory, out_of_memory
from scc_fast.engine.opaque import NO_GRAPH, check_caller, transformed
from scc_fast.engine.seeds import Seeds, image_seeds
from scc_fast.engine.session import Session
from scc_fast.images import to_batch
from scc_fast.models import VisionLanguage
from scc_fast.reference.ttc import Outcome
from scc_fast.result import DefenseResult


@torch.compiler.disable(reason=NO_GRAPH)
def call(
    session: Session,
    defense: Defense,
    images: Any,
    seeds: Seeds,
    *,
    max_batch: int,
    is_normalized: bool,
    clamp: bool,
) -> DefenseResult:
    """Defend a batch; arguments and result as for Defender.__call__."""
    check_caller(images)
    if transformed():
        raise TypeError("a Defender cannot be transformed by torch.func: use DefendedCLIP")
    started = time.perf_counter()
    model = session.model
    with plain(model.device):
        x = to_batch(images, model, is_normalized=is_normalized, clamp=clamp)
        if isinstance(images, Tensor) and x.data_ptr() == images.data_ptr():
            x = x.clone()  # the caller may reuse the buffer
        keys = image_seeds(seeds, len(x), x.device)
        if keys is seeds:
            keys = keys.clone()
        loaded = time.perf_counter()
        session = session.now()
        parts = []
        for batch in pieces(session, defense, Batch(x, keys), max_batch):
            try:
                outcome = run(session, defense, batch)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                raise too_large(session, defense, batch) from error
            parts.append(_result(session, defense, batch, outcome))
        result = DefenseResult.concatenate(parts)
        finite = (
            result.logits.isfinite().all().to("cpu", non_blocking=True)
        )  # read after synchronisation
    if x.is_cuda:  # not the device: another thread may be capturing
        torch.cuda.current_stream(x.device).synchronize()
    if not finite:
        raise not_finite(result.logits, model, session.precision)
    done = time.perf_counter()
    result.timings.update(input=loaded - started, defense=done - loaded, total=done - started)
    return result


def pieces(session: Session, defense: Defense, batch: Batch, max_batch: int) -> Iterator[Batch]:
    """Split a batch into pieces of at most max_batch pictures, at least one image each."""
    size = piece_size(session, defense, batch.size, max_batch)
    parts = zip(batch.x.split(size), batch.seeds.split(size), strict=True)
    return (Batch(x, seeds) for x, seeds in parts)


def piece_size(session: Session, defense: Defense, size: tuple[int, int], max_batch: int) -> int:
    """Images (H, W) per piece."""
    piece = max(1, max_batch // defense.width(session, size))
    # A power of two, to fill a graph's bucket.
    return 1 << (piece.bit_length() - 1) if serves(session, defense, size) == "graph" else piece


def serves(session: Session, defense: Defense, size: tuple[int, int]) -> str:
    """Engine for pictures (H, W)."""
    if session.engine == "graph" and not (defense.captures and session.captures(size)):
        return "runner"
    return session.engine


# ------------------------------------------------------------------------------- one piece at once


class Passes(Protocol):
    """A defense's two functions: called directly, or replayed as CUDA graphs."""

    def first_pass(self, batch: Batch) -> State:
        """Defense.first_pass of a batch."""
        ...

    def after_gate(self, batch: Batch, state: State, chosen: Tensor | None) -> Repaired:
        """Defense.after_gate of the batch, or of its rows `chosen` (b,)."""
        ...


@dataclass(eq=False)
class DirectPasses:
    """Direct calls of a defense's two functions."""

    session: Session
    defense: Defense

    def first_pass(self, batch: Batch) -> State:
        return self.defense.first_pass(self.session, batch)

    def after_gate(self, batch: Batch, state: State, chosen: Tensor | None) -> Repaired:
        if chosen is not None:
            state, batch = _rows(state, chosen, len(batch)), batch.rows(chosen)
        return self.defense.after_gate(self.session, batch, state)


def run(session: Session, defense: Defense, batch: Batch) -> Outcome:
    """Run a defense on one piece, without gradients, in an up-to-date session."""
    if len(batch) == 0:
        return nothing(session, batch)
    if session.served == "reference":
        found = defense.reference(session, batch)
        if found is not None:
            return found
    batch = Batch(batch.x.contiguous(), batch.seeds)
    with _passes(session, defense, batch) as passes:
        return carry_out(passes, defense, batch)


@contextlib.contextmanager
def _passes(session: Session, defense: Defense, batch: Batch) -> Iterator[Passes]:
    if serves(session, defense, batch.size) != "graph":
        yield DirectPasses(session, defense)
        return
    with graphs_of(session.encoder).passes(session, defense, batch.x.device) as passes:
        yield passes


def carry_out(passes: Passes, defense: Defense, batch: Batch) -> Outcome:
    """First pass, gate, compaction, repair.

    Images that count as clean keep the first pass's answer; the others are repaired in a batch of
    their own.
    """
    state = passes.first_pass(batch)
    logits, delta, flagged = state.logits, state.delta, gate(defense, state)
    chosen = chosen_rows(defense, flagged)
    if chosen is None:
        repaired = passes.after_gate(batch, state, None)
        logits, delta = repaired.logits, repaired.delta
    elif len(chosen):
        logits, delta = _joined(
            batch, logits, delta, passes.after_gate(batch, state, chosen), chosen
        )
    assert logits is not None
    delta = torch.zeros_like(batch.x) if delta is None else delta
    return Outcome(logits, delta, state.drift, flagged)


def dense(session: Session, defense: Defense, batch: Batch) -> Outcome:
    """As carry_out(), without branching on data: repair all images, then select by the gate."""
    state = defense.first_pass(session, batch)
    flagged = gate(defense, state)
    if defense.repairs == "none":
        repaired = Repaired(state.logits, state.delta)  # type: ignore[arg-type]
    else:
        repaired = defense.after_gate(session, batch, state)
    logits, delta = repaired.logits, repaired.delta
    if defense.repairs == "flagged":
        assert state.logits is not None
        logits = torch.where(flagged[:, None], logits, state.logits)
        left = torch.zeros_like(batch.x) if state.delta is None else state.delta
        each = flagged[:, None, None, None]
        delta = left if delta is None else torch.where(each, delta, left)
    delta = torch.zeros_like(batch.x) if delta is None else delta
    return Outcome(logits, delta, state.drift, flagged)


def gate(defense: Defense, state: State) -> Tensor:
    """Gate: (B,) bool, whether the margin is above 0 (attacked)."""
    if state.margin is not None:
        return state.margin > 0
    whole = torch.full_like(state.drift, float(defense.repairs != "none"))
    return whole > 0


def chosen_rows(defense: Defense, flagged: Tensor) -> Tensor | None:
    """Rows (b,) to repair; None: all."""
    count = int(flagged.sum()) if defense.repairs == "flagged" else 0
    if defense.repairs == "all" or count == len(flagged):
        return None
    return flagged.nonzero().squeeze(1) if count else flagged.new_zeros(0, dtype=torch.int64)


@dataclass(frozen=True, eq=False)
class Live:
    """Differentiable result of a defense (BPDA: the optimised δ counts as constant).

    Args:
        logits: (B, K).
        delta: (B, 3, H, W).
        drift: (B,) the gate's measure, NaN without a gate.
        flagged: (B,) bool.
        session, defense, batch: the call.
    """

    logits: Tensor
    delta: Tensor
    drift: Tensor
    flagged: Tensor
    session: Session
    defense: Defense
    batch: Batch

    @property
    def outcome(self) -> Outcome:
        """Result as of run()."""
        return Outcome(self.logits, self.delta, self.drift, self.flagged)

    @functools.cached_property
    def margin(self) -> Tensor | None:
        """Differentiable margin (B,) of the gate, > 0: attacked; None without a gate.

        Runs another first pass.
        """
        if not self.defense.has_gate:
            return None
        with torch.enable_grad():
            return self.defense.first_pass(self.session.live(), self.batch).margin


def live(session: Session, defense: Defense, batch: Batch) -> Live:
    """Run a defense on one piece, differentiably with respect to x; gradients must be on.

    Only the final pass is live, so that memory is that of a run.
    """
    session = session.now()
    logits: Tensor | None = None
    delta: Tensor | None = None
    if len(batch) == 0:
        found = nothing(session, batch)
        return Live(found.logits, batch.x, found.drift, found.flagged, session, defense, batch)
    if defense.repairs == "none":
        state = defense.first_pass(session.live(), batch)
        assert state.logits is not None
        logits, delta, drift = state.logits, state.delta, state.drift.detach()
        flagged = gate(defense, state)
    else:
        with torch.no_grad():
            direct, still = DirectPasses(session, defense), batch.still()
            state = direct.first_pass(still)
        drift, flagged = state.drift, gate(defense, state)
        chosen = chosen_rows(defense, flagged)
        if chosen is not None:
            left = (~flagged).nonzero().squeeze(1)
            stands = defense.first_pass(session.live(), batch.rows(left)).logits
            assert stands is not None
            logits = stands.new_zeros(len(batch), stands.shape[1]).index_copy(0, left, stands)
            delta = state.delta
        if chosen is None or len(chosen):
            repaired = DirectPasses(session.live(), defense).after_gate(batch, state, chosen)
            if chosen is None:
                logits, delta = repaired.logits, repaired.delta
            else:
                logits, delta = _joined(still, logits, delta, repaired, chosen)
        assert logits is not None
    delta = torch.zeros_like(batch.x.detach()) if delta is None else delta.detach()
    return Live(logits, delta, drift, flagged, session, defense, batch)


def nothing(session: Session, batch: Batch) -> Outcome:
    """Outcome of an empty batch."""
    x = batch.x
    rows = x.new_zeros(0)
    return Outcome(x.new_zeros(0, len(session.classes.text)), x, rows, rows.bool())


def _rows(state: State, index: Tensor, batch: int) -> State:
    """State of some of the images; without the closure if it cannot be indexed."""
    backward = state.backward
    if backward is not None:
        views = len(next(iter(state.views.values())))
        pictures = torch.arange(views, device=index.device)[:, None] * batch + index
        backward = backward.rows(pictures.flatten())
    return replace(
        state,
        drift=state.drift[index],
        margin=None if state.margin is None else state.margin[index],
        logits=None,
        delta=None if state.delta is None else state.delta[index],
        rows={name: part[index] for name, part in state.rows.items()},
        views={name: part[:, index] for name, part in state.views.items()},
        backward=backward,
    )


def _joined(
    batch: Batch, logits: Tensor | None, delta: Tensor | None, repaired: Repaired, chosen: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Logits and δ of a batch, updated at its repaired rows."""
    assert logits is not None
    logits = logits.index_copy(0, chosen, repaired.logits)
    if repaired.delta is not None:
        delta = torch.zeros_like(batch.x) if delta is None else delta
        delta = delta.index_copy(0, chosen, repaired.delta)
    return logits, delta


# ----------------------------------------------------------------------------- results, errors


def _result(session: Session, defense: Defense, batch: Batch, outcome: Outcome) -> DefenseResult:
    return DefenseResult(
        logits=outcome.logits,
        delta=outcome.delta,
        inputs=batch.x,
        drift=outcome.drift,
        flagged=outcome.flagged,
        seeds=batch.seeds,
        method=defense.name,
        backend=session.served,
        engine=serves(session, defense, batch.size),
    )


def too_large(session: Session, defense: Defense, batch: Batch) -> RuntimeError:
    """Error for a piece that did not fit into memory."""

    def estimate(count: int, size: tuple[int, int]) -> int:
        plan = defense.plan(session, size)
        if plan is None:
            raise RuntimeError("not counted")
        return session.memory(plan, count, size)

    width = defense.width(session, batch.size)
    return out_of_memory(batch.x.device, len(batch), batch.size, width, estimate)


def not_finite(logits: Tensor, model: VisionLanguage, precision: str) -> ValueError:
    """Error for logits (B, K) with NaN or infinity.

    Weights and text embeddings were checked, so the encoder overflowed its precision.
    """
    index = int((~logits.isfinite().all(dim=-1)).nonzero()[0])
    held = getattr(model, "dtype", torch.float32)
    instead = {"fp16": 'precision="bf16" or "fp32"', "bf16": 'precision="fp32"'}.get(precision)
    if instead is None:
        why = "its encoder gives values that are not finite, though in float32"
    else:
        load = "load the model with " if held.itemsize < 4 else "use "
        why = f"its encoder overflows in {precision}: {load}{instead}"
    return ValueError(f"model: logits of {model.name} for image {index} are not finite: {why}")
