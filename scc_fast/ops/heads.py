"""Heads: labels, and closed-form gradients of objectives, from features.

Features are (L, B, D), float32, float16 or bfloat16, of L views of B images; arithmetic is float32.
Gradients have the dtype of the features. Only mean_logits is differentiable by autograd.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scc_fast.config import shown
from scc_fast.ops import define
from scc_fast.reference import heads as reference
from scc_fast.reference.heads import Classes

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class ClassTable:
    """Table of the U different text embeddings of K classes, in order of first appearance.

    Duplicate prompts have bit-equal logits and are not each other's negatives. Make it with
    `ClassTable.of(classes)`.

    A row without a class is absent: it does not affect the heads, except for its unused column in
    mean_logits. Tables of one size can thus hold different classes.

    Args:
        text: (U, D) float32, unit length, contiguous; any finite numbers in absent rows.
        count: (U,) int64, classes per row, 0 in absent rows (not all); None: one each.
        group: (K,) int64, row of each class; None: one each.
        scale: s, the model's logit scale.
        bias: b, 0 except for SigLIP.
    """

    text: Tensor
    count: Tensor | None
    group: Tensor | None
    scale: float
    bias: float = 0.0

    @classmethod
    def of(cls, classes: Classes) -> ClassTable:
        """Table of the reference's classes; at least two, possibly equal."""
        if len(classes.text) < 2:
            raise ValueError(f"classes: K must be at least 2, got {len(classes.text)}")
        if not 0 <= classes.scale < float("inf"):
            raise ValueError(f"classes: scale must be a number >= 0, got {classes.scale}")
        if len(classes.distinct) == len(classes.text):
            return cls(classes.text.contiguous(), None, None, classes.scale, classes.bias)
        unsorted, count = classes.group, torch.bincount(classes.group)
        place = torch.arange(len(unsorted), device=unsorted.device)
        first = torch.full_like(count, len(unsorted)).scatter_reduce(0, unsorted, place, "amin")
        order = first.argsort()
        group = order.argsort()[unsorted]
        text = classes.distinct[order].contiguous()
        return cls(text, count[order], group, classes.scale, classes.bias)

    def padded(self, rows: int, classes: int) -> ClassTable:
        """Pad to `rows` rows, absent beyond U.

        `expand` then gives `classes` columns; those beyond K repeat the first.
        """
        count, group = self.count, self.group
        if count is None:
            count = torch.ones(len(self.text), dtype=torch.int64, device=self.text.device)
        if group is None:
            group = torch.arange(len(self.text), device=self.text.device)
        if rows < len(count):
            raise ValueError(f"rows: must be at least U = {len(count)}, got {rows}")
        if classes < len(group):
            raise ValueError(f"classes: must be at least K = {len(group)}, got {classes}")
        text = F.pad(self.text, (0, 0, 0, rows - len(count)))
        count = F.pad(count, (0, rows - len(count)))
        group = F.pad(group, (0, classes - len(group)))
        return ClassTable(text, count, group, self.scale, self.bias)

    def expand(self, rows: Tensor) -> Tensor:
        """(…, U) → (…, K)."""
        return rows if self.group is None else rows[..., self.group]


def drift_head(
    features: Tensor, anchor: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Relative drift τ of the first view, and gradient of the mean squared drift of all views.

    Args:
        features: f of the views of x + δ, (L, B, D).
        anchor: f₀, (B, D), in the dtype of the features.
        backend: "reference", "cpp", "triton"; None: the device's best.

    Returns:
        τ = ‖f_1 − f₀‖ / ‖f₀‖, (B,) float32, and ∂/∂f of (1/L) Σ_l ‖f_l − f₀‖², (L, B, D).

    Raises:
        TypeError, ValueError: an invalid argument.
        RuntimeError: the requested backend is not available.
    """
    _check_features("drift_head", features)
    _check_like("drift_head", "anchor", anchor, features, features.shape[1:], features.dtype)
    return _drift(features.device, backend, features, anchor)


def pseudo_label(
    features: Tensor, table: ClassTable, temperature: float, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Soft pseudo-label of the views (METHOD.md, SCC step 2).

    q̄ is the mean of the views' softmax, q = q̄^(1/T) / Σ q̄^(1/T), t_soft = Σ_k q_k t_k, normalised.

    Args:
        features: (L, B, D).
        table: the classes.
        temperature: T > 0.
        backend: as drift_head.

    Returns:
        q: (B, U) float32, probability of one class per row of the table, 0 if absent.
        ŷ: (B,) int64, the first maximiser of q, a row of the table.
        t_soft: (B, D) float32, unit length.

    Raises:
        as drift_head.
    """
    _check_classes("pseudo_label", features, table)
    if not isinstance(temperature, int | float) or not 0 < temperature < float("inf"):
        raise ValueError(f"pseudo_label: temperature must be above 0, got {shown(temperature)}")
    scalars = (float(table.scale), float(table.bias), float(temperature))
    return _pseudo(features.device, backend, features, table.text, table.count, *scalars)


def margin_head(
    features: Tensor,
    soft: Tensor,
    label: Tensor,
    table: ClassTable,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Semantic margin times s, and its gradient (METHOD.md, SCC step 3).

    J = (s/L) Σ_l [cos(f_l, t_soft) − max_{k ≠ ŷ} cos(f_l, t_k)], k over the rows of the table. The
    gradient of the maximum is that of its first maximiser; without a row but ŷ the maximum is 0.

    Args:
        features: (L, B, D).
        soft: t_soft, (B, D) float32, unit length.
        label: ŷ, (B,) int64, rows of the table, from pseudo_label.
        table: the classes.
        backend: as drift_head.

    Returns:
        J (B,) float32 and ∂J/∂f (L, B, D).

    Raises:
        as drift_head.
    """
    _check_classes("margin_head", features, table)
    _check_like("margin_head", "soft", soft, features, features.shape[1:], torch.float32)
    _check_like("margin_head", "label", label, features, features.shape[1:2], torch.int64)
    scale = float(table.scale)
    given = (features, soft, label, table.text, table.count, scale)
    return _margin(features.device, backend, *given)


def mean_logits(
    features: Tensor,
    table: ClassTable,
    weights: Tensor | None = None,
    *,
    unit: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Mean of s·cos(f, t_k) + b over the views, or of z = Σ_l w_l f_l/‖f_l‖: s·⟨z, t_k⟩ + b.

    Differentiable with respect to features and weights.

    Args:
        features: (L, B, D).
        table: the classes.
        weights: w, (L, B) float32, any finite numbers; None: 1/L each.
        unit: whether z is scaled to unit length; if z = 0, u_1 is used.
        backend: as drift_head.

    Returns:
        (B, K) float32.

    Raises:
        as drift_head.
    """
    _check_classes("mean_logits", features, table)
    if weights is not None:
        shape = features.shape[:2]
        _check_like("mean_logits", "weights", weights, features, shape, torch.float32)
    given = (features, table.text, weights, float(table.scale), float(table.bias), bool(unit))
    return table.expand(_logits(features.device, backend, *given))


def view_weights(
    features: Tensor,
    low: float,
    high: float,
    threshold: float,
    *,
    slope: float = math.inf,
    geodesic: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of the views for mean_logits (METHOD.md, View extrapolation).

    w_1 = 1 − c, w_l = c/(L − 1), with c = `high` where the views' drifts agree, else `low`.

    Args:
        features: (L, B, D), L >= 2, the first view the picture's own.
        low, high: c; with `geodesic`, AGC's β at a score of 0 and of 1.
        threshold: on the agreement r.
        slope: of a sigmoid of r instead of the switch, at least 1e-6; infinity: the switch.
        geodesic: AGC's weights instead (arXiv 2605.15584), by its own score.
        backend: as drift_head.

    Returns:
        w: (L, B) float32.
        a: (B,) float32, the mean cosine of the first view with the others.
        r: (B,) float32, the mean cosine of the views' drifts from the first with their mean.

    Raises:
        as drift_head.
    """
    _check_features("view_weights", features)
    if len(features) < 2:
        raise ValueError("view_weights: features must be of at least 2 views, got 1")
    numbers = {"low": low, "high": high, "threshold": threshold, "slope": slope}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            raise ValueError(f"view_weights: {name} must be a number, got {shown(value)}")
    if slope < 1e-6:  # Triton's kernel takes 0 for the switch
        raise ValueError(f"view_weights: slope must be at least 1e-6, got {shown(slope)}")
    scalars = (float(low), float(high), float(threshold), float(slope), bool(geodesic))
    return _weights(features.device, backend, features, *scalars)


def _check_features(op: str, features: Tensor) -> None:
    if not isinstance(features, Tensor) or features.dtype not in DTYPES:
        got = features.dtype if isinstance(features, Tensor) else type(features).__name__
        raise TypeError(f"{op}: features must be a tensor of {DTYPES}, got {got}")
    if features.dim() != 3 or features.shape[0] < 1 or features.shape[2] < 1:
        raise ValueError(
            f"{op}: features must be (L, B, D) with L and D >= 1, got shape {tuple(features.shape)}"
        )


def _check_like(
    op: str, name: str, tensor: Tensor, features: Tensor, shape: torch.Size, dtype: torch.dtype
) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{op}: {name} must be a {dtype} tensor, got {got}")
    if tensor.shape != shape:
        raise ValueError(f"{op}: {name} must be {tuple(shape)}, got shape {tuple(tensor.shape)}")
    if tensor.device != features.device:
        raise ValueError(f"{op}: {name} must be on {features.device}, got {tensor.device}")


def _check_classes(op: str, features: Tensor, table: ClassTable) -> None:
    _check_features(op, features)
    if not isinstance(table, ClassTable):
        raise TypeError(f"{op}: table must be a ClassTable, got {type(table).__name__}")
    shape = torch.Size((len(table.text), features.shape[2]))
    _check_like(op, "table.text", table.text, features, shape, torch.float32)


def _classes(text: Tensor, scale: float, bias: float, count: Tensor | None = None) -> Classes:
    """Classes of the reference, from distinct rows with counts."""
    group = torch.arange(len(text), device=text.device)
    group = group if count is None else group.repeat_interleave(count)
    classes = object.__new__(Classes)  # without its search for duplicates
    fields = {"text": text[group], "scale": scale, "bias": bias, "distinct": text, "group": group}
    for name, value in fields.items():
        object.__setattr__(classes, name, value)
    return classes


def _reference_drift(features: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
    wide, fixed = features.float(), anchor.float()
    gradient = reference.drift_head(wide, fixed).to(features.dtype)
    return reference.relative_drift(wide[0], fixed), gradient


def _reference_pseudo(
    features: Tensor,
    text: Tensor,
    count: Tensor | None,
    scale: float,
    bias: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = features.float()
    if count is None:
        return reference.pseudo_label(wide, _classes(text, scale, bias), temperature)
    # Cut to present rows; a table without any is kept.
    (rows,) = torch.where((count > 0) | ~count.any())
    count = count[rows].clamp(min=1)
    classes = _classes(text[rows], scale, bias, count)
    each, label, soft = reference.pseudo_label(wide, classes, temperature)
    q = each.new_zeros(len(each), len(text))
    q[:, rows] = each[:, count.cumsum(0) - count]
    return q, rows[classes.group[label]], soft


def _reference_margin(
    features: Tensor, soft: Tensor, label: Tensor, text: Tensor, count: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    rows = torch.arange(len(text), device=text.device)
    # On the CPU alone, without a synchronisation; CUDA then masks no class.
    asked = label.device.type == "cpu" and not torch.compiler.is_compiling()
    if asked and not ((label >= 0) & (label < len(text))).all():
        raise ValueError(f"margin_head: label must be rows of text, below {len(text)}")
    classes = _classes(text, scale, 0.0)
    negatives = rows != label[:, None]
    if count is not None:
        negatives &= count > 0
    value, gradient = reference.margin_head(features.float(), soft, negatives, classes)
    return value, gradient.to(features.dtype)


def _reference_logits(
    features: Tensor, text: Tensor, weights: Tensor | None, scale: float, bias: float, unit: bool
) -> Tensor:
    return reference.mean_logits(features.float(), _classes(text, scale, bias), weights, unit)


def _reference_weights(
    features: Tensor, low: float, high: float, threshold: float, slope: float, geodesic: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.view_weights(features.float(), low, high, threshold, slope, geodesic)


def _fake_drift(features: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
    tau = features.new_empty(features.shape[1], dtype=torch.float32)
    return tau, features.new_empty(features.shape)


def _fake_pseudo(features: Tensor, text: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, width = features.shape[1:]
    return (
        text.new_empty(batch, text.shape[0]),
        text.new_empty(batch, dtype=torch.int64),
        text.new_empty(batch, width),
    )


def _fake_margin(features: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    value = features.new_empty(features.shape[1], dtype=torch.float32)
    return value, features.new_empty(features.shape)


def _fake_logits(features: Tensor, text: Tensor, *rest: Any) -> Tensor:
    return text.new_empty(features.shape[1], text.shape[0])


def _fake_weights(features: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    views, batch = features.shape[:2]
    shapes = ((views, batch), (batch,), (batch,))
    weights, cosine, agreement = (
        features.new_empty(shape, dtype=torch.float32) for shape in shapes
    )
    return weights, cosine, agreement


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, text, weights, ctx.scale, _, ctx.unit = inputs
    ctx.save_for_backward(features, text, weights)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    features, text, weights = ctx.saved_tensors
    if ctx.needs_input_grad[1]:
        raise NotImplementedError("mean_logits: no gradient with respect to text")
    # Differentiable again. ∂cos(f, a)/∂f = (a − (u·a) u)/‖f‖ with a = Σ_k g_k t_k, linear in a.
    wide = features.float()
    norm = wide.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    unit = wide / norm
    direction, given = ctx.scale * (gradient @ text), weights
    if weights is None:
        weights = wide.new_full(wide.shape[:2], 1 / len(wide))
    if ctx.unit:
        whole = (weights[..., None] * unit).sum(dim=0)
        nothing = (whole == 0).all(dim=-1)  # where the first view stands alone
        alone = torch.zeros_like(weights)
        alone[0] = 1.0
        weights = torch.where(nothing, alone, weights)
        length = torch.where(nothing, 1.0, whole.norm(dim=-1)).clamp(min=1e-12)[:, None]
        whole = torch.where(nothing[:, None], unit[0], whole) / length
        direction = (direction - (whole * direction).sum(dim=-1, keepdim=True) * whole) / length
    along = (unit * direction).sum(dim=-1)
    slope = weights[..., None] * (direction - along[..., None] * unit) / norm
    return slope.to(features.dtype), None, None if given is None else along, None, None, None


def _triton() -> ModuleType:
    from scc_fast.kernels import heads

    return heads


_drift = define(
    "drift_head(Tensor features, Tensor anchor) -> (Tensor, Tensor)",
    reference=_reference_drift,
    fake=_fake_drift,
    triton=_triton,
)
_pseudo = define(
    "pseudo_label(Tensor features, Tensor text, Tensor? count, float scale, float bias, "
    "float temperature) -> (Tensor, Tensor, Tensor)",
    reference=_reference_pseudo,
    fake=_fake_pseudo,
    triton=_triton,
)
_margin = define(
    "margin_head(Tensor features, Tensor soft, Tensor label, Tensor text, Tensor? count, "
    "float scale) -> (Tensor, Tensor)",
    reference=_reference_margin,
    fake=_fake_margin,
    triton=_triton,
)
_logits = define(
    "mean_logits(Tensor features, Tensor text, Tensor? weights, float scale, float bias, "
    "bool unit) -> Tensor",
    reference=_reference_logits,
    fake=_fake_logits,
    triton=_triton,
    autograd=(_setup, _backward),
)
_weights = define(
    "view_weights(Tensor features, float low, float high, float threshold, float slope, "
    "bool geodesic) -> (Tensor, Tensor, Tensor)",
    reference=_reference_weights,
    fake=_fake_weights,
    triton=_triton,
)
