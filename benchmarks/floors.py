"""FLOPs and floors of a `generate` call, from a plan's counts and measured ceilings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fastskip.plan import SkipPlan
from fastskip.plan.chances import Rate
from fastskip.plan.costs import Ceilings, GenerationCost, floor_seconds, generation_cost
from fastskip.plan.mixed_cost import mixed_cost


class Work(NamedTuple):
    """FLOPs, and the seconds that they and the bytes take at least."""

    flops: float
    floor: float


def work_of(
    plan: SkipPlan,
    rows: Sequence[tuple[int, int]],
    n_new: int,
    ceilings: Ceilings,
    *,
    text_before: int,
    rates: tuple[Rate | None, Rate | None] = (None, None),
) -> dict[str, Work]:
    """The work of the prefill, without vision, of a mean decode step and of both phases (e2e).

    Args:
        plan: What runs.
        rows: Image and text rows of each sequence.
        n_new: New tokens of each.
        ceilings: What the machine reaches.
        text_before: Text rows before the image rows.
        rates: At which routers skip, in the prompt and in the steps; as `SkipPlan.expected`.
    """

    def cost(rate: Rate | None) -> GenerationCost:
        planned = plan.expected(rate)
        costs = {
            each: generation_cost(planned, *each, n_new, len(rows), text_before=text_before)
            for each in set(rows)
        }
        return costs[rows[0]] if len(costs) == 1 else mixed_cost([costs[each] for each in rows])

    prompt, steps = cost(rates[0]).prefill, cost(rates[1]).decode
    prefill, decode = (floor_seconds(part, ceilings) for part in (prompt, steps))
    return {
        "prefill": Work(prompt.flops, prefill),
        "decode": Work(steps.flops / steps.steps, decode / steps.steps),
        "e2e": Work(prompt.flops + steps.flops, prefill + decode),
    }
