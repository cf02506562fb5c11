"""How much a search does, and its progress callbacks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from fastskip.study.counts import check_counts

_LEAST = {"seed": 0, "tries": 1, "points": 0, "new_tokens": 2, "rounds": 1, "randoms": 0}


class SettingsError(ValueError):
    """An invalid setting of a search; says what is allowed."""


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """How much is done.

    Attributes:
        seed: of the refinement and the random policies.
        tries: policies measured to improve on the solver's at the budget; half as many elsewhere.
        points: further budgets to solve for, between dense and the given one.
        minutes: the most that the refinement may take; it then ends early, and the result says so.
        new_tokens: of the workload for which costs and times are taken.
        rounds: timed runs of each policy.
        randoms: random policies.
        wirings: whether to measure parallel blocks and pairs too.
        keeps_answers: whether GENERATED rows that skip attention still leave K and V, for later
            turns on a kept cache; single answers cannot show what that is worth.
        routers: whether to compare with calibrated routers.
    """

    seed: int = 0
    tries: int = 80
    points: int = 2
    minutes: float | None = None
    new_tokens: int = 16
    rounds: int = 5
    randoms: int = 3
    wirings: bool = True
    keeps_answers: bool = False
    routers: bool = True

    def __post_init__(self) -> None:
        check_counts(SettingsError, **{n: (getattr(self, n), low) for n, low in _LEAST.items()})
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise SettingsError(f"minutes: {self.minutes}; allowed: a number above 0, or none")


@dataclass(frozen=True)
class Watcher:
    """Progress callbacks of a search.

    `on_stage`: called with a stage's name and its number of steps, if known; `on_step`: called
    after each step.
    """

    on_stage: Callable[[str, int | None], object] = lambda stage, steps: None
    on_step: Callable[[], object] = lambda: None
