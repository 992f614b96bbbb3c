"""TTC, test-time counterattack; also SCC's warm-up.

Xing et al., "CLIP is Strong Enough to Fight Back", CVPR 2025 (arXiv 2503.03613).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scc_fast.config import IDENTITY, TTCConfig, View
from scc_fast.reference import heads, step
from scc_fast.reference.heads import Classes
from scc_fast.reference.views import make_views

# f∘φ: pixels (B, 3, H, W) in [0, 1] to un-normalised embeddings (B, D).
Encode = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Setting:
    """Setting of a method: frozen encoder, classes, fill of a shifted view."""

    encode: Encode
    classes: Classes
    fill: Tensor  # (3,), the normalisation mean


@dataclass(frozen=True, eq=False)
class Outcome:
    """Outcome of a method, per image."""

    logits: Tensor  # (B, K)
    delta: Tensor  # (B, 3, H, W)
    drift: Tensor  # τ (B,); NaN if not measured
    flagged: Tensor  # (B,) bool: counts as attacked, repaired


def look(setting: Setting, x: Tensor, seeds: Tensor, views: Sequence[View]) -> Tensor:
    """Features of the views of x: (L, B, D)."""
    seen = make_views(x, seeds, views, setting.fill)
    return setting.encode(seen.flatten(0, 1)).unflatten(0, seen.shape[:2])


def look_at(
    setting: Setting, x: Tensor, delta: Tensor, seeds: Tensor, views: Sequence[View]
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Features of the views of x + δ, and the map from ∂J/∂f (L, B, D) to ∂J/∂δ."""
    with torch.enable_grad():
        leaf = delta.detach().requires_grad_()
        features = look(setting, x.detach() + leaf, seeds, views)

    def pull_back(gradient: Tensor) -> Tensor:
        return torch.autograd.grad(features, leaf, gradient)[0]

    return features.detach(), pull_back


@dataclass(frozen=True, eq=False)
class Counterattack:
    """Result of the warm-up; `features` of the views of x + δ⁰, (L, B, D)."""

    delta: Tensor
    drift: Tensor
    flagged: Tensor
    features: Tensor


def counterattack(
    setting: Setting,
    x: Tensor,
    seeds: Tensor,
    views: Sequence[View],
    config: TTCConfig,
    gate: bool = True,
) -> Counterattack:
    """Steps 1 to 4 of TTC, with the drift averaged over views (step 1 of SCC).

    An image with τ ≥ τ* keeps δ⁰.
    """
    delta0 = step.initial_delta(x, seeds, config.epsilon)
    with torch.no_grad():
        anchor = setting.encode(x)
    features0, pull_back = look_at(setting, x, delta0, seeds, views)
    drift = heads.relative_drift(features0[0], anchor)
    flagged = drift < config.tau if gate else torch.ones_like(drift, dtype=torch.bool)
    if config.steps == 0 or not flagged.any():
        return Counterattack(delta0, drift, flagged, features0)

    weights = step.iterate_weights(config.steps, config.beta).to(x.device)
    gradient = pull_back(heads.drift_head(features0, anchor))[flagged]
    x, seeds, anchor, delta = x[flagged], seeds[flagged], anchor[flagged], delta0[flagged]
    weighted = weights[0] * delta
    for t in range(config.steps):
        if t > 0:
            features, pull_back = look_at(setting, x, delta, seeds, views)
            gradient = pull_back(heads.drift_head(features, anchor))
        delta = step.pgd_step(delta, gradient, x, config.alpha, config.epsilon)
        weighted = weighted + weights[t + 1] * delta
    return Counterattack(merge(delta0, flagged, weighted), drift, flagged, features0)


def merge(all_rows: Tensor, flagged: Tensor, flagged_rows: Tensor) -> Tensor:
    """`all_rows` with the flagged rows replaced."""
    return all_rows.index_put((flagged,), flagged_rows)


def predict(
    setting: Setting,
    x: Tensor,
    seeds: Tensor,
    views: Sequence[View],
    warm: Counterattack,
    strength: float = 1.0,
) -> Tensor:
    """Mean logits over the views (B, K); reuses the features of images left at δ⁰."""
    logits = mean_logits(warm.features, setting.classes, strength)
    rows = warm.flagged
    if torch.is_grad_enabled():  # under autograd all images need a live pass
        rows = torch.ones_like(rows)
    if not rows.any():
        return logits
    repaired = look(setting, (x + warm.delta)[rows], seeds[rows], views)
    return merge(logits, rows, mean_logits(repaired, setting.classes, strength))


def mean_logits(features: Tensor, classes: Classes, strength: float) -> Tensor:
    """Mean logits (B, K) of features (L, B, D), extrapolated by heads.mean_weights."""
    weights = heads.mean_weights(len(features), strength)
    each = None if weights is None else features.new_tensor(weights)[:, None]
    return heads.mean_logits(features, classes, each)


def ttc(setting: Setting, x: Tensor, seeds: Tensor, config: TTCConfig) -> Outcome:
    """TTC: x (B, 3, H, W) in [0, 1], seeds (B,) int64."""
    warm = counterattack(setting, x, seeds, (IDENTITY,), config)
    logits = predict(setting, x, seeds, (IDENTITY,), warm)
    return Outcome(logits, warm.delta, warm.drift, warm.flagged)
