"""The models that are timed, and their prompts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    InternVLConfig,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen3Config,
    Qwen3VLConfig,
    SmolVLMConfig,
)
from transformers.initialization import no_init_weights
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

import fastskip
from fastskip.families import UNCUT_SIDE, model_class_name, rows_of_crop, side_of

DEMO_CHECKPOINT = Path(fastskip.__file__).parent / "demo" / "checkpoint"
PAD_ID = 0
CROPS = 13
"""Crops that SmolVLM's processor makes of an image: four by three, and the whole image."""
FIRST_WORD = 5
"""Lower ids are special tokens."""

_LITTLE_VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}

Builder = Callable[[torch.dtype], Any]
"""Makes Hugging Face's model."""


@dataclass(frozen=True)
class Shape:
    """A model, and how many text rows its prompts have before and after the image."""

    name: str
    build: Builder
    text_before: int
    text_after: int

    @property
    def n_text(self) -> int:
        return self.text_before + self.text_after


@dataclass(frozen=True)
class Models:
    """One set of weights twice: under Hugging Face's decoder and under ours."""

    hf: Any
    ours: Any

    @property
    def depth(self) -> int:
        depth: int = self.hf.config.text_config.num_hidden_layers
        return depth


@cache
def models(build: Builder, dtype: torch.dtype, device: str, impl: str | None = None) -> Models:
    """Both models, built once per process; `impl` is what `fastskip.apply_` takes."""
    hf = build(dtype).to(device).eval().requires_grad_(False)
    hf.generation_config = GenerationConfig(pad_token_id=PAD_ID)  # no EOS: all tokens are made
    # With this memo deepcopy keeps the parameters, so that both models share them.
    shared = {id(parameter): parameter for parameter in hf.parameters()}
    return Models(hf, fastskip.apply_(copy.deepcopy(hf, shared), impl=impl))


def prompts(model: Any, shape: Shape, batch: int) -> dict[str, Tensor]:
    """Random prompts of one image each, all of the same length, as a processor returns them.

    Equal lengths favour Hugging Face, which would otherwise compute the padding too.
    """
    config = model.config
    generator = torch.Generator().manual_seed(0)
    ids = word_ids(model, (batch, shape.n_text), generator)
    image = torch.full((batch, config.image_seq_length), config.image_token_id)
    ids = torch.cat([ids[:, : shape.text_before], image, ids[:, shape.text_before :]], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs |= random_images(model, batch, generator)
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).long()
    return {name: value.to(model.device) for name, value in inputs.items()}


def ragged(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The prompts, each one token shorter at its end than the one before, padded on the left: at
    equal positions all sequences would draw the same."""
    ids, mask = inputs["input_ids"].clone(), inputs["attention_mask"].clone()
    for number in range(1, len(ids)):
        ids[number] = ids[number].roll(number)
        ids[number, :number], mask[number, :number] = PAD_ID, 0
    return {**inputs, "input_ids": ids, "attention_mask": mask}


def random_images(model: Any, count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """``count`` random images, as a processor returns them, in the model's dtype."""
    config, vision = model.config, model.config.vision_config
    if config.model_type == "qwen3_vl":  # as patches, one after the other
        side = UNCUT_SIDE // vision.patch_size
        size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        patches = torch.randn(count * side**2, size, generator=generator).to(model.dtype)
        return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, side, side]] * count)}
    side = side_of(vision.image_size)
    crops = (CROPS,) if config.model_type == "smolvlm" else ()
    pixels = torch.randn(count, *crops, 3, side, side, generator=generator)
    return {"pixel_values": pixels.to(model.dtype)}


def word_ids(model: Any, size: int | tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random ids of ordinary tokens, neither special nor image tokens."""
    image_id, vocabulary = model.config.image_token_id, model.config.text_config.vocab_size
    limit = image_id if image_id > FIRST_WORD else vocabulary
    size = (size,) if isinstance(size, int) else size
    return torch.randint(FIRST_WORD, limit, size, generator=generator)


def _demo(dtype: torch.dtype) -> Any:
    """The bundled checkpoint; without it a model of its size with fresh weights."""
    if (DEMO_CHECKPOINT / "config.json").is_file():
        return LlavaForConditionalGeneration.from_pretrained(DEMO_CHECKPOINT, dtype=dtype)
    from fastskip.demo.model import build_model
    from fastskip.demo.text import build_tokenizer

    return build_model(build_tokenizer(), seed=0).to(dtype)


def _half_billion(dtype: torch.dtype) -> Any:
    """A small LLaVA-1.5: 24 x 24 patches, 24 layers, 374 M weights, almost no vision.

    The tower is far smaller than a real one, so that the decoder and not the tower is measured.
    """
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=64,
        vocab_size=32064,
        max_position_embeddings=4096,
        pad_token_id=PAD_ID,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=32000,
        image_seq_length=576,
        tie_word_embeddings=False,
    )
    return random_model(config, dtype)


def _smolvlm(dtype: torch.dtype) -> Any:
    """SmolVLM-256M's language model, 135 M weights; crops of 64 rows, as for a photo, and almost no
    vision."""
    vision = SmolVLMVisionConfig(image_size=128, patch_size=4, **_LITTLE_VISION)
    text = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        vocab_size=49280,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
    )
    config = SmolVLMConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=49190,
        pad_token_id=PAD_ID,
        scale_factor=4,
        tie_word_embeddings=True,
    )
    config.image_seq_length = CROPS * rows_of_crop(config)
    return random_model(config, dtype)


def _internvl(dtype: torch.dtype) -> Any:
    """InternVL3.5-1B's language model (Qwen3's, 0.6 B weights), a tile of 256 rows, and almost no
    vision."""
    vision = InternVLVisionConfig(image_size=[448, 448], patch_size=[14, 14], **_LITTLE_VISION)
    text = Qwen3Config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
    )
    config = InternVLConfig(
        vision_config=vision, text_config=text, image_token_id=151671, tie_word_embeddings=True
    )
    config.image_seq_length = rows_of_crop(config)
    return random_model(config, dtype)


def _qwen3_vl(dtype: torch.dtype) -> Any:
    """Half of the layers of Qwen3-VL-2B's language model, 1 B weights, with three-axis positions
    and image features added after its first three layers; an image of 448 pixels a side (196 rows),
    and almost no vision. All layers together with their fp64 reference do not fit in 24 GB."""
    vision = {
        "depth": 3,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "out_hidden_size": 2048,
        "deepstack_visual_indexes": [0, 1, 2],
    }
    text = {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 14,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 262144,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5000000.0,
            "mrope_section": [24, 20, 20],
            "mrope_interleaved": True,
        },
        "pad_token_id": PAD_ID,
    }
    config = Qwen3VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=True)
    config.image_seq_length = rows_of_crop(config)
    return random_model(config, dtype)


@torch.no_grad()
def random_model(config: Any, dtype: torch.dtype, device: str = "cpu") -> Any:
    """A model with random weights, drawn once, directly in `dtype` and on `device`; Hugging Face
    would draw them twice, in fp32, on the CPU."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights(), torch.device(device):
            model = getattr(transformers, model_class_name(config))(config)
    finally:
        torch.set_default_dtype(default)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.02, generator=generator)
        else:
            parameter.fill_(float("norm" in name and name.endswith("weight")))
    return model


DEMO = Shape("demo", _demo, text_before=2, text_after=14)
HALF_BILLION = Shape("0.5b", _half_billion, text_before=4, text_after=40)
SMOLVLM = Shape("smolvlm-256m", _smolvlm, text_before=4, text_after=40)
QWEN3_VL = Shape("qwen3-vl-2b, 14 layers", _qwen3_vl, text_before=4, text_after=40)
INTERNVL = Shape("internvl3.5-1b", _internvl, text_before=4, text_after=40)
