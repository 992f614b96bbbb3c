"""The heads: what is computed from features, each with its gradient in closed form.

With u = f/‖f‖ and unit a, ∂cos(f, a)/∂f = (a − (u·a) u)/‖f‖. No head builds an autograd graph.
Shapes: features (L, B, D), text embeddings (K, D) of unit length.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Classes:
    """The text side of a zero-shot classifier.

    Args:
        text: t_k, (K, D) float32, unit length.
        scale: s, the model's logit scale.
        bias: b, 0 but for SigLIP.
    """

    text: Tensor
    scale: float
    bias: float = 0.0
    distinct: Tensor = field(init=False)  # (U, D), the different embeddings among the K
    group: Tensor = field(init=False)  # (K,) int64, the row of `distinct` each class has

    def __post_init__(self) -> None:
        distinct, group = torch.unique(self.text, dim=0, return_inverse=True)
        object.__setattr__(self, "distinct", distinct)
        object.__setattr__(self, "group", group)

    def negatives(self, label: Tensor) -> Tensor:
        """(B, K) bool: the classes whose text embedding differs from that of ŷ (B,)."""
        return self.group != self.group[label, None]


def cosines(features: Tensor, classes: Classes) -> Tensor:
    """cos(f, t_k): (..., D) → (..., K), equal to the bit where embeddings are equal.

    A matrix product may round equal columns differently, so each is computed once.
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


def mean_logits(features: Tensor, classes: Classes) -> Tensor:
    """Mean of the logits over the views: (L, B, D) → (B, K)."""
    return logits(features, classes).mean(dim=0)


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
    """The semantic margin times s, and its gradient.

    J = (s/L) Σ_l [cos(f_l, t_soft) − max_{k ∈ negatives} cos(f_l, t_k)]. The factor s leaves the
    sign alone and keeps half precision from underflowing. Where no negative is left the maximum
    counts as a constant.

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
