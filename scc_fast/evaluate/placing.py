"""Labels beside the points of a figure, where they cover neither each other nor a point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# How far the label's near edge stands from its point, in pixels at the figure's own dpi, and
# where: above first, for fronts leave a point to the right, then further and further out.
_RINGS = (4, 12, 24, 36, 50, 66, 84, 104, 126, 150)
_SIDES = ((1, 1), (0, 1), (-1, 1), (1, -1), (1, 0), (-1, 0), (0, -1), (-1, -1))
_SIZE = 8.0  # points

Box = tuple[float, float, float, float]
Spot = tuple[float, float]


def label_points(
    axis: Any,
    named: Sequence[tuple[float, float, str]],
    marks: Sequence[Spot],
    walls: Sequence[tuple[Spot, Spot]] = (),
) -> None:
    """Write a name beside each point, with a thin line to it where it has to stand off.

    Args:
        axis: matplotlib axes with their final limits and size.
        named: (x, y, name) in data coordinates.
        marks: (x, y) of everything that must stay visible.
        walls: the two ends of lines, level or upright, that labels should not cross.
    """
    from matplotlib.patheffects import withStroke

    renderer = axis.figure.canvas.get_renderer()
    inside = axis.get_window_extent(renderer)
    per_point = axis.figure.dpi / 72
    radius = 4.5 * per_point
    to_pixels = axis.transData.transform
    taken: list[Box] = []
    for x, y in marks:
        px, py = to_pixels((x, y))
        taken.append((px - radius, py - radius, px + radius, py + radius))
    for ends in walls:
        (x0, y0), (x1, y1) = sorted(map(tuple, to_pixels(ends)))
        taken.append((x0 - 1, min(y0, y1) - 1, x1 + 1, max(y0, y1) + 1))
    for x, y, name in sorted(named, key=lambda one: (-one[1], one[0])):
        px, py = to_pixels((x, y))
        text = axis.annotate(
            name, (x, y), (0, 0), textcoords="offset points", fontsize=_SIZE, parse_math=False
        )
        extent = text.get_window_extent(renderer)
        box, far = _spot(px, py, extent.width, extent.height, inside.extents, taken)
        taken.append(box)
        text.remove()
        axis.annotate(
            name,
            (x, y),
            ((box[0] - px) / per_point, (box[1] - py) / per_point),
            textcoords="offset points",
            fontsize=_SIZE,
            parse_math=False,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            arrowprops={"arrowstyle": "-", "color": "#8a8a8a", "linewidth": 0.6, "shrinkB": 3}
            if far
            else None,
        )


def _spot(
    px: float, py: float, width: float, height: float, inside: Sequence[float], taken: list[Box]
) -> tuple[Box, bool]:
    """The nearest free box for a label, and whether it stands off; the least bad if none is."""
    best: tuple[float, Box, bool] | None = None
    for ring in _RINGS:
        for right, up in _SIDES:
            left = px + right * ring - (width if right < 0 else width / 2 if right == 0 else 0)
            base = py + up * ring - (height if up < 0 else height / 2 if up == 0 else 0)
            box = (left, base, left + width, base + height)
            outside = (
                max(0.0, inside[0] - box[0])
                + max(0.0, inside[1] - box[1])
                + max(0.0, box[2] - inside[2])
                + max(0.0, box[3] - inside[3])
            )
            cost = sum(overlap(box, other) for other in taken) + height * outside
            if best is None or cost < best[0]:
                best = cost, box, ring > _RINGS[1]
            if cost == 0:
                return box, ring > _RINGS[1]
    assert best is not None
    return best[1], best[2]


def overlap(a: Box, b: Box) -> float:
    """The area that two boxes (left, bottom, right, top) share."""
    wide = min(a[2], b[2]) - max(a[0], b[0])
    high = min(a[3], b[3]) - max(a[1], b[1])
    return wide * high if wide > 0 and high > 0 else 0.0
