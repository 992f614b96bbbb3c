"""Session: a model prepared for classes, with encoder, precision and ops."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from scc_fast import ops
from scc_fast._plain import plain
from scc_fast.config import View
from scc_fast.engine.batch import Batch, Encode, LiveViews, Views, warped
from scc_fast.engine.choose import PRECISIONS, cannot_serve, choose_backends, choose_encoder
from scc_fast.engine.cost import Cost, cost_of
from scc_fast.engine.encoder import Encoder, Modules, Runner
from scc_fast.engine.opaque import transformed
from scc_fast.engine.plan import Plan
from scc_fast.models import VisionLanguage
from scc_fast.reference import heads
from scc_fast.reference.heads import Classes
from scc_fast.reference.ttc import Setting
from scc_fast.reference.views import preprocess


def unmarked(part: str) -> None:
    """Default mark: no timing."""


@dataclass(frozen=True, eq=False, repr=False)
class Session:
    """A model prepared for classes.

    Args:
        model: the caller's; encodes texts.
        snapshot: its image side, frozen.
        encoder: f, by the engine.
        prompts: the class prompts; None for given text embeddings.
        classes, table: text embeddings, for the reference and for the ops.
        backend: requested for the ops; None: the best for each.
        served: actual backends, joined by "+"; "reference" is scc_fast.reference.
        engine, precision: names.
        size: (height, width) of the encoder's pictures.
        mean, std: the model's normalisation.
        flip: whether views may mirror, unless a config says.
        insists: engine requested by name, which must not fall back; or "".
        judge: session whose encoder the gate uses; None: this one.
        mark: called with the name of each finished part of a pass.
        kind: class of views.
        encoded: replaces the encoder in `encode`.
    """

    model: VisionLanguage
    snapshot: VisionLanguage
    encoder: Encoder
    prompts: tuple[str, ...] | None
    classes: Classes
    table: ops.ClassTable
    backend: str | None
    served: str
    engine: str
    precision: str
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    insists: str = ""
    judge: Session | None = None
    mark: Callable[[str], None] = unmarked
    kind: Callable[..., Views] = Views
    encoded: Callable[[Tensor], Tensor] | None = None

    @property
    def encode(self) -> Callable[[Tensor], Tensor]:
        """f∘φ: embeddings of pixels, differentiable once."""
        return (
            Encode(self) if self.encoded is None else self.encoded
        )  # not stored: it would be a cycle

    def views(self, batch: Batch, views: Sequence[View]) -> Views:
        """Views of a batch."""
        return self.kind(self, batch, views)

    def logits(self, features: Tensor) -> Tensor:
        """s·cos(f, t_k) + b: (..., D) → (..., K), differentiable."""
        return heads.logits(features, self.classes)

    def mean_logits(self, features: Tensor) -> Tensor:
        """Mean over the views: (L, B, D) → (B, K), differentiable."""
        return self.logits(features).mean(dim=0)

    def features(self, pictures: Tensor) -> Tensor:
        """f of pictures (L, B, 3, H, W): (L, B, D), differentiable."""
        return self.encode(pictures.flatten(0, 1)).unflatten(0, pictures.shape[:2])

    def warped(self, x: Tensor, matrix: Tensor, **rules: Any) -> Tensor:
        """f of x through maps (V, B, 3, 3), as batch.warped takes them: (V, B, D)."""
        live = (torch.is_grad_enabled() and x.requires_grad) or transformed()
        if live or self.encoded is not None or x.shape[-2:] != self.size:
            return self.features(warped(x, matrix, self.backend, **rules))
        encoder = self.now().encoder
        with torch.no_grad():
            pictures = ops.warp_views(
                x,
                matrix,
                mean=self.mean,
                std=self.std,
                dtype=encoder.dtype,
                patch=encoder.patch,
                backend=self.backend,
                **rules,
            )
            return encoder.forward(pictures).unflatten(0, matrix.shape[:2])

    def live(self) -> Session:
        """Session with views that are differentiable with respect to the images."""
        return replace(self, kind=LiveViews)

    # ------------------------------------------------------------------------------- the engine

    def now(self) -> Session:
        """Up-to-date session: on the modules if they no longer match the runner.

        Raises:
            RuntimeError: they do not match, and the runner was requested by name.
        """
        if self.judge is not None:
            judge = self.judge.now()
            if judge is not self.judge:  # unseen by graphs
                engine = "runner" if self.engine == "graph" else self.engine
                return replace(self, judge=judge, engine=engine).now()
        reason = self.mistrust
        if not reason:
            return self
        if self.insists:
            raise RuntimeError(cannot_serve(self.snapshot, self.insists, reason))
        return replace(self, encoder=Modules(self.snapshot), engine="eager")

    @property
    def mistrust(self) -> str:
        """Reason why the runner no longer matches the modules; "" if it does, or without one."""
        return self.encoder.trust.reason(self.snapshot) if isinstance(self.encoder, Runner) else ""

    def captures(self, size: tuple[int, int]) -> bool:
        """Whether graphs serve pictures (H, W)."""
        return self.engine == "graph" and size == self.size

    @functools.cached_property
    def reference(self) -> Setting:
        """Setting of scc_fast.reference: the model's modules, under autograd."""
        with plain(self.snapshot.device):
            mean, std = (
                torch.tensor(three, dtype=torch.float32, device=self.snapshot.device)
                for three in (self.mean, self.std)
            )
        return Setting(_Pixels(self.snapshot, self.size, mean, std), self.classes, mean)

    # -------------------------------------------------------------------------------------- cost

    @functools.cached_property
    def cost(self) -> Cost:
        """Cost of one picture in the encoder."""
        tower = self.encoder.tower if isinstance(self.encoder, Runner) else None
        return cost_of(self.snapshot, tower, PRECISIONS[self.precision])

    def memory(self, plan: Plan, batch: int, size: tuple[int, int]) -> int:
        """Estimated peak bytes of a call with `batch` images (H, W), beyond the weights.

        State for the backward pass, temporaries, pictures and views, and logits.
        """
        cost, pixels = self.cost, 3 * size[0] * size[1]
        first = max(one.forward for one in plan.passes)
        keeps = any(one.backward for one in plan.passes)
        picture = 3 * self.size[0] * self.size[1]
        each = (
            cost.working + 2 * picture * self.encoder.dtype.itemsize + (cost.kept if keeps else 0)
        )
        classes = len(self.classes.text)
        return batch * (first * each + 6 * 4 * pixels + 3 * 4 * plan.views * classes)


@dataclass(frozen=True, eq=False)
class _Pixels:
    """f∘φ by a snapshot's modules: pixels (B, 3, H, W) in [0, 1] to embeddings."""

    snapshot: VisionLanguage
    size: tuple[int, int]
    mean: Tensor
    std: Tensor

    def __call__(self, pixels: Tensor) -> Tensor:
        return self.snapshot.encode_image(preprocess(pixels, self.size, self.mean, self.std))


def session_of(
    model: VisionLanguage,
    snapshot: VisionLanguage,
    prompts: tuple[str, ...] | None,
    classes: Classes,
    *,
    engine: str,
    precision: str,
    backend: str | None,
    judge: Session | None = None,
) -> Session:
    """Session of a snapshot and its classes.

    Args:
        engine, precision: see choose.choose_encoder.
        backend: of the ops; None: the best for each.

    Raises:
        RuntimeError: an engine, precision or backend requested by name is not available.
    """
    served = choose_backends(snapshot.device, backend)
    encoder, name, precision = choose_encoder(snapshot, engine, precision, backend, served)
    with plain(snapshot.device):
        table = ops.ClassTable.of(classes)
    height, width = model.image_size
    mean, std = (tuple(map(float, values)) for values in (model.mean, model.std))
    insists = engine if engine in ("runner", "graph") else ""
    return Session(
        *(model, snapshot, encoder, prompts, classes, table, backend, served, name, precision),
        *((height, width), mean, std, bool(model.flip), insists, judge),
    )
