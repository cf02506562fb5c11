"""The best policy for a model, a machine and a budget: searched for, and held to what is known.

`budget` says what may be spent, `changes` what can be done to a layer; `calibrating` and
`sensitivity` measure what that costs in answers, `costing`, `latency` and `pricing` what it saves.
`solver` takes the best of it, `refine` betters that by measuring, `seeking` does both at several
budgets. `uniform`, `peers` and `routers` make what the find is held to, each at the same budget
(`matching`). `judged` and `conclusion` say what held-out items say, `runner` does it all, and
`result` and `plots` are what comes out.
"""

from fastskip.study.search.budget import Budget, BudgetError, Quantity, parse_budget
from fastskip.study.search.result import Found, SearchResult
from fastskip.study.search.runner import Search
from fastskip.study.search.settings import SearchSettings, Watcher

__all__ = [
    "Budget",
    "BudgetError",
    "Found",
    "Quantity",
    "Search",
    "SearchResult",
    "SearchSettings",
    "Watcher",
    "parse_budget",
]
