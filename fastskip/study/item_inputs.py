"""Items as a model's inputs: prompts by the checkpoint's template, images by its processor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastskip.conversations import DataError
from fastskip.images import ImageError, load_image
from fastskip.prompts import PromptError, encode_prompts
from fastskip.rendering import Renderer
from fastskip.study.items import Item, ItemError

MOST_KEPT = 1 << 30
"""Bytes of inputs that are kept on the host: some 800 images of 336 x 336 pixels in float32."""


class ItemInputs:
    """Makes inputs of batches of items, and keeps them while there is room."""

    def __init__(self, processor: Any, config: Any, new_tokens: int, most_kept: int) -> None:
        """`new_tokens`: most tokens of an answer; they must fit behind the prompt."""
        self.config, self.most_kept = config, most_kept
        self._processor, self._new_tokens = processor, new_tokens
        self._renderer = Renderer(processor)
        self._kept: dict[int, Any] = {}
        self._room = most_kept

    def of(self, number: int, items: Sequence[Item]) -> Any:
        """The inputs of the batch of this number, which are the same each time.

        Raises:
            ItemError: an item's images or prompt cannot be used.
        """
        if number in self._kept:
            return self._kept[number]
        inputs = self.build(items)
        size = sum(value.nbytes for value in inputs.values() if isinstance(value, Tensor))
        if size <= self._room:
            self._kept[number] = inputs
            self._room -= size
        return inputs

    def build(self, items: Sequence[Item], new_tokens: int | None = None) -> Any:
        """The inputs of some items: all with images, or none.

        Args:
            items: in the order that is wanted.
            new_tokens: how many must fit behind the prompts; `None`: those of an answer.
        Raises:
            ItemError: an item's images or prompt cannot be used.
        """
        try:
            prompts = [
                self._renderer.prompt(item.history, item.question, len(item.images), item.where)
                for item in items
            ]
        except DataError as error:
            raise ItemError(str(error)) from error
        try:
            return encode_prompts(
                self._processor,
                prompts,
                [_images(item) for item in items],
                config=self.config,
                max_new_tokens=self._new_tokens if new_tokens is None else new_tokens,
            )
        except (ImageError, PromptError) as error:
            told = items[0].where if len(items) == 1 else f"{items[0].where} to {items[-1].where}"
            raise ItemError(f"{told}: {error}") from error


def _images(item: Item) -> list[Any]:
    return [load_image(image) if isinstance(image, Path) else image for image in item.images]
