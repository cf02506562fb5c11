"""The model and the batch of tests that need no particular ones."""

import copy
from typing import Any

import pytest

import fastskip
from tests.agreement import Trio
from tests.batches import Batch, random_batch
from tests.models import tiny_llava


@pytest.fixture(scope="module")
def trio() -> Trio:
    return Trio(tiny_llava())


@pytest.fixture(scope="module")
def batch(trio: Trio) -> Batch:
    return random_batch(trio.plain, seed=1, images=(2, 0, 1))


@pytest.fixture
def model(stock: Any) -> Any:
    """Prepared, from a copy of the plain model of the tests at hand."""
    return fastskip.apply_(copy.deepcopy(stock))
