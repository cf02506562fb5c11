"""Where the decisions of a decode step ride: in the residual updates right before them, so that
they take no launches of their own."""

from __future__ import annotations

from enum import Enum

from fastskip.decoder.fused.routes import DeviceRoutes, merged
from fastskip.decoder.guards import Point
from fastskip.ops.routes import Route
from fastskip.plan import SkipPlan
from fastskip.policy import Arrangement, TokenClass


class Part(Enum):
    """A moment of a layer: before it, between its sublayers, or in one of their updates."""

    BEFORE = "before"
    ATTENTION = "attention"
    BETWEEN = "between"
    FFN = "ffn"


def riding(
    plan: SkipPlan, routes: DeviceRoutes, new: TokenClass
) -> dict[tuple[int, Part], Route | None]:
    """By layer and part, what is decided there for rows of one class.

    A decision reads the residual stream as the last update before it left it. Only decisions before
    the first update of a decode step take a launch of their own. Parallel sublayers, and the blocks
    of a pair, share one update, that of the FFN; the first layer of a pair stands for both.
    """
    found: dict[tuple[int, Part], Route | None] = {}
    last: tuple[int, Part] | None = None

    def place(route: Route | None, otherwise: tuple[int, Part]) -> None:
        if route is not None:
            at = last or otherwise
            found[at] = merged([found.get(at), route])

    for step in plan.steps:
        layer = plan.layers[step[0]]
        place(routes.route(step, Point.START), (layer.index, Part.BEFORE))
        has_one_update = len(step) == 2 or layer.arrangement is Arrangement.PARALLEL
        if new in layer.attending and not has_one_update:
            last = layer.index, Part.ATTENTION
        place(routes.route(step, Point.MIDDLE), (layer.index, Part.BETWEEN))
        if new in layer.feeding or (has_one_update and new in layer.attending):
            last = layer.index, Part.FFN
    return found
