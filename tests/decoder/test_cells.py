"""Every cell of the semantics table, in prompts, answers and decoding, against the oracle."""

import pytest

from tests.agreement import Trio, answer_labels
from tests.batches import Batch
from tests.policies import CELLS, LAYERS, MIXED, Policy, cell_policy


def check(trio: Trio, policy: Policy, batch: Batch) -> None:
    trio.check_forward(policy, batch)
    labels, classes = answer_labels(batch)
    trio.check_forward(policy, batch, classes=classes, labels=labels)
    trio.check_greedy(policy, batch)


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("token_class", ["image", "text", "generated"])
@pytest.mark.parametrize("cell", CELLS)
def test_cell(trio: Trio, batch: Batch, cell: str, token_class: str, layers: str) -> None:
    check(trio, cell_policy(cell, token_class, layers), batch)


@pytest.mark.parametrize("name", MIXED)
def test_mixed_cells(trio: Trio, batch: Batch, name: str) -> None:
    check(trio, MIXED[name], batch)
