"""Accuracy against TTFT, TPOT or FLOPs: the data points and the chart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from fastskip.intervals import Estimate
from fastskip.plot_labels import Label, place
from fastskip.study.report.drawing import Colour, Form, Picture, figure_of, picture, shortened
from fastskip.wording import Scale, significant

NEAR = 0.1
"""If some points are far below dense, those within this distance of it get an enlarged panel."""
MOST_NAMES = 12
"""Up to this many points, a wide chart labels them by name; beyond that, by number."""


class Quantity(StrEnum):
    """The cost on the chart's horizontal axis."""

    TTFT = "TTFT"
    TPOT = "TPOT"
    FLOPS = "FLOPs"

    @property
    def unit(self) -> str:
        """The unit of `Point.cost`."""
        return "% of dense" if self is Quantity.FLOPS else "ms"


@dataclass(frozen=True, slots=True)
class Kind:
    """How points from one source are drawn."""

    label: str
    colour: Colour
    marker: str


DENSE = Kind("dense", Colour.INK, "*")
POLICY = Kind("policy", Colour.BLUE, "o")
KINDS = {
    "dense": DENSE,
    "search": Kind("found by search", Colour.BLUE, "o"),
    "uniform": Kind("uniform interval", Colour.ORANGE, "s"),
    "random": Kind("random", Colour.GREY, "X"),
    "peer": Kind("peer", Colour.GREEN, "D"),
    "router": Kind("router", Colour.PURPLE, "^"),
}


@dataclass(frozen=True, slots=True)
class Point:
    """A policy's cost, in the axis' unit (`low`, `high`: quartiles, if known), and its score.

    `number`: its row in the table below the chart.
    """

    number: int
    name: str
    kind: Kind
    cost: float
    low: float | None
    high: float | None
    score: Estimate
    is_on_front: bool = False
    is_recommended: bool = False


def accuracy_chart(
    name: str, quantity: Quantity, points: Sequence[Point], scale: Scale = Scale.SHARE
) -> Picture:
    """The chart of one quantity; `scale`: that of the scores."""
    values = "; ".join(
        f"{each.name}: {significant(each.cost)} {quantity.unit}, {scale.text(each.score.mean)} "
        f"({scale.text(each.score.low)} to {scale.text(each.score.high)})"
        for each in points
    )
    what = scale.heading[0].upper() + scale.heading[1:]
    what += f" against {quantity.value} of {len(points)} policies"
    text = f"{what}, with 95 % intervals. {values}."
    return picture(name, text, lambda form: draw(quantity, points, form, scale))


def draw(
    quantity: Quantity, points: Sequence[Point], form: Form, scale: Scale = Scale.SHARE
) -> Any:
    """The figure: up and to the left is better. If some points are far below dense, a second panel
    enlarges those near it."""
    near = _near(points)
    height = 3.6 if form.is_narrow else 4.4
    figure = figure_of(form.width, height * (1.75 if near else 1), layout="constrained")
    axes = figure.subplots(2 if near else 1, 1, squeeze=False)[:, 0]
    for axis, shown in zip(axes, (points, near), strict=False):
        _points(axis, shown)
        axis.set_ylabel(scale.axis)
    if near:
        axes[0].set_title("all", loc="left")
        axes[1].set_title(f"enlarged: at most {100 * NEAR:.0f} points below dense", loc="left")
    axes[-1].set_xlabel(f"{quantity.value}, {quantity.unit} (left is better)")
    handles, labels = axes[0].get_legend_handles_labels()
    if len(handles) > 1:
        columns = 2 if form.is_narrow else 4
        style = {"ncols": columns, "frameon": False, "handletextpad": 0.2}
        figure.legend(handles, labels, loc="outside upper left", **style)
    named = len(points) <= MOST_NAMES and not form.is_narrow
    apart = [point for point in points if point not in near or point.kind is DENSE]
    for axis, shown in zip(axes, (apart, near), strict=False):
        place(axis, [_label(point, named) for point in shown])
    return figure


def _near(points: Sequence[Point]) -> list[Point]:
    """The points near dense, if the others would squeeze them together; else none."""
    dense = next((point.score.mean for point in points if point.kind is DENSE), None)
    if dense is None or dense - min(point.score.mean for point in points) < 3 * NEAR:
        return []
    near = [point for point in points if point.score.mean >= dense - NEAR]
    return near if len(near) > 2 else []


def _points(axis: Any, points: Sequence[Point]) -> None:
    for kind in dict.fromkeys(point.kind for point in points):
        own = [point for point in points if point.kind == kind]
        x = [point.cost for point in own]
        y = [100 * point.score.mean for point in own]
        spread = [
            [100 * (point.score.mean - point.score.low) for point in own],
            [100 * (point.score.high - point.score.mean) for point in own],
        ]
        colour = kind.colour.value
        axis.errorbar(x, y, spread, _sideways(own), alpha=0.45, color=colour, lw=1, fmt="none")
        size = 10 if kind is DENSE else 6
        axis.plot(x, y, kind.marker, color=colour, ms=size, label=kind.label, mew=0)
    _mark(axis, points)
    _limit(axis, points)
    dense = next((point for point in points if point.kind is DENSE), None)
    if dense is not None:
        style: dict[str, Any] = {"color": Colour.MUTED.value, "lw": 0.8, "ls": ":", "zorder": 0}
        axis.axvline(dense.cost, **style)
        axis.axhline(100 * dense.score.mean, **style)


def _label(point: Point, is_named: bool) -> Label:
    return Label(
        f"{point.number} {shortened(point.name, 28)}" if is_named else str(point.number),
        point.cost,
        100 * point.score.mean,
        upright=(100 * point.score.low, 100 * point.score.high),
        sideways=(
            point.cost if point.low is None else point.low,
            point.cost if point.high is None else point.high,
        ),
        colour=point.kind.colour.value,
    )


def _sideways(points: Sequence[Point]) -> list[list[float]] | None:
    ends = [(p.cost, p.low, p.high) for p in points if p.low is not None and p.high is not None]
    if len(ends) < len(points):
        return None
    return [[cost - low for cost, low, _ in ends], [high - cost for cost, _, high in ends]]


def _mark(axis: Any, points: Sequence[Point]) -> None:
    """Draw the front as a line through its points, and a ring around the recommended policy."""
    front = sorted((p.cost, p.score.mean) for p in points if p.is_on_front)
    if len(front) > 1:
        x, y = ([scale * each[at] for each in front] for at, scale in ((0, 1), (1, 100)))
        axis.plot(x, y, "-", color=Colour.BLUE.value, lw=1, alpha=0.5, zorder=1, label="front")
    for point in points:
        if point.is_recommended:
            style = {"mfc": "none", "mec": Colour.RED.value, "mew": 1.5, "ms": 13, "ls": "none"}
            at = [point.cost], [100 * point.score.mean]
            axis.plot(*at, marker="o", label="recommended", **style)


def _limit(axis: Any, points: Sequence[Point]) -> None:
    """Leave room for names at the sides; put no ticks above the highest possible score."""
    x = [point.cost for point in points]
    x += [end for p in points for end in (p.low, p.high) if end is not None]
    margin = 0.12 * (max(x) - min(x)) or 0.1 * max(x)
    axis.set_xlim(max(0, min(x) - margin), max(x) + margin)
    low = min(100 * point.score.low for point in points)
    high = max(100 * point.score.high for point in points)
    margin = max(2.0, 0.12 * (high - low))
    axis.set_ylim(low - margin, high + margin)
    top = 100 if high <= 100 else high + margin
    axis.set_yticks([tick for tick in axis.get_yticks() if low - margin <= tick <= top])
