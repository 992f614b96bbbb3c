"""Heads in Triton: twins of scc_fast.ops.heads.

Matrix products are cuBLAS's, on features that are not normalised; the rest of a head is one program
per image, on tiles of all its L views.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from scc_fast.kernels._tiles import exp_sum, first_maximiser, load_row, load_tile, norms

# Elements of a tile: with eight warps a thread then holds sixteen of them.
_TILE = 4096
_STILL = tl.constexpr(1e-5)  # of scc_fast.reference.heads
_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}  # fused or not: one answer everywhere

# Bytes of the dot products of a chunk of images.
_CHUNK = 2**24


@triton.jit(do_not_specialize=["batch", "views"])
def _drift_kernel(
    features_ptr,  # (L, B, D), f of the views of x + δ
    anchor_ptr,  # (B, D), f₀
    tau_ptr,  # (B,) float32, ‖f_1 − f₀‖ / ‖f₀‖
    gradient_ptr,  # (L, B, D), 2 (f − f₀) / L
    batch,
    views,
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    features_ptr += row * width
    gradient_ptr += row * width
    anchor_ptr += row % batch * width
    count = views.to(tl.float32)
    drift = tl.zeros([BLOCK], dtype=tl.float32)
    size = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, width, BLOCK):
        d = start + tl.arange(0, BLOCK)
        anchor = load_row(anchor_ptr, d, width)
        difference = load_row(features_ptr, d, width) - anchor
        drift += difference * difference
        size += anchor * anchor
        gradient = tl.div_rn(2.0 * difference, count)
        tl.store(gradient_ptr + d, gradient.to(gradient_ptr.dtype.element_ty), mask=d < width)
    if row < batch:
        tau = tl.div_rn(tl.sqrt_rn(tl.sum(drift, axis=0)), tl.sqrt_rn(tl.sum(size, axis=0)))
        tl.store(tau_ptr + row, tau)


@triton.jit
def _load_count(count_ptr, k, classes):
    """Classes per row of the table; 0 outside."""
    if count_ptr is None:
        return (k < classes).to(tl.float32)
    else:
        return tl.load(count_ptr + k, mask=k < classes, other=0).to(tl.float32)


@triton.jit
def _present(count_ptr, k, classes):
    """Mask of the table's present rows."""
    if count_ptr is None:
        return k < classes
    else:
        return _load_count(count_ptr, k, classes) > 0


@triton.jit
def _hardest(
    dots_ptr, stride, v, label, count_ptr, views, classes, LP: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Largest product per view except the label's, −inf if none, and its row."""
    best = tl.full([LP, BLOCK_K], float("-inf"), dtype=tl.float32)
    place = tl.zeros([LP, BLOCK_K], dtype=tl.int32)
    for start in range(0, classes, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        dot = load_tile(dots_ptr, stride, v, k, views, classes)
        better = (_present(count_ptr, k, classes) & (k != label))[None, :] & (dot > best)
        best = tl.where(better, dot, best)
        place = tl.where(better, k[None, :], place)
    return first_maximiser(best, place)


@triton.jit
def _difference(soft_ptr, text_ptr, hardest, has_text, d, width):
    """(LP, N) t_soft minus the hardest text per view, 0 without one."""
    mask = has_text[:, None] & (d < width)[None, :]
    text = tl.load(text_ptr + hardest[:, None] * width + d[None, :], mask=mask, other=0.0)
    return load_row(soft_ptr, d, width)[None, :] - text


@triton.jit(do_not_specialize=["batch", "first", "rows", "views"])
def _margin_kernel(
    features_ptr,  # (L, B, D)
    dots_ptr,  # (L, rows, U) float32, f · t_k of the images from `first` on
    soft_ptr,  # (B, D) float32, t_soft
    label_ptr,  # (B,) int64, ŷ
    text_ptr,  # (U, D) float32, t_k
    count_ptr,  # (U,) int64, classes per row of the table; None where one each
    value_ptr,  # (B,) float32, J
    gradient_ptr,  # (L, B, D), ∂J/∂f
    scale,
    batch,
    first,
    rows,
    views,
    classes,
    width,
    LP: tl.constexpr,  # L, padded to a power of two
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    image = first + row
    v = tl.arange(0, LP)
    top, hardest = _hardest(
        dots_ptr + row * classes, rows.to(tl.int64) * classes, v, tl.load(label_ptr + image),
        count_ptr, views, classes, LP, BLOCK_K,
    )  # fmt: skip
    has_text = (v < views) & (top > float("-inf"))  # no: no negative is left, or all are NaN
    hardest = tl.where(has_text, hardest, 0).to(tl.int64)

    features_ptr += image * width
    soft_ptr += image * width
    stride = batch.to(tl.int64) * width
    squares = tl.zeros([LP, BLOCK_D], dtype=tl.float32)
    along = tl.zeros([LP, BLOCK_D], dtype=tl.float32)
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        f = load_tile(features_ptr, stride, v, d, views, width)
        squares += f * f
        along += f * _difference(soft_ptr, text_ptr, hardest, has_text, d, width)
    norm = tl.where(v < views, tl.sqrt_rn(tl.sum(squares, axis=1)), 1.0)
    cosine = tl.div_rn(tl.sum(along, axis=1), norm)  # of t_soft less that of the hardest text
    factor = scale / views.to(tl.float32)
    tl.store(value_ptr + image, factor * tl.sum(cosine, axis=0))
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        f = load_tile(features_ptr, stride, v, d, views, width)
        difference = _difference(soft_ptr, text_ptr, hardest, has_text, d, width)
        unit = tl.div_rn(f, norm[:, None])
        gradient = tl.div_rn(factor * (difference - cosine[:, None] * unit), norm[:, None])
        out = gradient_ptr + image * width + v[:, None] * stride + d[None, :]
        mask = (v < views)[:, None] & (d < width)[None, :]
        tl.store(out, gradient.to(gradient_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _softmax_over_rows(
    dots_ptr, stride, factor, count_ptr, v, views, classes, LP: tl.constexpr, BLOCK: tl.constexpr
):
    """Largest logit per view (LP, 1), and Σ count · exp(logit − largest)."""
    top = tl.full([LP, BLOCK], float("-inf"), dtype=tl.float32)
    total = tl.zeros([LP, BLOCK], dtype=tl.float32)
    for start in range(0, classes, BLOCK):
        k = start + tl.arange(0, BLOCK)
        z = factor * load_tile(dots_ptr, stride, v, k, views, classes)
        z = tl.where(_present(count_ptr, k, classes)[None, :], z, float("-inf"))
        top, total = exp_sum(top, total, z, _load_count(count_ptr, k, classes)[None, :])
    highest = tl.max(top, axis=1)[:, None]
    return highest, tl.sum(total * tl.exp(top - highest), axis=1)[:, None]


@triton.jit
def _finish_q(q_ptr, weighted_ptr, count_ptr, largest, whole, classes, BLOCK: tl.constexpr):
    """Turn log q + const into q, and q · count if wanted; returns the first maximiser of q."""
    best = tl.full([BLOCK], -1.0, dtype=tl.float32)
    place = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, classes, BLOCK):
        k = start + tl.arange(0, BLOCK)
        sharp = tl.load(q_ptr + k, mask=k < classes, other=0.0)
        q = tl.div_rn(tl.exp(sharp - largest), whole)
        present = _present(count_ptr, k, classes)
        if count_ptr is not None:
            q = tl.where(present, q, 0.0)
        tl.debug_barrier()  # where a tile is narrow, several threads load the same element
        tl.store(q_ptr + k, q, mask=k < classes)
        if weighted_ptr is not None:
            counted = q * _load_count(count_ptr, k, classes)
            tl.store(weighted_ptr + k, counted, mask=k < classes)
        rank = q
        if count_ptr is not None:  # of NaNs alone the first, which need not be row 0 here
            rank = tl.where(q == q, q, -0.5)
        better = present & (rank > best)
        best = tl.where(better, rank, best)
        place = tl.where(better, k, place)
    _, label = first_maximiser(best, place)
    return label


@triton.jit(do_not_specialize=["batch", "first", "rows", "views"])
def _pseudo_kernel(
    features_ptr,  # (L, B, D)
    dots_ptr,  # (L, rows, U) float32, f · t_k of the images from `first` on
    count_ptr,  # (U,) int64, classes per row of the table; None where one each
    q_ptr,  # (B, U) float32, q
    label_ptr,  # (B,) int64, ŷ
    weighted_ptr,  # (B, U) float32, q · count; None where count is
    scale,
    temperature,
    batch,
    first,
    rows,
    views,
    classes,
    width,
    LP: tl.constexpr,  # L, padded to a power of two
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    image = first + row
    v = tl.arange(0, LP)
    dots_ptr += row * classes
    stride = rows.to(tl.int64) * classes
    lengths = norms(
        features_ptr + image * width, batch.to(tl.int64) * width, v, views, width, LP, BLOCK_D
    )
    factor = (scale / tl.maximum(lengths, 1e-12))[:, None]  # b cancels in a softmax
    highest, total = _softmax_over_rows(
        dots_ptr, stride, factor, count_ptr, v, views, classes, LP, BLOCK_K
    )
    q_ptr += image * classes
    peak = tl.full([BLOCK_K], float("-inf"), dtype=tl.float32)
    mass = tl.zeros([BLOCK_K], dtype=tl.float32)
    for start in range(0, classes, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        z = factor * load_tile(dots_ptr, stride, v, k, views, classes)
        p = tl.where((v < views)[:, None], tl.exp(z - highest) / total, 0.0)
        mean = tl.sum(p, axis=0) / views.to(tl.float32)
        present = _present(count_ptr, k, classes)
        sharp = tl.where(present, tl.div_rn(tl.log(mean), temperature), float("-inf"))
        tl.store(q_ptr + k, sharp, mask=k < classes)
        peak, mass = exp_sum(peak, mass, sharp, _load_count(count_ptr, k, classes))
    largest = tl.max(peak, axis=0)
    whole = tl.sum(mass * tl.exp(peak - largest), axis=0)
    if weighted_ptr is not None:
        weighted_ptr += image * classes
    tl.debug_barrier()  # a thread may read what another one has stored
    label = _finish_q(q_ptr, weighted_ptr, count_ptr, largest, whole, classes, BLOCK_K)
    tl.store(label_ptr + image, label.to(tl.int64))


@triton.jit
def _unit_rows_kernel(
    rows_ptr,  # (B, D) float32, scaled to unit length in place
    width,
    BLOCK: tl.constexpr,
):
    rows_ptr += tl.program_id(0).to(tl.int64) * width
    squares = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, width, BLOCK):
        value = load_row(rows_ptr, start + tl.arange(0, BLOCK), width)
        squares += value * value
    norm = tl.maximum(tl.sqrt_rn(tl.sum(squares, axis=0)), 1e-12)
    tl.debug_barrier()
    for start in range(0, width, BLOCK):
        d = start + tl.arange(0, BLOCK)
        tl.store(rows_ptr + d, tl.div_rn(load_row(rows_ptr, d, width), norm), mask=d < width)


@triton.jit(do_not_specialize=["batch", "views"])
def _mean_unit_kernel(
    features_ptr,  # (L, B, D)
    weights_ptr,  # (L, B) float32, w; None: 1/L
    out_ptr,  # (B, D) float32, z = Σ_l w_l f_l / ‖f_l‖
    batch,
    views,
    width,
    LP: tl.constexpr,  # L, padded to a power of two
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,  # z / ‖z‖, of zeros f_1 / ‖f_1‖
):
    image = tl.program_id(0).to(tl.int64)
    v = tl.arange(0, LP)
    features_ptr += image * width
    stride = batch.to(tl.int64) * width
    norm = tl.maximum(norms(features_ptr, stride, v, views, width, LP, BLOCK), 1e-12)
    if weights_ptr is not None:
        share = tl.load(weights_ptr + v * batch + image, mask=v < views, other=0.0)
    squares = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, width, BLOCK):
        d = start + tl.arange(0, BLOCK)
        unit = tl.div_rn(load_tile(features_ptr, stride, v, d, views, width), norm[:, None])
        if weights_ptr is None:
            mean = tl.div_rn(tl.sum(unit, axis=0), views.to(tl.float32))
        else:
            mean = tl.sum(share[:, None] * unit, axis=0)
        squares += mean * mean
        tl.store(out_ptr + image * width + d, mean, mask=d < width)
    if UNIT:
        size = tl.sqrt_rn(tl.sum(squares, axis=0))
        own = tl.sum(tl.where(v == 0, norm, 0.0), axis=0)
        tl.debug_barrier()  # a thread may read what another one has stored
        for start in range(0, width, BLOCK):
            d = start + tl.arange(0, BLOCK)
            mean = load_row(out_ptr + image * width, d, width)
            alone = tl.div_rn(load_row(features_ptr, d, width), own)
            z = tl.where(size == 0, alone, tl.div_rn(mean, tl.maximum(size, 1e-12)))
            tl.debug_barrier()
            tl.store(out_ptr + image * width + d, z, mask=d < width)


@triton.jit
def _drift_tile(features_ptr, stride, v, d, norm, views, width, count):
    """u_1 (N,), the others' mean m (N,), and the drifts u_l − u_1 (LP, N), 0 for the first view."""
    unit = tl.div_rn(load_tile(features_ptr, stride, v, d, views, width), norm[:, None])
    other = (v > 0) & (v < views)
    own = tl.sum(tl.where((v == 0)[:, None], unit, 0.0), axis=0)
    mean = tl.sum(tl.where(other[:, None], tl.div_rn(unit, count), 0.0), axis=0)
    return own, mean, tl.where(other[:, None], unit - own[None, :], 0.0)


@triton.jit
def _geodesic(low, high, a, size, theta, side, count):
    """AGC's weights of u_1 and of the others' mean."""
    between = (count * size * size - 1.0) / tl.maximum(count - 1.0, 1.0)
    tight = tl.minimum(tl.maximum((between + 1.0) / 2.0, 0.0), 1.0)
    apart = tl.minimum(tl.maximum(1.0 - a, 1e-30), 1.0)
    score = tl.minimum(tl.exp(0.9 * tl.log(apart)) * tight, 1.0)
    beta = low + (high - low) * score
    still = side < 1e-6
    sine = tl.div_rn(tl.sin(beta * theta), tl.where(still, 1.0, side))
    first = tl.where(still, 1.0, tl.cos(beta * theta) - sine * tl.div_rn(a, size))
    return first, tl.where(still, 0.0, tl.div_rn(sine, size))


@triton.jit
def _arctangent(y, x):
    """atan2 for y >= 0, to a few ulp: a quotient of at most tan(π/8), then its series."""
    big, small = tl.maximum(y, tl.abs(x)), tl.minimum(y, tl.abs(x))
    t = tl.div_rn(small, tl.maximum(big, 1e-30))
    turned = t > 0.4142135
    t = tl.where(turned, tl.div_rn(t - 1.0, t + 1.0), t)
    q = t * t
    series = 8.05374449538e-2 * q - 1.38776856032e-1
    series = (series * q + 1.99777106478e-1) * q - 3.33329491539e-1
    angle = series * q * t + t + tl.where(turned, 0.7853981633974483, 0.0)
    angle = tl.where(y > tl.abs(x), 1.5707963267948966 - angle, angle)
    return tl.where(x < 0, 3.141592653589793 - angle, angle)


@triton.jit(do_not_specialize=["batch", "views"])
def _weights_kernel(
    features_ptr,  # (L, B, D)
    weights_ptr,  # (L, B) float32, w
    cosine_ptr,  # (B,) float32, a
    agreement_ptr,  # (B,) float32, r
    low,
    high,
    threshold,
    slope,  # 0: the switch
    batch,
    views,
    width,
    GEODESIC: tl.constexpr,
    LP: tl.constexpr,  # L, padded to a power of two
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    v = tl.arange(0, LP)
    features_ptr += image * width
    stride = batch.to(tl.int64) * width
    count = (views - 1).to(tl.float32)
    norm = tl.maximum(norms(features_ptr, stride, v, views, width, LP, BLOCK), 1e-12)
    with_mean = tl.zeros([BLOCK], dtype=tl.float32)
    squares = tl.zeros([BLOCK], dtype=tl.float32)
    along = tl.zeros([BLOCK], dtype=tl.float32)
    drifts = tl.zeros([LP, BLOCK], dtype=tl.float32)
    agreed = tl.zeros([LP, BLOCK], dtype=tl.float32)
    for start in range(0, width, BLOCK):
        d = start + tl.arange(0, BLOCK)
        own, mean, drift = _drift_tile(features_ptr, stride, v, d, norm, views, width, count)
        with_mean += own * mean
        squares += mean * mean
        along += (mean - own) * (mean - own)
        drifts += drift * drift
        agreed += drift * (mean - own)[None, :]
    a = tl.sum(with_mean, axis=0)
    size = tl.maximum(tl.sqrt_rn(tl.sum(squares, axis=0)), 1e-12)
    far = tl.sqrt_rn(tl.sum(along, axis=0))
    moved = tl.sqrt_rn(tl.sum(drifts, axis=1))
    cosines = tl.div_rn(tl.sum(agreed, axis=1), tl.maximum(moved * far, _STILL * _STILL))
    r = tl.div_rn(tl.sum(tl.where(moved <= _STILL, 0.0, cosines), axis=0), count)
    r = tl.where(r > 1.0, 1.0, tl.where(r < -1.0, -1.0, r))  # NaN stays
    tl.store(cosine_ptr + image, a)
    tl.store(agreement_ptr + image, r)
    if GEODESIC:
        p = tl.div_rn(a, size)
        off = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, width, BLOCK):
            d = start + tl.arange(0, BLOCK)
            own, mean, _ = _drift_tile(features_ptr, stride, v, d, norm, views, width, count)
            part = tl.div_rn(mean, size) - p * own
            off += part * part
        side = tl.sqrt_rn(tl.sum(off, axis=0))
        first, rest = _geodesic(low, high, a, size, _arctangent(side, p), side, count)
    else:
        sigmoid = 1.0 / (1.0 + tl.exp(-slope * (r - threshold)))
        part = tl.where(slope > 0, sigmoid, (r > threshold).to(tl.float32))
        rest = low + (high - low) * part
        first = 1.0 - rest
    share = tl.where(v == 0, first, tl.div_rn(rest, count))
    tl.store(weights_ptr + v * batch + image, share, mask=v < views)


def _block(size: int, rows: int = 1) -> int:
    """Columns of a tile of `rows` rows."""
    return min(triton.next_power_of_2(size), max(64, _TILE // rows))


def _tiles(features: Tensor, text: Tensor) -> dict[str, object]:
    padded = triton.next_power_of_2(len(features))
    blocks = {"BLOCK_K": _block(len(text), padded), "BLOCK_D": _block(features.shape[2], padded)}
    return {"LP": padded, **blocks, **_OPTIONS}


def _dots(features: Tensor, text: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """f · t_k of a chunk of images at a time: (first image, images, (L, images, U) float32).

    All chunks are written to the same memory.
    """
    views, batch, width = features.shape
    limit = max(1, _CHUNK // (4 * views * max(len(text), width)))
    buffer = text.new_empty(views * min(limit, batch), len(text))
    for first in range(0, batch, limit):
        chunk = features[:, first : first + limit]
        rows = chunk.shape[1]
        out = buffer[: views * rows]
        # out= also keeps autocast from taking the product to half precision.
        torch.mm(chunk.float().reshape(views * rows, width), text.T, out=out)
        yield first, rows, out


def drift_head(features: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
    """scc_fast.ops.drift_head by Triton, with the arguments of its schema."""
    features, anchor = features.detach().contiguous(), anchor.detach().contiguous()
    views, batch, width = features.shape
    tau = features.new_empty(batch, dtype=torch.float32)
    gradient = torch.empty_like(features)
    if batch == 0:
        return tau, gradient
    with torch.cuda.device(features.get_device()):  # -1, a CPU tensor's, changes nothing
        _drift_kernel[(views * batch,)](
            features, anchor, tau, gradient, batch, views, width, BLOCK=_block(width), **_OPTIONS
        )
    return tau, gradient


def pseudo_label(
    features: Tensor,
    text: Tensor,
    count: Tensor | None,
    scale: float,
    bias: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """scc_fast.ops.pseudo_label by Triton, with the arguments of its schema."""
    features, text = features.detach().contiguous(), text.detach().contiguous()
    count = None if count is None else count.contiguous()
    views, batch, width = features.shape
    classes = len(text)
    q = text.new_empty(batch, classes)
    label = text.new_empty(batch, dtype=torch.int64)
    soft = text.new_empty(batch, width)
    if batch == 0:
        return q, label, soft
    weighted = None if count is None else torch.empty_like(q)
    with torch.cuda.device(features.get_device()):
        for first, rows, dots in _dots(features, text):
            _pseudo_kernel[(rows,)](
                features, dots, count, q, label, weighted, scale, temperature,
                batch, first, rows, views, classes, width, **_tiles(features, text),
            )  # fmt: skip
        torch.mm(q if weighted is None else weighted, text, out=soft)
        _unit_rows_kernel[(batch,)](soft, width, BLOCK=_block(width), **_OPTIONS)
    return q, label, soft


def margin_head(
    features: Tensor, soft: Tensor, label: Tensor, text: Tensor, count: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """scc_fast.ops.margin_head by Triton, with the arguments of its schema."""
    features, text = features.detach().contiguous(), text.detach().contiguous()
    soft, label = soft.detach().contiguous(), label.contiguous()
    count = None if count is None else count.contiguous()
    views, batch, width = features.shape
    value = text.new_empty(batch)
    gradient = torch.empty_like(features)
    if batch == 0:
        return value, gradient
    with torch.cuda.device(features.get_device()):
        for first, rows, dots in _dots(features, text):
            _margin_kernel[(rows,)](
                features, dots, soft, label, text, count, value, gradient, scale,
                batch, first, rows, views, len(text), width, **_tiles(features, text),
            )  # fmt: skip
    return value, gradient


def mean_logits(
    features: Tensor, text: Tensor, weights: Tensor | None, scale: float, bias: float, unit: bool
) -> Tensor:
    """scc_fast.ops.mean_logits by Triton, with the arguments of its schema."""
    features, text = features.detach().contiguous(), text.detach().contiguous()
    weights = None if weights is None else weights.detach().contiguous()
    views, batch, width = features.shape
    out = text.new_empty(batch, len(text))
    if batch == 0:
        return out
    mean = text.new_empty(batch, width)
    padded = triton.next_power_of_2(views)
    with torch.cuda.device(features.get_device()):
        _mean_unit_kernel[(batch,)](
            features, weights, mean, batch, views, width,
            LP=padded, BLOCK=_block(width, padded), UNIT=unit, **_OPTIONS,
        )  # fmt: skip
        start = text.new_full((len(text),), bias)
        return torch.addmm(start, mean, text.T, alpha=scale, out=out)


def view_weights(
    features: Tensor, low: float, high: float, threshold: float, slope: float, geodesic: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """scc_fast.ops.view_weights by Triton, with the arguments of its schema."""
    features = features.detach().contiguous()
    views, batch, width = features.shape
    weights, cosine, agreement = (
        features.new_empty(shape, dtype=torch.float32)
        for shape in ((views, batch), (batch,), (batch,))
    )
    if batch == 0:
        return weights, cosine, agreement
    padded = triton.next_power_of_2(views)
    with torch.cuda.device(features.get_device()):
        _weights_kernel[(batch,)](
            features, weights, cosine, agreement,
            low, high, threshold, 0.0 if slope == float("inf") else slope, batch, views, width,
            GEODESIC=geodesic, LP=padded, BLOCK=_block(width, padded), **_OPTIONS,
        )  # fmt: skip
    return weights, cosine, agreement
