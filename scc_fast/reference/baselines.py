"""Controls: no defense, random noise, and views without a perturbation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scc_fast.config import IDENTITY, RNConfig, View
from scc_fast.reference import step
from scc_fast.reference.ttc import Outcome, Setting, look, mean_logits


def none(setting: Setting, x: Tensor, seeds: Tensor) -> Outcome:
    """Prediction of the model."""
    return _outcome(setting, x, seeds, (IDENTITY,), torch.zeros_like(x))


def rn(setting: Setting, x: Tensor, seeds: Tensor, config: RNConfig) -> Outcome:
    """Uniform noise: TTC with zero steps, and with the same noise."""
    delta = step.initial_delta(x, seeds, config.epsilon)
    return _outcome(setting, x, seeds, (IDENTITY,), delta)


def views(
    setting: Setting, x: Tensor, seeds: Tensor, views: Sequence[View], strength: float = 1.0
) -> Outcome:
    """Mean logits over SCC's views."""
    return _outcome(setting, x, seeds, views, torch.zeros_like(x), strength)


def _outcome(
    setting: Setting,
    x: Tensor,
    seeds: Tensor,
    views: Sequence[View],
    delta: Tensor,
    strength: float = 1.0,
) -> Outcome:
    logits = mean_logits(look(setting, x + delta, seeds, views), setting.classes, strength)
    drift = x.new_full((len(x),), torch.nan)
    return Outcome(logits, delta, drift, torch.zeros(len(x), dtype=torch.bool, device=x.device))
