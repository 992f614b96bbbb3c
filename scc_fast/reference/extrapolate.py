"""View extrapolation (METHOD.md): on in the direction in which a picture's views moved."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scc_fast.config import View
from scc_fast.reference import heads
from scc_fast.reference.ttc import Outcome, Setting, look


def extrapolate(
    setting: Setting,
    x: Tensor,
    seeds: Tensor,
    views: Sequence[View],
    *,
    low: float,
    high: float,
    threshold: float,
    slope: float,
    geodesic: bool,
) -> Outcome:
    """View extrapolation: x (B, 3, H, W) in [0, 1], L >= 2 views; rule as in view_weights."""
    features = look(setting, x, seeds, views)
    rule = (low, high, threshold, slope, geodesic)
    weights, cosine, agreement = heads.view_weights(features, *rule)
    logits = heads.mean_logits(features, setting.classes, weights, unit=True)
    flagged = agreement > threshold
    return Outcome(logits, torch.zeros_like(x), cosine.detach(), flagged)
