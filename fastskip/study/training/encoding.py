"""Examples as model inputs, with labels on answer tokens only.

The checkpoint's own chat template renders the conversation (``prompts.rendering``), which is
tokenised as a whole; a token is learned if it holds a character of an answer or of its end token.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastskip.prompts.conversations import DataError, Example
from fastskip.prompts.images import ImageError, load_image
from fastskip.prompts.inputs import lead_of, placeholder_of
from fastskip.prompts.rendering import Renderer, Span

IGNORED = -100
"""The label of tokens that the loss ignores."""
Features = dict[str, Tensor]


class Encoder:
    """Encodes examples for one processor (for a text-only model, its tokenizer)."""

    def __init__(self, processor: Any, max_tokens: int | None = None) -> None:
        """``max_tokens``: longer examples raise ``DataError``."""
        self._processor, self._max_tokens = processor, max_tokens
        self._renderer = Renderer(processor)
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self._reads_images = hasattr(processor, "image_processor")
        self._image = str(processor.image_token) if self._reads_images else None
        if not self.tokenizer.is_fast:
            raise DataError(
                f"processor: {type(self.tokenizer).__name__} gives no character offsets; allowed: "
                "a fast tokenizer (one with a tokenizer.json)"
            )

    def __call__(self, example: Example) -> Features:
        """``input_ids`` and ``labels`` ``[T]`` int64, and the processor's outputs for the images;
        its per-token outputs are ``[T]`` too.

        Raises:
            DataError: an image cannot be read, the template cannot render the example, or it is
                too long.
        """
        if example.images and not self._reads_images:
            raise DataError(
                f"{example.where}: has images; allowed: none, as this model only reads text"
            )
        text, spans = self._renderer.render(example)
        bos = self.tokenizer.bos_token
        special = {"add_special_tokens": not (bos and text.startswith(bos))}
        lead = lead_of(self._processor)
        plain = self.tokenizer(lead + text, return_offsets_mapping=True, **special)
        ids = torch.tensor(plain["input_ids"])
        places = [(first - len(lead), last - len(lead)) for first, last in plain["offset_mapping"]]
        learned = torch.tensor([_is_within(at, spans) for at in places])
        shown = self._images_in(text)
        own = torch.tensor([not _is_within(at, shown) for at in places])
        if not self._reads_images:
            features = {"input_ids": ids}
        else:
            made = self._processed(example, text, special)
            shape = made["input_ids"].shape
            features = {
                name: value[0] if getattr(value, "shape", None) == shape else value
                for name, value in made.items()
                if name not in ("attention_mask", "token_type_ids")
            }
        features["labels"] = self._labels(example, features["input_ids"], ids, own, learned)
        length = len(features["input_ids"])
        if self._max_tokens is not None and length > self._max_tokens:
            allowed = f"at most {self._max_tokens} positions"
            raise DataError(f"{example.where}: {length} tokens; allowed: {allowed}")
        return features

    def _processed(self, example: Example, text: str, special: dict[str, bool]) -> Any:
        try:
            images = [
                load_image(image) if isinstance(image, Path) else image for image in example.images
            ]
        except ImageError as error:
            raise DataError(f"{example.where}: {error}") from error
        # Nested, as all images belong to this one text: that decides how anyres models crop them.
        given = {"images": [images]} if images else {}
        # In a list, too: on the oldest transformers Janus's takes a string for a list of letters.
        return self._processor(text=[text], **given, **special, return_tensors="pt")

    def _images_in(self, text: str) -> list[Span]:
        """Where images stand in a text."""
        if not self._reads_images:
            return []
        mark = re.escape(placeholder_of(self._processor))
        return [found.span() for found in re.finditer(mark, text)]

    def _labels(
        self, example: Example, ids: Tensor, plain: Tensor, own: Tensor, learned: Tensor
    ) -> Tensor:
        """Labels of ``ids [T]``, in which the processor has expanded each image of ``plain [t]``,
        whose other tokens are ``own [t]``, and may have added tokens of its own (crop markers, for
        example)."""
        token = -1 if self._image is None else self.tokenizer.convert_tokens_to_ids(self._image)
        words = ids != token
        targets = plain.masked_fill(~learned, IGNORED)
        labels = torch.full_like(ids, IGNORED)
        if torch.equal(ids[words], plain[own]):
            labels[words] = targets[own]
            return labels
        images = (~own).nonzero().flatten().tolist() or [0]
        before, after = images[0], len(plain) - images[-1] - 1
        ends = len(ids) - after
        fits = torch.equal(ids[:before], plain[:before]) and before < ends
        if not (fits and torch.equal(ids[ends:], plain[len(plain) - after :])):
            raise DataError(
                f"{example.where}: the processor and its tokenizer disagree on the tokens; "
                "allowed: a processor that adds tokens only around images"
            )
        if bool(learned[before : len(plain) - after].any()):
            raise DataError(
                f"{example.where}: has an answer between two images; allowed with this processor: "
                "all images in one question"
            )
        labels[:before], labels[ends:] = targets[:before], targets[len(plain) - after :]
        return labels


def _is_within(token: Span, spans: list[Span]) -> bool:
    """Whether a token holds a character of one of the spans; an empty token holds none."""
    first, last = token
    return first < last and any(first < end and start < last for start, end in spans)
