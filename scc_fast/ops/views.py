"""Views of a batch in the encoder's layout, and their adjoint (METHOD.md, "Views" and φ)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from scc_fast.config import View, shown
from scc_fast.ops import define
from scc_fast.reference import views as reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Channels = Sequence[float]  # per colour channel


def make_views(
    x: Tensor,
    delta: Tensor | None,
    seeds: Tensor,
    views: Sequence[View],
    *,
    mean: Channels = (0.0, 0.0, 0.0),
    std: Channels = (1.0, 1.0, 1.0),
    fill: Channels | None = None,
    dtype: torch.dtype = torch.float32,
    patch: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Normalised views of x + δ, in one pass over x and δ.

    (v_l(x + δ) − mean) / std, where v_l shifts, then flips, then adds σ · noise and clamps to
    [0, 1]. Differentiable once, in reverse mode, with respect to x and δ; the clamp's gradient
    is 1 where the noisy pixel is in [0, 1].

    Args:
        x: (B, 3, H, W) float32, pixels in [0, 1].
        delta: δ like x, or None for zero.
        seeds: (B,) int64; a view's noise is philox_normal of (seed, view).
        views: L >= 1 views.
        mean, std: three numbers each, pixel units; the defaults are the identity.
        fill: of pixels uncovered by a shift, three numbers, pixel units; None: mean.
        dtype: of the result: float32, float16 or bfloat16. The arithmetic is float32.
        patch: 0: pictures. p > 0: rows for a p × p patch embedding, (c, i, j) per patch, patches
            row by row; a remainder at the right and bottom is dropped, as by a convolution of
            stride p.
        backend: "reference", "cpp", "triton"; None: the device's best.

    Returns:
        (L·B, 3, H, W), view by view; or (L·B, (H div p)·(W div p), 3·p·p).

    Raises:
        TypeError, ValueError: an invalid argument.
        RuntimeError: the requested backend is not available.
    """
    check_pixels("make_views", x=x, delta=delta)
    plan, noise = check_views("make_views", x, seeds, views, patch)
    if dtype not in DTYPES:
        raise TypeError(f"make_views: dtype must be one of {DTYPES}, got {dtype}")
    mean, std = channels("make_views", "mean", mean), channels("make_views", "std", std)
    fill = mean if fill is None else channels("make_views", "fill", fill)
    return _views(x.device, backend, x, delta, seeds, plan, noise, fill, mean, std, dtype, patch)


def make_views_adjoint(
    gradient: Tensor,
    x: Tensor,
    delta: Tensor | None,
    seeds: Tensor,
    views: Sequence[View],
    *,
    std: Channels = (1.0, 1.0, 1.0),
    patch: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Gradient with respect to x (and δ) from that with respect to the views.

    Args:
        gradient: shaped like the result of make_views; float32, float16 or bfloat16.
        x, delta, seeds, views, std, patch: as in make_views.
        backend: as there.

    Returns:
        (B, 3, H, W) float32: Σ_l of the gradients, unflipped and shifted back, over std.

    Raises:
        as make_views.
    """
    op = "make_views_adjoint"
    check_pixels(op, x=x, delta=delta)
    plan, noise = check_views(op, x, seeds, views, patch)
    check_gradient(op, gradient, x, len(views), patch)
    std = channels(op, "std", std)
    return _adjoint(x.device, backend, gradient, x, delta, seeds, plan, noise, std, patch)


def check_pixels(op: str, **tensors: Tensor | None) -> None:
    """Check that the first is float32 (B, 3, H, W), and the others equal in shape, or None."""
    (first, x), *others = tensors.items()
    for name, tensor in tensors.items():
        if (tensor is not None or name == "x") and not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if x is None or x.dim() != 4 or x.shape[1] != 3:
        shape = None if x is None else tuple(x.shape)
        raise ValueError(f"{op}: {first} must be (B, 3, H, W), got shape {shape}")
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != torch.float32:
            raise TypeError(f"{op}: {name} must be float32, got {tensor.dtype}")
    for name, tensor in others:
        if tensor is None:
            continue
        if tensor.shape != x.shape:
            shapes = f"{tuple(x.shape)}, got shape {tuple(tensor.shape)}"
            raise ValueError(f"{op}: {name} must have the shape of {first}, {shapes}")
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} must be on {x.device}, got {tensor.device}")


def check_views(
    op: str, x: Tensor, seeds: Tensor, views: Sequence[View], patch: int
) -> tuple[list[int], list[float]]:
    """Views as arguments of ops: (flip, down, right) and σ of each."""
    if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64:
        got = seeds.dtype if isinstance(seeds, Tensor) else type(seeds).__name__
        raise TypeError(f"{op}: seeds must be an int64 tensor, got {got}")
    if seeds.shape != x.shape[:1]:
        raise ValueError(f"{op}: seeds must be ({len(x)},), got shape {tuple(seeds.shape)}")
    if seeds.device != x.device:
        raise ValueError(f"{op}: seeds must be on {x.device}, got {seeds.device}")
    if not isinstance(views, list | tuple) or not all(isinstance(view, View) for view in views):
        raise TypeError(f"{op}: views must be a list or tuple of View, got {shown(views)}")
    if not views:
        raise ValueError(f"{op}: views must hold at least one view, got none")
    for view in views:
        if any(isinstance(part, float) for part in view.shift):
            raise ValueError(
                f"{op}: views must be shifted by whole pixels, got {shown(view.shift)}: "
                "scc_fast.config.resolve_views makes them of shares"
            )
    check_patch(op, patch, (x.shape[-2], x.shape[-1]))
    plan = [number for view in views for number in (int(view.flip), *view.shift)]
    return plan, [float(view.noise) for view in views]


def check_patch(op: str, patch: int, size: Sequence[int]) -> None:
    """Check the patch of views (height, width)."""
    if not isinstance(patch, int) or isinstance(patch, bool):
        raise TypeError(f"{op}: patch must be an int, got {shown(patch)}")
    if not 0 <= patch <= min(size):
        raise ValueError(f"{op}: patch must be in [0, {min(size)}], got {patch}")


def check_gradient(op: str, gradient: Tensor, x: Tensor, count: int, patch: int) -> None:
    """Check the gradient of `count` views of x."""
    if not isinstance(gradient, Tensor) or gradient.dtype not in DTYPES:
        got = gradient.dtype if isinstance(gradient, Tensor) else type(gradient).__name__
        raise TypeError(f"{op}: gradient must be a tensor of {DTYPES}, got {got}")
    shape = views_shape(x, count, patch)
    if tuple(gradient.shape) != shape:
        raise ValueError(f"{op}: gradient must be {shape}, got shape {tuple(gradient.shape)}")
    if gradient.device != x.device:
        raise ValueError(f"{op}: gradient must be on {x.device}, got {gradient.device}")


def views_shape(x: Tensor, count: int, patch: int) -> tuple[int, ...]:
    """Shape of `count` views of x."""
    batch, colours, height, width = x.shape
    if patch == 0:
        return (count * batch, colours, height, width)
    return (count * batch, (height // patch) * (width // patch), colours * patch * patch)


def as_views(plan: Sequence[int], noise: Sequence[float]) -> tuple[View, ...]:
    """Inverse of check_views."""
    return tuple(
        View(bool(plan[3 * i]), (plan[3 * i + 1], plan[3 * i + 2]), sigma)
        for i, sigma in enumerate(noise)
    )


def channels(op: str, name: str, values: Channels) -> list[float]:
    """Three finite numbers, and of std above 0."""
    given = list(values) if isinstance(values, Sequence) else []
    # Dynamo traces a comparison of symbolic floats, not math.isfinite.
    good = all(isinstance(value, int | float) and abs(value) < math.inf for value in given)
    if len(given) != 3 or not good:
        raise ValueError(f"{op}: {name} must be three numbers, got {shown(values)}")
    if name == "std" and min(given) <= 0:
        raise ValueError(f"{op}: std must be above 0, got {shown(values)}")
    return [float(value) for value in given]


def _reference(
    x: Tensor,
    delta: Tensor | None,
    seeds: Tensor,
    plan: Sequence[int],
    noise: Sequence[float],
    fill: Sequence[float],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    patch: int,
) -> Tensor:
    pixels = x.clone() if delta is None else x + delta
    seen = reference.make_views(pixels, seeds, as_views(plan, noise), x.new_tensor(fill))
    size = (x.shape[-2], x.shape[-1])
    seen = reference.preprocess(seen.flatten(0, 1), size, x.new_tensor(mean), x.new_tensor(std))
    return (reference.to_patches(seen, patch) if patch else seen).to(dtype)


def _reference_adjoint(
    gradient: Tensor,
    x: Tensor,
    delta: Tensor | None,
    seeds: Tensor,
    plan: Sequence[int],
    noise: Sequence[float],
    std: Sequence[float],
    patch: int,
) -> Tensor:
    pixels = x if delta is None else x + delta
    gradient = gradient.float()
    if patch:
        gradient = reference.from_patches(gradient, patch, (x.shape[-2], x.shape[-1]))
    seen = gradient.unflatten(0, (len(noise), len(x)))
    whole = reference.make_views_adjoint(seen, pixels, seeds, as_views(plan, noise))
    return whole / x.new_tensor(std).view(3, 1, 1)


def _fake(
    x: Tensor,
    delta: Tensor | None,
    seeds: Tensor,
    plan: Sequence[int],
    noise: Sequence[float],
    fill: Sequence[float],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    patch: int,
) -> Tensor:
    if delta is not None and delta.device != x.device:
        raise ValueError(f"make_views: delta must be on {x.device}, got {delta.device}")
    return x.new_empty(views_shape(x, len(noise), patch), dtype=dtype)


def _fake_adjoint(gradient: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, delta, seeds, plan, noise, _, _, std, _, patch = inputs
    ctx.save_for_backward(x, delta, seeds)
    ctx.rest = (plan, noise, std, patch)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    # once_differentiable raises in .backward() alone: autograd.grad() would leave the term out.
    if torch.is_grad_enabled() and gradient.requires_grad:
        raise NotImplementedError("make_views: differentiable once, got create_graph=True")
    x, delta, seeds = ctx.saved_tensors
    whole = _adjoint(x.device, None, gradient, x, delta, seeds, *ctx.rest)
    wanted = ctx.needs_input_grad
    both = (whole if wanted[0] else None, whole if wanted[1] else None)
    return (*both, *[None] * 8)


def _triton() -> ModuleType:
    from scc_fast.kernels import views

    return views


_adjoint = define(
    "make_views_adjoint(Tensor gradient, Tensor x, Tensor? delta, Tensor seeds, int[] plan, "
    "float[] noise, float[] std, int patch) -> Tensor",
    reference=_reference_adjoint,
    fake=_fake_adjoint,
    triton=_triton,
)
_views = define(
    "make_views(Tensor x, Tensor? delta, Tensor seeds, int[] plan, float[] noise, float[] fill, "
    "float[] mean, float[] std, ScalarType dtype, int patch) -> Tensor",
    reference=_reference,
    fake=_fake,
    triton=_triton,
    autograd=(_setup, _backward),
)
