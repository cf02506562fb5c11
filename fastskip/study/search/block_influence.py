"""ShortGPT's rule: blocks that turn the hidden states least are left out, for all tokens.

Source: Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
arXiv 2403.03853: the influence of a block is 1 minus the mean cosine of what enters and leaves it.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastskip.study.similarity import LayerSimilarity


def block_influence(similarity: Sequence[LayerSimilarity]) -> dict[int, float]:
    """1 minus the mean cosine of each block's input and output, over all rows of all classes."""
    sums: dict[int, float] = {}
    rows: dict[int, int] = {}
    for each in similarity:
        sums[each.layer] = sums.get(each.layer, 0.0) + each.rows * each.block
        rows[each.layer] = rows.get(each.layer, 0) + each.rows
    return {layer: 1 - sums[layer] / rows[layer] for layer in sums}


def least_influence_first(influence: dict[int, float]) -> list[int]:
    """Layers in the order in which they are left out; of equal ones the lower first."""
    return sorted(influence, key=lambda layer: (influence[layer], layer))
