"""Projected sign step, from the gradient of the views to the new δ (METHOD.md, TTC step 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from scc_fast.config import View, shown
from scc_fast.ops import define
from scc_fast.ops.views import as_views, check_gradient, check_pixels, check_views
from scc_fast.reference import step as reference
from scc_fast.reference import views as reference_views


def pgd_step_(
    delta: Tensor,
    gradient: Tensor,
    x: Tensor,
    seeds: Tensor,
    views: Sequence[View],
    *,
    alpha: float,
    epsilon: float,
    weighted: Tensor | None = None,
    weight: float = 0.0,
    patch: int = 0,
    backend: str | None = None,
) -> None:
    """Ascent step in place: δ ← Π(δ + α · sign(g)), and weighted ← weighted + weight · δ.

    g is the sum of the views' gradients, unflipped and shifted back. Division by std and by the
    number of views is omitted: it does not change the sign. sign(0) = 0.

    Args:
        delta: δ, (B, 3, H, W) float32, contiguous; overwritten.
        gradient: of the objective with respect to the result of make_views for this δ; float32,
            float16 or bfloat16.
        x: (B, 3, H, W) float32, pixels in [0, 1].
        seeds, views, patch: as in make_views.
        alpha: α, the step, pixel units.
        epsilon: ε, the L∞ budget, pixel units.
        weighted: running Σ_t w_t δᵗ like δ, overwritten; None: no sum.
        weight: w_{t+1} of the new δ.
        backend: "reference", "cpp", "triton"; None: the device's best.

    Raises:
        TypeError, ValueError: an invalid argument.
        RuntimeError: the requested backend is not available.
    """
    check_pixels("pgd_step_", delta=delta, x=x, weighted=weighted)
    plan, noise = check_views("pgd_step_", delta, seeds, views, patch)
    check_gradient("pgd_step_", gradient, delta, len(views), patch)
    for name, tensor in (("delta", delta), ("weighted", weighted)):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(
                f"pgd_step_: {name} is written in place and must be contiguous, got strides "
                f"{tensor.stride()}"
            )
    for name, value in (("alpha", alpha), ("epsilon", epsilon), ("weight", weight)):
        if not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(f"pgd_step_: {name} must be a finite number >= 0, got {shown(value)}")
    for name, tensor in (("delta", delta), ("weighted", weighted)):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"pgd_step_: {name} is written in place and must not require grad")
    scalars = (float(alpha), float(epsilon), float(weight))
    _step(delta.device, backend, delta, weighted, gradient, x, seeds, plan, noise, *scalars, patch)
    if not torch.compiler.is_compiling():  # invalidates what autograd has saved
        for tensor in (delta, weighted):
            if tensor is not None and not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)


def _reference(
    delta: Tensor,
    weighted: Tensor | None,
    gradient: Tensor,
    x: Tensor,
    seeds: Tensor,
    plan: Sequence[int],
    noise: Sequence[float],
    alpha: float,
    epsilon: float,
    weight: float,
    patch: int,
) -> None:
    gradient = gradient.float()
    if patch:
        gradient = reference_views.from_patches(gradient, patch, (x.shape[-2], x.shape[-1]))
    seen = gradient.unflatten(0, (len(noise), len(x)))
    views = as_views(plan, noise)
    whole = reference_views.make_views_adjoint(seen, x + delta, seeds, views)
    delta.copy_(reference.pgd_step(delta, whole, x, alpha, epsilon))
    if weighted is not None:
        weighted.add_(weight * delta)


def _fake(*arguments: Any) -> None:
    return None


def _triton() -> ModuleType:
    from scc_fast.kernels import step

    return step


_step = define(
    "pgd_step_(Tensor(a!) delta, Tensor(b!)? weighted, Tensor gradient, Tensor x, Tensor seeds, "
    "int[] plan, float[] noise, float alpha, float epsilon, float weight, int patch) -> ()",
    reference=_reference,
    fake=_fake,
    triton=_triton,
)
