"""Perturbation: start, projected sign step, and weights of iterates."""

from __future__ import annotations

import torch
from torch import Tensor

from scc_fast.reference import philox


def project(delta: Tensor, x: Tensor, epsilon: float) -> Tensor:
    """Π(δ): clamp to the ball, then keep x + δ in the box [0, 1]; all (B, 3, H, W) float32."""
    return (x + delta.clamp(-epsilon, epsilon)).clamp(0, 1) - x


def initial_delta(x: Tensor, seeds: Tensor, epsilon: float) -> Tensor:
    """δ⁰ = Π(uniform(−ε, ε)), from each image's stream."""
    noise = 2 * philox.uniform_like(x, seeds, philox.DELTA) - 1  # exact in float32
    return project(noise * epsilon, x, epsilon)


def pgd_step(delta: Tensor, gradient: Tensor, x: Tensor, alpha: float, epsilon: float) -> Tensor:
    """Ascent step Π(δ + α·sign(g)), with sign(0) = 0."""
    return project(delta + alpha * gradient.sign(), x, epsilon)


def iterate_weights(steps: int, beta: float) -> Tensor:
    """w_t = exp(βt) / Σ_j exp(βj) for t = 0…N: (N + 1,) float32."""
    return torch.softmax(beta * torch.arange(steps + 1, dtype=torch.float64), dim=0).float()
