"""The demo's models: LLaVAs small enough to ship with the package, in three sizes."""

import math
from dataclasses import dataclass
from enum import Enum

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from fastskip.demo.scenes import IMAGE_SIZE
from fastskip.demo.text import IMAGE_TOKENS, PATCH


@dataclass(frozen=True, slots=True)
class Decoder:
    """The sizes of a language model; its heads are `HEAD` wide."""

    layers: int
    width: int
    ffn: int
    heads: int


HEAD = 64


class Size(Enum):
    """What the package ships: one model to try policies on, and smaller ones to compare with.

    All share one vision tower. The medium decoder's matrices have 27 % of the large one's weights,
    the small one's 2.4 %.
    """

    LARGE = Decoder(layers=8, width=192, ffn=512, heads=4)
    MEDIUM = Decoder(layers=4, width=160, ffn=384, heads=2)
    SMALL = Decoder(layers=2, width=64, ffn=160, heads=1)

    @property
    def label(self) -> str:
        """The name in files and on the command line."""
        return self.name.lower()


def build_config(tokenizer: PreTrainedTokenizerFast, size: Size = Size.LARGE) -> LlavaConfig:
    """The configuration of a model of this size for the tokenizer's words."""
    decoder = size.value
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=64 * math.ceil(len(tokenizer) / 64),
        hidden_size=decoder.width,
        intermediate_size=decoder.ffn,
        num_hidden_layers=decoder.layers,
        num_attention_heads=decoder.heads,
        num_key_value_heads=decoder.heads,
        head_dim=HEAD,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, seed: int, size: Size = Size.LARGE
) -> LlavaForConditionalGeneration:
    """A model with fresh weights, determined by `seed`."""
    model = LlavaForConditionalGeneration(build_config(tokenizer, size)).float()
    initialise_(model, torch.Generator().manual_seed(seed))
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=32,
    )
    return model


def initialise_(model: LlavaForConditionalGeneration, generator: torch.Generator) -> None:
    """Draw every matrix with standard deviation 1/sqrt(fan-in).

    The usual 0.02 suits widths of thousands. At a width of 192 it makes attention almost uniform,
    for so long that nothing about the image is learned.
    """
    depth = {
        "language_model": model.config.text_config.num_hidden_layers,
        "vision_tower": model.config.vision_config.num_hidden_layers,
    }
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5, generator=generator)
        elif isinstance(module, nn.Linear | nn.Conv2d):
            std = 1 / math.sqrt(module.weight[0].numel())
            if name.endswith(("o_proj", "down_proj", "out_proj", "fc2")):
                # writes to the residual stream, once per sublayer
                std /= math.sqrt(2 * next(n for part, n in depth.items() if part in name))
            nn.init.normal_(module.weight, std=std, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.normal_(
        model.model.vision_tower.embeddings.class_embedding, std=0.5, generator=generator
    )
