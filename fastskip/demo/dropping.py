"""Skipping sublayers for the image rows during training, so that skip policies cost little.

A decoder trained with every sublayer for every row may rely on any of them. The last stage
therefore skips some sublayers of the image rows at random; the decoder learns to extract what it
needs from the image in the early layers, which are never skipped.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

FIRST = 3
"""Layers below this one are never skipped."""

Cell = tuple[int, str]
"""A layer and the name of its sublayer, "self_attn" or "mlp"."""


def draw_cells(rng: np.random.Generator, depth: int) -> list[Cell]:
    """Nothing for half of the batches; else all late blocks or FFNs, or scattered sublayers."""
    form = rng.random()
    if form < 0.5:
        return []
    if form < 0.75:
        first = int(rng.integers(FIRST, depth))
        chosen = [(layer, name) for layer in range(first, depth) for name in ("self_attn", "mlp")]
        return chosen if rng.random() < 0.5 else [cell for cell in chosen if cell[1] == "mlp"]
    share = rng.random()
    return [
        (layer, name)
        for layer in range(FIRST, depth)
        for name in ("self_attn", "mlp")
        if rng.random() < share
    ]


@contextmanager
def dropped(
    model: LlavaForConditionalGeneration, cells: Sequence[Cell], image: slice
) -> Iterator[None]:
    """Inside the block, the cells add nothing to the columns `image`; K and V stay visible."""

    def silence(module: object, inputs: object, output: Tensor | tuple[Tensor, ...]) -> object:
        added = output[0] if isinstance(output, tuple) else output
        keep = torch.ones(added.shape[1], 1, dtype=added.dtype)
        keep[image] = 0
        return (added * keep, *output[1:]) if isinstance(output, tuple) else added * keep

    layers = model.model.language_model.layers
    hooks = [getattr(layers[layer], name).register_forward_hook(silence) for layer, name in cells]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
