"""SLEB's rule: block after block, that one is left out whose absence costs the least.

Source: Song et al., "SLEB: Streamlining LLMs through Redundancy Verification and Elimination of
Transformer Blocks", arXiv 2402.09025: in every round each block that is left is left out in turn
beside those that are gone already, and the one goes without which a calibration set is predicted
best. Here what is predicted is the dense model's answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence


def greedy_removal(
    depth: int,
    loss: Callable[[Sequence[int]], float],
    is_enough: Callable[[Sequence[int]], bool],
) -> list[int] | None:
    """The layers left out, in the order in which they go; `None` if all of them are not enough.

    Args:
        depth: layers.
        loss: of the model without these blocks.
        is_enough: whether these blocks are as many as should go.
    """
    gone: list[int] = []
    while not is_enough(gone):
        left = [layer for layer in range(depth) if layer not in gone]
        if not left:
            return None
        losses = {layer: loss([*gone, layer]) for layer in left}
        gone.append(min(left, key=lambda layer: (losses[layer], layer)))
    return gone
