"""The best policy for a model, a machine and a budget: searched for, and held to what is known.

`budget` says what may be spent, `changes` what can be done to a layer, `calibrating` and
`sensitivity` what each of that costs in answers, `costing` and `latency` what it saves, `solver`
which of it to take, `refine` how to better that by measuring. `peers`, `uniform` and `routers` make
what the find is held to; `runner` does it all, `result` is what comes out.
"""

from fastskip.study.search.budget import Budget, BudgetError, Quantity, parse_budget
from fastskip.study.search.result import Found, SearchResult
from fastskip.study.search.runner import Search, SearchSettings

__all__ = [
    "Budget",
    "BudgetError",
    "Found",
    "Quantity",
    "Search",
    "SearchResult",
    "SearchSettings",
    "parse_budget",
]
