"""What a policy runs by layer and token class, according to its plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import prod
from typing import Any

from fastskip.plan import Cell, LayerPlan, ModelShape, SkipPlan, make_plan
from fastskip.policy import (
    Arrangement,
    RemovalRule,
    SkippedKV,
    SkipPolicy,
    Sublayer,
    TokenClass,
)


class State(StrEnum):
    """What rows do in one sublayer, attention or FFN."""

    RUNS = "runs"
    ROUTED = "decided row by row"
    OWN_KV = "own K, V only"
    COPIED_KV = "copied K, V only"
    HIDDEN_KV = "hidden state as K, V"
    NOTHING = "nothing"


_LEFT = {
    SkippedKV.PROJECT: State.OWN_KV,
    SkippedKV.REUSE: State.COPIED_KV,
    SkippedKV.HIDDEN: State.HIDDEN_KV,
}


@dataclass(frozen=True, slots=True)
class MapCell:
    """One layer, one token class; `share`: of its prompt rows, those that removals have left."""

    attention: State
    ffn: State
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class MapLine:
    """Consecutive layers that do the same, in words; `cells`: one per token class."""

    layers: str
    arrangement: str
    cells: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PolicyMap:
    """One policy on one model.

    `cells`: one per layer, by token class. `pairs`: the first layer of each pair.
    """

    depth: int
    classes: tuple[TokenClass, ...]
    cells: Mapping[TokenClass, tuple[MapCell, ...]]
    parallel: frozenset[int]
    pairs: tuple[int, ...]
    removals: tuple[Removal, ...]
    lines: tuple[MapLine, ...]

    @property
    def text(self) -> str:
        """The map in words."""
        parts = []
        for line in self.lines:
            cells = zip(self.classes, line.cells, strict=True)
            what = ", ".join(f"{name} rows: {cell}" for name, cell in cells)
            noun = "layers" if "-" in line.layers else "layer"
            parts.append(f"{noun} {line.layers} ({line.arrangement}): {what}")
        parts += [removal.text for removal in self.removals]
        return "; ".join(parts)


@dataclass(frozen=True, slots=True)
class Removal:
    """Rows removed from all layers after `after_layer`: of `classes`, a share `ratio` stays."""

    after_layer: int
    classes: frozenset[TokenClass]
    ratio: float
    by: str

    @property
    def text(self) -> str:
        """The removal in words."""
        rows = ", ".join(each for each in TokenClass if each in self.classes)
        return f"after layer {self.after_layer}: {self.ratio:.0%} of {rows} rows stay, by {self.by}"


def map_policy(policy: Mapping[str, Any], shape: ModelShape) -> PolicyMap:
    """The map of a policy, given as plain data, on a model of a shape.

    Raises:
        PolicyError: the policy is invalid, or does not fit the shape.
    """
    plan = make_plan(SkipPolicy.from_dict(policy), shape)
    routed: dict[tuple[int, TokenClass], frozenset[Sublayer]] = {}
    for each in plan.routed:
        place = each.layer, each.token_class
        routed[place] = routed.get(place, frozenset()) | each.skip
    cells = {
        token_class: tuple(
            _cell(layer, token_class, routed, plan.removals) for layer in plan.layers
        )
        for token_class in plan.classes
    }
    return PolicyMap(
        depth=shape.depth,
        classes=plan.classes,
        cells=cells,
        parallel=frozenset(
            each.index for each in plan.layers if each.arrangement is Arrangement.PARALLEL
        ),
        pairs=tuple(step[0] for step in plan.steps if len(step) == 2),
        removals=tuple(
            Removal(each.after_layer, each.classes, each.keep.ratio, each.keep.by.value)
            for each in plan.removals
        ),
        lines=_lines(plan),
    )


def _cell(
    layer: LayerPlan,
    token_class: TokenClass,
    routed: Mapping[tuple[int, TokenClass], frozenset[Sublayer]],
    removals: Sequence[RemovalRule],
) -> MapCell:
    cell, maybe = layer.cells[token_class], routed.get((layer.index, token_class), frozenset())
    away = (rule for rule in removals[: layer.stage] if token_class in rule.classes)
    share = prod(rule.keep.ratio for rule in away)
    return MapCell(_attention(cell, maybe), _ffn(cell, maybe), share)


def _attention(cell: Cell, routed: frozenset[Sublayer]) -> State:
    if cell.attention:
        return State.ROUTED if Sublayer.ATTENTION in routed else State.RUNS
    return State.NOTHING if cell.kv is None else _LEFT.get(cell.kv, State.NOTHING)


def _ffn(cell: Cell, routed: frozenset[Sublayer]) -> State:
    if not cell.ffn:
        return State.NOTHING
    return State.ROUTED if Sublayer.FFN in routed else State.RUNS


def _lines(plan: SkipPlan) -> tuple[MapLine, ...]:
    return tuple(MapLine(row.layers, row.arrangement, row.cells) for row in plan.rows())
