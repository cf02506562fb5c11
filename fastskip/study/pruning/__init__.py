"""Pruning: which weights a model can do without, as masks to apply, combine, hold and store."""

from fastskip.study.pruning.kept_set import KeptSet
from fastskip.study.pruning.masks import WeightMasks
from fastskip.study.pruning.prune import find_masks, prune_
from fastskip.study.pruning.recipe import Method, Part, Pattern, Per, PruningError, Recipe

__all__ = [
    "KeptSet",
    "Method",
    "Part",
    "Pattern",
    "Per",
    "PruningError",
    "Recipe",
    "WeightMasks",
    "find_masks",
    "prune_",
]
