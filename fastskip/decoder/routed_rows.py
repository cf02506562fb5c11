"""The rows of a forward in which routers decide: worked out layer by layer, as it runs.

Decisions are masks over the ``N`` packed rows, on the host. A row that skips is treated as the
static cell of a policy would treat it; only which rows those are is not known sooner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastskip.decoder.attention import AttentionPattern
from fastskip.decoder.cache import SkipCache
from fastskip.decoder.candidates import Attended, Candidates
from fastskip.decoder.entries import Entries
from fastskip.decoder.layer import BlockRows
from fastskip.decoder.trace import RowTrace, trace_start
from fastskip.plan import LayerPlan, RoutedCell, SkipPlan
from fastskip.policy import Arrangement, Group, SkippedKV, Sublayer, TokenClass
from fastskip.routing import Decision, Decisions, Router, RouterError, Scope
from fastskip.tokens import Rows, TokenLayout, member

StaticRows = Callable[[LayerPlan, bool], BlockRows]


class RoutedRows:
    """Makes the ``BlockRows`` of one forward; layers that nothing decides on have static ones."""

    def __init__(
        self,
        plan: SkipPlan,
        routers: Sequence[Router],
        layout: TokenLayout,
        cache: SkipCache,
        entries: Entries,
        narrow: Rows | None,
        static: StaticRows,
        *,
        lens: Callable[[Tensor], Tensor] | None = None,
        attended: Attended | None = None,
    ) -> None:
        self._plan, self._routers, self._layout = plan, routers, layout
        self._cache, self._entries, self._narrow, self._static = cache, entries, narrow, static
        self._lens, self._attended = lens, attended
        self._start = trace_start(plan, routers)
        self._trace: RowTrace | None = None
        self._states: dict[int, dict[str, Any]] = {}
        nobody = torch.zeros(len(layout), dtype=torch.bool)
        self._nobody = nobody
        # Rows that have exited, by what they leave in the caches of later layers.
        self._exited: dict[SkippedKV, Tensor] = {}
        self._exiting: dict[SkippedKV, Tensor] = {}
        self._gone = nobody
        self._ran = nobody
        self._h: Tensor | None = None
        self._members: dict[frozenset[TokenClass], Tensor] = {}
        self._held: dict[int, Tensor] = {}
        self._skips: dict[tuple[int, Sublayer], Tensor] = {}
        self._asked: dict[tuple[int, Sublayer], Tensor] = {}

    def enter(self, step: tuple[int, ...], h: Tensor) -> None:
        """Rows stand before a layer, or a pair of them: what is decided there is decided."""
        if self._start is not None and step[0] >= self._start:
            if self._trace is None:
                self._trace = RowTrace(h)
            else:
                self._trace.move(h, self._ran)
        self._h = h
        for kv, rows in self._exiting.items():
            self._exited[kv] = self._exited.get(kv, self._nobody) | rows
            self._gone = self._gone | rows
        self._exiting = {}
        if bool(self._gone.any()):
            self._note_exits(step)
        layer = self._plan.layers[step[0]]
        # Who runs the layer whole: what its class has to do there, unless a router takes some.
        self._ran = self._of(layer.attending | layer.feeding) & ~self._gone
        for number, cells in self._rules(layer, is_late=False).items():
            self._decide(layer, number, cells, h, None)

    def of(self, layer: LayerPlan, is_last: bool) -> BlockRows:
        """What enters each part of a layer; to be called once a layer, after ``enter``."""
        if self._attended is not None:
            assert self._h is not None
            self._attended.inputs[layer.index] = self._h.detach().clone(), self._attending(layer)
        is_routed = layer.index in self._plan.routed_by_layer
        if layer.is_even and not is_routed and not bool(self._gone.any()):
            return self._static(layer, is_last)
        return self._make(layer, self._narrow if is_last else None)

    def decisions(self) -> Decisions:
        """What was decided in this forward, by column."""
        layout = self._layout
        masks, asked = (
            {key: layout.unpack(rows) for key, rows in sorted(found.items())}
            for found in (self._skips, self._asked)
        )
        return Decisions(layout.first_column, layout.source, masks, asked)

    def _make(self, layer: LayerPlan, narrow: Rows | None) -> BlockRows:
        attending = self._attending(layer)
        stored, copied = self._leaving(layer)
        if layer.hollow:
            held = attending | stored
            for _, mask in copied:
                held = held | mask
            self._held[layer.index] = held
            self._entries.hold(layer.index, held)
        going_on = _rows(attending) if narrow is None else _rows(narrow.take(attending))
        late = self._rules(layer, is_late=True)
        feeding = self._feeding(layer)
        pattern = None
        if going_on.count:
            queries = (
                going_on
                if narrow is None
                else Rows(going_on.take(narrow.ids(torch.device("cpu"))), going_on.count)
            )
            pattern = self._pattern(layer, queries)
        return BlockRows(
            joint=_rows(attending if narrow is None else self._nobody),
            stored=_rows(stored if narrow is None else stored | attending),
            reused=tuple((source, _rows(mask)) for source, mask in copied if bool(mask.any())),
            narrow=narrow,
            attending=going_on,
            feeding=_rows(feeding if narrow is None else narrow.take(feeding)),
            pattern=pattern,
            decide_feeding=partial(self._feed, layer, late, narrow) if late else None,
        )

    def _attending(self, layer: LayerPlan) -> Tensor:
        skipped = self._skips.get((layer.index, Sublayer.ATTENTION), self._nobody)
        return self._of(layer.attending) & ~skipped & ~self._gone

    def _feeding(self, layer: LayerPlan) -> Tensor:
        skipped = self._skips.get((layer.index, Sublayer.FFN), self._nobody)
        return self._of(layer.feeding) & ~skipped & ~self._gone

    def _leaving(self, layer: LayerPlan) -> tuple[Tensor, list[tuple[int, Tensor]]]:
        """Rows that do not attend and leave entries: projected, and copied by source layer."""
        if not layer.holds_kv:
            return self._nobody, []
        leaves: dict[SkippedKV, Tensor] = {kv: self._nobody for kv in SkippedKV}
        for token_class, cell in layer.cells.items():
            if cell.kv is not None:
                leaves[cell.kv] = leaves[cell.kv] | self._of(frozenset({token_class}))
        skipped = self._skips.get((layer.index, Sublayer.ATTENTION), self._nobody) & ~self._gone
        for routed in self._plan.routed_by_layer.get(layer.index, ()):
            if Sublayer.ATTENTION in routed.skip:
                kv = routed.rule.kv or SkippedKV.PROJECT
                leaves[kv] = leaves[kv] | self._of(frozenset({routed.token_class})) & skipped
        # Where a rule leaves attention out for a class, its K and V go by that rule in any case.
        for kv, rows in self._exited.items():
            leaves[kv] = leaves[kv] | rows & self._of(layer.attending)
        copied: list[tuple[int, Tensor]] = []
        for token_class in layer.cells:
            mine = leaves[SkippedKV.REUSE] & self._of(frozenset({token_class}))
            for source in self._plan.kv_sources(layer.index, token_class):
                if not bool(mine.any()):
                    break
                lower = self._plan.layers[source]
                has = self._held[source] if lower.hollow else self._of(lower.holding)
                copied.append((source, mine & has))
                mine = mine & ~has
        return leaves[SkippedKV.PROJECT], copied

    def _pattern(self, layer: LayerPlan, queries: Rows) -> AttentionPattern:
        layout = self._layout
        if layout.is_step and queries.count == layout.batch:
            return AttentionPattern.newest(layout.batch, layer.index, self._entries)
        at = queries.take(layout.sequences), queries.take(layout.columns)
        return AttentionPattern.of(*at, layout.batch, layer.index, self._entries)

    def _rules(self, layer: LayerPlan, *, is_late: bool) -> dict[int, list[RoutedCell]]:
        """The routed cells of a layer by rule: those decided before it, or (late) between its
        sublayers, where the FFN alone is guarded."""
        found: dict[int, list[RoutedCell]] = {}
        is_parallel = layer.arrangement is Arrangement.PARALLEL
        for cell in self._plan.routed_by_layer.get(layer.index, ()):
            waits = cell.skip == {Sublayer.FFN} and not is_parallel
            if waits == is_late:
                found.setdefault(cell.number, []).append(cell)
        return found

    def _feed(
        self, layer: LayerPlan, rules: dict[int, list[RoutedCell]], narrow: Rows | None, h: Tensor
    ) -> Rows:
        """The rows that run the FFN, decided on ``h`` as the attention leaves it."""
        for number, cells in rules.items():
            self._decide(layer, number, cells, h, narrow)
        feeding = self._feeding(layer)
        return _rows(feeding if narrow is None else narrow.take(feeding))

    def _decide(
        self,
        layer: LayerPlan,
        number: int,
        cells: Sequence[RoutedCell],
        h: Tensor,
        narrow: Rows | None,
    ) -> None:
        """Asks one rule's router about its candidates among the rows of ``h``."""
        classes = frozenset(cell.token_class for cell in cells)
        mask = self._of(classes) & ~self._gone
        within = _rows(mask if narrow is None else narrow.take(mask))
        if not within.count:
            return
        host = torch.device("cpu")
        rows = within.ids(host) if narrow is None else within.take(narrow.ids(host))
        skip, router = cells[0].skip, self._routers[number]
        context = Candidates(
            layer.index,
            skip,
            h,
            within,
            rows,
            self._layout,
            self._trace,
            (self._states.setdefault(number, {}), self._cache.routing.setdefault(number, {})),
            self._lens,
            self._attended,
        )
        decision = _checked(router.decide(context), within.count, cells[0])
        skipped = self._nobody.clone()
        skipped[rows] = decision.skip.detach().to(host)
        asked = self._nobody.clone()
        asked[rows] = True
        for sublayer in skip:
            key = layer.index, sublayer
            self._skips[key] = self._skips.get(key, self._nobody) | skipped
            self._asked[key] = self._asked.get(key, self._nobody) | asked
        self._ran = self._ran & ~skipped
        if decision.scope is Scope.REST:
            kv = cells[0].rule.kv or SkippedKV.PROJECT
            self._exiting[kv] = self._exiting.get(kv, self._nobody) | skipped

    def _note_exits(self, step: tuple[int, ...]) -> None:
        """What rows leave out of a layer because they exited before it."""
        for index in step:
            layer = self._plan.layers[index]
            for sublayer, classes in (
                (Sublayer.ATTENTION, layer.attending),
                (Sublayer.FFN, layer.feeding),
            ):
                self._skips[index, sublayer] = self._gone & self._of(classes)

    def _of(self, classes: frozenset[TokenClass]) -> Tensor:
        found = self._members.get(classes)
        if found is None:
            found = self._members[classes] = member(self._layout.codes, classes)
        return found


def narrows_after(plan: SkipPlan) -> bool:
    """Whether all rows must pass the last layer, also those whose logits nobody reads.

    That is so where they have a say in what the others do between its sublayers.
    """
    last = plan.layers[plan.steps[-1][0]]
    return any(
        cell.skip == {Sublayer.FFN}
        and last.arrangement is not Arrangement.PARALLEL
        and (
            cell.rule.is_plug_in
            or cell.rule.capacity is not None
            or cell.rule.group not in (None, Group.ROW)
        )
        for cell in plan.routed_by_layer.get(last.index, ())
    )


def _rows(mask: Tensor) -> Rows:
    """The rows where ``mask [N]`` (host) is true: a slice where they are neighbours."""
    index = mask.nonzero().squeeze(1)
    count = len(index)
    if not count:
        return Rows(slice(0, 0), 0)
    first, last = int(index[0]), int(index[-1])
    return Rows(slice(first, last + 1) if last - first + 1 == count else index, count)


def _checked(decision: Any, count: int, cell: RoutedCell) -> Decision:
    where = f"router {cell.rule.kind!r} in layer {cell.layer}"
    if not isinstance(decision, Decision):
        raise RouterError(f"{where}: answered {type(decision).__name__}; allowed: a Decision")
    skip = decision.skip
    if not isinstance(skip, Tensor) or skip.dtype != torch.bool or tuple(skip.shape) != (count,):
        got = (
            f"{skip.dtype} {list(skip.shape)}" if isinstance(skip, Tensor) else type(skip).__name__
        )
        raise RouterError(f"{where}: Decision.skip is {got}; allowed: bool [{count}]")
    if not isinstance(decision.scope, Scope):
        raise RouterError(f"{where}: Decision.scope is {decision.scope!r}; allowed: a Scope")
    return decision
