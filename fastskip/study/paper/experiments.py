"""The experiments as data: each experiment cell is one model under one policy, trained or not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from fastskip.demo.model import Size
from fastskip.policy import SkipPolicy, SkipRule, TokenClass

DEPTH = Size.LARGE.value.layers


class Part(StrEnum):
    """What is skipped in a layer."""

    BLOCK = "block"
    FFN = "ffn"
    ATTENTION = "attention"

    @property
    def label(self) -> str:
        """Its name in the report."""
        return "FFN" if self is Part.FFN else self.value


class Scope(StrEnum):
    """The tokens that skip: the paper's three scopes, and the image alone."""

    ALL = "all"
    PROMPT = "prompt"
    GENERATED = "generated"
    IMAGE = "image"

    @property
    def classes(self) -> frozenset[TokenClass]:
        """The token classes in this scope."""
        if self is Scope.ALL:
            return frozenset(TokenClass)
        if self is Scope.PROMPT:
            return frozenset({TokenClass.IMAGE, TokenClass.TEXT})
        return frozenset({TokenClass(self.value)})


class Learned(StrEnum):
    """What is trained further, under the policy, before the cell is judged."""

    NOTHING = "nothing"
    PROJECTOR = "projector"
    """The projector alone; the language model stays frozen, as in the paper."""
    LANGUAGE = "language"
    """Projector and language model."""


class Section(StrEnum):
    """The part of the report that a cell belongs to."""

    DENSE = "dense"
    SKIPPING = "skipping"
    PARALLEL = "parallel"
    TRAINING = "training"
    SMALLER = "smaller"


@dataclass(frozen=True, slots=True)
class Schedule:
    """The layers n that the paper's code selects: start < n < depth - 1, n % interval == 0."""

    part: Part
    scope: Scope
    interval: int
    start: int

    def layers(self, depth: int = DEPTH) -> tuple[int, ...]:
        """The layers that skip the part, in a model of `depth` layers."""
        return tuple(n for n in range(self.start + 1, depth - 1) if n % self.interval == 0)

    @property
    def policy(self) -> SkipPolicy:
        """The schedule as a policy."""
        options = {"scope": self.scope.value, "interval": self.interval, "start": self.start}
        return SkipPolicy.preset(f"paper/skip-{self.part}", **options)


@dataclass(frozen=True, slots=True)
class Cell:
    """One thing to measure, under a unique `name`.

    `removed`: the share of the decoder's weights that is set to zero first. `patience`: the factor
    by which it is trained longer than others.
    """

    name: str
    label: str
    section: Section
    policy: SkipPolicy = SkipPolicy()
    size: Size = Size.LARGE
    schedule: Schedule | None = None
    removed: float = 0.0
    learned: Learned = Learned.NOTHING
    patience: int = 1


DENSE = Cell("dense", "dense", Section.DENSE)
INTERVALS = ((2, 0), (1, 3))
"""Interval and start of the schedules; with an interval of 1, every layer of the range skips."""
MORE = {
    Part.BLOCK: ((3, 0), (4, 0), (2, 3), (1, 0)),
    Part.FFN: ((1, 0),),
    Part.ATTENTION: ((1, 0),),
}
"""Further intervals and starts, for the scope of all tokens."""
HALF = Schedule(Part.BLOCK, Scope.ALL, interval=2, start=0)
"""What the paper's code skips for "half of the blocks": 15 of 32, here 3 of 8."""
MOST = Schedule(Part.BLOCK, Scope.ALL, interval=1, start=0)
"""Leaves about as much compute of the large model as the medium one has."""


def cells(is_quick: bool = False) -> tuple[Cell, ...]:
    """All cells in the order of measurement; the dense baseline comes first."""
    return (
        DENSE,
        Cell("medium", "medium model", Section.SMALLER, size=Size.MEDIUM),
        Cell("small", "small model", Section.SMALLER, size=Size.SMALL),
        *_skipped(is_quick),
        *_parallel(is_quick),
        *_trained(is_quick),
    )


def _skipped(is_quick: bool) -> list[Cell]:
    found = []
    for part in Part:
        for scope in Scope:
            is_full = scope is Scope.ALL and not is_quick
            more = MORE[part] if is_full else ()
            for interval, start in (*INTERVALS, *more):
                each = Schedule(part, scope, interval, start)
                name = f"skip-{part}-{scope}-every{interval}-from{start}"
                layers = ", ".join(map(str, each.layers()))
                label = f"no {part.label} in {layers} ({scope})"
                found.append(Cell(name, label, Section.SKIPPING, each.policy, schedule=each))
    return found


def _parallel(is_quick: bool) -> list[Cell]:
    found = []
    for start in (2,) if is_quick else (2, 4):
        for norm in ("own", "shared"):
            policy = SkipPolicy.preset("parallel_blocks", start=start, end=DEPTH, norm=norm)
            label = f"attention and FFN in parallel from layer {start}, {norm} norm"
            found.append(Cell(f"parallel-{norm}-from{start}", label, Section.PARALLEL, policy))
        for combine in ("sum", "mean"):
            policy = SkipPolicy.preset("block_pairs", start=start, end=DEPTH, combine=combine)
            label = f"blocks in pairs from layer {start}, {combine} of the two"
            found.append(Cell(f"pairs-{combine}-from{start}", label, Section.PARALLEL, policy))
    return found


def _trained(is_quick: bool) -> list[Cell]:
    exact = SkipPolicy(rules=(SkipRule("1::2", "all", "block"),))
    nothing, language = Learned.NOTHING, Learned.LANGUAGE
    wanted = [
        ("half", "blocks 2, 4, 6 left out", HALF.policy, 0.0, tuple(Learned)),
        ("sparse", "70 % of the weights removed", SkipPolicy(), 0.7, tuple(Learned)),
    ]
    if not is_quick:
        wanted += [
            ("most", "blocks 1 to 6 left out", MOST.policy, 0.0, (nothing, language)),
            ("exact-half", "blocks 1, 3, 5, 7 left out", exact, 0.0, (nothing,)),
        ]
    found = [
        Cell(f"{name}-{each}", label, Section.TRAINING, policy, removed=removed, learned=each)
        for name, label, policy, removed, taught in wanted
        for each in taught
    ]
    longer = [
        replace(cell, name=f"{cell.name}-long", patience=4)
        for cell in found
        if cell.policy == HALF.policy and cell.learned is not nothing and not is_quick
    ]
    return [*found, *longer]
