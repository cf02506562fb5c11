"""The probability that rows of each class run each part of a layer: 0 or 1 unless a router decides.

A router is known here only by its *rate*, the share of its candidates that skip. Separate decisions
of one layer, and decisions in different layers, are treated as independent. Cache entries are
counted as the plan states them: early exits are not modelled, and a copy always finds its source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from fastskip.plan.cells import RoutedCell
from fastskip.plan.layer_plan import LayerPlan, ModelShape
from fastskip.policy import Group, PolicyError, RemovalRule, RouterRule, Sublayer, TokenClass

Rate = float | Mapping[int, float]
"""One share for all routers, or a share per router number in the policy."""


@dataclass(frozen=True, slots=True)
class CellChance:
    """The probabilities that a row of one class, in one layer, attends, stores its own K and V,
    copies an entry, has an entry at all, and runs the FFN."""

    attends: float
    projects: float
    copies: float
    holds: float
    feeds: float


@dataclass(frozen=True, slots=True)
class Ruled:
    """Rows of `classes` that, under one rule, skip a sublayer with probability `rate`."""

    classes: frozenset[TokenClass]
    rate: float
    group: Group
    is_capped: bool
    """Whether at least one candidate of every sequence runs, unless the rate is 1."""

    def idle(self, rows: Mapping[TokenClass, int], batch: int) -> float:
        """The probability that all of them skip, given the rows per class of each sequence."""
        own = sum(rows.get(c, 0) for c in self.classes)
        if not own:
            return 1
        if self.is_capped:
            return int(self.rate == 1)
        decisions = {Group.ROW: own * batch, Group.SEQUENCE: batch, Group.BATCH: 1}[self.group]
        return self.rate**decisions


@dataclass(frozen=True)
class LayerChance:
    """The probabilities of one layer, for the rows that removals leave.

    `ruled`: the router rules of each sublayer; `unimodal` and `stage`: as in the plan; `is_split`:
    whether some rows of a pair run its blocks one after the other.
    """

    index: int
    cells: Mapping[TokenClass, CellChance]
    ruled: Mapping[Sublayer, tuple[Ruled, ...]]
    unimodal: bool = False
    stage: int = 0
    is_split: bool = False

    @property
    def key(self) -> object:
        """Equal for layers with equal probabilities."""
        return tuple(self.cells.items()), tuple(self.ruled.items()), self.unimodal, self.stage

    def sees(self, query: TokenClass, other: TokenClass) -> bool:
        """Whether rows of one class see the entries of another, if there are any."""
        image = TokenClass.IMAGE
        return not self.unimodal or (query is image) == (other is image)

    def running(self, sublayer: Sublayer, rows: Mapping[TokenClass, int], batch: int) -> float:
        """The probability that a sublayer runs at all, given the rows per class of a sequence."""
        free = [c for c, count in rows.items() if count and self.runs(c, sublayer) == 1]
        if free:
            return 1
        return 1 - prod(each.idle(rows, batch) for each in self.ruled.get(sublayer, ()))

    def holding_beside(self, attending: TokenClass) -> Mapping[TokenClass, float]:
        """The probability that rows of the same forward have entries, given that a row of class
        `attending` attends.

        Rows that decide together run together, so a running row implies entries of its group.
        """
        together = frozenset[TokenClass]().union(
            *(
                each.classes
                for each in self.ruled.get(Sublayer.ATTENTION, ())
                if attending in each.classes and each.group is not Group.ROW
            )
        )
        return {
            c: (1 if c in together else cell.holds) if self.sees(attending, c) else 0
            for c, cell in self.cells.items()
        }

    def runs(self, token_class: TokenClass, sublayer: Sublayer) -> float:
        """The probability that a row of a class runs a sublayer."""
        cell = self.cells[token_class]
        return cell.attends if sublayer is Sublayer.ATTENTION else cell.feeds


@dataclass(frozen=True, slots=True)
class ExpectedPlan:
    """A plan whose routers skip rows at given rates; the cost functions accept it as a plan."""

    shape: ModelShape
    steps: tuple[tuple[int, ...], ...]
    chances: tuple[LayerChance, ...]
    removals: tuple[RemovalRule, ...] = ()


def certain(layer: LayerPlan) -> LayerChance:
    """The probabilities of a layer in which no row skips by a router's decision."""
    cells = {
        c: CellChance(
            int(c in layer.attending),
            int(c in layer.projecting),
            int(c in layer.holding - layer.projecting),
            int(c in layer.holding),
            int(c in layer.feeding),
        )
        for c in layer.cells
    }
    is_split = layer.partner is not None and not layer.is_arranged_whole
    return LayerChance(layer.index, cells, {}, layer.unimodal, layer.stage, is_split)


def expected(
    running: LayerPlan, skipping: LayerPlan, routed: Sequence[RoutedCell], rates: Mapping[int, Any]
) -> LayerChance:
    """The probabilities of a layer, interpolated between its all-run and its all-skip form."""
    if not routed:
        return certain(running)
    before, after = certain(running), certain(skipping)
    cells = {}
    for c in running.cells:
        attention, ffn = (
            next((rates[r.number] for r in routed if r.token_class is c and s in r.skip), 0)
            for s in (Sublayer.ATTENTION, Sublayer.FFN)
        )
        a, b = before.cells[c], after.cells[c]
        cells[c] = CellChance(
            _mix(a.attends, b.attends, attention),
            _mix(a.projects, b.projects, attention),
            _mix(a.copies, b.copies, attention),
            _mix(a.holds, b.holds, attention),
            _mix(a.feeds, b.feeds, ffn),
        )
    ruled = {
        s: tuple(
            Ruled(
                frozenset(
                    r.token_class for r in routed if r.number == n and before.runs(r.token_class, s)
                ),
                rates[n],
                rule.group or Group.ROW,
                rule.capacity is not None,
            )
            for n, rule in {r.number: r.rule for r in routed if s in r.skip}.items()
        )
        for s in Sublayer
    }
    return replace(before, cells=cells, ruled=ruled)


def rates_of(routers: Sequence[RouterRule], rate: Rate | None) -> dict[int, float]:
    """The rate of each router, by number: the given one, else the one that its rule states.

    Raises:
        PolicyError: a rate is not in [0, 1], or a router has neither a given nor a stated rate.
    """
    if isinstance(rate, Mapping):
        for number in rate:
            if number not in range(len(routers)):
                allowed = f"router numbers in [0, {len(routers)})"
                raise PolicyError("rate", dict(rate), allowed)
    found = {}
    for number, rule in enumerate(routers):
        given = rate.get(number) if isinstance(rate, Mapping) else rate
        found[number] = _share(_own_rate(rule) if given is None else given, number, rule)
    return found


def weights_read(rate: float, batch: int, group: Group = Group.ROW) -> float:
    """The share of decode steps that read a guarded sublayer's weights: 1 - rate ** batch.

    A single running sequence suffices to read them. If the whole batch decides together, 1 - rate.
    """
    return 1 - rate ** (1 if group is Group.BATCH else batch)


def _mix(running: float, skipping: float, rate: float) -> float:
    # Equal values are returned bit for bit, so whole numbers stay whole.
    return running if running == skipping else (1 - rate) * running + rate * skipping


def _own_rate(rule: RouterRule) -> float | None:
    if rule.capacity is not None:
        return 1 - rule.capacity
    return rule.rate


def _share(rate: Any, number: int, rule: RouterRule) -> float:
    if rate is None:
        problem = f"routers[{number}] of kind {rule.kind!r} does not say what share of rows skips"
        raise PolicyError("rate", rate, "a share in [0, 1]", problem)
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate <= 1:
        raise PolicyError("rate", rate, "a share in [0, 1]")
    return int(rate) if rate in (0, 1) else float(rate)
