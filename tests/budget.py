"""Assertions on errors, with allowances that are measured instead of chosen."""

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastskip.verification.budget import measure


def assert_within_budget(
    name: str, actual: Tensor, eager: Tensor, truth: Tensor, *, rows: Tensor | None = None
) -> None:
    """Fail unless `actual` is about as close to the fp64 `truth` as plain `eager` code is.

    `eager` is computed in the dtype of `actual`. `rows`: boolean mask over the leading
    dimensions (for example the rows that are no pads); all by default.
    """
    if rows is not None:
        actual, eager, truth = actual[rows], eager[rows], truth[rows]
    budget = measure(name, actual, eager, truth)
    assert budget.holds, str(budget)


def truth_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in fp64."""
    return copy.deepcopy(model).to(torch.float64)
