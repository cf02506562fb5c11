"""ShortV's rule: image rows are frozen in the layers where they contribute least to the answers.

Source: Yuan et al., "ShortV: Efficient Multimodal Large Language Models by Freezing Visual Tokens
in Ineffective Layers", arXiv 2504.00502: the contribution of a layer is how far the model's output
moves (Kullback-Leibler divergence) when image rows pass that layer unchanged. Frozen rows still
leave K and V.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastskip.policy import SkippedKV, SkipPolicy, TokenClass
from fastskip.study.search.changes import BLOCK, Change, policy_of

FROZEN = Change(frozenset({TokenClass.IMAGE}), BLOCK, SkippedKV.PROJECT)
"""The change that freezes image rows in a layer."""


def frozen_in(layers: Sequence[int]) -> SkipPolicy:
    """The policy that freezes image rows in these layers."""
    return policy_of(((layer, (FROZEN,)) for layer in layers), "shortv")
