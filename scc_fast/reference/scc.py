"""SCC, self-calibrated consistency.

Liu et al., "Self-Calibrated Consistency can Fight Back for Adversarial Robustness in
Vision-Language Models", ICML 2026 (arXiv 2510.22785). Numbers are METHOD.md's steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from scc_fast.config import IDENTITY, SCCConfig, TTCConfig, View
from scc_fast.reference import heads, step
from scc_fast.reference.ttc import (
    Outcome,
    Setting,
    counterattack,
    look_at,
    merge,
    predict,
)


def scc(
    setting: Setting, x: Tensor, seeds: Tensor, views: Sequence[View], config: SCCConfig
) -> Outcome:
    """SCC: x (B, 3, H, W) in [0, 1], seeds (B,) int64, L views."""
    if not config.spatial:
        views = (IDENTITY,)

    # 1. Warm-up, and 5. the gate.
    warm_up = TTCConfig(
        epsilon=config.epsilon,
        alpha=config.alpha,
        steps=config.warmup_steps,
        beta=config.beta,
        tau=config.tau,
    )
    warm = counterattack(setting, x, seeds, views, warm_up, config.gate)

    # 2. and 3. Pseudo-label, then semantic steps, on flagged images.
    rows = warm.flagged
    if config.semantic and rows.any():
        delta = semantic_steps(setting, x[rows], warm.delta[rows], seeds[rows], views, config)
        warm = replace(warm, delta=merge(warm.delta, rows, delta))

    # 4. Prediction.
    logits = predict(setting, x, seeds, views, warm, config.strength)
    return Outcome(logits, warm.delta, warm.drift, warm.flagged)


def semantic_steps(
    setting: Setting,
    x: Tensor,
    delta: Tensor,
    seeds: Tensor,
    views: Sequence[View],
    config: SCCConfig,
) -> Tensor:
    """S ascent steps on the margin between t_soft and the hardest negative, from δ_w.

    The pseudo-label shares the first step's forward pass.
    """
    for s in range(config.semantic_steps):
        features, pull_back = look_at(setting, x, delta, seeds, views)
        if s == 0:
            _, label, soft = heads.pseudo_label(features, setting.classes, config.temperature)
            negatives = setting.classes.negatives(label)
        _, gradient = heads.margin_head(features, soft, negatives, setting.classes)
        delta = step.pgd_step(delta, pull_back(gradient), x, config.alpha, config.epsilon)
    return delta
