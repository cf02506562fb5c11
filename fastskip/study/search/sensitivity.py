"""The cost of every single change, layer by layer and class by class, measured on the answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from fastskip.plan import ModelShape
from fastskip.policy import TokenClass
from fastskip.study.search.changes import (
    ATTENTION,
    BLOCK,
    FFN,
    Change,
    Choice,
    changes_of,
    merged,
    policy_of,
)
from fastskip.study.similarity import LayerSimilarity


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """One change of one layer, everything else dense.

    Attributes:
        layer: the layer; the first one of a pair.
        change: what is done.
        kl: how far the answers move, nats per answer token.
        similarity: mean cosine between input and output of the skipped part, over rows of these
            classes; `None` for wirings, and if it was not measured.
        saved: share of the dense cost, in the budget's quantity.
    """

    layer: int
    change: Change
    kl: float
    similarity: float | None
    saved: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        change = self.change
        return {
            "layer": self.layer,
            "tokens": "+".join(c.value for c in TokenClass if c in change.tokens),
            "skip": sorted(s.value for s in change.skip),
            "kv": None if change.kv is None else change.kv.value,
            "arrangement": None if change.arrangement is None else change.arrangement.value,
            "kl": self.kl,
            "similarity": self.similarity,
            "saved": self.saved,
        }


class Sensitivities:
    """All sensitivities, and the expected cost of several changes together."""

    def __init__(self, found: Sequence[Sensitivity]) -> None:
        self.found = tuple(found)
        self._kl = {(each.layer, each.change): each.kl for each in found}
        self._changes: dict[int, list[Change]] = {}
        for each in found:
            self._changes.setdefault(each.layer, []).append(each.change)

    def changes(self, layer: int) -> Sequence[Change]:
        """The changes measured in a layer."""
        return self._changes[layer]

    def kl(self, layer: int, choice: Choice) -> float:
        """The expected cost of a choice: the sum over its changes, where changes of several classes
        that were measured jointly count as one."""
        parts = merged(choice, self._changes[layer])
        return sum(self._kl[layer, change] for change in parts)

    def of(self, change: Change) -> list[tuple[int, float]]:
        """The layers in which a change was measured, with its cost there."""
        return [(each.layer, each.kl) for each in self.found if each.change == change]


def measure(
    shape: ModelShape,
    divergence: Callable[[Any], float],
    saved: Callable[[int, Change], float],
    similarity: Sequence[LayerSimilarity] = (),
    *,
    wirings: bool = True,
    keeps_answers: bool = False,
    on_cell: Callable[[], object] = lambda: None,
) -> Sensitivities:
    """Measure every change of every layer.

    Args:
        shape: the model's.
        divergence: how far a policy moves the answers (nats).
        saved: what a change of a layer saves, as a share of dense.
        similarity: of hidden states, by layer and class.
        wirings: whether to measure parallel blocks and pairs too.
        keeps_answers: as in `changes_of`.
        on_cell: called after each change.
    """
    known = {(each.layer, each.token_class): each for each in similarity}
    options = {"wirings": wirings, "keeps_answers": keeps_answers}
    found = []
    for layer in range(shape.depth):
        for change in changes_of(layer, shape.depth, shape.classes, **options):
            kl = divergence(policy_of([(layer, (change,))]))
            alike = _similarity(layer, change, known)
            found.append(Sensitivity(layer, change, kl, alike, saved(layer, change)))
            on_cell()
    return Sensitivities(found)


def count(shape: ModelShape, **options: bool) -> int:
    """How many changes `measure` measures."""
    return sum(
        len(changes_of(layer, shape.depth, shape.classes, **options))
        for layer in range(shape.depth)
    )


def _similarity(
    layer: int, change: Change, known: Mapping[tuple[int, TokenClass], LayerSimilarity]
) -> float | None:
    rows = [known[layer, c] for c in change.tokens if (layer, c) in known]
    name = {ATTENTION: "attention", FFN: "ffn", BLOCK: "block"}.get(change.skip)
    if not rows or name is None:
        return None
    weights = sum(each.rows for each in rows)
    if not weights:
        return fmean(getattr(each, name) for each in rows)
    return float(sum(each.rows * getattr(each, name) for each in rows) / weights)
