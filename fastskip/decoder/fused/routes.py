"""Decisions on the device, of a forward or a decode step: their flags, and when they are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from fastskip.decoder.guards import Classes, Guard, Point, Ruling, doing, guards_of
from fastskip.decoder.trace import trace_start
from fastskip.ops.allocate import empty
from fastskip.ops.routes import Move, Route, Terms, Trace, Verdict
from fastskip.plan import SkipPlan
from fastskip.policy import Sublayer
from fastskip.routing import Decisions, Router, ScoreRouter
from fastskip.tokens import TokenLayout


@dataclass(frozen=True, slots=True)
class Homes:
    """Flags ``[any, n]``, and by layer the row of those whose flags lie there."""

    flags: Tensor
    rows: Mapping[int, int]


class DeviceRoutes:
    """The flags ``[G, n]`` of ``n`` rows, and the routes that write them.

    Rows that no router decides on have the flag that the plan gives their class.
    """

    def __init__(
        self,
        plan: SkipPlan,
        routers: Sequence[Router],
        present: Classes,
        flags_of: Callable[[Classes], Tensor],
        positions: Tensor,
        sequences: Tensor,
        like: Tensor,
        homes: Homes | None = None,
    ) -> None:
        """``present``: classes that the rows may have; ``flags_of``: ``[n]`` int32, 1 for rows of
        some classes; ``positions``, ``sequences [n]``; ``like``: gives dtype and device of rows;
        ``homes``: memory elsewhere for the attention flags of some layers."""
        self._plan, self._routers, self._present = plan, routers, present
        self._flags_of, self._positions, self._sequences = flags_of, positions, sequences
        device, count = like.device, len(positions)
        self.guards = guards_of(plan, present)
        self._start = trace_start(plan, routers, present)
        looking = [
            cell.layer
            for cell in plan.routed
            if cell.token_class in present and self._looks_back(cell.number)
        ]
        self._end = max(looking, default=-1)
        self._ran = self._ran_guards() if looking else {}
        guards = self._all_guards()
        self.flags = torch.zeros(len(guards), count, dtype=torch.int32, device=device)
        self._runs_by_guard = dict(zip(map(id, guards), self.flags.unbind(), strict=True))
        self._homes = homes or Homes(self.flags, {})
        known = self._homes.rows
        self._apart = [
            guard
            for guard in self.guards
            if Sublayer.ATTENTION in guard.sublayers and guard.layer in known
        ]
        numbers = [known[guard.layer] for guard in self._apart]
        for guard, number in zip(self._apart, numbers, strict=True):
            self._runs_by_guard[id(guard)] = self._homes.flags[number]
        self._apart_rows = torch.tensor(numbers, dtype=torch.int64, device=device)
        self.trace = None
        if looking:
            width = plan.shape.hidden_size
            found = empty((count, 2), torch.float32, device)
            self.trace = Trace(empty((count, width), like.dtype, device), found)
        self.arrivals = torch.zeros(1, dtype=torch.int32, device=device)
        self._terms: dict[tuple[int, int], Terms] = {}
        self.reset()

    def reset(self) -> None:
        """Sets every flag to what the plan says."""
        rows = [self._flags_of(guard.running) for guard in self._all_guards()]
        if rows:
            torch.stack(rows, out=self.flags)
        if self._apart:
            apart = torch.stack([self._flags_of(guard.running) for guard in self._apart])
            self._homes.flags.index_copy_(0, self._apart_rows, apart)

    def runs(self, layer: int, sublayer: Sublayer) -> Tensor | None:
        """``[n]``: which rows run a sublayer; ``None`` if no router decides on it."""
        for guard in self.guards:
            if guard.layer == layer and sublayer in guard.sublayers:
                return self._runs(guard)
        return None

    def answers(self) -> dict[tuple[int, Sublayer], tuple[Tensor, Tensor]]:
        """By layer and sublayer: rows that skip by a decision, rows decided on, ``[n]`` bool."""
        found: dict[tuple[int, Sublayer], tuple[Tensor, Tensor]] = {}
        for guard in self.guards:
            asked = self._flags_of(
                frozenset().union(*(ruling.classes for ruling in guard.rulings))
            ).bool()
            skipped = asked & ~self._runs(guard).bool()
            found |= {(guard.layer, sublayer): (skipped, asked) for sublayer in guard.sublayers}
        return found

    def route(self, step: tuple[int, ...], point: Point) -> Route | None:
        """What is decided before a step of the plan, or in its middle; ``None`` if nothing is."""
        move, ran = Move.NONE, list[Tensor]()
        if point is Point.START:
            move, ran = self._move(step)
        verdicts = [
            self._verdict(guard, ruling)
            for guard in self._all_guards()
            if guard.layer in step
            for ruling in guard.rulings
            if ruling.point is point
        ]
        if move is Move.NONE and not verdicts:
            return None
        return Route(
            verdicts, self._positions, self._sequences, self.trace, move, ran, self.arrivals
        )

    def decision_on(self, layer: int) -> tuple[Terms, Tensor] | None:
        """The terms of the only decision on a layer, if that is one on the whole block before it
        begins, and its flags ``[n]``; else ``None``."""
        own = [guard for guard in self._all_guards() if guard.layer == layer]
        if len(own) != 1 or own[0].sublayers != frozenset(Sublayer) or len(own[0].rulings) != 1:
            return None
        (ruling,) = own[0].rulings
        return self._terms_of(ruling.number, layer), self._runs(own[0])

    def _move(self, step: tuple[int, ...]) -> tuple[Move, list[Tensor]]:
        if self.trace is None or self._start is None:
            return Move.NONE, []
        if not self._start <= step[0] <= self._end:
            return Move.NONE, []
        number = self._plan.steps.index(step)
        if step[0] == self._start:
            return Move.START, []
        before = self._plan.layers[self._plan.steps[number - 1][0]]
        changed = doing(before) & self._present
        if not changed:  # it changed no row, so there is nothing to measure
            return Move.NONE, []
        ran = [self._runs(guard) for guard in self._ran.get(before.index, ())]
        ran += [
            self._runs(guard)
            for guard in self.guards
            if guard.layer == before.index and changed <= guard.running
        ]
        return Move.NEXT, ran

    def _ran_guards(self) -> dict[int, list[Guard]]:
        """Flags for the rows that ran a layer whole, where its guards' flags do not tell: rows
        whose class skips a guarded sublayer have 0 there, yet may have run all that is theirs."""
        found: dict[int, list[Guard]] = {}
        for layer in self._plan.layers:
            changed = doing(layer) & self._present
            own = [
                Guard(layer.index, frozenset(), changed, guard.rulings)
                for guard in self.guards
                if guard.layer == layer.index and not changed <= guard.running
            ]
            if changed != self._present and not own:
                own = [Guard(layer.index, frozenset(), changed, ())]
            if own:
                found[layer.index] = own
        return found

    def _verdict(self, guard: Guard, ruling: Ruling) -> Verdict:
        terms = self._terms_of(ruling.number, guard.layer)
        given = {field.name: getattr(terms, field.name) for field in fields(Terms)}
        return Verdict(**given, runs=self._runs(guard), candidates=self._flags_of(ruling.classes))

    def _terms_of(self, number: int, layer: int) -> Terms:
        found = self._terms.get((number, layer))
        if found is None:
            router = self._routers[number]
            assert isinstance(router, ScoreRouter)
            found = self._terms[number, layer] = router.terms_on(layer, self.flags.device)
        return found

    def _looks_back(self, number: int) -> bool:
        router = self._routers[number]
        return isinstance(router, ScoreRouter) and router.needs_trace

    def _all_guards(self) -> list[Guard]:
        """In the order of ``flags``."""
        return [*self.guards, *(guard for own in self._ran.values() for guard in own)]

    def _runs(self, guard: Guard) -> Tensor:
        """``[n]``: the guard's flags, wherever they are kept."""
        return self._runs_by_guard[id(guard)]


def merged(routes: Sequence[Route | None]) -> Route | None:
    """Merges routes that are due at the same moment."""
    some = [route for route in routes if route is not None]
    if not some:
        return None
    moving = next((route for route in some if route.move is not Move.NONE), some[0])
    verdicts = [verdict for route in some for verdict in route.verdicts]
    return replace(moving, verdicts=verdicts)


def decisions_of(routes: DeviceRoutes, layout: TokenLayout) -> Decisions:
    """The decisions of a forward over the columns of a layout; waits for the device."""
    skipped, asked = {}, {}
    for key, (skips, rows) in sorted(routes.answers().items()):
        skipped[key], asked[key] = layout.unpack(skips.cpu()), layout.unpack(rows.cpu())
    return Decisions(layout.first_column, layout.source, skipped, asked)
