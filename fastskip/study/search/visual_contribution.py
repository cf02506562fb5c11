"""ShortV's rule: image rows are frozen in the layers that contribute least to what is answered.

Source: Yuan et al., "ShortV: Efficient Multimodal Large Language Models by Freezing Visual Tokens
in Ineffective Layers", arXiv 2504.00502: the contribution of a layer is how far the model's output
moves (Kullback-Leibler divergence) when image rows pass that layer unchanged. A frozen row still
gives K and V.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastskip.policy import SkippedKV, SkipPolicy, TokenClass
from fastskip.study.search.changes import BLOCK, Change, policy_of

FROZEN = Change(frozenset({TokenClass.IMAGE}), BLOCK, SkippedKV.PROJECT)
"""What is done to a layer."""


def least_contribution_first(contribution: Mapping[int, float]) -> list[int]:
    """Layers in the order in which they freeze; of equal ones the lower first."""
    return sorted(contribution, key=lambda layer: (contribution[layer], layer))


def frozen_in(layers: Sequence[int]) -> SkipPolicy:
    """Image rows frozen in these layers."""
    return policy_of(((layer, (FROZEN,)) for layer in layers), "shortv")
