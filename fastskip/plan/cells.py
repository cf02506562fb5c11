"""Resolves a policy into the cells of a model, refusing every conflict."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from fastskip.plan.layer_plan import Cell, LayerPlan, ModelShape
from fastskip.policy import (
    Arrangement,
    Combine,
    Norm,
    PolicyError,
    Ranking,
    RouterRule,
    Semantics,
    SkippedKV,
    SkipPolicy,
    Sublayer,
    TokenClass,
    select_layers,
    select_pairs,
)
from fastskip.policy.fields import TokenSet

Place = tuple[int, TokenClass]


@dataclass(frozen=True, slots=True)
class RoutedCell:
    """A cell in which a router decides for each row whether it skips `skip`.

    `number`: the rule's index in the policy. `skipped`: the cell of a row that skips, as if by a
    static rule.
    """

    layer: int
    token_class: TokenClass
    number: int
    rule: RouterRule
    skipped: Cell

    @property
    def skip(self) -> frozenset[Sublayer]:
        """The sublayers that the router may skip."""
        return self.rule.skip


@dataclass(frozen=True, slots=True)
class _Skip:
    """What the rules skip in one cell; if attention is, also `kv` and the field that set it.

    `kv=None`: no rule names one, so the reference semantics decide.
    """

    sublayers: frozenset[Sublayer] = frozenset()
    kv: SkippedKV | None = SkippedKV.PROJECT
    kv_field: str = ""

    @property
    def leaves(self) -> SkippedKV:
        """What a row that skips attention leaves."""
        if self.kv is not None:
            return self.kv
        # In the papers' code, a skipped block passes on the K and V of the layer before; if
        # attention alone is skipped, its input takes their place.
        return SkippedKV.REUSE if Sublayer.FFN in self.sublayers else SkippedKV.HIDDEN


def resolve_layers(
    policy: SkipPolicy, shape: ModelShape
) -> tuple[tuple[LayerPlan, ...], tuple[RoutedCell, ...]]:
    """One `LayerPlan` per layer, in which routed cells count as running, and the routed cells.

    Each sublayer of a cell has at most one rule or router.
    """
    skips = _skips(policy, shape)
    layers = _wired(policy, shape, skips)
    _check_hidden(policy, layers, skips, shape)
    routers = _routers(policy, shape, layers)
    resolved: list[LayerPlan] = []
    routed: list[RoutedCell] = []
    # What rows that a plug-in sent past all later layers leave in them.
    exits: dict[TokenClass, set[SkippedKV]] = {c: set() for c in shape.classes}
    for plan in layers:
        column = _column(skips, plan.index, shape)
        cells = {c: _cell(c, skip, plan.holds_kv, resolved) for c, skip in column.items()}
        decided = [
            _routed_cell(plan, c, skip, number, policy.routers[number], resolved)
            for c, skip in column.items()
            for number in routers.get((plan.index, c), ())
        ]
        hollow = _hollow(cells, decided, exits, resolved) if plan.holds_kv else frozenset()
        stage = sum(rule.after_layer < plan.index for rule in policy.removals)
        resolved.append(replace(plan, cells=cells, hollow=hollow, stage=stage))
        routed += decided
        for cell in decided:
            if cell.rule.is_plug_in:
                exits[cell.token_class].add(cell.rule.leaves)
    _check_removals(policy, resolved, shape)
    return tuple(resolved), tuple(routed)


def _wired(policy: SkipPolicy, shape: ModelShape, skips: Mapping[Place, _Skip]) -> list[LayerPlan]:
    """What each layer runs, and how it is wired; its cells do not know yet what they copy."""
    layers: list[LayerPlan] = []
    for index in range(shape.depth):
        column = _column(skips, index, shape)
        holds_kv = any(Sublayer.ATTENTION not in skip.sublayers for skip in column.values())
        cells = {c: _cell(c, skip, holds_kv, []) for c, skip in column.items()}
        layers.append(LayerPlan(index, cells))
    layers = _apply_arrangements(policy, layers, shape)
    if policy.semantics is Semantics.REFERENCE:
        layers = [_as_reference(plan, shape) for plan in layers]
    return _apply_masks(policy, layers)


def _column(skips: Mapping[Place, _Skip], layer: int, shape: ModelShape) -> dict[TokenClass, _Skip]:
    """What the rules skip in one layer."""
    return {c: skips.get((layer, c), _Skip()) for c in shape.classes}


def _routed_cell(
    plan: LayerPlan,
    token_class: TokenClass,
    skip: _Skip,
    number: int,
    rule: RouterRule,
    below: Sequence[LayerPlan],
) -> RoutedCell:
    """A cell of which rules skip `skip`, and in which a router may skip more."""
    kv = rule.leaves if Sublayer.ATTENTION in rule.skip else skip.leaves
    both = _Skip(skip.sublayers | rule.skip, kv)
    skipped = _cell(token_class, both, plan.holds_kv, below)
    return RoutedCell(plan.index, token_class, number, rule, skipped)


def _hollow(
    cells: Mapping[TokenClass, Cell],
    decided: Sequence[RoutedCell],
    exits: Mapping[TokenClass, Collection[SkippedKV]],
    below: Sequence[LayerPlan],
) -> frozenset[TokenClass]:
    """Classes of which a row may lack an entry, in a layer that holds entries.

    A class that never holds one is not hollow: no reader looks for its entries.
    """
    hollow = set()
    for token_class, cell in cells.items():
        routed = (each for each in decided if each.token_class is token_class)
        skipping = [each.skipped for each in routed if Sublayer.ATTENTION in each.skip]
        if cell.kv is SkippedKV.REUSE:
            skipping.append(cell)
        for kv in exits[token_class] if cell.attention else ():
            skipping.append(_cell(token_class, _Skip(frozenset(Sublayer), kv), True, below))
        if any(_may_lack(each, token_class, below) for each in skipping):
            hollow.add(token_class)
    return frozenset(hollow)


def _may_lack(cell: Cell, token_class: TokenClass, below: Sequence[LayerPlan]) -> bool:
    """Whether a row of this cell may lack an entry, in a layer that holds entries."""
    if cell.kv is SkippedKV.REUSE:
        sources = (cell.kv_source, *cell.kv_fallbacks)
        last = below[sources[-1]]  # type: ignore[index]
        return token_class in last.hollow
    return cell.kv is SkippedKV.OMIT


def _routers(
    policy: SkipPolicy, shape: ModelShape, layers: Sequence[LayerPlan]
) -> dict[Place, list[int]]:
    """The numbers of the routers of each cell."""
    found: dict[Place, list[int]] = {}
    for number, rule in enumerate(policy.routers):
        name = f"routers[{number}]"
        for layer, token_class in _places(rule.layers, rule.tokens, shape, name):
            plan = layers[layer]
            where = f"layer {layer}, {token_class} rows"
            if plan.partner is not None:
                raise PolicyError(f"{name}.layers", rule.layers, _NO_PAIR, f"{where}: in a pair")
            if not plan.is_arranged_whole or plan.replaced:
                problem = f"{where}: classes are wired differently in this layer"
                raise PolicyError(f"{name}.layers", rule.layers, _ONE_WIRING, problem)
            cell = plan.cells[token_class]
            running = {Sublayer.ATTENTION: cell.attention, Sublayer.FFN: cell.ffn}
            taken = {s for s, runs in running.items() if not runs}
            for other in found.setdefault((layer, token_class), []):
                taken |= policy.routers[other].skip
            if taken & rule.skip:
                problem = f"{where}: {_list(taken & rule.skip)} already has a rule or router"
                raise PolicyError(f"{name}.skip", _list(rule.skip), _ONE_DECISION, problem)
            found[layer, token_class].append(number)
    return found


def _check_removals(policy: SkipPolicy, layers: Sequence[LayerPlan], shape: ModelShape) -> None:
    """Checks that removals lie between layers, and that the attention they rank by exists."""
    for number, rule in enumerate(policy.removals):
        name, last = f"removals[{number}]", shape.depth - 1
        _classes(rule.tokens, shape, name)
        if rule.after_layer >= last:
            allowed = f"a layer index in [0, {last}), before the last layer"
            raise PolicyError(f"{name}.after_layer", rule.after_layer, allowed)
        before, by = layers[rule.after_layer], rule.keep.by
        if before.partner == before.index + 1:
            problem = f"layers {before.index} and {before.partner} are a pair"
            raise PolicyError(f"{name}.after_layer", rule.after_layer, _NO_PAIR, problem)
        if by not in (Ranking.ATTENTION, Ranking.NEXT_ATTENTION):
            continue
        seen = layers[rule.after_layer + (by is Ranking.NEXT_ATTENTION)]
        shown = TokenClass.TEXT in seen.attending and rule.classes <= seen.projecting
        if seen.partner is not None or seen.unimodal or not shown:
            allowed = "a layer outside pairs in which text attends and sees K and V of image rows"
            problem = f'"{by}" ranks rows by layer {seen.index}'
            raise PolicyError(f"{name}.keep.by", by.value, allowed, problem)


_NO_PAIR = "layers outside pairs"
_ONE_WIRING = "layers in which all classes are sequential, or all are parallel"
_ONE_DECISION = "at most one rule or router per sublayer and cell"


def _skips(policy: SkipPolicy, shape: ModelShape) -> dict[Place, _Skip]:
    is_clean = policy.semantics is Semantics.CLEAN
    skips: dict[Place, _Skip] = {}
    for number, rule in enumerate(policy.rules):
        name = f"rules[{number}]"
        for place in _places(rule.layers, rule.tokens, shape, name):
            skip = skips.get(place, _Skip())
            kv, kv_field = skip.kv, skip.kv_field
            if Sublayer.ATTENTION in rule.skip:
                kv = rule.kv or (SkippedKV.PROJECT if is_clean else None)
                if kv_field and kv is not skip.kv:
                    problem = f'got "{kv or "none"}" for layer {place[0]}, {place[1]} rows'
                    allowed = f'"{skip.kv or "none"}" there, as in {kv_field}'
                    raise PolicyError(f"{name}.kv", rule.kv, allowed, problem)
                kv_field = f"{name}.kv"
            skips[place] = _Skip(skip.sublayers | rule.skip, kv, kv_field)
    return skips


def _cell(token_class: TokenClass, skip: _Skip, holds_kv: bool, below: Sequence[LayerPlan]) -> Cell:
    attention, ffn = Sublayer.ATTENTION not in skip.sublayers, Sublayer.FFN not in skip.sublayers
    if attention:
        return Cell(attention, ffn)
    if holds_kv and skip.leaves in (SkippedKV.PROJECT, SkippedKV.HIDDEN):
        return Cell(attention, ffn, skip.leaves)
    if holds_kv and skip.leaves is SkippedKV.REUSE:
        sources = kv_sources(below, token_class)
        if sources:
            return Cell(attention, ffn, SkippedKV.REUSE, sources[0], sources[1:])
    return Cell(attention, ffn, SkippedKV.OMIT)


def kv_sources(below: Sequence[LayerPlan], token_class: TokenClass) -> tuple[int, ...]:
    """Where REUSE looks for a row's entry: from the highest of the layers `below` down to the first
    that is certain to have one for every row of the class."""
    sources: list[int] = []
    for plan in reversed(below):
        if token_class in plan.holding:
            sources.append(plan.index)
            if token_class not in plan.hollow:
                break
    return tuple(sources)


def _as_reference(plan: LayerPlan, shape: ModelShape) -> LayerPlan:
    """A layer as the papers' code runs it.

    For rows that skip attention alone, the FFN reads the attention's norm (Llama), or the residual
    stream itself becomes that norm (OPT). Pairs store the mean of their K and V.
    """
    if plan.partner is not None:
        return replace(plan, merges_kv=True)
    alone = plan.feeding - plan.attending
    if not alone:
        return plan
    if not shape.gated_ffn:
        return replace(plan, replaced=alone)
    if plan.arrangement is Arrangement.PARALLEL and plan.norm is not Norm.SHARED:
        problem = f"layer {plan.index} skips attention, so its FFN reads the attention's norm"
        raise PolicyError("semantics", Semantics.REFERENCE.value, 'norm "shared" there', problem)
    return replace(
        plan,
        arrangement=Arrangement.PARALLEL,
        norm=Norm.SHARED,
        arranged=plan.arranged | alone,
    )


def _apply_masks(policy: SkipPolicy, layers: list[LayerPlan]) -> list[LayerPlan]:
    for number, rule in enumerate(policy.masks):
        for layer in select_layers(rule.layers, len(layers), f"masks[{number}].layers"):
            layers[layer] = replace(layers[layer], unimodal=True)
    return layers


def _check_hidden(
    policy: SkipPolicy, layers: Sequence[LayerPlan], skips: dict[Place, _Skip], shape: ModelShape
) -> None:
    """Checks that hidden states, split into heads, have the size of K and V."""
    if shape.num_kv_heads * shape.head_dim == shape.hidden_size:
        return
    size = f"{shape.num_kv_heads} K and V heads of {shape.head_dim}, hidden size"
    problem = f"hidden states do not fit {size} {shape.hidden_size}"
    for (layer, _), skip in skips.items():
        leaves = Sublayer.ATTENTION in skip.sublayers and skip.leaves is SkippedKV.HIDDEN
        if leaves and layers[layer].holds_kv:
            field = skip.kv_field if skip.kv else "semantics"
            others = '"project", "reuse" or "omit" as kv'
            raise PolicyError(field, SkippedKV.HIDDEN.value, others, problem)
    for number, rule in enumerate(policy.routers):
        if rule.kv is SkippedKV.HIDDEN:
            others = '"project", "reuse" or "omit"'
            raise PolicyError(f"routers[{number}].kv", rule.kv.value, others, problem)


def _apply_arrangements(
    policy: SkipPolicy, layers: list[LayerPlan], shape: ModelShape
) -> list[LayerPlan]:
    depth = len(layers)
    taken: dict[int, str] = {}
    norm, combine = Norm.OWN, Combine.SUM
    if policy.semantics is Semantics.REFERENCE:
        # In OPT's code, the FFN applies its own norm to the output of the attention's norm.
        norm, combine = Norm.SHARED if shape.gated_ffn else Norm.STACKED, Combine.MEAN
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
                problem = f"layer {layer} is also in {taken[layer]}"
                raise PolicyError(name, rule.layers, "each layer in one arrangement", problem)
            cells = layers[layer].cells.values()
            if partner is not None and not all(cell.attention and cell.ffn for cell in cells):
                problem = f"layer {layer} is in a pair but also has a skip"
                raise PolicyError(name, rule.layers, "pairs of layers without skips", problem)
            taken[layer] = name
            layers[layer] = replace(
                layers[layer],
                arrangement=rule.kind,
                norm=rule.norm or norm,
                combine=rule.combine or combine,
                partner=partner,
                arranged=_classes(rule.tokens, shape, f"arrangements[{number}]"),
            )
    return layers


def _places(
    layers: str | tuple[int, ...], tokens: TokenSet, shape: ModelShape, name: str
) -> list[Place]:
    classes = [c for c in shape.classes if c in _classes(tokens, shape, name)]
    return [(n, c) for n in select_layers(layers, shape.depth, f"{name}.layers") for c in classes]


def _classes(tokens: TokenSet, shape: ModelShape, name: str) -> frozenset[TokenClass]:
    classes = frozenset(shape.classes)
    if tokens == "all":
        return classes
    if not tokens <= classes:
        allowed = f'"all" or {_list(classes)}: this is a text-only model'
        raise PolicyError(f"{name}.tokens", _list(tokens), allowed)
    return tokens


def _list(values: object) -> list[str]:
    return sorted(map(str, values))  # type: ignore[call-overload]
