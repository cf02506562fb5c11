"""A plan in a few lines, as notebooks show it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from fastskip.policy import Arrangement, Sublayer, TokenClass

if TYPE_CHECKING:
    from fastskip.plan.skip_plan import SkipPlan

_MORE = "table() shows every layer, cost(n_image, n_text, n_new) what it costs"


def summary(plan: SkipPlan) -> str:
    """What is skipped in how many layers, and where to read more."""
    head = f"SkipPlan {plan.name!r} of {len(plan.layers)} layers:"
    return "\n  ".join([head, *_parts(plan), _MORE])


def _parts(plan: SkipPlan) -> Iterator[str]:
    of_all = f"of {len(plan.layers)} layers"
    for group in plan.groups:
        yield f"{_names(plan, group)}: {_skipped(plan, group, of_all)}"
    for arrangement in (Arrangement.PARALLEL, Arrangement.PAIR):
        if arranged := sum(layer.arrangement is arrangement for layer in plan.layers):
            yield f"arrangement {arrangement}: {arranged} {of_all}"
    if masked := sum(layer.unimodal for layer in plan.layers):
        yield f"unimodal masks: {masked} {of_all}"
    for number, rule in enumerate(plan.policy.routers):
        cells = [cell for cell in plan.routed if cell.number == number]
        if not cells:
            continue  # of a plan in which every decision is made
        classes = _names(plan, {cell.token_class for cell in cells})
        parts = " and ".join(each for each in Sublayer if each in rule.skip)
        layers = len({cell.layer for cell in cells})
        yield f"router {rule.kind}: may skip {parts} of {classes} in {layers} {of_all}"
    for removal in plan.removals:
        away = f"{1 - removal.keep.ratio:.0%} of the {_names(plan, removal.classes)} rows leave"
        yield f"removal after layer {removal.after_layer}: {away}, by {removal.keep.by}"


def _skipped(plan: SkipPlan, group: frozenset[TokenClass], of_all: str) -> str:
    one = next(iter(group))  # all of a group are treated alike
    counts = {
        sublayer: sum(one not in layer.running(sublayer) for layer in plan.layers)
        for sublayer in Sublayer
    }
    told = [f"{sublayer} in {count}" for sublayer, count in counts.items() if count]
    return f"skip {', '.join(told)} {of_all}" if told else "no rule skips"


def _names(plan: SkipPlan, classes: Collection[TokenClass]) -> str:
    return ", ".join(each for each in plan.classes if each in classes)
