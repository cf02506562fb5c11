"""Which choices to take: the least loss within a budget, as a mixed-integer program.

minimise    sum of kl[i] x[i]
subject to  each layer is covered once; the sum of saved[i] x[i] is at least what must be saved;
            x[i] is 0 or 1.

Solved to optimality by HiGHS (Huangfu and Hall, "Parallelizing the dual revised simplex method",
Mathematical Programming Computation 10, 2018) through scipy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastskip.study.search.changes import Choice, span_of


class SolverError(ImportError):
    """The solver that a search needs is not installed."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A choice for one layer (for a pair, this and the next one), with its loss and savings."""

    layer: int
    choice: Choice
    kl: float
    saved: float

    @property
    def layers(self) -> range:
        """The layers that it covers."""
        return range(self.layer, self.layer + span_of(self.choice))


Solution = tuple[Offer, ...]
"""One offer for every layer, in order."""


def require() -> None:
    """Raise `SolverError` without scipy, so that a search fails before it measures anything."""
    try:
        import scipy.optimize  # noqa: F401
    except ImportError as error:
        raise SolverError(
            "search: scipy is missing; install it with: pip install 'fastskip[search]'"
        ) from error


def solve(offers: Sequence[Offer], depth: int, least: float) -> Solution | None:
    """The solution of least loss that saves at least `least`; `None` if no solution saves that.

    Ties are broken deterministically.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    covers = np.zeros((depth, len(offers)))
    for number, offer in enumerate(offers):
        covers[offer.layers.start : offer.layers.stop, number] = 1
    losses = np.array([offer.kl for offer in offers])
    savings = np.array([offer.saved for offer in offers])
    result = milp(
        losses / (losses.max() or 1.0),
        integrality=np.ones(len(offers)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(covers, 1, 1),
            LinearConstraint(savings[None], least, np.inf),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        return None
    taken = [offer for offer, x in zip(offers, result.x, strict=True) if x > 0.5]
    return tuple(sorted(taken, key=lambda offer: offer.layer))


def most_saved(offers: Sequence[Offer], depth: int) -> float:
    """The most that any solution saves."""
    best = [0.0] + [-np.inf] * depth
    for layer in range(depth):
        for offer in offers:
            if offer.layer == layer:
                end = offer.layers.stop
                best[end] = max(best[end], best[layer] + offer.saved)
    return float(best[depth])


def worthwhile(offers: Sequence[Offer], depth: int, fronts: int = 2) -> list[Offer]:
    """Offers worth considering: for each layer and span, the first `fronts` Pareto fronts of loss
    and savings."""
    found = []
    for layer in range(depth):
        for span in (1, 2):
            rest = [o for o in offers if o.layer == layer and len(o.layers) == span]
            for _ in range(fronts):
                kept: list[Offer] = []
                for offer in sorted(rest, key=lambda o: (o.kl, -o.saved)):
                    if not kept or offer.saved > kept[-1].saved + 1e-12:
                        kept.append(offer)
                found += kept
                rest = [o for o in rest if o not in kept]
    return found
