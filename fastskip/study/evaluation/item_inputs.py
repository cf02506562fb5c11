"""Items as model inputs: prompts by the checkpoint's chat template, images by its processor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastskip.prompts import PromptError, encode_prompts
from fastskip.prompts.conversations import DataError
from fastskip.prompts.images import ImageError, load_image
from fastskip.prompts.rendering import Renderer
from fastskip.study.evaluation.items import Item, ItemError

MAX_CACHE_BYTES = 1 << 30
"""Bytes of inputs kept on the host: about 800 float32 images of 336 x 336 pixels."""


class ItemInputs:
    """Builds the inputs of batches of items, and caches them while there is room."""

    def __init__(self, processor: Any, config: Any, new_tokens: int, max_cache_bytes: int) -> None:
        """`new_tokens`: maximum answer length, which must fit after the prompt."""
        self.config, self.max_cache_bytes = config, max_cache_bytes
        self._processor, self._new_tokens = processor, new_tokens
        self._renderer = Renderer(processor)
        self._kept: dict[int, Any] = {}
        self._room = max_cache_bytes

    def of(self, number: int, items: Sequence[Item]) -> Any:
        """The inputs of batch `number`, whose items must be the same on every call.

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
        """The inputs of some items, either all with images or all without.

        Args:
            items: in the order of the batch.
            new_tokens: how many must fit after the prompts; `None`: the maximum answer length.
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
            where = items[0].where if len(items) == 1 else f"{items[0].where} to {items[-1].where}"
            raise ItemError(f"{where}: {error}") from error


def _images(item: Item) -> list[Any]:
    return [load_image(image) if isinstance(image, Path) else image for image in item.images]
