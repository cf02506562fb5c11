"""How much a search does, and who is told how far it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

_LEAST = {"seed": 0, "tries": 1, "points": 0, "new_tokens": 2, "rounds": 1, "randoms": 0}


class SettingsError(ValueError):
    """A setting that a search cannot have; says what is allowed."""


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """How much is done.

    Attributes:
        seed: of the refinement and the random policies.
        tries: policies measured to better the solver's, at the budget; half as many elsewhere.
        points: budgets between dense and the one asked for that are solved too.
        minutes: of the refinement at the most; it then ends early, and the result says so.
        new_tokens: of the workload that costs and times are of.
        rounds: timed runs of each policy.
        randoms: random policies.
        wirings: whether parallel blocks and pairs are measured too.
        keeps_answers: whether GENERATED rows that skip attention leave K and V all the same, for
            later turns on a kept cache; no single answer shows what that is worth.
        routers: whether calibrated routers are held to the find.
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
        for name, low in _LEAST.items():
            if getattr(self, name) < low:
                raise SettingsError(f"{name}: {getattr(self, name)}; allowed: {low} or more")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise SettingsError(f"minutes: {self.minutes}; allowed: a number above 0, or none")


@dataclass(frozen=True)
class Watcher:
    """Who is told how far a search is.

    `on_stage`: of a stage and how many steps it has, if that is known; `on_step`: of each step.
    """

    on_stage: Callable[[str, int | None], object] = lambda stage, steps: None
    on_step: Callable[[], object] = lambda: None
