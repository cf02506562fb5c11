"""Smaller models to compare with the bundled checkpoint under a policy.

Only their projectors and language models are stored: all share the checkpoint's vision tower.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from fastskip.demo import checkpoint_path
from fastskip.demo.export import export, hub_name
from fastskip.demo.model import Size, build_model
from fastskip.demo.text import build_processor

TOWER = "model.vision_tower."


def weights_path(size: Size) -> Path:
    """The weight file of a bundled size; the large one's includes the tower."""
    if size is Size.LARGE:
        return checkpoint_path() / "model.safetensors"
    return Path(__file__).parent / "smaller" / f"{size.label}.safetensors"


def load(size: Size) -> LlavaForConditionalGeneration:
    """A bundled model on the CPU, in float32 and evaluation mode."""
    model = build_model(build_processor().tokenizer, seed=0, size=size)
    take_tower_(model)
    _take_(model, weights_path(size), [name for name in model.state_dict() if not _is_tower(name)])
    return model.eval()


def write_checkpoint(size: Size, folder: Path) -> None:
    """A bundled model as an ordinary Hugging Face folder, tower included."""
    export(load(size), build_processor(), folder)


def take_tower_(model: LlavaForConditionalGeneration) -> None:
    """Load the bundled checkpoint's vision tower into a model."""
    names = [name for name in model.state_dict() if _is_tower(name)]
    _take_(model, weights_path(Size.LARGE), names)


def save_without_tower(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write a state dict in bfloat16, under hub names, without the tower."""
    kept = {
        hub_name(name): value.detach().to(torch.bfloat16).contiguous()
        for name, value in weights.items()
        if not _is_tower(name)
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(save(kept, metadata={"format": "pt"}))


def _is_tower(name: str) -> bool:
    return name.startswith(TOWER)


def _take_(model: LlavaForConditionalGeneration, path: Path, names: list[str]) -> None:
    own = model.state_dict()
    with safe_open(path, "pt") as file, torch.no_grad():
        for name in names:
            own[name].copy_(file.get_tensor(hub_name(name)))
