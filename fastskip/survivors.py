"""How many rows removals leave: what costs are counted of.

Which ones is decided at run time; costs take them as evenly spaced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastskip.policy import RemovalRule, TokenClass


def spaced(rows: int, kept: int) -> list[int]:
    """`kept` of the numbers below `rows`, evenly spaced and in order."""
    return [(2 * number + 1) * rows // (2 * kept) for number in range(kept)]


def left(removals: Sequence[RemovalRule], classes: Sequence[TokenClass]) -> list[int]:
    """Which rows of a forward of these classes are left after some removals, in order."""
    found = list(range(len(classes)))
    for rule in removals:
        candidates = [row for row in found if classes[row] in rule.classes]
        kept = {candidates[n] for n in spaced(len(candidates), rule.keep.count(len(candidates)))}
        found = [row for row in found if classes[row] not in rule.classes or row in kept]
    return found


def counts_left(
    removals: Sequence[RemovalRule], rows: Mapping[TokenClass, int]
) -> dict[TokenClass, int]:
    """How many rows a class are left of the rows of one forward."""
    found = dict(rows)
    for rule in removals:
        together = sum(found.get(c, 0) for c in rule.classes)
        kept = rule.keep.count(together)
        for token_class in found.keys() & rule.classes:
            found[token_class] = found[token_class] * kept // together if together else 0
    return found
