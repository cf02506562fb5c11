"""Names beside the points of a plot, placed so that they cover as little else as possible."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastskip.plotting import settled

OFFSETS = sorted(
    ((x, y) for x in range(-150, 151, 6) for y in range(-90, 91, 5) if abs(y) >= 9 or abs(x) >= 30),
    key=lambda offset: math.hypot(offset[0], 2.2 * offset[1]),
)
"""Candidate positions of a label relative to its mark, in points, nearest first."""
_HALF = 4.5
"""Half the size of a mark, in points."""
_NEAR = 13
"""Beyond this many points, a line connects a label to its mark."""


@dataclass(frozen=True, slots=True)
class Label:
    """A text at a data point, and the ends of the point's error bars.

    ``colour``: any that matplotlib takes.
    """

    text: str
    x: float
    y: float
    upright: tuple[float, float]
    sideways: tuple[float, float]
    colour: Any


def place(axis: Any, labels: Sequence[Label], *, size: float | None = None) -> None:
    """Draw the labels, each at the nearest position with the fewest overlaps.

    The axis' limits must be final. `size`: of the text, in points, instead of the figure's own.
    """
    figure = axis.figure
    settled(figure)  # label placement needs the points' final positions
    scale = figure.dpi / 72
    taken = [box for label in labels for box in _marks(axis, label, scale)]
    for label in labels:
        style = {"ha": "center", "va": "center", "fontsize": size}
        draft = axis.text(0, 0, label.text, **style)
        extent = draft.get_window_extent()
        draft.remove()
        offset = _best_offset(axis, label, extent, scale, taken)
        taken.append(_box(axis, label, offset, extent, scale).padded(1.5 * scale))
        near_end = offset[0] - math.copysign(extent.width / 2 / scale, offset[0])
        is_near = math.hypot(near_end, offset[1]) <= _NEAR
        arrow = {"arrowstyle": "-", "color": label.colour, "lw": 0.6, "shrinkB": 4}
        axis.annotate(
            label.text,
            (label.x, label.y),
            xytext=offset,
            textcoords="offset points",
            color=label.colour,
            arrowprops=None if is_near else arrow,
            **style,
        ).set_in_layout(False)


def _marks(axis: Any, label: Label, scale: float) -> Iterator[Any]:
    """What a point covers, in pixels: its mark and its error bars."""
    from matplotlib.transforms import Bbox

    x, y = axis.transData.transform((label.x, label.y))
    half = _HALF * scale
    yield Bbox.from_bounds(x - half, y - half, 2 * half, 2 * half)
    low, high = (axis.transData.transform((label.x, end))[1] for end in label.upright)
    yield Bbox.from_extents(x - scale, low, x + scale, high)
    low, high = (axis.transData.transform((end, label.y))[0] for end in label.sideways)
    yield Bbox.from_extents(low, y - scale, high, y + scale)


def _best_offset(
    axis: Any, label: Label, extent: Any, scale: float, taken: list[Any]
) -> tuple[int, int]:
    """The nearest offset where the text lies within the axis and covers least."""
    inside = axis.get_window_extent()
    best, least = OFFSETS[0], math.inf
    for offset in OFFSETS:
        box = _box(axis, label, offset, extent, scale)
        if not (inside.contains(*box.min) and inside.contains(*box.max)):
            continue
        covered = box.count_overlaps(taken)
        if covered < least:
            best, least = offset, covered
        if not covered:
            break
    return best


def _box(axis: Any, label: Label, offset: tuple[int, int], extent: Any, scale: float) -> Any:
    """Where the text lies, in pixels."""
    from matplotlib.transforms import Bbox

    x, y = axis.transData.transform((label.x, label.y))
    left = x + offset[0] * scale - extent.width / 2
    low = y + offset[1] * scale - extent.height / 2
    return Bbox.from_bounds(left, low, extent.width, extent.height)
