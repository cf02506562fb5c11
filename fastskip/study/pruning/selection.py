"""Which weights of a matrix are kept, given their scores: exact counts, ties by position."""

from __future__ import annotations

import torch
from torch import Tensor

from fastskip.study.pruning.recipe import Recipe


def kept_by(scores: Tensor, recipe: Recipe) -> Tensor:
    """The mask of a matrix with scores ``[M, E]``: True where a weight is kept.

    In each competing group, the weights of lowest score are removed: exactly as many as the ratio
    says, to the nearest whole number; among equal scores, the first ones.
    """
    competing = recipe.competing(*scores.shape)
    groups = scores.view(-1, competing)
    return _all_but_lowest(groups, recipe.removed(competing)).view(scores.shape)


def _all_but_lowest(scores: Tensor, count: int) -> Tensor:
    """Boolean ``[G, S]``, False at the ``count`` lowest of each row."""
    order = scores.argsort(dim=1, stable=True)
    kept = torch.ones_like(scores, dtype=torch.bool)
    return kept.scatter_(1, order[:, :count], False)
