"""Place labels beside points so that they cover as little else as possible."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastskip.study.report.drawing import Colour, settled

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
    """A text at a data point, and the ends of the point's error bars."""

    text: str
    x: float
    y: float
    upright: tuple[float, float]
    sideways: tuple[float, float]
    colour: Colour


def place(axis: Any, labels: Sequence[Label]) -> None:
    """Draw the labels, each at the nearest position with the fewest overlaps.

    The axis' limits must be final.
    """
    from matplotlib.transforms import Bbox

    figure = axis.figure
    settled(figure)  # label placement needs the points' final positions
    scale = figure.dpi / 72
    inside = axis.get_window_extent()
    taken = []
    for label in labels:
        x, y = axis.transData.transform((label.x, label.y))
        half = _HALF * scale
        taken.append(Bbox.from_bounds(x - half, y - half, 2 * half, 2 * half))
        low, high = (axis.transData.transform((label.x, end))[1] for end in label.upright)
        taken.append(Bbox.from_extents(x - scale, low, x + scale, high))
        low, high = (axis.transData.transform((end, label.y))[0] for end in label.sideways)
        taken.append(Bbox.from_extents(low, y - scale, high, y + scale))
    for label in labels:
        x, y = axis.transData.transform((label.x, label.y))
        draft = axis.text(0, 0, label.text, ha="center", va="center")
        size = draft.get_window_extent()
        draft.remove()
        best, least = OFFSETS[0], math.inf
        for offset in OFFSETS:
            middle = x + offset[0] * scale, y + offset[1] * scale
            box = _box(middle, size)
            if not (inside.contains(*box.min) and inside.contains(*box.max)):
                continue
            covered = box.count_overlaps(taken)
            if covered < least:
                best, least = offset, covered
            if not covered:
                break
        taken.append(_box((x + best[0] * scale, y + best[1] * scale), size).padded(1.5 * scale))
        far = math.hypot(best[0] - math.copysign(size.width / 2 / scale, best[0]), best[1]) > _NEAR
        line = {"arrowstyle": "-", "color": Colour.GREY.value, "lw": 0.6, "shrinkB": 4}
        axis.annotate(
            label.text,
            (label.x, label.y),
            xytext=best,
            textcoords="offset points",
            ha="center",
            va="center",
            color=label.colour.value,
            arrowprops=line if far else None,
        ).set_in_layout(False)


def _box(middle: tuple[float, float], size: Any) -> Any:
    from matplotlib.transforms import Bbox

    x, y = middle
    return Bbox.from_bounds(x - size.width / 2, y - size.height / 2, size.width, size.height)
