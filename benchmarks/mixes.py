"""Batches of unlike prompts: several images or none, other lengths, padded on the left.

Hugging Face computes the pads, as a batch is a rectangle there; fastskip has no rows for them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.shapes import PAD_ID, Shape, word_ids
from fastskip.costs import Cost, GenerationCost, Operation
from fastskip.plan import SkipPlan

Key = tuple[str, int | None, int]


@dataclass(frozen=True)
class Mix:
    """The prompts of a batch: how many images each has, and how many text rows after them."""

    images: tuple[int, ...]
    texts: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.images) != len(self.texts):
            raise ValueError(
                f"{len(self.images)} images, {len(self.texts)} texts: one each a prompt"
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
    width = max(map(len, rows))
    ids = torch.full((len(mix), width), PAD_ID)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, width - len(row) :] = row
        mask[number, width - len(row) :] = 1
    side = config.vision_config.image_size
    pixels = torch.randn(sum(mix.images), 3, side, side, generator=generator).to(model.dtype)
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    return {name: value.to(model.device) for name, value in inputs.items()}


def mixed_cost(costs: Sequence[GenerationCost]) -> GenerationCost:
    """The cost of a batch of sequences with these costs: weights are read once for all of them."""
    return GenerationCost(
        _together([each.prefill for each in costs]), _together([each.decode for each in costs])
    )


def mixed_kv_bytes(plan: SkipPlan, images: Sequence[int], texts: Sequence[int], n_new: int) -> int:
    """Bytes of cache entries of sequences with so many image and text rows."""
    pairs = zip(images, texts, strict=True)
    return sum(plan.kv_bytes(n_image, n_text, n_new) for n_image, n_text in pairs)


def _together(costs: Sequence[Cost]) -> Cost:
    found: dict[Key, Operation] = {}
    for cost in costs:
        for key, own in _by_key(cost).items():
            other = found.get(key, Operation(key[0], key[1], times=own.times))
            found[key] = Operation(
                own.kind,
                own.layer,
                other.flops + own.flops,
                max(other.weight_bytes, own.weight_bytes),
                other.kv_read_bytes + own.kv_read_bytes,
                other.kv_written_bytes + own.kv_written_bytes,
                own.times,
            )
    return Cost(tuple(found.values()), costs[0].steps)


def _by_key(cost: Cost) -> dict[Key, Operation]:
    """The operations of one sequence, so named that those of other sequences find them.

    Whether q, k and v are one product depends on a sequence's classes: they count as one.
    """
    found: dict[Key, Operation] = {}
    seen: dict[tuple[str, int | None], int] = defaultdict(int)
    for own in cost.ops:
        name = own.kind, own.layer
        key = (*name, 0 if own.kind == "qkv" else seen[name])
        seen[name] += 1
        other = found.get(key)
        found[key] = own if other is None else _added(own, other)
    return found


def _added(a: Operation, b: Operation) -> Operation:
    return Operation(
        a.kind,
        a.layer,
        a.flops + b.flops,
        a.weight_bytes + b.weight_bytes,
        a.kv_read_bytes + b.kv_read_bytes,
        a.kv_written_bytes + b.kv_written_bytes,
        a.times,
    )
