"""Rows, query-key pairs and cache entries of one layer, which size its operations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from fastskip.plan.chances import LayerChance
from fastskip.policy import Sublayer, TokenClass


@dataclass(frozen=True, slots=True)
class LayerWork:
    """Expected rows of one sequence in one layer; `visible` is how many entries its queries read.

    `reading_q`, `reading_kv`, `reading_ffn`: the probability that the weights of Q and the output
    projection, of K and V, and of the FFN are read at all.
    """

    attending: float
    projecting: float
    copied: float
    feeding: float
    pairs: float
    visible: float
    reading_q: float
    reading_kv: float
    reading_ffn: float


def work_of(
    layer: LayerChance,
    classes: Sequence[TokenClass],
    past: Mapping[TokenClass, int],
    first: int,
    batch: int,
) -> LayerWork:
    """The work on rows of these classes, in order; those before `first` only store their entries.

    `past`: rows per class that earlier forwards left in the cache.
    """
    cells = layer.cells
    continuing = Counter(classes[first:])
    pairs: float = 0
    last: dict[bool, float] = {}  # under a unimodal mask, only image rows read what they see
    for query in (c for c in continuing if cells[c].attends):
        beside = layer.holding_beside(query)
        kept = held(layer, {c: count for c, count in past.items() if layer.sees(query, c)})
        before = list(accumulate((beside[c] for c in classes), initial=kept))
        # A row that attends sees itself.
        seen = [before[i] + 1 for i in range(first, len(classes)) if classes[i] is query]
        pairs += cells[query].attends * sum(seen)
        side = layer.unimodal and query is TokenClass.IMAGE
        last[side] = max(last.get(side, 0), seen[-1])
    reading = layer.running(Sublayer.ATTENTION, Counter(classes), batch)
    is_stored = any(cells[c].projects == 1 for c in set(classes))
    return LayerWork(
        attending=sum(cells[c].attends for c in classes[first:]),
        projecting=sum(cells[c].projects for c in classes),
        copied=sum(cells[c].copies for c in classes),
        feeding=sum(cells[c].feeds for c in classes[first:]),
        pairs=pairs,
        visible=layer.running(Sublayer.ATTENTION, continuing, 1) * sum(last.values()),
        reading_q=layer.running(Sublayer.ATTENTION, continuing, batch),
        reading_kv=1 if is_stored else reading,
        reading_ffn=layer.running(Sublayer.FFN, continuing, batch),
    )


def held(layer: LayerChance, rows: Mapping[TokenClass, int]) -> float:
    """How many of these rows have an entry in the layer's cache."""
    return sum(n * layer.cells[c].holds for c, n in rows.items())
