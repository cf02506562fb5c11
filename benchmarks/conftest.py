"""Command-line options, item selection, and the tables that are printed and saved at the end."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest

from benchmarks.harness import Case, Measurement, measure
from benchmarks.records import Record, file_name
from benchmarks.report import Results, markdown, tables
from fastskip.timing import with_stack_room

_HERE = Path(__file__).parent
_RECORDS = pytest.StashKey[list[Record]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--save-results",
        nargs="?",
        const="",
        metavar="PATH",
        help="save the results as JSON (default: benchmarks/results/<machine>.json); cases in the "
        "file that were not run are kept",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RECORDS] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects the long form unless `-m full` is given."""
    if "full" in config.option.markexpr:
        return
    long = [
        item for item in items if item.get_closest_marker("full") and _HERE in item.path.parents
    ]
    items[:] = [item for item in items if item not in long]
    config.hook.pytest_deselected(items=long)


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Callable[[Case], Measurement]:
    """Measures the selected peers of a case when the first of its items needs them."""
    params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]

    known: dict[Case, Measurement | Exception] = {}

    def measured(case: Case) -> Measurement:
        if case not in known:
            selected = {own["peer"] for own in params if own.get("case") == case}
            try:
                known[case] = with_stack_room(partial(measure, case, selected))
            except Exception as error:  # so that the case's other items fail at once
                known[case] = error
        found = known[case]
        if isinstance(found, Exception):
            raise found
        return found

    return measured


@pytest.fixture
def records(request: pytest.FixtureRequest) -> list[Record]:
    """The list to which items append their results."""
    return request.config.stash[_RECORDS]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    records = config.stash[_RECORDS]
    if not records:
        return
    for table in tables(records):
        terminalreporter.write_line(f"\n{markdown(table)}")
    place = config.getoption("save_results")
    if place is not None:
        path = Path(place) if place else _HERE / "results" / file_name("cpu")
        run = {
            "command": f"pytest {shlex.join(config.invocation_params.args)}",
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
        }
        known = Results.load(path) if path.is_file() else Results([])
        known.renewed([record | run for record in records]).save(path)
        terminalreporter.write_line(f"\nresults: {path}")
