"""What every call of a model needs: its inputs where the model is, and where its answers end."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor


def placed(inputs: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Inputs on the model's device; floating-point ones (pixels) in its dtype."""

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)

    return {name: moved(value) for name, value in inputs.items()}


def end_tokens(model: object) -> frozenset[int]:
    """The tokens at which a model's `generate` ends an answer."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = torch.as_tensor([] if found is None else found, dtype=torch.int64).flatten()
    return frozenset(ids.tolist())


def in_answers(new: Tensor, ends: Collection[int]) -> Tensor:
    """Which generated tokens `[B, n]` belong to the answers: those up to and including an end."""
    ended = torch.isin(new, torch.tensor(sorted(ends), device=new.device, dtype=new.dtype))
    return ended.cumsum(1) - ended.long() == 0
