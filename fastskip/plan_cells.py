"""A policy spread over the cells of a model: who skips what where, with every conflict refused."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastskip.layer_plan import Cell, LayerPlan, ModelShape
from fastskip.policy import (
    Arrangement,
    Combine,
    Norm,
    PolicyError,
    RouterRule,
    SkippedKV,
    SkipPolicy,
    Sublayer,
    TokenClass,
    select_layers,
    select_pairs,
)
from fastskip.policy_fields import TokenSet

Place = tuple[int, TokenClass]


@dataclass(frozen=True, slots=True)
class RoutedCell:
    """A cell for which a router decides, row by row, whether `skip` is left out."""

    layer: int
    token_class: TokenClass
    skip: frozenset[Sublayer]
    rule: RouterRule


@dataclass(frozen=True, slots=True)
class _Skip:
    """What the rules leave out of one cell; `kv` and the field that named it, with attention."""

    sublayers: frozenset[Sublayer] = frozenset()
    kv: SkippedKV = SkippedKV.PROJECT
    kv_field: str = ""


def resolve_layers(policy: SkipPolicy, shape: ModelShape) -> tuple[LayerPlan, ...]:
    """One `LayerPlan` a layer; routed cells count as running."""
    skips = _skips(policy, shape)
    layers: list[LayerPlan] = []
    for index in range(shape.depth):
        column = {c: skips.get((index, c), _Skip()) for c in shape.classes}
        holds_kv = any(Sublayer.ATTENTION not in skip.sublayers for skip in column.values())
        cells = {c: _cell(c, skip, holds_kv, layers) for c, skip in column.items()}
        layers.append(LayerPlan(index, cells))
    return _arrange(policy, layers)


def resolve_routers(
    policy: SkipPolicy, shape: ModelShape, layers: tuple[LayerPlan, ...]
) -> tuple[RoutedCell, ...]:
    """The cells that routers decide; each sublayer of a cell has one rule or one router at most."""
    routed: dict[Place, list[RoutedCell]] = {}
    for number, rule in enumerate(policy.routers):
        name = f"routers[{number}]"
        for layer, token_class in _places(rule.layers, rule.tokens, shape, name):
            plan = layers[layer]
            where = f"layer {layer}, {token_class} rows"
            if plan.partner is not None:
                raise PolicyError(f"{name}.layers", rule.layers, _NO_PAIR, f"{where}: in a pair")
            cell = plan.cells[token_class]
            running = {Sublayer.ATTENTION: cell.attention, Sublayer.FFN: cell.ffn}
            taken = {s for s, runs in running.items() if not runs}
            for other in routed.setdefault((layer, token_class), []):
                taken |= other.skip
            if taken & rule.skip:
                problem = f"{where}: {_list(taken & rule.skip)} already has a rule or router"
                raise PolicyError(f"{name}.skip", _list(rule.skip), _ONE_DECISION, problem)
            routed[layer, token_class].append(RoutedCell(layer, token_class, rule.skip, rule))
    return tuple(cell for cells in routed.values() for cell in cells)


_NO_PAIR = "layers outside pairs"
_ONE_DECISION = "one rule or router for a sublayer of a cell"


def _skips(policy: SkipPolicy, shape: ModelShape) -> dict[Place, _Skip]:
    skips: dict[Place, _Skip] = {}
    for number, rule in enumerate(policy.rules):
        name = f"rules[{number}]"
        for place in _places(rule.layers, rule.tokens, shape, name):
            skip = skips.get(place, _Skip())
            kv, kv_field = skip.kv, skip.kv_field
            if Sublayer.ATTENTION in rule.skip:
                kv = rule.kv or SkippedKV.PROJECT
                if kv_field and kv is not skip.kv:
                    problem = f'got "{kv}" for layer {place[0]}, {place[1]} rows'
                    allowed = f'"{skip.kv}" there, as {kv_field} says'
                    raise PolicyError(f"{name}.kv", rule.kv, allowed, problem)
                kv_field = f"{name}.kv"
            skips[place] = _Skip(skip.sublayers | rule.skip, kv, kv_field)
    return skips


def _cell(token_class: TokenClass, skip: _Skip, holds_kv: bool, below: list[LayerPlan]) -> Cell:
    attention, ffn = Sublayer.ATTENTION not in skip.sublayers, Sublayer.FFN not in skip.sublayers
    if attention:
        return Cell(attention, ffn)
    if holds_kv and skip.kv is SkippedKV.PROJECT:
        return Cell(attention, ffn, SkippedKV.PROJECT)
    if holds_kv and skip.kv is SkippedKV.REUSE:
        for plan in reversed(below):
            if token_class in plan.holding:
                return Cell(attention, ffn, SkippedKV.REUSE, plan.index)
    return Cell(attention, ffn, SkippedKV.OMIT)


def _arrange(policy: SkipPolicy, layers: list[LayerPlan]) -> tuple[LayerPlan, ...]:
    depth = len(layers)
    taken: dict[int, str] = {}
    for number, rule in enumerate(policy.arrangements):
        name = f"arrangements[{number}].layers"
        partners: dict[int, int | None]
        if rule.kind is Arrangement.PAIR:
            pairs = select_pairs(rule.layers, depth, name)  # type: ignore[arg-type]
            partners = {a: b for pair in pairs for a, b in (pair, pair[::-1])}
        else:
            partners = dict.fromkeys(select_layers(rule.layers, depth, name))  # type: ignore[arg-type]
        for layer, partner in partners.items():
            if layer in taken:
                problem = f"layer {layer} is in {taken[layer]} too"
                raise PolicyError(name, rule.layers, "each layer in one arrangement", problem)
            cells = layers[layer].cells.values()
            if partner is not None and not all(cell.attention and cell.ffn for cell in cells):
                problem = f"layer {layer} is in a pair and has a skip"
                raise PolicyError(name, rule.layers, "pairs of layers without skips", problem)
            taken[layer] = name
            layers[layer] = replace(
                layers[layer],
                arrangement=rule.kind,
                norm=rule.norm or Norm.OWN,
                combine=rule.combine or Combine.SUM,
                partner=partner,
            )
    return tuple(layers)


def _places(
    layers: str | tuple[int, ...], tokens: TokenSet, shape: ModelShape, name: str
) -> list[Place]:
    classes = shape.classes
    if tokens != "all":
        if not tokens <= set(classes):
            allowed = f'"all" or {_list(classes)}: this is a text-only model'
            raise PolicyError(f"{name}.tokens", _list(tokens), allowed)
        classes = tuple(c for c in classes if c in tokens)
    return [(n, c) for n in select_layers(layers, shape.depth, f"{name}.layers") for c in classes]


def _list(values: object) -> list[str]:
    return sorted(values)  # type: ignore[call-overload, no-any-return]
