"""Heads on features, with gradients in closed form.

With u = f/‖f‖ and unit a, ∂cos(f, a)/∂f = (a − (u·a) u)/‖f‖. No head builds an autograd graph.
Shapes: features (L, B, D), text embeddings (K, D) of unit length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

STILL = 1e-5  # drifts of unit features up to this length are rounding


@dataclass(frozen=True, eq=False)
class Classes:
    """Text embeddings of a zero-shot classifier, with scale and bias.

    Args:
        text: t_k, (K, D) float32, unit length.
        scale: s, the model's logit scale.
        bias: b, 0 except for SigLIP.
    """

    text: Tensor
    scale: float
    bias: float = 0.0
    distinct: Tensor = field(init=False)  # (U, D), different embeddings
    group: Tensor = field(init=False)  # (K,) int64, row of `distinct` of each class

    def __post_init__(self) -> None:
        distinct, group = torch.unique(self.text, dim=0, return_inverse=True)
        object.__setattr__(self, "distinct", distinct)
        object.__setattr__(self, "group", group)

    def negatives(self, label: Tensor) -> Tensor:
        """Negatives (B, K) bool: classes with another text embedding than ŷ (B,)."""
        return self.group != self.group[label, None]


def cosines(features: Tensor, classes: Classes) -> Tensor:
    """cos(f, t_k): (..., D) → (..., K), bit-equal for equal embeddings.

    Each embedding is used once: a matrix product may round equal columns differently.
    """
    unit = F.normalize(features, dim=-1)
    if len(classes.distinct) == len(classes.text):
        return unit @ classes.text.T
    return (unit @ classes.distinct.T)[..., classes.group]


def drift_head(features: Tensor, anchor: Tensor) -> Tensor:
    """∂/∂f of (1/L) Σ_l ‖f_l − f₀‖²: (L, B, D) with f₀ (B, D)."""
    return 2 * (features - anchor) / len(features)


def relative_drift(features: Tensor, anchor: Tensor) -> Tensor:
    """τ = ‖f − f₀‖₂ / ‖f₀‖₂ per image: (B, D), (B, D) → (B,)."""
    return (features - anchor).norm(dim=-1) / anchor.norm(dim=-1)


def logits(features: Tensor, classes: Classes) -> Tensor:
    """s·cos(f, t_k) + b: (..., D) → (..., K)."""
    return classes.scale * cosines(features, classes) + classes.bias


def mean_logits(
    features: Tensor, classes: Classes, weights: Tensor | None = None, unit: bool = False
) -> Tensor:
    """Mean of the logits over the views: (L, B, D) → (B, K).

    Args:
        weights: w_l, (L, B), of each view of each image; None: 1/L. need not sum to 1.
        unit: normalise z = Σ_l w_l u_l; u_1 for z = 0.
    """
    if weights is None and not unit:
        return logits(features, classes).mean(dim=0)
    units = F.normalize(features, dim=-1)
    whole = units.mean(dim=0) if weights is None else (weights[..., None] * units).sum(dim=0)
    if unit:
        nothing = (whole == 0).all(dim=-1, keepdim=True)
        whole = F.normalize(torch.where(nothing, units[0], whole), dim=-1)
    table = classes.distinct if len(classes.distinct) < len(classes.text) else classes.text
    found = classes.scale * (whole @ table.T) + classes.bias
    return found if table is classes.text else found[..., classes.group]


def mean_weights(views: int, strength: float) -> tuple[float, ...] | None:
    """Weights of u_1 + c·(mean of all u_l − u_1), common to all images; None for c = 1."""
    if strength == 1:
        return None
    return (1 - strength * (views - 1) / views, *([strength / views] * (views - 1)))


def view_weights(
    features: Tensor,
    low: float,
    high: float,
    threshold: float,
    slope: float = math.inf,
    geodesic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of METHOD.md's view extrapolation, with the measures that choose them.

    z = Σ_l w_l u_l with w_1 = 1 − c and w_l = c/(L − 1), u_1 being the picture's own. c is `high`
    where the drifts u_l − u_1 agree (r above `threshold`), else `low`; a finite `slope` replaces
    the switch by a sigmoid. `geodesic` is AGC's arc (arXiv 2605.15584): β from
    `low` to `high` by its score, z at the angle βθ from u_1 towards the others' mean.

    Args:
        features: (L, B, D), L >= 2.

    Returns:
        w (L, B); a (B,), the mean cosine of the picture with its views; and r (B,), the mean
        cosine of the views' drifts with their mean, where a drift within rounding counts as 0.
    """
    units = F.normalize(features, dim=-1)
    own, others, count = units[0], units[1:], len(units) - 1
    mean = others.mean(dim=0)
    cosine = (own * mean).sum(dim=-1)
    drifts, along = others - own, mean - own
    sizes = drifts.norm(dim=-1)
    scales = (sizes * along.norm(dim=-1)).clamp_min(STILL**2)
    cosines = (drifts * along).sum(dim=-1) / scales * ~(sizes <= STILL)
    agreement = cosines.mean(dim=0).clamp(-1, 1)  # rounding brings it beyond
    if geodesic:
        first, rest = _geodesic(own, mean, cosine, count, low, high)
    else:
        part = (agreement > threshold).to(units)
        if slope < math.inf:
            part = torch.sigmoid(slope * (agreement - threshold))
        c = low + (high - low) * part
        first, rest = 1 - c, c
    return torch.cat([first[None], (rest / count).expand(count, -1)]), cosine, agreement


def _geodesic(
    own: Tensor, mean: Tensor, cosine: Tensor, count: int, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Weights (B,) of u_1 and of the mean m of the others: (cos βθ − sin βθ/tan θ), sin βθ/(…).

    With a = m/‖m‖ and p = ⟨u_1, a⟩ = cos θ: z = cos(βθ) u_1 + sin(βθ) (a − p u_1)/‖a − p u_1‖.
    """
    length = mean.norm(dim=-1).clamp_min(1e-12)
    p = cosine / length
    side = (mean / length[:, None] - p[:, None] * own).norm(dim=-1)  # sin θ
    between = (count * length.square() - 1) / max(count - 1, 1)  # mean cosine of two views
    tight = ((between + 1) / 2).clamp(0, 1)
    score = ((1 - cosine).clamp(1e-30, 1) ** 0.9 * tight).clamp(0, 1)
    beta = low + (high - low) * score
    theta = torch.atan2(side, p)
    still = side < 1e-6  # no angle, or that of opposite ones, whose arc has no direction
    sine = torch.sin(beta * theta) / torch.where(still, 1.0, side)
    first = torch.where(still, 1.0, torch.cos(beta * theta) - sine * p)
    return first, torch.where(still, 0.0, sine / length)


def pseudo_label(
    features: Tensor, classes: Classes, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Soft pseudo-label of the views.

    Returns:
        q: (B, K), the mean of the views' softmax, sharpened by 1/T.
        ŷ: (B,) int64, the first maximiser of q.
        t_soft: (B, D), Σ_k q_k t_k scaled to unit length.
    """
    mean = logits(features, classes).softmax(dim=-1).mean(dim=0)
    q = torch.softmax(mean.log() / temperature, dim=-1)  # q̄^(1/T)/Σ, without underflow
    return q, q.argmax(dim=-1), F.normalize(q @ classes.text, dim=-1)


def margin_head(
    features: Tensor, soft: Tensor, negatives: Tensor, classes: Classes
) -> tuple[Tensor, Tensor]:
    """Semantic margin times s, and its gradient.

    J = (s/L) Σ_l [cos(f_l, t_soft) − max_{k ∈ negatives} cos(f_l, t_k)]. The factor s keeps
    half precision from underflowing. Without negatives the maximum is a constant.

    Args:
        features: (L, B, D).
        soft: t_soft, (B, D), unit length.
        negatives: (B, K) bool.

    Returns:
        J (B,) and ∂J/∂f (L, B, D).
    """
    norm = features.norm(dim=-1, keepdim=True)
    unit = features / norm
    hardest = cosines(features, classes).masked_fill(~negatives, -2.0).argmax(dim=-1)
    exists = negatives.any(dim=-1)[:, None]
    difference = soft - classes.text[hardest] * exists  # (L, B, D)
    along = (unit * difference).sum(dim=-1, keepdim=True)
    factor = classes.scale / len(features)
    return factor * along.sum(dim=0)[:, 0], factor * (difference - along * unit) / norm
