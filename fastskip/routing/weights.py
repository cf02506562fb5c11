"""Learned weights of linear routers: a safetensors file with one vector per layer.

``layers.<l>.weight [D]`` fp32 and optionally ``layers.<l>.bias [1]`` for every layer that a rule
names; additional layers are allowed. A row's score is ``weight . h / rms(h) + bias``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastskip.atomic_files import atomic_write
from fastskip.policy import PolicyError


@dataclass(frozen=True, slots=True)
class LayerScore:
    """``weight [D]`` fp32 and bias of one layer."""

    weight: Tensor
    bias: float


def read_weights(
    path: Path, layers: tuple[int, ...], hidden_size: int, field: str
) -> Mapping[int, LayerScore]:
    """The weights of ``layers``; errors name ``field``.

    Raises:
        PolicyError: the file is missing or malformed, belongs to another model, or contains
            non-finite numbers.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise PolicyError(field, str(path), "a safetensors file", str(error)) from error
    found = {}
    for layer in layers:
        weight, bias = (tensors.get(f"layers.{layer}.{name}") for name in ("weight", "bias"))
        if weight is None:
            known = sorted(name for name in tensors if name.endswith(".weight"))
            problem = f"{path} has no layers.{layer}.weight"
            raise PolicyError(field, str(path), f"layers in the file: {known}", problem)
        if tuple(weight.shape) != (hidden_size,):
            problem = (
                f"layers.{layer}.weight has shape {list(weight.shape)}: the weights belong to "
                "another model"
            )
            raise PolicyError(field, str(path), f"shape [{hidden_size}]", problem)
        if bias is not None and bias.numel() != 1:
            problem = f"layers.{layer}.bias has shape {list(bias.shape)}"
            raise PolicyError(field, str(path), "shape [1]", problem)
        score = LayerScore(weight.float(), 0.0 if bias is None else float(bias))
        if not bool(weight.isfinite().all()) or score.bias - score.bias != 0:
            problem = f"layers.{layer} contains non-finite numbers"
            raise PolicyError(field, str(path), "finite numbers", problem)
        found[layer] = score
    return found


def write_weights(
    path: Path, scores: Mapping[int, LayerScore], about: Mapping[str, object] | None = None
) -> None:
    """Writes the weights; ``about`` is stored in the file's metadata as JSON."""
    tensors: dict[str, Tensor] = {}
    for layer, score in sorted(scores.items()):
        tensors[f"layers.{layer}.weight"] = score.weight.float().cpu().contiguous()
        tensors[f"layers.{layer}.bias"] = torch.tensor([score.bias])
    metadata = None if about is None else {"about": json.dumps(dict(about))}
    with atomic_write(path) as part:
        save_file(tensors, part, metadata=metadata)
