"""Search for the best policy for a model, a machine and a budget, compared with known policies.

`budget` says what may be spent, `changes` what can be done to a layer; `calibrating` and
`sensitivity` measure what that costs in answers, `costing`, `latency` and `pricing` what it saves.
`solver` picks the best combination, `refine` improves it by measuring, `seeking` does both at
several budgets. `uniform`, `peers` and `routers` make the baselines, each at the same budget
(`matching`). `judged` and `conclusion` evaluate on held-out items, `runner` does it all, and
`result` and `plots` hold the output.
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
