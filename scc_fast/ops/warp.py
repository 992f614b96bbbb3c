"""Views of a batch through projective maps, as the encoder takes them."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from scc_fast.config import shown
from scc_fast.ops import define
from scc_fast.ops.views import DTYPES, Channels, channels, check_patch, check_pixels, views_shape
from scc_fast.reference import views as views_reference
from scc_fast.reference import warp as reference

MODES = ("bilinear", "bicubic")


def warp_views(
    x: Tensor,
    matrix: Tensor,
    *,
    size: tuple[int, int] | None = None,
    mode: str = "bilinear",
    box: Tensor | None = None,
    fill: Channels | None = None,
    antialias: bool = False,
    mean: Channels = (0.0, 0.0, 0.0),
    std: Channels = (1.0, 1.0, 1.0),
    dtype: torch.dtype = torch.float32,
    patch: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Crops, zooms, turns and perspectives of pictures, sampled and normalised in one pass.

    (w_vb(x_b) − mean) / std; scc_fast.reference.warp states w, and is what to call for a gradient:
    here the arguments are constants.

    Args:
        x: (B, 3, H, W) float32, pixels in [0, 1].
        matrix: (V, B, 3, 3) float32, from (x, y, 1) in the view to a place in the picture, both in
            pixels from the upper left corner; the centre of a pixel lies at a half.
        size: (height, width) of the views; None: that of the pictures.
        mode: "bilinear" or "bicubic"; the latter is clamped to [0, 1].
        box: (V, B, 4) int64, top, left, height, width: what a view may see; None: all.
        fill: what lies outside of that, three numbers, pixel units; None: its border goes on.
        antialias: where a map shrinks the picture s times, an output pixel is the mean of n x n
            points, n = ⌈s⌉ up to 8, found for each view from its matrix.
        mean, std: three numbers each, pixel units; the defaults leave pixels as they are.
        dtype: of the result: float32, float16 or bfloat16. The arithmetic is float32.
        patch: 0 gives pictures, p > 0 the rows that a p x p patch embedding multiplies, as
            make_views does.
        backend: "reference", "cpp", "triton"; None takes the device's best.

    Returns:
        (V·B, 3, *size), view by view; or (V·B, (height div p)·(width div p), 3·p·p).

    Raises:
        TypeError, ValueError: naming the op, the argument and what came.
        RuntimeError: the backend asked for is not available; says why.
    """
    op = "warp_views"
    check_pixels(op, x=x)
    if min(x.shape[-2:]) < 1:
        raise ValueError(f"{op}: x must have pixels, got shape {tuple(x.shape)}")
    _check_of_views(op, "matrix", matrix, torch.float32, x, (3, 3))
    if box is not None:
        _check_of_views(op, "box", box, torch.int64, x, (4,))
        if len(box) != len(matrix):
            raise ValueError(f"{op}: box must be of {len(matrix)} views, got {len(box)}")
    size = (x.shape[-2], x.shape[-1]) if size is None else size
    if (
        not isinstance(size, list | tuple)
        or len(size) != 2
        or not all(isinstance(side, int) and side > 0 for side in size)
    ):
        raise ValueError(f"{op}: size must be two whole numbers above 0, got {shown(size)}")
    if mode not in MODES:
        raise ValueError(f"{op}: mode must be one of {MODES}, got {shown(mode)}")
    if dtype not in DTYPES:
        raise TypeError(f"{op}: dtype must be one of {DTYPES}, got {dtype}")
    check_patch(op, patch, size)
    around = [] if fill is None else channels(op, "fill", fill)
    mean, std = channels(op, "mean", mean), channels(op, "std", std)
    samples = None
    if antialias:
        samples = reference.shrinking(matrix.detach(), (x.shape[-2], x.shape[-1]), size)
    cubic = mode == "bicubic"
    rest = (list(size), cubic, around, mean, std, dtype, patch)
    return _warp(x.device, backend, x, matrix, box, samples, *rest)


def _check_of_views(
    op: str, name: str, given: Tensor, dtype: torch.dtype, x: Tensor, last: tuple[int, ...]
) -> None:
    """A tensor (V, B, *last) with V >= 1."""
    if not isinstance(given, Tensor) or given.dtype != dtype:
        got = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(f"{op}: {name} must be a {dtype} tensor, got {got}")
    if given.shape[1:] != (len(x), *last) or len(given) == 0:
        shape = ", ".join(str(n) for n in (len(x), *last))
        raise ValueError(f"{op}: {name} must be (V, {shape}), got shape {tuple(given.shape)}")
    if given.device != x.device:
        raise ValueError(f"{op}: {name} must be on {x.device}, got {given.device}")


def _reference(
    x: Tensor,
    matrix: Tensor,
    box: Tensor | None,
    samples: Tensor | None,
    size: Sequence[int],
    cubic: bool,
    fill: Sequence[float],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    patch: int,
) -> Tensor:
    high, wide = size
    seen = reference.warp_views(
        x,
        matrix,
        (high, wide),
        mode="bicubic" if cubic else "bilinear",
        box=box,
        fill=fill or None,
        samples=samples,
    ).flatten(0, 1)
    prepared = views_reference.preprocess(seen, (high, wide), x.new_tensor(mean), x.new_tensor(std))
    return (views_reference.to_patches(prepared, patch) if patch else prepared).to(dtype)


def _fake(
    x: Tensor,
    matrix: Tensor,
    box: Tensor | None,
    samples: Tensor | None,
    size: Sequence[int],
    cubic: bool,
    fill: Sequence[float],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    patch: int,
) -> Tensor:
    for name, other in (("matrix", matrix), ("box", box), ("samples", samples)):
        if other is not None and other.device != x.device:
            raise ValueError(f"warp_views: {name} must be on {x.device}, got {other.device}")
    like = x.new_empty((0, 3, *size))
    return x.new_empty((len(matrix) * len(x), *views_shape(like, 1, patch)[1:]), dtype=dtype)


def _triton() -> ModuleType:
    from scc_fast.kernels import warp

    return warp


_warp = define(
    "warp_views(Tensor x, Tensor matrix, Tensor? box, Tensor? samples, int[] size, bool cubic, "
    "float[] fill, float[] mean, float[] std, ScalarType dtype, int patch) -> Tensor",
    reference=_reference,
    fake=_fake,
    triton=_triton,
)
