"""How many rows removals leave, for the cost functions.

Which rows stay is decided at run time; costs assume evenly spaced ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastskip.policy import RemovalRule, TokenClass


def spaced(rows: int, kept: int) -> list[int]:
    """`kept` evenly spaced numbers in `range(rows)`, in order."""
    return [(2 * number + 1) * rows // (2 * kept) for number in range(kept)]


def left(removals: Sequence[RemovalRule], classes: Sequence[TokenClass]) -> list[int]:
    """The rows of a forward over `classes` that remain after the removals, in order."""
    found = list(range(len(classes)))
    for rule in removals:
        candidates = [row for row in found if classes[row] in rule.classes]
        kept = {candidates[n] for n in spaced(len(candidates), rule.keep.count(len(candidates)))}
        found = [row for row in found if classes[row] not in rule.classes or row in kept]
    return found


def counts_left(
    removals: Sequence[RemovalRule], rows: Mapping[TokenClass, int]
) -> dict[TokenClass, int]:
    """How many rows per class remain of one forward's rows."""
    found = dict(rows)
    for rule in removals:
        together = sum(found.get(c, 0) for c in rule.classes)
        kept = rule.keep.count(together)
        for token_class in found.keys() & rule.classes:
            found[token_class] = found[token_class] * kept // together if together else 0
    return found
