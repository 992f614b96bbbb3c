"""AugMix (Hendrycks et al., arXiv 1912.02781) at severity 1.

As in R-TPT, but batched and on float pixels instead of 8-bit pictures. Equalize and posterize have
straight-through gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from scc_fast.defenses.augment import rotation, straight, warp

CHAINS, LONGEST = 3, 3
_EACH = 1 + 3 * LONGEST  # draws per chain: length; operation, level and sign of each step
MIX_DRAWS = CHAINS + 1 + CHAINS * _EACH
_AT_ONCE = 64  # pictures at once on a CPU, to fit caches
# By index: photometric operations, then geometric ones.
_GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


def augmix(x: Tensor, draws: Tensor, backend: str | None = None) -> Tensor:
    """m·x + (1 − m)·Σ_i w_i chain_i(x), w Dirichlet(1, 1, 1) and m Beta(1, 1).

    Args:
        x: (n, 3, H, W) in [0, 1].
        draws: (n, MIX_DRAWS) uniforms in [0, 1).

    Returns:
        (n, 3, H, W) in [0, 1].
    """
    if x.device.type == "cpu" and len(x) > _AT_ONCE:
        pieces = zip(x.split(_AT_ONCE), draws.split(_AT_ONCE), strict=True)
        return torch.cat([augmix(*piece, backend) for piece in pieces])
    share = -torch.log1p(-draws[:, :CHAINS]) + 1e-12
    share = share / share.sum(dim=1, keepdim=True) * (1 - draws[:, CHAINS, None])
    mixed = x * draws[:, CHAINS, None, None, None]
    chains = draws[:, CHAINS + 1 :].unflatten(1, (CHAINS, _EACH))
    for i in range(CHAINS):
        mixed = mixed + share[:, i, None, None, None] * _chain(x, chains[:, i], backend)
    return mixed


def _chain(x: Tensor, draws: Tensor, backend: str | None) -> Tensor:
    """Chain of one to three operations per picture."""
    length = 1 + (LONGEST * draws[:, 0]).long()
    for at in range(LONGEST):
        which, level, sign = draws[:, 1 + 3 * at : 4 + 3 * at].unbind(dim=1)
        kind = (len(OPERATIONS) * which).long().masked_fill(length <= at, -1)
        x = operate(x, kind, 0.1 + 0.9 * level, 1 - 2 * (sign > 0.5).float(), backend)
    return x


def operate(
    x: Tensor, kind: Tensor, level: Tensor, sign: Tensor, backend: str | None = None
) -> Tensor:
    """Apply one operation per picture.

    Args:
        x: (n, 3, H, W) in [0, 1].
        kind: (n,) int64, index into OPERATIONS, or −1 for none.
        level: (n,) in [0.1, 1], of at most 10.
        sign: (n,) ±1, direction of geometric operations.
    """
    order = kind.argsort()
    counts = torch.bincount(kind + 1, minlength=len(OPERATIONS) + 1).tolist()
    # Identity, each photometric operation, all geometric ones.
    counts = [*counts[: 1 + len(_PHOTOMETRIC)], sum(counts[1 + len(_PHOTOMETRIC) :])]
    same, *rows, moved = order.split(counts)
    parts = [x[same]]
    parts += [change(x[i], level[i]) for change, i in zip(_PHOTOMETRIC.values(), rows, strict=True)]
    turn = _matrices(kind[moved] - len(_PHOTOMETRIC), level[moved], sign[moved], _size(x))
    parts.append(warp(x[moved], turn, backend) if len(moved) else x[moved])
    return torch.cat(parts)[order.argsort()]


def _size(x: Tensor) -> tuple[int, int]:
    return x.shape[-2], x.shape[-1]


def autocontrast(x: Tensor, _: Tensor) -> Tensor:
    """Stretch each channel to [0, 1]; constant channels are unchanged."""
    low, high = x.amin(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)
    spread = high - low
    flat = spread == 0
    return torch.where(flat, x, (x - low) / spread.masked_fill(flat, 1.0))


def equalize(x: Tensor, _: Tensor) -> Tensor:
    """Histogram equalization of each channel in 256 bins, by Pillow's table."""
    bins = (x.detach() * 255).round().long().clamp(0, 255).flatten(2)
    counts = bins.new_zeros(*bins.shape[:2], 256).scatter_add_(2, bins, torch.ones_like(bins))
    used = counts > 0
    last = 255 - used.flip(-1).int().argmax(dim=-1, keepdim=True)
    stride = (bins.shape[-1] - counts.gather(2, last)) // 255
    safe = stride.clamp_min(1)
    table = (safe // 2 + counts.cumsum(dim=-1) - counts) // safe
    table = torch.where(stride == 0, torch.arange(256, device=x.device), table.clamp(0, 255))
    return straight(x, (table.gather(2, bins).float() / 255).view_as(x))


def posterize(x: Tensor, _: Tensor) -> Tensor:
    """Keep the upper 4 of 8 bits (at every level of this severity)."""
    return straight(x, torch.floor((x * 255).round() / 16) * 16 / 255)


def solarize(x: Tensor, level: Tensor) -> Tensor:
    """Invert pixels of at least 256 − ⌊25.6 level⌋ of 255."""
    threshold = (256 - torch.floor(25.6 * level)) / 255
    # Half a step lower, against rounding of pixels at the threshold.
    return torch.where(x < threshold[:, None, None, None] - 0.5 / 255, x, 1 - x)


def _matrices(kind: Tensor, level: Tensor, sign: Tensor, size: tuple[int, int]) -> Tensor:
    """Matrices (n, 2, 3) for warp; kind (n,) indexes _GEOMETRIC."""
    height, width = size
    zero = torch.zeros_like(level)

    def pick(name: str, value: Tensor) -> Tensor:
        return torch.where(kind == _GEOMETRIC.index(name), sign * value, zero)

    turned = rotation(
        -torch.deg2rad(pick("rotate", torch.floor(3 * level))),
        zero + 1,
        zero[:, None].expand(-1, 2),
    )
    right = pick("shear_x", 0.03 * level)
    down = pick("shear_y", 0.03 * level)
    across = pick("translate_x", torch.floor(width / 30 * level))
    along = pick("translate_y", torch.floor(height / 30 * level))
    # Pillow shears about the upper left corner, warp() about the centre.
    moved = torch.stack(
        [
            torch.stack([zero, right, across + right * height / 2], dim=-1),
            torch.stack([down, zero, along + down * width / 2], dim=-1),
        ],
        dim=-2,
    )
    return turned + moved


_PHOTOMETRIC: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "autocontrast": autocontrast,
    "equalize": equalize,
    "posterize": posterize,
    "solarize": solarize,
}
OPERATIONS = (*_PHOTOMETRIC, *_GEOMETRIC)
