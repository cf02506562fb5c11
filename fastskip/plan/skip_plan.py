"""What one model does under one policy: the single source of truth for what is skipped.

`make_plan` resolves a `SkipPolicy` against a `ModelShape`. The runtime, the cost counts, the report
and the tables all read the resulting `SkipPlan`, so they cannot disagree about what ran.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import groupby
from math import prod
from typing import TypeVar

from fastskip.plan import costs
from fastskip.plan.cells import RoutedCell, kv_sources, resolve_layers
from fastskip.plan.chances import ExpectedPlan, LayerChance, Rate, certain, expected, rates_of
from fastskip.plan.layer_plan import Cell, LayerPlan, ModelShape, Pool, Table
from fastskip.plan.summary import summary
from fastskip.policy import (
    Arrangement,
    PolicyError,
    RemovalRule,
    SkippedKV,
    SkipPolicy,
    Sublayer,
    TokenClass,
)
from fastskip.policy.presets import PRESETS, defaults_of

Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class TableRow:
    """Consecutive layers that do the same: their range, wiring, and one text per token class."""

    layers: str
    arrangement: str
    cells: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class SkipPlan:
    """A policy resolved for one model; immutable.

    `steps` is the execution order: `(l,)`, or `(l, l + 1)` for a pair. `notes` holds remarks on
    layers of the actual model for readers of the table; it does not affect execution.
    """

    policy: SkipPolicy
    shape: ModelShape
    layers: tuple[LayerPlan, ...]
    routed: tuple[RoutedCell, ...] = ()
    notes: Mapping[int, str] = field(default_factory=dict, compare=False)

    def __repr__(self) -> str:
        return summary(self)

    @property
    def classes(self) -> tuple[TokenClass, ...]:
        """The token classes that the model has."""
        return self.shape.classes

    @property
    def removals(self) -> tuple[RemovalRule, ...]:
        """The removals, from the lowest layer up; removal `n` ends stage `n`."""
        return self.policy.removals

    @cached_property
    def steps(self) -> tuple[tuple[int, ...], ...]:
        """Layers in execution order, both layers of a pair together."""
        steps: list[tuple[int, ...]] = []
        for plan in self.layers:
            if plan.partner is None:
                steps.append((plan.index,))
            elif plan.partner > plan.index:
                steps.append((plan.index, plan.partner))
        return tuple(steps)

    @cached_property
    def stages(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """The steps between removals: those before the first one, and so forth."""

        def stage(step: tuple[int, ...]) -> int:
            return self.layers[step[0]].stage

        return tuple(tuple(steps) for _, steps in groupby(self.steps, stage))

    def removal_layer(self, stage: int) -> int | None:
        """The layer whose input is read by the removal that ends a stage, if there is one."""
        return self.removals[stage].after_layer if stage < len(self.removals) else None

    @cached_property
    def layers_by_table(self) -> dict[Table, tuple[int, ...]]:
        """The layers whose entries are counted together."""
        return _grouped((layer.table, layer.index) for layer in self.layers if layer.holding)

    @cached_property
    def hollow_tables(self) -> tuple[int, ...]:
        """The tables of layers in which the host does not know which rows have entries."""
        return tuple(table for table in self.layers_by_table if isinstance(table, int))

    @cached_property
    def layers_by_pool(self) -> dict[Pool, tuple[int, ...]]:
        """The layers whose entries are stored together."""
        return _grouped((layer.pool, layer.index) for layer in self.layers if layer.holding)

    @cached_property
    def tables_by_pool(self) -> dict[Pool, tuple[Table, ...]]:
        """The tables, counted separately, of each pool, stored together."""
        tables = self.layers_by_table.items()
        return _grouped((self.layers[layers[0]].pool, table) for table, layers in tables)

    @cached_property
    def groups(self) -> tuple[frozenset[TokenClass], ...]:
        """Classes that every layer treats the same, merged; in the order of `TokenClass`."""
        merged: dict[object, set[TokenClass]] = {}
        for token_class in self.classes:
            routed = [(r.layer, r.rule) for r in self.routed if r.token_class is token_class]
            column = tuple(plan.treats(token_class) for plan in self.layers)
            merged.setdefault((column, tuple(routed)), set()).add(token_class)
        return tuple(frozenset(group) for group in merged.values())

    @cached_property
    def is_dense(self) -> bool:
        """Whether every cell runs, in sequence, without masks, routers or removals."""
        plain = all(plan.arrangement is Arrangement.SEQUENTIAL for plan in self.layers)
        full = all(
            cell.attention and cell.ffn for plan in self.layers for cell in plan.cells.values()
        )
        seen = not any(plan.unimodal for plan in self.layers)
        return plain and full and seen and not self.routed and not self.removals

    @property
    def name(self) -> str:
        """The policy's name, else "dense" or "unnamed"."""
        return self.policy.name or ("dense" if self.is_dense else "unnamed")

    @cached_property
    def affected_classes(self) -> frozenset[TokenClass]:
        """Classes that the policy affects; in a forward without their rows it has no effect."""
        dense = LayerPlan(0, dict.fromkeys(self.classes, Cell(True, True)))
        found = {routed.token_class for routed in self.routed}
        for plan in self.layers:
            found |= {c for c in self.classes if plan.treats(c) != dense.treats(c)}
        return frozenset(found.union(*(rule.classes for rule in self.removals)))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that affects execution, names excluded; equal across processes."""
        layers = [asdict(plan) for plan in self.layers]
        routed = [(r.layer, r.token_class, r.rule.to_dict()) for r in self.routed]
        away = [rule.to_dict() for rule in self.removals]
        parts = [asdict(self.shape), layers, routed, away]
        text = json.dumps(parts, sort_keys=True, default=sorted)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def routed_by_layer(self) -> Mapping[int, tuple[RoutedCell, ...]]:
        """The routed cells of each layer that has any."""
        return _grouped((cell.layer, cell) for cell in self.routed)

    def skipping_cells(self, layer: int) -> dict[TokenClass, Cell]:
        """The cells of rows that skip a layer's attention, by a rule or by a router's decision; of
        the classes of which there may be such rows."""
        found = {c: cell for c, cell in self.layers[layer].cells.items() if not cell.attention}
        for routed in self.routed_by_layer.get(layer, ()):
            if Sublayer.ATTENTION in routed.skip:
                found[routed.token_class] = routed.skipped
        return found

    def kv_sources(self, layer: int, token_class: TokenClass) -> tuple[int, ...]:
        """Where REUSE looks for a row's entry of `layer`; as `cells.kv_sources`."""
        return kv_sources(self.layers[:layer], token_class)

    def layer_when(self, index: int, skipping: frozenset[int]) -> LayerPlan:
        """A layer as it runs if the routers with these numbers let all of their rows skip."""
        found = self.layers[index]
        for routed in self.routed_by_layer.get(index, ()):
            if routed.number in skipping:
                before, skipped = found.cells[routed.token_class], routed.skipped
                both = replace(
                    before if Sublayer.ATTENTION not in routed.skip else skipped,
                    attention=before.attention and skipped.attention,
                    ffn=before.ffn and skipped.ffn,
                )
                found = replace(found, cells={**found.cells, routed.token_class: both})
        return found

    @cached_property
    def when_skipping(self) -> SkipPlan:
        """The plan that runs if every router lets every row skip."""
        everyone = frozenset(range(len(self.policy.routers)))
        layers = (self.layer_when(layer.index, everyone) for layer in self.layers)
        return SkipPlan(self.policy, self.shape, tuple(layers))

    @cached_property
    def chances(self) -> tuple[LayerChance, ...]:
        """What runs in each layer, for costs; routed cells count as running."""
        return tuple(certain(layer) for layer in self.layers)

    def expected(self, rate: Rate | None = None) -> ExpectedPlan:
        """The expected plan if each router lets this share of its candidates skip.

        `rate`: one share for all routers, or shares by router number; with `None`, and for routers
        that are not named, the rate that the rule states. The cost functions accept the result as a
        plan; at 0 costs equal those of this plan, at 1 those of `when_skipping`.

        Raises:
            PolicyError: a rate is not in [0, 1], or is missing for a router that states none
                (similarity, linear with a threshold).
        """
        rates, skipping = rates_of(self.policy.routers, rate), self.when_skipping
        layers = zip(self.layers, skipping.layers, strict=True)
        chances = (expected(a, b, self.routed_by_layer.get(a.index, ()), rates) for a, b in layers)
        return ExpectedPlan(self.shape, self.steps, tuple(chances), self.removals)

    def cost(
        self, n_image: int, n_text: int, n_new: int, batch: int = 1, *, text_before: int = 0
    ) -> costs.GenerationCost:
        """FLOPs, bytes and operations of one `generate` call, separately for prefill and decode.

        Counts are per sequence. `text_before` of the text rows precede the image rows.
        """
        return costs.generation_cost(self, n_image, n_text, n_new, batch, text_before=text_before)

    def flops(
        self, n_image: int, n_text: int, n_new: int, batch: int = 1, *, text_before: int = 0
    ) -> int:
        """All FLOPs of one `generate` call, decoder and lm_head; `cost` splits them."""
        return self.cost(n_image, n_text, n_new, batch, text_before=text_before).flops

    def decode_bytes(self, context: Mapping[TokenClass, int], batch: int = 1) -> int:
        """Bytes that one decode step reads and writes; `context`: rows per class and sequence."""
        return costs.decode_cost(self, context, batch).bytes

    def kv_bytes(self, n_image: int, n_text: int, n_generated: int = 0, batch: int = 1) -> int:
        """Bytes of live cache entries of `batch` sequences with these rows each."""
        counts = costs.prompt_counts(n_image, n_text, n_generated)
        return costs.cache_bytes(self, counts, batch)

    def rows(self) -> tuple[TableRow, ...]:
        """The plan as a table of layer ranges; `classes` names the columns of `cells`."""

        def describe(plan: LayerPlan) -> tuple[str, tuple[str, ...], str]:
            cells = tuple(self._cell_text(plan, c) for c in self.classes)
            return _arrangement_text(plan, self.classes), cells, self.notes.get(plan.index, "")

        rows = []
        for (arrangement, cells, note), group in groupby(self.layers, describe):
            indices = [plan.index for plan in group]
            first, last = indices[0], indices[-1]
            name = str(first) if first == last else f"{first}-{last}"
            rows.append(TableRow(name, arrangement, cells, note))
        return tuple(rows)

    def table(self) -> str:
        """The rows as plain text, columns aligned."""
        head = (
            "layers",
            "arrangement",
            *(str(c) for c in self.classes),
            "note" if self.notes else "",
        )
        rows = ((row.layers, row.arrangement, *row.cells, row.note) for row in self.rows())
        lines = [head, *rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        padded = (
            "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines
        )
        return "\n".join(line.rstrip() for line in padded)

    def _cell_text(self, plan: LayerPlan, token_class: TokenClass) -> str:
        cell = plan.cells[token_class]
        here = [r for r in self.routed if (r.layer, r.token_class) == (plan.index, token_class)]
        routed = frozenset().union(*(r.skip for r in here))
        parts = []
        if cell.attention:
            parts.append("attention" + ("?" if "attention" in routed else ""))
        elif cell.kv in _STORED:
            parts.append(_STORED[cell.kv])
        if cell.ffn:
            parts.append("ffn" + ("?" if "ffn" in routed else ""))
        text = " + ".join(parts) or "-"
        away = [r for r in self.removals[: plan.stage] if token_class in r.classes]
        if not parts or not away:
            return text
        return f"{text}, {prod(rule.keep.ratio for rule in away):.3g} of the rows"


def make_plan(policy: SkipPolicy, shape: ModelShape) -> SkipPlan:
    """Resolve `policy` for a model of `shape`.

    Raises `PolicyError` where the policy does not fit the model or contradicts itself; no rule
    is dropped silently.
    """
    try:
        return SkipPlan(policy, shape, *resolve_layers(policy, shape))
    except PolicyError as error:
        name = (policy.name or "").partition(":")[0]
        options = list(defaults_of(name)) if name in PRESETS else []
        if options:
            about = f"its options: {', '.join(options)}; written as {name}:{options[0]}=VALUE"
            error.add_note(f"(preset {name}; {about})")
        raise


_STORED = {
    SkippedKV.PROJECT: "own K, V",
    SkippedKV.REUSE: "copied K, V",
    SkippedKV.HIDDEN: "hidden K, V",
}


def _grouped(pairs: Iterable[tuple[Key, Value]]) -> dict[Key, tuple[Value, ...]]:
    """The values of each key, in order."""
    found: dict[Key, list[Value]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return {key: tuple(values) for key, values in found.items()}


def _arrangement_text(plan: LayerPlan, classes: Sequence[TokenClass]) -> str:
    text = "sequential"
    if plan.arrangement is Arrangement.PARALLEL:
        text = f"parallel, {plan.norm} norm"
    elif plan.partner is not None:
        text = f"pair, {plan.combine}" + (", mean K, V" if plan.merges_kv else "")
    if not plan.is_arranged_whole:
        text += f" ({', '.join(c for c in classes if c in plan.arranged)})"
    if plan.replaced:
        text += f", normed stream ({', '.join(c for c in classes if c in plan.replaced)})"
    return text + (", unimodal" if plan.unimodal else "")
