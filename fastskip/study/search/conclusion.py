"""The conclusion of a search: which policy to take, and whether searching was worth it.

The rule: of the candidates within the budget, keep those whose score on held-out items is not
significantly below the dense model's (95 % interval of the differences, item by item), and take the
one that moves the calibration set's answers least; a router only if nothing static remains, since
its decisions take time that a FLOPs budget does not count. Held-out items only rule candidates out;
they do not choose among them, so that the winner's score is not biased upwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fastskip.study.search.result import Comparison, Found
from fastskip.wording import FEW_ITEMS, counted

FOUND = "search"
"""The name of the search's best policy at the budget."""
WIDE = 0.05
"""A loss of this much score is worth a caution unless the interval rules it out."""
RULE = (
    "of the candidates within the budget that held-out items do not show to be worse than dense, "
    "the one that moves the calibration set's answers least (a router only if no other remains)"
)


def recommended(candidates: Sequence[Found]) -> Found | None:
    """The candidate to take, by the rule; `None` if nothing is worth it."""
    fit = [
        each
        for each in candidates
        if each.source != "dense" and each.keeps_budget and not each.change.is_below_zero
    ]

    def rank(each: Found) -> tuple[bool, float, float]:
        return each.source == "router", each.calibration_kl or 0.0, each.cost

    return min(fit, key=rank, default=None)


def told(
    candidates: Sequence[Found],
    best: Found | None,
    comparisons: Sequence[Comparison],
    items: int,
    budget: str,
    cheaper: str | None = None,
    comparisons_of_cheaper: Sequence[Comparison] = (),
) -> str:
    """The conclusion in words, a paragraph per line: the advice and its caution, how the search
    stands against its rivals, and the rule behind it.

    `cheaper`: the search's policy at the cheapest rival's cost.
    """
    parts = [*_advice(candidates, best, items, budget), _standing(candidates, comparisons)]
    rivals = _rivals(comparisons_of_cheaper)
    if cheaper is not None and rivals:
        beaten = [each for each in rivals if each.is_beaten]
        rest = [each.name for each in rivals if not each.is_beaten]
        parts.append(
            "Rivals' costs come in steps and may be below the budget: "
            f"{cheaper!r}, which costs no more than any of them, beats {len(beaten)} of "
            f"{len(rivals)}" + (f"; not {', '.join(rest)}." if rest else ".")
        )
    if best is not None:
        parts.append(f"The rule: {RULE}.")
    return "\n".join(parts)


def _advice(
    candidates: Sequence[Found], best: Found | None, items: int, budget: str
) -> Iterator[str]:
    if best is not None:
        yield (
            f"Take {best.name!r}: {_points(best)} from dense on {counted(items, 'held-out item')}, "
            f"within the budget ({budget}).{_caution(best, items)}"
        )
        return
    within = [each for each in candidates if each.source != "dense" and each.keeps_budget]
    if not within:
        yield f"Nothing meets the budget ({budget}) as measured here, so nothing is recommended."
        return
    least = max(within, key=lambda each: each.score.mean)
    yield (
        f"Nothing is worth it here: every candidate within the budget ({budget}) scores worse than "
        f"dense on {counted(items, 'held-out item')}. The mildest is {least.name!r} with "
        f"{_points(least)}."
    )
    yield from _milder(candidates)


def _caution(best: Found, items: int) -> str:
    """Reasons not to rely on it: few items, or an interval that includes a large loss."""
    reasons = []
    if items < FEW_ITEMS:
        reasons.append(f"{counted(items, 'item')} can only show large differences")
    if best.change.low < -WIDE:
        reasons.append(f"a loss of {-100 * best.change.low:.1f} points is not ruled out")
    if not reasons:
        return ""
    return f" Do not rely on it yet: {' and '.join(reasons)}; judge it on more items."


def _milder(candidates: Sequence[Found]) -> Iterator[str]:
    """The cheapest policy that the search found under milder budgets and that is not worse."""
    fit = [
        each
        for each in candidates
        if each.name.startswith(FOUND) and not each.keeps_budget and not each.change.is_below_zero
    ]
    if fit:
        best = min(fit, key=lambda each: each.cost)
        yield f"At {best.cost:.2g} of the dense cost {best.name!r} does not: {_points(best)}."


def _standing(candidates: Sequence[Found], comparisons: Sequence[Comparison]) -> str:
    if not any(each.name == FOUND for each in candidates):
        return "The search itself found no policy within the budget."
    rivals = _rivals(comparisons)
    if not rivals:
        return "No uniform interval and no peer meets the budget."
    better = [each for each in rivals if each.difference.is_below_zero]
    level = [each for each in rivals if not each.is_beaten and not each.difference.is_below_zero]
    beaten = len(rivals) - len(better) - len(level)
    if beaten == len(rivals):
        return (
            f"The search's policy beats every uniform interval and every peer at this budget "
            f"({len(rivals)}) by more than the noise."
        )
    text = (
        "The search's policy does not beat every uniform interval and every peer at this budget "
        f"by more than the noise: {beaten} of {len(rivals)} are beaten"
    )
    if better:
        text += f"; better: {', '.join(each.name for each in better)}"
    if level:
        text += f"; no clear difference: {', '.join(each.name for each in level)}"
    return text + "."


def _rivals(comparisons: Sequence[Comparison]) -> list[Comparison]:
    return [each for each in comparisons if each.source in ("uniform", "peer")]


def _points(each: Found) -> str:
    mean, interval = each.change.in_points
    return f"{mean} points ({interval})"
