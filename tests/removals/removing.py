"""Policies with removals, and what the papers' rules keep, restated on a plain model."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastskip.verification.cells import GENERATED, IMAGE
from tests.batches import Batch
from tests.policies import Policy, policy_of


def removal(after: int, by: str, ratio: float = 0.5, **fields: Any) -> dict[str, Any]:
    return {"after_layer": after, "keep": {"by": by, "ratio": ratio}} | fields


def removing(*removals: dict[str, Any], rules: Any = (), arrangements: Any = ()) -> Policy:
    return policy_of(*rules, arrangements=tuple(arrangements)) | {"removals": list(removals)}


def last_prompt_columns(classes: Tensor, real: Tensor) -> list[int]:
    """The last column of each sequence that is no pad and was not generated."""
    is_prompt = real & (classes != GENERATED)
    return [int(row.nonzero().max()) for row in is_prompt]


@torch.no_grad()
def attention_of(model: PreTrainedModel, batch: Batch, layer: int) -> Tensor:
    """`[B, T, T]`: how rows attend to each other in a layer of the dense model, mean over heads."""
    model.set_attn_implementation("eager")
    try:
        out = model(**batch.inputs(), output_attentions=True)
    finally:
        model.set_attn_implementation("sdpa")
    weights: Tensor = out.attentions[layer]
    return weights.float().mean(1)


def kept_by(scores: Tensor, batch: Batch, ratio: float) -> Tensor:
    """`[B, T]`: image rows that stay, the best by `scores [B, T]`; `int(ratio * n)` of `n`."""
    stay = torch.zeros_like(batch.real)
    last = last_prompt_columns(batch.token_classes, batch.real)
    for sequence, classes in enumerate(batch.token_classes):
        is_image = (classes == IMAGE) & batch.real[sequence]
        is_image[last[sequence]] = False
        columns = is_image.nonzero().squeeze(1).tolist()
        ranked = sorted(columns, key=lambda c: (-float(scores[sequence, c]), c))
        stay[sequence, ranked[: int(ratio * len(columns))]] = True
    return stay
