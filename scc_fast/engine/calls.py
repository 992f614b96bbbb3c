"""How a call on images goes, whatever the defense: input, seeds, pieces, memory, result."""

from __future__ import annotations

import functools
import secrets
import time
from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from scc_fast._plain import plain
from scc_fast.config import python_number, shown, whole
from scc_fast.engine import serve
from scc_fast.engine.opaque import NO_GRAPH, check_caller, transformed
from scc_fast.images import check_dense, to_batch
from scc_fast.models import VisionLanguage
from scc_fast.reference import philox
from scc_fast.reference.ttc import Outcome
from scc_fast.result import DefenseResult

Seeds = int | Sequence[int] | np.ndarray | Tensor | None


class Callee(Protocol):
    """What a call asks of a defense."""

    @property
    def model(self) -> VisionLanguage:
        """Whose pictures they are."""
        ...

    @property
    def method(self) -> str:
        """The method's name."""
        ...

    @property
    def precision(self) -> str:
        """That of the encoder's products."""
        ...

    @property
    def backend(self) -> str:
        """Who serves the ops."""
        ...

    def pieces(self, x: Tensor, seeds: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """x and seeds in pieces that fit."""
        ...

    def run(self, x: Tensor, seeds: Tensor) -> Outcome:
        """The defense of one piece."""
        ...

    def serves(self, size: tuple[int, int]) -> str:
        """The engine that serves pictures (height, width)."""
        ...

    def out_of_memory(self, x: Tensor) -> RuntimeError:
        """What is raised where a piece did not fit."""
        ...


@torch.compiler.disable(reason=NO_GRAPH)
def call(
    callee: Callee, images: Any, seeds: Seeds, *, is_normalized: bool, clamp: bool
) -> DefenseResult:
    """Defend a batch; arguments and result as for Defender.__call__."""
    check_caller(images)
    if transformed():
        raise TypeError(
            "a Defender is called on pictures, outside torch.func's transforms: what they can "
            "transform is DefendedCLIP"
        )
    started = time.perf_counter()
    device = callee.model.device
    with plain(device):
        x = to_batch(images, callee.model, is_normalized=is_normalized, clamp=clamp)
        if isinstance(images, Tensor) and x.data_ptr() == images.data_ptr():
            x = x.clone()  # the result keeps its inputs; the caller may reuse the buffer
        keys = image_seeds(seeds, len(x), x.device)
        if keys is seeds:
            keys = keys.clone()
        loaded = time.perf_counter()
        parts = []
        for piece, key in callee.pieces(x, keys):
            try:
                outcome = callee.run(piece, key)
            except RuntimeError as error:
                if not serve.is_out_of_memory(error):
                    raise
                raise callee.out_of_memory(piece) from error
            parts.append(_result(callee, outcome, piece, key))
        result = DefenseResult.concatenate(parts)
        finite = result.logits.isfinite().all().to("cpu", non_blocking=True)  # not read yet
    if x.is_cuda:  # the stream, not the device: another thread may be capturing on it
        torch.cuda.current_stream(x.device).synchronize()
    if not finite:
        raise not_finite(result.logits, callee.model, callee.precision)
    done = time.perf_counter()
    result.timings.update(input=loaded - started, defense=done - loaded, total=done - started)
    return result


def not_finite(logits: Tensor, model: VisionLanguage, precision: str) -> ValueError:
    """What is raised where logits (B, K) hold NaN or infinity.

    Weights and text embeddings were seen to be finite, so the encoder left its precision's range.
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


def image_seeds(seeds: Seeds, batch: int, device: torch.device | str = "cpu") -> Tensor:
    """The (B,) int64 seeds a call with this `seeds` argument uses.

    Args:
        seeds: None draws fresh ones; a whole number seeds image i with (seed, i); a tensor, array
            or sequence of B whole numbers is used as it is, those from 2^63 on less 2^64.
        batch: B.
        device: where they are wanted.

    Raises:
        TypeError, ValueError: no whole numbers, more than 64 bits, or not one per image.
    """
    batch = whole("batch", batch, 0)
    if seeds is None or (isinstance(seeds, Integral) and not isinstance(seeds, bool)):
        seed = None if seeds is None else int(seeds)
        if seed is not None and not -(1 << 63) <= seed < 1 << 64:
            raise ValueError(f"seeds must fit into 64 bits, got {shown(seeds)}")
        # On the host, then one copy: on a GPU the hash is 165 launches.
        return _host_seeds(seed, batch).to(device, copy=True)
    keys = _given_seeds(seeds)
    if keys.shape != (batch,):
        raise ValueError(
            f"seeds must be one whole number or {batch}, one per image, got {shown(seeds)}"
            + ("" if isinstance(seeds, Tensor | np.ndarray) else f", which holds {len(keys)}")
        )
    return philox.image_seeds(keys, batch, device)


def _given_seeds(seeds: Any) -> Tensor:
    """Whole numbers in any container as an int64 tensor."""
    wrong = f"seeds must be None, a whole number or one for each image, got {shown(seeds)}"
    if isinstance(seeds, Tensor):
        check_dense("seeds", seeds)
        if seeds.is_floating_point() or seeds.is_complex() or seeds.dtype == torch.bool:
            raise TypeError(wrong)
        return seeds.to(torch.int64)
    if isinstance(seeds, list | tuple | range):
        numbers = [python_number(seed) for seed in seeds]
        if not all(type(number) is int for number in numbers):
            raise TypeError(wrong)
        if not all(-(1 << 63) <= number < 1 << 64 for number in numbers):
            raise ValueError(f"seeds must fit into 64 bits, got {shown(seeds)}")
        half = 1 << 63
        signed = [(n + half) % (2 * half) - half for n in numbers]
        return torch.tensor(signed, dtype=torch.int64, device="cpu")
    array = np.asarray(seeds) if hasattr(seeds, "__array__") else np.empty(0, object)
    if array.dtype.kind not in "iu":
        raise TypeError(wrong)
    return torch.from_numpy(array.astype(np.int64))


def _host_seeds(seeds: int | None, batch: int) -> Tensor:
    if not batch:  # which frombuffer refuses
        return torch.empty(0, dtype=torch.int64, device="cpu")
    if seeds is None:
        return torch.frombuffer(bytearray(secrets.token_bytes(8 * batch)), dtype=torch.int64)
    return _hashed(seeds, batch)


@functools.lru_cache(maxsize=32)
def _hashed(seeds: int, batch: int) -> Tensor:
    with torch.inference_mode(False):
        return philox.image_seeds(seeds, batch)


def _result(callee: Callee, outcome: Outcome, x: Tensor, seeds: Tensor) -> DefenseResult:
    return DefenseResult(
        logits=outcome.logits,
        delta=outcome.delta,
        inputs=x,
        drift=outcome.drift,
        flagged=outcome.flagged,
        seeds=seeds,
        method=callee.method,
        backend=callee.backend,
        engine=callee.serves((x.shape[-2], x.shape[-1])),
    )
