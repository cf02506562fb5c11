"""What a search comes to: which policy to take, and whether searching was worth it.

The rule. Of the candidates that keep the budget, those stay whose score on held-out items is not
told to be below the dense model's (95 % interval of the differences, item by item); of them the one
is recommended that moves the answers of the calibration set least; a router only where nothing
static is left, since its decisions take time that no budget of FLOPs sees. The held-out items only
rule out; they do not choose, so that the winner's score is not flattered.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastskip.study.search.result import Comparison, Found
from fastskip.wording import FEW_ITEMS, counted

FOUND = "search"
"""The name of the search's best policy at the budget."""
WIDE = 0.05
"""A loss of the score from which on it matters that it is not ruled out."""
RULE = (
    "of the candidates within the budget that held-out items do not show to be worse than dense, "
    "the one that moves the calibration set's answers least (a router only where it is alone)"
)


def recommended(candidates: Sequence[Found]) -> Found | None:
    """The one to take, by the rule; `None` if nothing is worth it."""
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
    """The conclusion in words; `cheaper`: the search's policy at what the cheapest rival takes."""
    parts = [_advice(candidates, best, items, budget), _standing(candidates, comparisons)]
    rivals = _rivals(comparisons_of_cheaper)
    if cheaper is not None and rivals:
        beaten = [each for each in rivals if each.is_beaten]
        rest = [each.name for each in rivals if not each.is_beaten]
        parts.append(
            f"Rivals come in steps and may cost less: {cheaper!r}, which takes no more than any of "
            f"them, beats {len(beaten)} of {len(rivals)}"
            + (f"; not {', '.join(rest)}." if rest else ".")
        )
    return " ".join(parts)


def _advice(candidates: Sequence[Found], best: Found | None, items: int, budget: str) -> str:
    if best is not None:
        return (
            f"Take {best.name!r}: {_points(best)} from dense on {counted(items, 'held-out item')}, "
            f"within the budget ({budget}); the rule: {RULE}.{_caution(best, items)}"
        )
    within = [each for each in candidates if each.source != "dense" and each.keeps_budget]
    if not within:
        return f"Nothing keeps the budget ({budget}) as measured here, so nothing is recommended."
    least = max(within, key=lambda each: each.score.mean)
    return (
        f"Nothing is worth it here: every candidate within the budget ({budget}) scores worse than "
        f"dense on {counted(items, 'held-out item')}. The mildest is {least.name!r} with "
        f"{_points(least)}."
        f"{_milder(candidates)}"
    )


def _caution(best: Found, items: int) -> str:
    """What speaks against relying on it: few items, or an interval with a great loss in it."""
    reasons = []
    if items < FEW_ITEMS:
        reasons.append(f"{counted(items, 'item')} can show large differences only")
    if best.change.low < -WIDE:
        reasons.append(f"a loss of {-100 * best.change.low:.1f} points is not ruled out")
    if not reasons:
        return ""
    return f" Do not rely on it yet: {' and '.join(reasons)}; judge it by more items."


def _milder(candidates: Sequence[Found]) -> str:
    """What was searched for under milder budgets and is not worse, the cheapest of it."""
    fit = [
        each
        for each in candidates
        if each.name.startswith(FOUND) and not each.keeps_budget and not each.change.is_below_zero
    ]
    if not fit:
        return ""
    best = min(fit, key=lambda each: each.cost)
    return f" At {best.cost:.2g} of the dense cost {best.name!r} does not: {_points(best)}."


def _standing(candidates: Sequence[Found], comparisons: Sequence[Comparison]) -> str:
    if not any(each.name == FOUND for each in candidates):
        return "The search found no policy of its own within the budget."
    rivals = _rivals(comparisons)
    if not rivals:
        return "No uniform interval and no peer keeps the budget."
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
    if level:
        text += f"; not told apart: {', '.join(each.name for each in level)}"
    if better:
        text += f"; better than it: {', '.join(each.name for each in better)}"
    return text + "."


def _rivals(comparisons: Sequence[Comparison]) -> list[Comparison]:
    return [each for each in comparisons if each.source in ("uniform", "peer")]


def _points(each: Found) -> str:
    change = each.change
    return f"{100 * change.mean:+.1f} points ({100 * change.low:+.1f} to {100 * change.high:+.1f})"
