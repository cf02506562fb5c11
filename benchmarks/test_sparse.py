"""Products with a pruned weight, form by form; see `benchmarks.sparse`."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.replay import CLOCK, replay
from benchmarks.sparse import Case, Measurement, cases, measure
from fastskip.sparse.linear import Weights

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ITEMS = [
    pytest.param(case, form, id=f"{case.name}-{form.value}")
    for case in cases(DEVICE)
    for form in case.forms
]


@cache
def measured(case: Case) -> Measurement:
    """The first item of a case measures all of it."""
    return measure(case)


@pytest.mark.benchmark(group="sparse", timer=CLOCK)
@pytest.mark.parametrize(("case", "form"), ITEMS)
def test_sparse(case: Case, form: Weights, benchmark: Any) -> None:
    found = measured(case)
    for needed in (form, Weights.DENSE):
        if needed in found.faults:
            pytest.fail(f"{needed.value} is wrong, its time means nothing: {found.faults[needed]}")
    record = found.record(form)
    benchmark.extra_info.update(record)
    replay(benchmark, [milliseconds / 1e3 for milliseconds in record["samples_ms"]])
