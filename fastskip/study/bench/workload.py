"""The workload that contenders are timed on: a batch of prompts and a number of new tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image, Resampling
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastskip.demo.scenes import Split, draw, scenes
from fastskip.families import placeholders
from fastskip.prompts import build_inputs
from fastskip.study.bench.errors import BenchError
from fastskip.study.evaluation.comparison import prompt_sizes

QUESTION = "describe the image."
WORDS = "what is the colour of the shape in the image and how many are there"
"""Filler that lengthens prompts."""
PHOTO = (640, 480)
"""Pixels of the drawn image: as large as a photo, so that models that tile make as many tiles."""


@dataclass(frozen=True, slots=True)
class Workload:
    """A batch of prompts with equal images.

    Row counts are those of the longest prompt; ``text_before``: its text rows before its image.
    ``texts``: the text rows of each prompt, if they differ. Equal lengths favour Hugging Face,
    which computes padding too.
    """

    batch: int
    n_image: int
    n_text: int
    text_before: int
    new_tokens: int
    texts: tuple[int, ...] = ()

    @property
    def each_text(self) -> tuple[int, ...]:
        """The text rows of each prompt."""
        return self.texts or (self.n_text,) * self.batch

    @property
    def text(self) -> str:
        """The distinct numbers of text rows, as text."""
        return "/".join(map(str, dict.fromkeys(self.each_text)))


def workload_of(inputs: Mapping[str, Any], config: Any, new_tokens: int) -> Workload:
    """The workload of a batch of inputs whose prompts have equal images."""
    mask = inputs.get("attention_mask")
    rows = len(inputs["input_ids"])
    counts = [inputs["input_ids"].shape[1]] * rows if mask is None else mask.sum(1).tolist()
    longest = counts.index(max(counts))
    one = {"input_ids": inputs["input_ids"][longest : longest + 1]}
    n_image, n_text, before = prompt_sizes(one, config)
    texts = tuple(count - n_image for count in counts)
    return Workload(rows, n_image, n_text, before, new_tokens, texts if len(set(texts)) > 1 else ())


def drawn_image(size: tuple[int, int] | None = PHOTO) -> Image:
    """Coloured shapes; with `size=None`, at the size that the demo model was trained on."""
    image = draw(scenes(Split.TEST, 1, 0)[0])
    return image if size is None else image.resize(size, Resampling.BICUBIC)


def synthetic_inputs(
    processor: Any, config: Any, images: Sequence[Image], *, text_tokens: int, new_tokens: int
) -> dict[str, Any]:
    """A prompt about the images with exactly `text_tokens` text tokens, the template's included.

    Raises:
        BenchError: the template alone needs more, or the model has too few positions.
        PromptError: the processor cannot build such a prompt.
    """
    inputs = dict(build_inputs(processor, QUESTION, images, config=config))
    n_image, n_text, before = prompt_sizes(inputs, config)
    if text_tokens < n_text:
        raise BenchError(f"text_tokens: {text_tokens}; allowed: {n_text} or more with this model")
    positions = config.get_text_config().max_position_embeddings
    if n_image + text_tokens + new_tokens > positions:
        raise BenchError(
            f"positions: {n_image} image, {text_tokens} text and {new_tokens} new tokens; allowed: "
            f"{positions} in all with this model"
        )
    if text_tokens == n_text:
        return inputs
    tokenizer = getattr(processor, "tokenizer", processor)
    words = tokenizer(WORDS, add_special_tokens=False)["input_ids"]
    missing = text_tokens - n_text
    more = torch.tensor([(words * (missing // len(words) + 1))[:missing]])
    ids = inputs["input_ids"]
    # After the last image, or after the first token (BOS); a word of the question follows.
    place = _after_images(ids[0], config) if n_image else min(1, n_text - 1)

    def longer(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape != ids.shape:
            return value  # pixels and sizes
        new = more if name == "input_ids" else value[:, place : place + 1].expand(1, missing)
        return torch.cat([value[:, :place], new.to(value.dtype), value[:, place:]], 1)

    return {name: longer(name, value) for name, value in inputs.items()}


def padded(every: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Single-sequence prompts as one batch, padded on the left.

    Pads reuse the last token of a prompt, which is never an image placeholder; the mask marks them.
    """

    def together(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        own = [each[name] for each in every]
        if value.shape != every[0]["input_ids"].shape:
            return torch.cat(own)  # pixels and sizes
        pad = int(value[0, -1]) if name == "input_ids" else 0
        rows = [each[0] for each in own]
        return pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left")

    return {name: together(name, value) for name, value in every[0].items()}


def repeated(inputs: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """The prompt and its images `batch` times."""
    return {
        name: torch.cat([value] * batch) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }


def _after_images(ids: Tensor, config: Any) -> int:
    is_image = placeholders(config, ids)
    return int(is_image.nonzero()[-1]) + 1
