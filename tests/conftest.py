"""What every test gets: few threads, fixed seeds, poisoned memory, sensible hypothesis profiles."""

import gc
import os
import random
import sys
import zlib
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
# Without a GPU kernels run in Triton's interpreter, which is chosen when they are first imported.
if not torch.cuda.is_available():
    runs_ptx = any(argument.partition("=")[0] == "--ptx" for argument in sys.argv)
    os.environ.setdefault("TRITON_INTERPRET", "0" if runs_ptx else "1")

from fastskip import ops  # noqa: E402 (after the choice of the interpreter)
from tests.interpreting import interpreting_quickly  # noqa: E402

settings.register_profile(
    "quick",
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("full", settings.get_profile("quick"), max_examples=300)
settings.load_profile("quick")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--impl",
        choices=("reference", "torch", "triton"),
        help="the implementation that models are prepared with where a test names none",
    )
    parser.addoption(
        "--ptx",
        type=int,
        metavar="ARCH",
        help="kernels run as the PTX that they compile to for this architecture (80, 90), executed "
        "on the CPU (tests/ptx)",
    )
    parser.addoption(
        "--every-case",
        action="store_true",
        help="with --ptx: all cases of the tests of kernels (default: one in four)",
    )


def pytest_configure(config: pytest.Config) -> None:
    chosen, resolve = config.option.impl, ops.resolve
    if chosen is not None:  # before any fixture prepares a model
        ops.resolve = lambda impl, device: resolve(impl or chosen, device)  # type: ignore[assignment]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    long_form = "full" in str(config.option.markexpr)
    is_other = config.option.impl not in (None, "reference")
    # Compiling takes most of the time.
    if config.option.ptx is not None and not config.option.every_case:
        kept = _thinned(items)
        chosen_ids = {id(item) for item in kept}
        config.hook.pytest_deselected(items=[i for i in items if id(i) not in chosen_ids])
        items[:] = kept
    for item in items:
        if item.get_closest_marker("reference") and is_other:
            item.add_marker(pytest.mark.skip(reason="looks into the reference runtime"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("full") and not long_form:
            item.add_marker(pytest.mark.skip(reason="long form; select it with -m full"))


def pytest_collection_finish() -> None:
    """Modules stay, so whoever collects garbage (a trainer does after each run) need not look
    through them."""
    gc.collect()
    gc.freeze()


def _thinned(items: list[pytest.Item]) -> list[pytest.Item]:
    """Of every parametrised test of kernels its first case and about a sixth of the others, drawn
    by their names: in turn, one of three dtypes would be left out."""
    seen: set[str] = set()
    kept = []
    for item in items:
        name, is_case, _ = item.nodeid.partition("[")
        is_thin = bool(is_case) and name.startswith("tests/kernels/")
        if not is_thin or name not in seen or zlib.crc32(item.nodeid.encode()) % 6 == 0:
            kept.append(item)
        seen.add(name)
    return kept


@pytest.fixture(autouse=True, scope="session")
def kernels_on_a_cpu(pytestconfig: pytest.Config) -> Iterator[None]:
    arch = pytestconfig.option.ptx
    as_ptx = arch and import_module("tests.ptx.launches").executing(arch)
    with as_ptx or interpreting_quickly():
        yield


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # it would note a stack for each device that is not there, to seed it when it comes
        torch.default_generator.manual_seed(0)


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Every buffer that product code allocates uninitialised starts as NaN.

    Rows that a policy skips are just where an output that nobody wrote would hide.
    """
    if find_spec("fastskip.ops.allocate") is None:
        yield
        return
    with import_module("fastskip.ops.allocate").poisoned():
        yield
