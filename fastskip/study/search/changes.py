"""The changes that can be made to a layer (skips by class, wirings) and their combinations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from fastskip.policy import (
    Arrangement,
    ArrangementRule,
    SkippedKV,
    SkipPolicy,
    SkipRule,
    Sublayer,
    TokenClass,
)

ATTENTION = frozenset({Sublayer.ATTENTION})
FFN = frozenset({Sublayer.FFN})
BLOCK = ATTENTION | FFN


@dataclass(frozen=True, slots=True)
class Change:
    """Rows of `tokens` skip `skip` in a layer; or the layer (or a pair of layers) is rewired."""

    tokens: frozenset[TokenClass]
    skip: frozenset[Sublayer] = frozenset()
    kv: SkippedKV | None = None
    arrangement: Arrangement | None = None

    @property
    def span(self) -> int:
        """How many layers it covers: two for a pair."""
        return 2 if self.arrangement is Arrangement.PAIR else 1

    @property
    def key(self) -> tuple[Any, ...]:
        """The sort key of changes, the same in every process."""
        return (
            sorted(list(TokenClass).index(c) for c in self.tokens),
            sorted(self.skip),
            self.kv or "",
            self.arrangement or "",
        )

    def rule(self, layers: Sequence[int]) -> SkipRule | ArrangementRule:
        """The change as a policy's rule for these layers (for pairs, their first layers)."""
        if self.arrangement is Arrangement.PAIR:
            return ArrangementRule([(n, n + 1) for n in layers], Arrangement.PAIR)
        if self.arrangement is not None:
            return ArrangementRule(tuple(layers), self.arrangement)
        return SkipRule(tuple(layers), self.tokens, self.skip, self.kv)

    def label(self) -> str:
        """A short description."""
        if self.arrangement is not None:
            return self.arrangement.value
        names = "block" if self.skip == BLOCK else next(iter(self.skip)).value
        kv = "" if self.kv in (None, SkippedKV.PROJECT) else f" ({self.kv.value})"
        return f"{'+'.join(c.value for c in TokenClass if c in self.tokens)} {names}{kv}"


Choice = tuple[Change, ...]
"""The changes made to one layer, of disjoint classes; empty for a dense layer."""


def span_of(choice: Choice) -> int:
    """How many layers a choice covers."""
    return max((change.span for change in choice), default=1)


def changes_of(
    layer: int,
    depth: int,
    classes: Sequence[TokenClass],
    *,
    wirings: bool = True,
    keeps_answers: bool = False,
) -> tuple[Change, ...]:
    """All changes measured in one layer: per class, for text and answer together, and for all.

    Rows of the lowest layer have no entry below to reuse. Where all classes skip attention, no row
    reads the K and V that they leave, so only one form is measured. Where GENERATED rows skip
    attention, only later turns on a kept cache read what they leave: REUSE is then no better than
    OMIT, and with `keeps_answers` they always leave their own.
    """
    every, generated = frozenset(classes), TokenClass.GENERATED
    answer = frozenset({TokenClass.TEXT, generated})
    found = []
    for tokens in (*(frozenset({c}) for c in classes), *([answer] if answer < every else [])):
        kvs = [SkippedKV.PROJECT]
        if not (keeps_answers and generated in tokens):
            kvs.append(SkippedKV.OMIT)
        if layer and generated not in tokens:
            kvs.append(SkippedKV.REUSE)
        found.append(Change(tokens, FFN))
        found += (Change(tokens, skip, kv) for skip in (ATTENTION, BLOCK) for kv in kvs)
    found.append(Change(every, FFN))
    found += (Change(every, skip, SkippedKV.PROJECT) for skip in (ATTENTION, BLOCK))
    if wirings:
        found.append(Change(every, arrangement=Arrangement.PARALLEL))
        if layer + 1 < depth:
            found.append(Change(every, arrangement=Arrangement.PAIR))
    return tuple(found)


def choices_of(changes: Sequence[Change], classes: Sequence[TokenClass]) -> tuple[Choice, ...]:
    """All choices that a layer's changes allow: at most one change per class, or a wiring.

    A change of several classes is expressed by one change of each class (`merged` restores it).
    Equivalent choices come once.
    """
    single = {c: [x for x in changes if x.tokens == {c} and x.skip] for c in classes}
    columns = [[(), *((x,) for x in single[c])] for c in classes]
    combined = {
        _meaning(tuple(x for own in row for x in own), classes) for row in product(*columns)
    }
    wired = [(x,) for x in changes if x.arrangement is not None]
    return (*sorted(combined, key=lambda choice: [x.key for x in choice]), *wired)


def merged(choice: Choice, changes: Iterable[Change]) -> Choice:
    """A choice in the fewest of `changes`: the same change of several classes becomes one."""
    rest, found = list(choice), []
    for joint in sorted(changes, key=lambda x: -len(x.tokens)):
        if len(joint.tokens) < 2 or joint.arrangement is not None:
            continue
        parts = [x for x in rest if x.tokens <= joint.tokens and _alike(x, joint)]
        if frozenset().union(*(x.tokens for x in parts)) == joint.tokens:
            rest = [x for x in rest if x not in parts]
            found.append(joint)
    return tuple(sorted((*found, *rest), key=lambda x: x.key))


def policy_of(places: Iterable[tuple[int, Choice]], name: str = "") -> SkipPolicy:
    """The policy that makes these choices, by layer: one rule for all layers changed alike."""
    layers: dict[Change, list[int]] = {}
    for layer, choice in places:
        for change in choice:
            layers.setdefault(change, []).append(layer)
    rules = [x.rule(sorted(own)) for x, own in sorted(layers.items(), key=lambda pair: pair[0].key)]
    return SkipPolicy(
        rules=tuple(rule for rule in rules if isinstance(rule, SkipRule)),
        arrangements=tuple(rule for rule in rules if isinstance(rule, ArrangementRule)),
        name=name,
    )


def _alike(one: Change, other: Change) -> bool:
    return one.skip == other.skip and one.kv == other.kv


def _meaning(choice: Choice, classes: Sequence[TokenClass]) -> Choice:
    """A canonical form of the choice: if no class attends, what rows leave in the cache is moot."""
    skipping = {c for x in choice if Sublayer.ATTENTION in x.skip for c in x.tokens}
    if skipping != set(classes):
        return choice
    return tuple(
        replace(x, kv=SkippedKV.PROJECT) if Sublayer.ATTENTION in x.skip else x for x in choice
    )
