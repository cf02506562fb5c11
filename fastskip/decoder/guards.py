"""Which decisions a plan makes and where: what the device executor keeps flags for."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from fastskip.plan import LayerPlan, RoutedCell, SkipPlan
from fastskip.policy import Arrangement, Sublayer, TokenClass

Classes = frozenset[TokenClass]


class Point(Enum):
    """Where in a layer a decision is made: before it, or between its sublayers."""

    START = "start"
    MIDDLE = "middle"


@dataclass(frozen=True, slots=True)
class Ruling:
    """One router rule on rows of some classes in one layer."""

    number: int
    classes: Classes
    point: Point


@dataclass(frozen=True, slots=True)
class Guard:
    """One flag per row: whether it runs ``sublayers`` of a layer.

    ``running``: classes whose flag starts as 1; each ruling then decides on its own classes.
    """

    layer: int
    sublayers: frozenset[Sublayer]
    running: Classes
    rulings: tuple[Ruling, ...]


def guards_of(plan: SkipPlan, present: Classes) -> tuple[Guard, ...]:
    """The guards of all layers for rows of the classes ``present``.

    A router that guards a whole block has one flag for both sublayers, unless something else
    distinguishes them.
    """
    found: list[Guard] = []
    for index, cells in plan.routed_by_layer.items():
        layer = plan.layers[index]
        parts = {
            sublayer: Guard(index, frozenset({sublayer}), running & present, rulings)
            for sublayer, running in (
                (Sublayer.ATTENTION, layer.attending),
                (Sublayer.FFN, layer.feeding),
            )
            if (rulings := _rulings(layer, cells, sublayer, present))
        }
        alike = {(guard.running, guard.rulings) for guard in parts.values()}
        if len(parts) == 2 and len(alike) == 1:
            ((running, rulings),) = alike
            found.append(Guard(index, frozenset(Sublayer), running, rulings))
        else:
            found += parts.values()
    return tuple(found)


def doing(layer: LayerPlan) -> Classes:
    """Classes that a layer changes, unless a router lets a row skip."""
    return layer.attending | layer.feeding


def _rulings(
    layer: LayerPlan, cells: tuple[RoutedCell, ...], sublayer: Sublayer, present: Classes
) -> tuple[Ruling, ...]:
    by_rule: dict[int, set[TokenClass]] = {}
    points: dict[int, Point] = {}
    for cell in cells:
        if sublayer in cell.skip and cell.token_class in present:
            by_rule.setdefault(cell.number, set()).add(cell.token_class)
            points[cell.number] = point_of(layer, cell)
    return tuple(
        Ruling(number, frozenset(classes), points[number]) for number, classes in by_rule.items()
    )


def point_of(layer: LayerPlan, cell: RoutedCell) -> Point:
    """A router of the FFN alone waits for the attention's output, where attention comes first."""
    waits = cell.skip == {Sublayer.FFN} and layer.arrangement is not Arrangement.PARALLEL
    return Point.MIDDLE if waits else Point.START
