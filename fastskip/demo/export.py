"""Write a trained model as a Hugging Face folder, in the layout of the hub's LLaVAs."""

import json
from pathlib import Path

import torch
from safetensors.torch import save
from transformers import LlavaForConditionalGeneration, LlavaProcessor

HUB_NAMES = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
"""In-memory prefix -> prefix on the hub; transformers maps them back on loading."""


def export(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Weights in bfloat16, configs, tokenizer and processor."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        hub_name(name): value.detach().to(torch.bfloat16).contiguous()
        for name, value in model.state_dict().items()
    }
    # not `save_file`, which makes the file readable only by its owner
    (folder / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    model.config.architectures = [type(model).__name__]
    config = model.config.to_dict() | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)


def hub_name(name: str) -> str:
    for ours, theirs in HUB_NAMES.items():
        if name.startswith(ours):
            # only some versions of transformers keep the tower's inner name
            return theirs + name.removeprefix(ours).removeprefix("vision_model.")
    raise ValueError(f"no hub name for {name!r}")
