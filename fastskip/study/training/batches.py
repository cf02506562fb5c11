"""Batches of encoded examples: padded sequences, and the images of all examples concatenated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastskip.study.training.encoding import IGNORED, Features
from fastskip.study.training.settings import Padding

_BY_EXAMPLE = "pixel_attention_mask"
"""Present in families that group images by example: ``[B, images, height, width]``."""
_SIZES = "image_sizes"
"""Present in families that separate an image from its padding by its size: ``[images, 2]``."""


class Collator:
    """Collates several examples into one batch.

    ``input_ids``, ``labels``, ``attention_mask`` are ``[B, T]``; image tensors are concatenated in
    the order of their placeholders. Where images differ in their number of crops (LLaVA-NeXT,
    LLaVA-OneVision) or in size (Mistral 3, LightOnOCR, Idefics 2), or examples in their number of
    images (Idefics, SmolVLM), they are padded with zeros, which the model ignores.
    """

    def __init__(self, pad_id: int, side: Padding) -> None:
        self._pad_id, self._side = pad_id, side

    def __call__(self, examples: Sequence[Features]) -> Features:
        width = max(len(example["input_ids"]) for example in examples)
        batch = {
            "input_ids": self._padded([e["input_ids"] for e in examples], width, self._pad_id),
            "labels": self._padded([e["labels"] for e in examples], width, IGNORED),
            "attention_mask": self._padded(
                [torch.ones_like(e["input_ids"]) for e in examples], width, 0
            ),
        }
        names = {name: None for example in examples for name in example if name not in batch}
        for name in names:
            found = [example.get(name) for example in examples]
            if _BY_EXAMPLE in names:  # every example needs its row, even if only of blank images
                like = next(each for each in found if each is not None)
                blank = torch.zeros_like(like[:, :1])
                found = [blank if each is None else each for each in found]
            given = [each for each in found if each is not None]
            pairs = zip(examples, found, strict=True)
            if all(own is None or own.shape == e["input_ids"].shape for e, own in pairs):
                # a per-token feature, such as which tokens belong to an image
                batch[name] = self._padded(given, width, 0)
                continue
            is_ragged = bool(names.keys() & {_BY_EXAMPLE, _SIZES}) or given[0].ndim > 4
            batch[name] = _concatenated(given, is_ragged=is_ragged)
        return batch

    def _padded(self, rows: list[Tensor], width: int, fill: int) -> Tensor:
        is_left = self._side is Padding.LEFT
        missing = [width - len(row) for row in rows]
        sides = [(count, 0) if is_left else (0, count) for count in missing]
        return torch.stack(
            [pad(row, ends, value=fill) for row, ends in zip(rows, sides, strict=True)]
        )


def _concatenated(tensors: list[Tensor], *, is_ragged: bool) -> Tensor:
    """Concatenates tensors ``[n, ...]``; if ragged, pads their crops, images or pixel rows and
    columns with zeros to the largest size first."""
    if not is_ragged:
        return torch.cat(tensors)
    most = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    padded = [tensor.new_zeros(len(tensor), *most) for tensor in tensors]
    for whole, own in zip(padded, tensors, strict=True):
        whole[(slice(None), *map(slice, own.shape[1:]))] = own
    return torch.cat(padded)
