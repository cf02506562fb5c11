"""How likely rows of each class run what in a layer: 0 or 1, but where a router decides.

A router is known here by its *rate* alone, the share of its candidates that skip. Rows that decide
apart, and decisions in different layers, are taken as independent. What leaves a layer empty-handed
is counted as a plan says it: rows that exit are not foreseen, and a copied entry is always found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from fastskip.layer_plan import LayerPlan, ModelShape
from fastskip.plan_cells import RoutedCell
from fastskip.policy import Group, PolicyError, RemovalRule, RouterRule, Sublayer, TokenClass

Rate = float | Mapping[int, float]
"""One share for all routers, or shares by the router's number in the policy."""


@dataclass(frozen=True, slots=True)
class CellChance:
    """How likely a row of one class attends, leaves K and V of its own, copies an entry, has an
    entry at all, and runs the FFN, in one layer."""

    attends: float
    projects: float
    copies: float
    holds: float
    feeds: float


@dataclass(frozen=True, slots=True)
class Ruled:
    """Rows of `classes` that skip a sublayer with the chance `rate`, as one rule says."""

    classes: frozenset[TokenClass]
    rate: float
    group: Group
    is_capped: bool
    """Whether some candidate of every sequence runs in any case, unless all skip."""

    def idle(self, rows: Mapping[TokenClass, int], batch: int) -> float:
        """The chance that all of them skip, with these rows a class in each sequence."""
        own = sum(rows.get(c, 0) for c in self.classes)
        if not own:
            return 1
        if self.is_capped:
            return int(self.rate == 1)
        decisions = {Group.ROW: own * batch, Group.SEQUENCE: batch, Group.BATCH: 1}[self.group]
        return self.rate**decisions


@dataclass(frozen=True)
class LayerChance:
    """The chances of one layer; `ruled`: who decides about a sublayer; `unimodal` and `stage`: as
    in a plan; `is_split`: whether some rows of a pair run one block after the other. Chances are
    those of rows that are left."""

    index: int
    cells: Mapping[TokenClass, CellChance]
    ruled: Mapping[Sublayer, tuple[Ruled, ...]]
    unimodal: bool = False
    stage: int = 0
    is_split: bool = False

    @property
    def key(self) -> object:
        """Equal for layers with equal chances."""
        return tuple(self.cells.items()), tuple(self.ruled.items()), self.unimodal, self.stage

    def sees(self, query: TokenClass, other: TokenClass) -> bool:
        """Whether rows of a class see entries of another, where there are some."""
        image = TokenClass.IMAGE
        return not self.unimodal or (query is image) == (other is image)

    def running(self, sublayer: Sublayer, rows: Mapping[TokenClass, int], batch: int) -> float:
        """The chance that a sublayer runs at all, with these rows a class in each sequence."""
        free = [c for c, count in rows.items() if count and self.runs(c, sublayer) == 1]
        if free:
            return 1
        return 1 - prod(each.idle(rows, batch) for each in self.ruled.get(sublayer, ()))

    def holding_beside(self, attending: TokenClass) -> Mapping[TokenClass, float]:
        """How likely rows of the same forward have entries, if one of class `attending` attends.

        Rows that decide together run together; beside a running row they have theirs.
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
        """The chance that a row of a class runs a sublayer."""
        cell = self.cells[token_class]
        return cell.attends if sublayer is Sublayer.ATTENTION else cell.feeds


@dataclass(frozen=True, slots=True)
class ExpectedPlan:
    """A plan whose routers let rows skip at some rates: what costs expect of it."""

    shape: ModelShape
    steps: tuple[tuple[int, ...], ...]
    chances: tuple[LayerChance, ...]
    removals: tuple[RemovalRule, ...] = ()


def certain(layer: LayerPlan) -> LayerChance:
    """The chances of a layer in which nobody skips by a router's decision."""
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
    """The chances of a layer between its form where all run and the one where all skip."""
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
    return LayerChance(running.index, cells, ruled, running.unimodal)


def rates_of(routers: Sequence[RouterRule], rate: Rate | None) -> dict[int, float]:
    """The rate of each router, by number: as given, else its own.

    Raises:
        PolicyError: a rate is no share, or a router has none of its own and none is given.
    """
    if isinstance(rate, Mapping):
        for number in rate:
            if number not in range(len(routers)):
                raise PolicyError("rate", dict(rate), f"numbers of the {len(routers)} routers")
    found = {}
    for number, rule in enumerate(routers):
        given = rate.get(number) if isinstance(rate, Mapping) else rate
        found[number] = _share(_own_rate(rule) if given is None else given, number, rule)
    return found


def weights_read(rate: float, batch: int, group: Group = Group.ROW) -> float:
    """The share of decode steps that read a guarded sublayer's weights: 1 - rate ** batch.

    One sequence that runs is enough to read them. Where the batch decides as one, 1 - rate.
    """
    return 1 - rate ** (1 if group is Group.BATCH else batch)


def weights_read_table(
    rates: Sequence[float] = (0.25, 0.5, 0.75, 0.9), batches: Sequence[int] = (1, 2, 4, 8, 16)
) -> str:
    """`weights_read` as a table in Markdown, for rows and sequences that decide for themselves."""
    lines = [
        ["rows that skip", *(f"batch {batch}" for batch in batches), 'any, group "batch"'],
        ["---:"] * (len(batches) + 2),
    ]
    for rate in rates:
        apart = [f"{weights_read(rate, batch):.0%}" for batch in batches]
        lines.append([f"{rate:.0%}", *apart, f"{weights_read(rate, 1, Group.BATCH):.0%}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _mix(running: float, skipping: float, rate: float) -> float:
    # Equal values stay what they are, to the last bit: whole numbers stay whole.
    return running if running == skipping else (1 - rate) * running + rate * skipping


def _own_rate(rule: RouterRule) -> float | None:
    if rule.capacity is not None:
        return 1 - rule.capacity
    return rule.rate


def _share(rate: Any, number: int, rule: RouterRule) -> float:
    if rate is None:
        problem = f"routers[{number}] of kind {rule.kind!r} does not say how many rows skip"
        raise PolicyError("rate", rate, "a share in [0, 1]", problem)
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate <= 1:
        raise PolicyError("rate", rate, "a share in [0, 1]")
    return int(rate) if rate in (0, 1) else float(rate)
