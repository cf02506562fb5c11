"""The rows of a forward in which routers decide: determined layer by layer, as it runs.

Decisions are masks over the ``N`` packed rows, on the host, in NumPy, whose calls on a few numbers
cost a fraction of torch's. A row that skips is treated as a policy's static cell would treat it;
only which rows skip is not known in advance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastskip.decoder.attention import pattern_of
from fastskip.decoder.cache import SkipCache
from fastskip.decoder.candidates import Attended, Candidates, Lens
from fastskip.decoder.entries import Entries
from fastskip.decoder.guards import Classes, Point, Ruling, doing, rulings_of
from fastskip.decoder.layer import BlockRows
from fastskip.decoder.trace import RowTrace, trace_start
from fastskip.plan import LayerPlan, SkipPlan
from fastskip.policy import RouterRule, SkippedKV, Sublayer
from fastskip.routing import Decision, Decisions, Router, RouterError, Scope, ScoreRouter
from fastskip.tokens import CODES, HOST, Rows, TokenLayout

Mask = NDArray[np.bool_]
FEW = 16
"""Up to this many rows, plain numbers are faster than tensors."""
RowsOf = Callable[[LayerPlan, bool], BlockRows]


class RoutedPlan:
    """What all forwards under a plan with routers need from it: computed once.

    ``start``: the first layer whose input some router looks back to. ``rulings``: what is decided,
    by layer and point.
    """

    def __init__(self, plan: SkipPlan, routers: Sequence[Router]) -> None:
        self.plan, self.routers = plan, routers
        self.start = trace_start(plan, routers)
        every = frozenset(plan.classes)
        self.rulings: dict[tuple[int, Point], list[Ruling]] = {}
        for index in plan.routed_by_layer:
            for ruling in rulings_of(plan, plan.layers[index], every):
                self.rulings.setdefault((index, ruling.point), []).append(ruling)
        self._forms: dict[tuple[int, frozenset[int]], LayerPlan | None] = {}

    def is_of(self, plan: SkipPlan, routers: Sequence[Router]) -> bool:
        return self.plan is plan and self.routers is routers

    def static_form(self, layer: int, skipping: frozenset[int]) -> LayerPlan | None:
        """A layer as a static plan would have it if the rules ``skipping`` let all of their rows
        skip; ``None`` if what it copies depends on which rows left entries in lower layers."""
        key = layer, skipping
        if key not in self._forms:
            found = self.plan.layer_when(layer, skipping)
            is_uneven = any(
                self.plan.layers[cell.kv_source].hollow
                for cell in found.cells.values()
                if cell.kv_source is not None
            )
            self._forms[key] = None if is_uneven else found
        return self._forms[key]


class RoutedRows:
    """Makes the ``BlockRows`` of one forward.

    Where all rows of a rule do the same, as in a decode step of one sequence, the rows are those of
    a static plan that says so, which layers share.
    """

    def __init__(
        self,
        routed: RoutedPlan,
        layout: TokenLayout,
        cache: SkipCache,
        entries: Entries,
        narrow: Rows | None,
        static: RowsOf,
        *,
        lens: Lens | None,
        attended: Attended | None,
    ) -> None:
        self._routed, self._plan, self._routers = routed, routed.plan, routed.routers
        self._layout, self._start = layout, routed.start
        self._cache, self._entries, self._narrow, self._static = cache, entries, narrow, static
        self._lens, self._attended = lens, attended
        self._trace: RowTrace | None = None
        self._states: dict[int, dict[str, Any]] = {}
        self._no_rows = np.zeros(len(layout), dtype=np.bool_)
        # Rows that have exited, by what they leave in the caches of later layers.
        self._exited: dict[SkippedKV, Mask] = {}
        self._exiting: dict[SkippedKV, Mask] = {}
        self._gone: Mask | None = None
        self._ran = self._no_rows
        self._h: Tensor | None = None
        self._codes = layout.codes.numpy()
        self._positions = layout.positions.tolist() if len(layout) <= FEW else []
        self._members: dict[Classes, Mask] = {}
        # Masks of classes as tensors, which are compared by identity.
        self._tensors: dict[Classes, Tensor] = {}
        self._held: dict[int, Mask] = {}
        self._skips: dict[tuple[int, Sublayer], Mask] = {}
        self._asked: dict[tuple[int, Sublayer], Mask] = {}
        self._factors: dict[tuple[int, Sublayer], Tensor] = {}
        # Rules of this layer whose candidates all skip; ``None`` if those of some rule differ.
        self._whole: set[int] | None = set()

    def enter(self, step: tuple[int, ...], h: Tensor) -> None:
        """Called with the input of a layer or a pair of layers: makes the decisions due there."""
        if self._start is not None and step[0] >= self._start:
            if self._trace is None:
                self._trace = RowTrace(h)
            else:
                self._trace.move(h, self._ran)
        self._h, self._whole = h, set()
        if self._exiting:
            self._let_go()
        if self._gone is not None:
            self._note_exits(step, self._gone)
        layer = self._plan.layers[step[0]]
        if self._start is not None:
            # Rows that run all that the plan gives their class here, unless a router intervenes.
            self._ran = self._staying(self._of(doing(layer)))
        for ruling in self._routed.rulings.get((layer.index, Point.START), ()):
            self._decide(ruling, h, None)

    def of(self, layer: LayerPlan, is_last: bool) -> BlockRows:
        """What enters each part of a layer; called once per layer, after ``enter``."""
        if self._attended is not None:
            assert self._h is not None
            attending = torch.from_numpy(self._running(layer, Sublayer.ATTENTION))
            self._attended.inputs[layer.index] = self._h.detach().clone(), attending
        late = self._routed.rulings.get((layer.index, Point.MIDDLE))
        narrow = self._narrow if is_last else None
        decide = partial(self._feed, layer, late, narrow) if late else None
        static = self._static_form(layer)
        if static is None:
            return self._make(layer, narrow, decide)
        if layer.hollow:
            self._hold(layer, self._tensor_of(static.holding))
        rows = self._static(static, is_last)
        if decide is None and not self._factors:
            return rows
        return replace(rows, decide_feeding=decide, factors=self._factors)

    def decisions(self) -> Decisions:
        """The decisions of this forward, by column."""
        layout = self._layout
        masks, asked = (
            {key: layout.unpack(torch.from_numpy(rows)) for key, rows in sorted(found.items())}
            for found in (self._skips, self._asked)
        )
        return Decisions(layout.first_column, layout.source, masks, asked)

    def _static_form(self, layer: LayerPlan) -> LayerPlan | None:
        """The layer as a static plan would have it; ``None`` where rows of a class differ."""
        if self._gone is not None or self._whole is None:
            return None
        return self._routed.static_form(layer.index, frozenset(self._whole))

    def _make(
        self, layer: LayerPlan, narrow: Rows | None, decide: Callable[[Tensor], Rows] | None
    ) -> BlockRows:
        attending = self._running(layer, Sublayer.ATTENTION)
        stored, raw, copied = self._leaving(layer)
        if layer.hollow:
            held = attending | stored | raw
            for _, mask in copied:
                held = held | mask
            self._hold(layer, torch.from_numpy(held))
        asking, pattern = _rows(_taken(attending, narrow)), None
        if asking.count:
            queries = asking.through(narrow)
            pattern = pattern_of(layer, self._layout, queries, self._entries)
        feeding, is_beside = self._running(layer, Sublayer.FFN), self._of(layer.beside)
        is_paired = self._of(layer.arranged) if layer.partner is not None else self._no_rows
        is_alone = ~is_paired if layer.partner is not None else self._no_rows
        return BlockRows(
            joint=_rows(attending if narrow is None else self._no_rows),
            stored=_rows(stored if narrow is None else stored | attending),
            raw=_rows(raw),
            reused=tuple((source, _rows(mask)) for source, mask in copied if mask.any()),
            narrow=narrow,
            attending=asking,
            replaced=_rows(_taken(self._staying(self._of(layer.replaced)), narrow)),
            feeding=_rows(_taken(feeding & ~is_beside, narrow)),
            beside=_rows(_taken(feeding & is_beside, narrow)),
            paired=_rows(_taken(attending & is_paired, narrow)),
            alone=_rows(_taken(attending & is_alone, narrow)),
            merged=_rows(attending & is_paired),
            pattern=pattern,
            decide_feeding=decide,
            factors=self._factors,
        )

    def _hold(self, layer: LayerPlan, held: Tensor) -> None:
        self._held[layer.index] = held.numpy()
        self._entries.hold(layer.index, held)

    def _running(self, layer: LayerPlan, sublayer: Sublayer) -> Mask:
        skipped = self._skips.get((layer.index, sublayer))
        rows = self._staying(self._of(layer.running(sublayer)))
        return rows if skipped is None else rows & ~skipped

    def _staying(self, rows: Mask) -> Mask:
        return rows if self._gone is None else rows & ~self._gone

    def _leaving(self, layer: LayerPlan) -> tuple[Mask, Mask, list[tuple[int, Mask]]]:
        """Rows that leave entries without attending: projected, as hidden states, and copied, by
        source layer."""
        if not layer.holds_kv:
            return self._no_rows, self._no_rows, []
        leaves = self._by_kv(layer)
        copied = self._copied(layer, leaves[SkippedKV.REUSE])
        return leaves[SkippedKV.PROJECT], leaves[SkippedKV.HIDDEN], copied

    def _by_kv(self, layer: LayerPlan) -> dict[SkippedKV, Mask]:
        """Rows that do not attend in a layer, by the rule on what they leave there."""
        leaves: dict[SkippedKV, Mask] = dict.fromkeys(SkippedKV, self._no_rows)
        for token_class, cell in layer.cells.items():
            if cell.kv is not None:
                leaves[cell.kv] = leaves[cell.kv] | self._of(frozenset({token_class}))
        skipped = self._staying(self._skips.get((layer.index, Sublayer.ATTENTION), self._no_rows))
        for routed in self._plan.routed_by_layer.get(layer.index, ()):
            if Sublayer.ATTENTION in routed.skip:
                kv = routed.rule.leaves
                leaves[kv] = leaves[kv] | self._of(frozenset({routed.token_class})) & skipped
        # Where a static rule lets a class skip attention, that rule decides on its K and V anyway.
        for kv, rows in self._exited.items():
            leaves[kv] = leaves[kv] | rows & self._of(layer.attending)
        return leaves

    def _copied(self, layer: LayerPlan, reusing: Mask) -> list[tuple[int, Mask]]:
        """By lower layer, the rows that copy their entry from it: the nearest that has one."""
        copied: list[tuple[int, Mask]] = []
        for token_class in layer.cells:
            mine = reusing & self._of(frozenset({token_class}))
            for source in self._plan.kv_sources(layer.index, token_class):
                if not mine.any():
                    break
                lower = self._plan.layers[source]
                has = self._held[source] if lower.hollow else self._of(lower.holding)
                copied.append((source, mine & has))
                mine = mine & ~has
        return copied

    def _feed(
        self, layer: LayerPlan, rulings: Sequence[Ruling], narrow: Rows | None, h: Tensor
    ) -> Rows:
        """The rows that run the FFN, decided on ``h`` as the attention leaves it."""
        for ruling in rulings:
            self._decide(ruling, h, narrow)
        feeding = self._running(layer, Sublayer.FFN)
        return _rows(_taken(feeding & ~self._of(layer.beside), narrow))

    def _decide(self, ruling: Ruling, h: Tensor, narrow: Rows | None) -> None:
        """Asks one rule's router about its candidates among the rows of ``h``."""
        asked = self._staying(self._of(ruling.classes))
        answers = None if narrow is not None else self._ask_about_few(ruling, len(asked))
        if answers is not None:
            self._take(ruling, self._among(asked, answers), asked, Scope.SUBLAYER)
            return
        within = _rows(_taken(asked, narrow))
        if not within.count:
            return
        rows = within.through(narrow).ids()
        decision = self._ask(ruling, h, within, rows)
        skipped, among = self._no_rows.copy(), self._no_rows.copy()
        if decision.factor is not None:
            self._scale(ruling, rows, decision.factor, h)
            self._ran = self._ran.copy()  # a row whose change does not count has not run whole
            self._ran[rows.numpy()] &= (decision.factor.detach() != 0).to(HOST).numpy()
        skipped[rows.numpy()] = decision.skip.detach().to(HOST).numpy()
        among[rows.numpy()] = True
        self._take(ruling, self._among(among, skipped.tolist()), among, decision.scope)

    def _ask_about_few(self, ruling: Ruling, count: int) -> Sequence[bool] | None:
        """Whether each of all rows skips, of a router that decides on few rows in plain numbers;
        else ``None``."""
        router = self._routers[ruling.number]
        # Not of a subclass, which may add something.
        if count > FEW or type(router) is not ScoreRouter:
            return None
        trace = None if self._trace is None else self._trace.listed
        return router.decide_few(ruling.layer, self._positions, trace)

    def _ask(self, ruling: Ruling, h: Tensor, within: Rows, rows: Tensor) -> Decision:
        """A router's checked answer about candidates: ``rows [n]`` of the forward, ``within`` the
        rows of ``h``."""
        number = ruling.number
        states = self._states.setdefault(number, {}), self._cache.routing.setdefault(number, {})
        context = Candidates(
            ruling,
            h,
            within,
            rows,
            layout=self._layout,
            trace=self._trace,
            states=states,
            lens=self._lens,
            attended=self._attended,
        )
        rule = self._rule(ruling)
        where = f"router {rule.kind!r} in layer {ruling.layer}"
        try:
            answer = self._routers[number].decide(context)
        except Exception as error:
            if rule.is_plug_in:  # the built-in ones name themselves
                error.add_note(f"raised by {where}")
            raise
        if context.is_changed:
            raise RouterError(f"{where}: changed context.hidden in place; allowed: a copy of it")
        return _checked(answer, within.count, where)

    def _among(self, asked: Mask, answers: Sequence[bool]) -> Mask:
        """Which of the ``asked`` rows skip: ``asked`` itself if all do, ``_no_rows`` if none."""
        if not any(answers):
            return self._no_rows
        skipped = asked if all(answers) else asked & np.array(answers)
        if not skipped.any():
            return self._no_rows
        is_all = skipped is asked or np.array_equal(skipped, asked)
        return asked if is_all else skipped

    def _scale(self, ruling: Ruling, rows: Tensor, factor: Tensor, h: Tensor) -> None:
        """Notes the factors on the changes of candidates."""
        ones = h.new_ones(len(self._layout))
        for sublayer in sorted(ruling.skip):  # a set's order varies between processes
            key = ruling.layer, sublayer
            found = self._factors.get(key, ones)
            self._factors[key] = found.index_copy(0, rows.to(h.device), factor.to(h.dtype))

    def _take(self, ruling: Ruling, skipped: Mask, asked: Mask, scope: Scope) -> None:
        """Notes an answer: the rows that skip, as from ``_among``, and the rows asked about."""
        does_any = skipped is not self._no_rows
        if does_any and skipped is not asked:
            self._whole = None
        elif does_any and self._whole is not None:
            self._whole.add(ruling.number)
        for sublayer in ruling.skip:
            key = ruling.layer, sublayer
            self._skips[key] = self._skips[key] | skipped if key in self._skips else skipped
            self._asked[key] = self._asked[key] | asked if key in self._asked else asked
        if self._start is not None:
            self._ran = self._ran & ~skipped
        if scope is Scope.REST and does_any:
            kv = self._rule(ruling).leaves
            self._exiting[kv] = self._exiting.get(kv, self._no_rows) | skipped

    def _rule(self, ruling: Ruling) -> RouterRule:
        return self._plan.policy.routers[ruling.number]

    def _let_go(self) -> None:
        """Rows that exited in the previous layer are gone from here on."""
        for kv, rows in self._exiting.items():
            self._exited[kv] = self._exited.get(kv, self._no_rows) | rows
            self._gone = rows if self._gone is None else self._gone | rows
        self._exiting = {}

    def _note_exits(self, step: tuple[int, ...], gone: Mask) -> None:
        """Notes what rows skip in a step because they exited before it."""
        for index in step:
            layer = self._plan.layers[index]
            for sublayer in Sublayer:
                self._skips[index, sublayer] = gone & self._of(layer.running(sublayer))

    def _tensor_of(self, classes: Classes) -> Tensor:
        """``_of`` as a tensor, the same one each time."""
        found = self._tensors.get(classes)
        if found is None:
            found = self._tensors[classes] = torch.from_numpy(self._of(classes))
        return found

    def _of(self, classes: Classes) -> Mask:
        found = self._members.get(classes)
        if found is None:
            is_member = np.zeros(len(CODES), dtype=np.bool_)
            is_member[[CODES[token_class] for token_class in classes]] = True
            found = self._members[classes] = is_member[self._codes]
        return found


def _taken(mask: Mask, narrow: Rows | None) -> Mask:
    """``mask`` restricted to the rows that continue."""
    return mask if narrow is None else mask[narrow.ids().numpy()]


def _rows(mask: Mask) -> Rows:
    """The rows where ``mask [N]`` is true: a slice if they are contiguous."""
    index = np.flatnonzero(mask)
    count = len(index)
    if not count:
        return Rows(slice(0, 0), 0)
    first, last = int(index[0]), int(index[-1])
    is_slice = last - first + 1 == count
    return Rows(slice(first, last + 1) if is_slice else torch.from_numpy(index), count)


def _checked(decision: Any, count: int, where: str) -> Decision:
    """A router's answer about ``count`` candidates; ``where`` names the router."""
    if not isinstance(decision, Decision):
        raise RouterError(f"{where}: returned {type(decision).__name__}; allowed: a Decision")
    skip, factor = decision.skip, decision.factor
    if not isinstance(skip, Tensor) or skip.dtype != torch.bool or tuple(skip.shape) != (count,):
        raise RouterError(f"{where}: Decision.skip is {_form(skip)}; allowed: bool [{count}]")
    if factor is not None and not (isinstance(factor, Tensor) and factor.shape == skip.shape):
        allowed = f"a tensor [{count}]"
        raise RouterError(f"{where}: Decision.factor is {_form(factor)}; allowed: {allowed}")
    if not isinstance(decision.scope, Scope):
        raise RouterError(f"{where}: Decision.scope is {decision.scope!r}; allowed: a Scope")
    return decision


def _form(value: Any) -> str:
    """What a value is, in an error: dtype and shape of a tensor, else its type."""
    is_tensor = isinstance(value, Tensor)
    return f"{value.dtype} {list(value.shape)}" if is_tensor else type(value).__name__
