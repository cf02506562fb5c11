"""SLEB's rule: remove blocks one by one, each time the one whose absence costs least.

Source: Song et al., "SLEB: Streamlining LLMs through Redundancy Verification and Elimination of
Transformer Blocks", arXiv 2402.09025: each round tries every remaining block in addition to those
removed already, and removes the one without which the calibration set is predicted best. Here, the
dense model's answers are predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence


def greedy_removal(
    depth: int,
    loss: Callable[[Sequence[int]], float],
    is_enough: Callable[[Sequence[int]], bool],
) -> list[int] | None:
    """The removed layers, in order of removal; `None` if removing all is not enough.

    Args:
        depth: layers.
        loss: of the model without these blocks.
        is_enough: whether removing these blocks is enough.
    """
    removed: list[int] = []
    while not is_enough(removed):
        left = [layer for layer in range(depth) if layer not in removed]
        if not left:
            return None
        losses = {layer: loss([*removed, layer]) for layer in left}
        removed.append(min(left, key=lambda layer: (losses[layer], layer)))
    return removed
