"""ShortGPT's rule: the blocks that change the hidden states least are skipped, for all tokens.

Source: Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
arXiv 2403.03853: a block's influence is 1 minus the mean cosine between its input and its output.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastskip.study.similarity import LayerSimilarity


def block_influence(similarity: Sequence[LayerSimilarity]) -> dict[int, float]:
    """1 minus the mean cosine between each block's input and output, over rows of all classes."""
    sums: dict[int, float] = {}
    rows: dict[int, int] = {}
    for each in similarity:
        sums[each.layer] = sums.get(each.layer, 0.0) + each.rows * each.block
        rows[each.layer] = rows.get(each.layer, 0) + each.rows
    return {layer: 1 - sums[layer] / rows[layer] for layer in sums}
