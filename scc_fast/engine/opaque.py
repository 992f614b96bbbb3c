"""Opaque functions for torch.func: value and gradient as custom autograd functions.

torch.func cannot trace a defense, but its value and gradient are functions of the pictures, image
by image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# (pictures, seeds) -> tensor, image by image, differentiable by autograd.
Function = Callable[[Tensor, Tensor], Tensor]

NO_GRAPH = (
    "a defense cannot be traced, scripted or exported: it optimises for each image; call the object"
)
_FORWARD = (
    "a defense has no forward-mode derivatives (torch.func.jvp, jacfwd, hessian, dual numbers): "
    "use torch.func.grad, vjp or jacrev"
)
_TWICE = "a defense has only first derivatives under torch.func: use torch.func.grad, vjp, jacrev"


def check_caller(images: object) -> None:
    """Reject tracing, export, and forward-mode derivatives."""
    traced = torch.jit.is_tracing() or torch.compiler.is_exporting()
    if traced or isinstance(images, torch.fx.Proxy):
        raise TypeError(NO_GRAPH)
    if forward_ad._current_level >= 0:
        raise TypeError(_FORWARD)


def transformed() -> bool:
    """Whether a torch.func transform is active."""
    return torch._C._are_functorch_transforms_active()  # as torch.autograd.Function does


def opaque(function: Function, x: Tensor, seeds: Tensor) -> Tensor:
    """function(x, seeds) under torch.func's grad, vjp, jacrev and vmap."""
    result: Tensor = _Value.apply(function, x, seeds)
    return result


class _Opaque(torch.autograd.Function):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise TypeError(_FORWARD)

    @classmethod
    def rows(cls, info: Any, dims: Any, function: Function, *given: Tensor) -> tuple[Tensor, int]:
        """Batching rule of vmap: flatten into one batch."""
        held = [
            one.expand(info.batch_size, *one.shape) if dim is None else one.movedim(dim, 0)
            for one, dim in zip(given, dims[1:], strict=True)
        ]
        found = cls.apply(function, *(one.flatten(0, 1) for one in held))
        return found.unflatten(0, held[0].shape[:2]), 0


class _Value(_Opaque):
    @staticmethod
    def forward(function: Function, x: Tensor, seeds: Tensor) -> Tensor:
        with torch.no_grad():
            return function(x, seeds)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.function, *given = inputs
        ctx.save_for_backward(*given)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[None, Tensor, None]:
        return None, _Slope.apply(ctx.function, *ctx.saved_tensors, slope), None

    @staticmethod
    def vmap(info: Any, dims: Any, *given: Any) -> tuple[Tensor, int]:
        return _Value.rows(info, dims, *given)


class _Slope(_Opaque):
    @staticmethod
    def forward(function: Function, x: Tensor, seeds: Tensor, slope: Tensor) -> Tensor:
        check_caller(x)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(function(leaf, seeds), leaf, slope)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        raise TypeError(_TWICE)

    @staticmethod
    def vmap(info: Any, dims: Any, *given: Any) -> tuple[Tensor, int]:
        return _Slope.rows(info, dims, *given)
