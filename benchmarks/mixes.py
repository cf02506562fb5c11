"""Batches of unlike prompts: several images or none, different lengths, padded on the left.

Hugging Face computes the padding, since its batches are rectangular; fastskip has no rows for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.shapes import PAD_ID, Shape, random_images, word_ids


@dataclass(frozen=True)
class Mix:
    """The prompts of a batch: how many images each has, and how many text rows after them."""

    images: tuple[int, ...]
    texts: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.images) != len(self.texts):
            raise ValueError(
                f"images, texts: {len(self.images)} and {len(self.texts)} entries; "
                "allowed: one of each per prompt"
            )

    def __len__(self) -> int:
        return len(self.images)

    def image_rows(self, model: Any) -> tuple[int, ...]:
        """Image rows of each prompt."""
        return tuple(count * model.config.image_seq_length for count in self.images)

    def text_rows(self, shape: Shape) -> tuple[int, ...]:
        """Text rows of each prompt, those before its images included."""
        return tuple(shape.text_before + after for after in self.texts)


MIX = Mix(images=(1, 0, 2, 1), texts=(44, 200, 30, 120))


def mixed_prompts(model: Any, shape: Shape, mix: Mix) -> dict[str, Tensor]:
    """Random prompts of a mix, as a processor that pads on the left returns them."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    rows = []
    for images, after in zip(mix.images, mix.texts, strict=True):
        text = word_ids(model, shape.text_before + after, generator)
        image = torch.full((images * config.image_seq_length,), config.image_token_id)
        rows.append(torch.cat((text[: shape.text_before], image, text[shape.text_before :])))
    ids, mask = (
        pad_sequence(each, batch_first=True, padding_value=pad, padding_side="left")
        for each, pad in ((rows, PAD_ID), (list(map(torch.ones_like, rows)), 0))
    )
    inputs = {"input_ids": ids, "attention_mask": mask}
    inputs |= random_images(model, sum(mix.images), generator)
    return {name: value.to(model.device) for name, value in inputs.items()}
