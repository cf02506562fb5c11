"""How numbers are worded."""

from typing import Any

import pytest

from fastskip.commands.bench_tables import footer, show
from fastskip.intervals import Spread
from fastskip.plan.costs import Ceilings
from fastskip.study.bench.contenders import Source
from fastskip.study.bench.results import BenchResult, ContenderResult, Phases, Times
from fastskip.study.bench.workload import Workload
from fastskip.study.report.tables import time_cell
from fastskip.wording import significant


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0, 3, "0"),
        (0.0123456, 3, "0.0123"),
        (1.5, 3, "1.5"),
        (99.96, 3, "100"),
        (999.6, 3, "1000"),
        (1234.5, 3, "1234"),
        (16_123.4, 4, "16123"),
        (1e-6, 2, "1e-06"),
        (-1234.5, 3, "-1234"),
    ],
)
def test_large_numbers_have_no_exponent(value: float, digits: int, text: str) -> None:
    assert significant(value, digits) == text


def test_numbers_of_a_large_model_on_a_large_machine(capsys: pytest.CaptureFixture[str]) -> None:
    """Seconds of prefill, thousands of tokens a second, gigabytes of cache, terabytes a second."""
    time = Spread(1.2345, 1.2, 1.3)
    assert time_cell(time).text == "1234 ms" and time_cell(time).small == "1200 to 1300"
    dense = ContenderResult(
        "dense",
        Source.FASTSKIP,
        {},
        Times(time, time, time, time),
        tokens_per_s=5123.4,
        peak_bytes=1_234_500_000_000,
        kv_bytes=1_073_741_824,
        floor_s=Phases(1.1, 1.1),
    )
    about: dict[str, Any] = {"device": "GPU", "threads": None, "dtype": "bfloat16", "versions": {}}
    load = Workload(1, 576, 64, 5, 32)
    found = BenchResult(about, load, 3, Ceilings(4.8e12, 1.2e15), (dense,))
    show(found)
    printed = capsys.readouterr().out
    assert "e+" not in printed + footer(found)
    assert "1074" in printed and "5123" in printed and "4800 GB/s and 1200 TFLOP/s" in footer(found)
