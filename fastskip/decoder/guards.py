"""Which decisions a plan makes and where; what the device executor keeps flags for."""

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
    """One router rule on rows of some classes in one layer: whether they ``skip``."""

    number: int
    layer: int
    classes: Classes
    skip: frozenset[Sublayer]
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


def rulings_of(plan: SkipPlan, layer: LayerPlan, present: Classes) -> tuple[Ruling, ...]:
    """What router rules decide in a layer on rows of the classes ``present``."""
    by_rule: dict[int, list[RoutedCell]] = {}
    for cell in plan.routed_by_layer.get(layer.index, ()):
        if cell.token_class in present:
            by_rule.setdefault(cell.number, []).append(cell)
    return tuple(
        Ruling(
            number,
            layer.index,
            frozenset(cell.token_class for cell in cells),
            cells[0].skip,
            _point_of(layer, cells[0].skip),
        )
        for number, cells in by_rule.items()
    )


def guards_of(plan: SkipPlan, present: Classes) -> tuple[Guard, ...]:
    """The guards of all layers for rows of the classes ``present``.

    A router that guards a whole block has one flag for both sublayers, unless something else
    distinguishes them.
    """
    found: list[Guard] = []
    for index in plan.routed_by_layer:
        layer = plan.layers[index]
        rulings = rulings_of(plan, layer, present)
        parts = [
            Guard(index, frozenset({sublayer}), layer.running(sublayer) & present, own)
            for sublayer in Sublayer
            if (own := tuple(ruling for ruling in rulings if sublayer in ruling.skip))
        ]
        alike = {(guard.running, guard.rulings) for guard in parts}
        if len(parts) == 2 and len(alike) == 1:
            ((running, own),) = alike
            found.append(Guard(index, frozenset(Sublayer), running, own))
        else:
            found += parts
    return tuple(found)


def doing(layer: LayerPlan) -> Classes:
    """Classes that a layer changes, unless a router lets a row skip."""
    return layer.attending | layer.feeding


def narrows_after(plan: SkipPlan) -> bool:
    """Whether all rows must pass through the last layer, even those whose logits are not read.

    That is so where they influence what the others do between its sublayers, where some rows run a
    final pair of layers one after the other, and where features are added after the last step.
    """
    last = plan.layers[plan.steps[-1][0]]
    if last.partner is not None and not last.is_arranged_whole:
        return True
    if last.index < plan.shape.deep_layers:
        return True
    rules = [
        plan.policy.routers[ruling.number]
        for ruling in rulings_of(plan, last, frozenset(plan.classes))
        if ruling.point is Point.MIDDLE
    ]
    return any(not rule.is_by_row for rule in rules)


def _point_of(layer: LayerPlan, skip: frozenset[Sublayer]) -> Point:
    """A router of the FFN alone waits for the attention's output, where attention comes first."""
    waits = skip == {Sublayer.FFN} and layer.arrangement is not Arrangement.PARALLEL
    return Point.MIDDLE if waits else Point.START
