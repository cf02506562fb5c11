"""What can be done to a layer: sublayers skipped by a class, a wiring; and all of it together."""

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
    """Rows of `tokens` skip `skip` in a layer; or the layer (with the next one) is rewired."""

    tokens: frozenset[TokenClass]
    skip: frozenset[Sublayer] = frozenset()
    kv: SkippedKV | None = None
    arrangement: Arrangement | None = None

    @property
    def span(self) -> int:
        """How many layers it takes: two, if it makes a pair."""
        return 2 if self.arrangement is Arrangement.PAIR else 1

    @property
    def key(self) -> tuple[Any, ...]:
        """What changes are ordered by, the same in every process."""
        return (
            sorted(list(TokenClass).index(c) for c in self.tokens),
            sorted(self.skip),
            self.kv or "",
            self.arrangement or "",
        )

    def rule(self, layers: Sequence[int]) -> SkipRule | ArrangementRule:
        """The same as a statement of a policy, for these layers (the first ones of pairs)."""
        if self.arrangement is Arrangement.PAIR:
            return ArrangementRule([(n, n + 1) for n in layers], Arrangement.PAIR)
        if self.arrangement is not None:
            return ArrangementRule(tuple(layers), self.arrangement)
        return SkipRule(tuple(layers), self.tokens, self.skip, self.kv)

    def label(self) -> str:
        """In a few words."""
        if self.arrangement is not None:
            return self.arrangement.value
        names = "block" if self.skip == BLOCK else next(iter(self.skip)).value
        kv = "" if self.kv in (None, SkippedKV.PROJECT) else f" ({self.kv.value})"
        return f"{'+'.join(c.value for c in TokenClass if c in self.tokens)} {names}{kv}"


Choice = tuple[Change, ...]
"""What is done to one layer: changes of classes that do not meet; none for a dense layer."""


def span_of(choice: Choice) -> int:
    """How many layers a choice takes."""
    return max((change.span for change in choice), default=1)


def changes_of(
    layer: int,
    depth: int,
    classes: Sequence[TokenClass],
    *,
    wirings: bool = True,
    keeps_answers: bool = False,
) -> tuple[Change, ...]:
    """All that is measured of one layer: by class, for the answer with the text, and for all.

    A row of the lowest layer has no entry below to reuse. Where all classes skip attention nobody
    is left to read what K and V they leave, so that there is one form of it. What GENERATED rows
    leave where they skip attention only later turns on a kept cache read: reusing an entry is then
    no better than having none, and `keeps_answers` has them leave their own in any case.
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
    """All choices that a layer's changes allow: one change a class at the most, or a wiring.

    Changes of several classes stand for the same said of each of them (`merged` finds them again).
    Choices that mean the same come once.
    """
    single = {c: [x for x in changes if x.tokens == {c} and x.skip] for c in classes}
    columns = [[(), *((x,) for x in single[c])] for c in classes]
    combined = {
        _meaning(tuple(x for own in row for x in own), classes) for row in product(*columns)
    }
    wired = [(x,) for x in changes if x.arrangement is not None]
    return (*sorted(combined, key=lambda choice: [x.key for x in choice]), *wired)


def merged(choice: Choice, changes: Iterable[Change]) -> Choice:
    """A choice said in the fewest of `changes`: the same of several classes is one."""
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
    """The policy that makes these choices, by layer: one rule for layers that are changed alike."""
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
    return one.skip == other.skip and (one.kv or None) == (other.kv or None)


def _meaning(choice: Choice, classes: Sequence[TokenClass]) -> Choice:
    """The choice as it is told from others: nobody reads what is left where nobody attends."""
    skipping = {c for x in choice if Sublayer.ATTENTION in x.skip for c in x.tokens}
    if skipping != set(classes):
        return choice
    return tuple(
        replace(x, kv=SkippedKV.PROJECT) if Sublayer.ATTENTION in x.skip else x for x in choice
    )
