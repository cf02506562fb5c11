"""Wanda said again, plainly: whole forwards, loops, and sorted lists; shares no code with ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def blocks_of(model: Any) -> nn.ModuleList:
    """The decoder's layers: the deepest list of that name whose blocks are no vision tower's."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and name.endswith("layers") and "vision" not in name
    ]
    assert len(lists) == 1
    return lists[0][1]  # type: ignore[return-value]


def linears_of(layer: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in layer.named_modules() if isinstance(m, nn.Linear)}


@torch.no_grad()
def wanda_(model: Any, prompts: Sequence[dict[str, Tensor]], ratio: float) -> dict[str, Tensor]:
    """Prunes in place, of each row the lowest |w| * ||x||; prompts are of one sequence, unpadded.

    Every layer costs a forward of the whole model, whose weights so far are pruned.
    """
    masks = {}
    for number, layer in enumerate(blocks_of(model)):
        linears = linears_of(layer)
        read: dict[str, list[Tensor]] = {name: [] for name in linears}
        hooks = [
            linear.register_forward_hook(
                lambda _, x, __, own=read[name]: own.append(x[0].flatten(0, -2))
            )
            for name, linear in linears.items()
        ]
        for prompt in prompts:
            model(**prompt)
        for hook in hooks:
            hook.remove()
        for name, linear in linears.items():
            norms = torch.cat(read[name]).double().pow(2).sum(0).sqrt().tolist()
            kept = torch.ones(linear.weight.shape, dtype=torch.bool)
            for row, weights in enumerate(linear.weight.tolist()):
                scores = [abs(w) * norm for w, norm in zip(weights, norms, strict=True)]
                order = sorted(range(len(scores)), key=scores.__getitem__)
                for column in order[: math.floor(ratio * len(scores) + 0.5)]:
                    kept[row, column] = False
                    linear.weight[row, column] = 0.0
            masks[f"layers.{number}.{name}"] = kept
    return masks
