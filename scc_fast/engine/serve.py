"""Which engine serves a Defender, with what memory, and how one of its calls goes."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scc_fast.config import (
    MethodConfig,
    RNConfig,
    SCCConfig,
    TTCConfig,
    View,
    python_number,
    shown,
)
from scc_fast.engine import graph, methods
from scc_fast.engine.cost import Cost, cost_of
from scc_fast.engine.encoder import PRECISIONS, Runner, encoder_of, is_native
from scc_fast.engine.methods import Setting, Sight
from scc_fast.engine.plan import Plan, plan_of
from scc_fast.models import VisionLanguage
from scc_fast.reference.ttc import Outcome

ENGINES = ("auto", "eager", "compile", "runner", "graph")


@dataclass(frozen=True)
class Stage:
    """One part of a defense, in order of time.

    Args:
        step: the pass's name in the plan.
        part: "views", "forward", "head", "backward" or "step".
        ms: how long it took.
    """

    step: str
    part: str
    ms: float


def held_precision(model: VisionLanguage) -> str:
    """That of the model's weights.

    Raises:
        ValueError: it is none of PRECISIONS.
    """
    dtype = getattr(model, "dtype", torch.float32)
    for name, known in PRECISIONS.items():
        if dtype == known:
            return name
    raise ValueError(f"model: its dtype must be one of {list(PRECISIONS.values())}, got {dtype!r}")


class Engine:
    """Runs the methods for one model in one precision.

    Args:
        model: the snapshot.
        engine: one of ENGINES.
        precision: "auto" or one of PRECISIONS.
        backend: of the ops; None takes the best.
        served: the backends that `backend` comes to; "reference" runs scc_fast.reference.

    Raises:
        RuntimeError: what was asked for by name is not to be had; says why.
    """

    def __init__(
        self, model: VisionLanguage, engine: str, precision: str, backend: str | None, served: str
    ) -> None:
        self.model, self.backend = model, backend
        held, kind = held_precision(model), model.device.type
        if served == "reference":
            self._refuse(engine not in ("auto", "eager"), f"engine={engine!r}", 'engine="eager"')
            self._refuse(
                precision not in ("auto", held), f"precision={precision!r}", f'precision="{held}"'
            )
            engine, precision = "eager", held
        if engine == "graph" and kind != "cuda":
            raise RuntimeError(
                f"engine='graph' cannot serve {model.name}: CUDA graphs need a CUDA device, the "
                f'model is on {model.device}; use engine="auto"'
            )
        if precision not in ("auto", held) and not is_native(PRECISIONS[precision], kind):
            raise RuntimeError(
                f"precision={precision!r} cannot serve {model.name}: this CPU has no arithmetic "
                f'for it; use precision="{held}" or "auto"'
            )
        self.encoder = encoder_of(model, engine, PRECISIONS[held])
        if precision == "auto":
            # Half the weights to read, and tensor cores, where there is a GPU; bfloat16 is as wide
            # as float32, so that nothing underflows. The model's own modules stay as they are.
            reduced = (
                kind == "cuda"
                and held == "fp32"
                and torch.cuda.is_bf16_supported(including_emulation=False)
            )
            precision = "bf16" if reduced and isinstance(self.encoder, Runner) else held
        self.precision = precision
        if precision != held:
            self.encoder = encoder_of(model, engine, PRECISIONS[precision])
        if isinstance(self.encoder, Runner):
            self.name = "graph" if kind == "cuda" and engine in ("auto", "graph") else "runner"
        else:
            self.name = "compile" if engine == "compile" else "eager"
            if precision != held != "fp32":  # autocast casts down from float32 alone
                raise RuntimeError(
                    f"precision={precision!r} cannot be had of {model.name}, whose modules are in "
                    f'{held}: load it with precision="fp32", or use precision="{held}"'
                )
        if self.name == "graph" and self.encoder.graphs is None:
            self.encoder.graphs = graph.Graphs()

    def _refuse(self, refused: bool, asked: str, instead: str) -> None:
        if refused:
            why = "with backend='reference'" if self.backend else "here, where no op is compiled"
            raise RuntimeError(
                f"{asked} cannot serve {self.model.name} {why}: scc_fast.reference does, on the "
                f'model\'s modules (scc-fast doctor); use {instead} or "auto"'
            )

    def serves(self, size: tuple[int, int]) -> str:
        """The engine's name for pictures (H, W): graphs are for those of the encoder's size."""
        return "runner" if self.name == "graph" and not self._is_captured(size) else self.name

    def _is_captured(self, size: tuple[int, int]) -> bool:
        return self.name == "graph" and size == tuple(self.model.image_size)

    def run(
        self,
        setting: Setting,
        config: MethodConfig,
        x: Tensor,
        seeds: Tensor,
        views: Sequence[View],
    ) -> Outcome:
        """The method on x (B, 3, H, W) in [0, 1] with seeds (B,), without gradients."""
        setting = setting.now()
        if self._is_captured((x.shape[-2], x.shape[-1])) and setting.encoder is self.encoder:
            known = config if isinstance(config, SCCConfig | TTCConfig | RNConfig) else None
            return self.encoder.graphs.run(setting, x, seeds, views, known)
        return methods.run(Sight(setting, x.contiguous(), seeds, views), config)

    def waterfall(
        self,
        setting: Setting,
        config: MethodConfig,
        x: Tensor,
        seeds: Tensor,
        views: Sequence[View],
    ) -> list[Stage]:
        """The parts of one call, and how long each took; without graphs."""
        clock = _Recorder(x.device)
        sight = Sight(replace(setting.now(), mark=clock.mark), x.contiguous(), seeds, views)
        clock.mark("")
        methods.run(sight, config)
        return clock.stages(plan_of(config, len(views)))

    @functools.cached_property
    def cost(self) -> Cost:
        """What one picture costs the encoder."""
        tower = self.encoder.tower if isinstance(self.encoder, Runner) else None
        return cost_of(self.model, tower, PRECISIONS[self.precision])

    def memory(self, plan: Plan, batch: int, size: tuple[int, int], classes: int) -> int:
        """Bytes that a call with `batch` images of (H, W) takes at its peak, about.

        Beyond the weights: what the forward pass keeps, what is on its way, pictures and views in
        the encoder's precision, and the logits of the heads.
        """
        cost, pixels = self.cost, 3 * size[0] * size[1]
        first = max(one.forward for one in plan.passes)
        keeps = any(one.backward for one in plan.passes)
        picture = 3 * self.model.image_size[0] * self.model.image_size[1]
        each = (
            cost.working + 2 * picture * self.encoder.dtype.itemsize + (cost.kept if keeps else 0)
        )
        return batch * (first * each + 6 * 4 * pixels + 3 * 4 * plan.views * classes)


class _Recorder:
    """The times at which parts of a defense were done."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._times = device, list[tuple[str, Any]]()

    def mark(self, part: str) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._times.append((part, event))
        else:
            self._times.append((part, time.perf_counter()))

    def stages(self, plan: Plan) -> list[Stage]:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        found, place = [], -1
        for (_, before), (part, after) in zip(self._times, self._times[1:], strict=False):
            place += part == "views"
            on_gpu = self._device.type == "cuda"
            ms = before.elapsed_time(after) if on_gpu else 1e3 * (after - before)
            found.append(Stage(plan.passes[min(place, len(plan.passes) - 1)].name, part, ms))
        return found


def size_of(size: Any, model: VisionLanguage) -> tuple[int, int]:
    """(height, width) checked; None is the encoder's."""
    if size is None:
        return model.image_size
    pair = tuple(map(python_number, size)) if isinstance(size, list | tuple) else ()
    if len(pair) != 2 or not all(type(side) is int and side > 0 for side in pair):
        raise ValueError(f"size must be (height, width) in pixels or None, got {shown(size)}")
    return pair[0], pair[1]


# ---------------------------------------------------------------------------------------- memory


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch could not allocate: on CUDA it has a class of its own, on the CPU words."""
    known = ("can't allocate memory", "not enough memory", "CUDA out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in known)


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device; None where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]  # what torch has cached may be a graph's
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if "MemAvailable" in line).split()[1])
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def out_of_memory(
    x: Tensor, views: int, estimate: Callable[[int, tuple[int, int]], int]
) -> RuntimeError:
    """What to raise where x (B, 3, H, W) did not fit at once: says what would."""
    batch, size = len(x), (x.shape[-2], x.shape[-1])
    free, needs, fits = free_memory(x.device), "", batch // 2
    try:
        needs = f": they need about {estimate(batch, size) / 2**20:.0f} MiB"
        while free and fits > 1 and estimate(fits, size) > free // 2:
            fits //= 2
    except RuntimeError:  # a model whose cost cannot be counted
        pass
    there = "" if free is None else f", {free / 2**20:.0f} MiB are free"
    advice = (
        f"max_batch={max(1, fits) * views} ({max(1, fits)} images at once) should fit"
        if batch > 1
        else "one image at once is the least: use smaller pictures, a smaller model, bf16 or "
        "fewer views"
    )
    return torch.OutOfMemoryError(
        f"out of memory with {batch} images of {size[0]}x{size[1]} at once in {views} views"
        f"{needs}{there}; {advice}"
    )
