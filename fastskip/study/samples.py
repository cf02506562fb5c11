"""Samples to study a model on: a file of prompts, usually with an image each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastskip.prompts import PromptError, build_inputs
from fastskip.prompts.images import ImageError, is_url, load_image
from fastskip.study.json_lines import Format


class SampleError(ValueError):
    """A sample or its file cannot be used; names it, what is wrong and what is allowed."""


_FORMAT = Format(
    what="samples",
    fields=frozenset({"prompt", "image"}),
    allowed='one JSON object per line, {"prompt": "...", "image": "a.jpg"}; image is optional',
    error=SampleError,
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt with an optional image; `where`: how error messages name it."""

    prompt: str
    image: Path | None = None
    where: str = "sample"


def read_samples(path: str | os.PathLike[str]) -> list[Sample]:
    """Read the samples of a JSON Lines file; image paths are relative to its folder.

    Raises:
        SampleError: the file or a line of it cannot be used.
    """
    return [_sample(document, Path(path).parent, where) for document, where in _FORMAT.read(path)]


def inputs_of(samples: Sequence[Sample], processor: Any, config: Any, new_tokens: int) -> list[Any]:
    """The model's inputs for each sample.

    Raises:
        SampleError: an image or a prompt cannot be used; names the sample.
    """
    found = []
    for sample in samples:
        try:
            images = [] if sample.image is None else [load_image(sample.image)]
            inputs = build_inputs(
                processor, sample.prompt, images, config=config, max_new_tokens=new_tokens
            )
        except (ImageError, PromptError) as error:
            raise SampleError(f"{sample.where}: {error}") from error
        found.append(inputs)
    return found


def _sample(document: dict[str, Any], folder: Path, where: str) -> Sample:
    prompt, image = document.get("prompt"), document.get("image")
    if not isinstance(prompt, str) or not prompt.strip():
        raise SampleError(f"{where}: prompt is {prompt!r}; allowed: a non-empty string")
    if image is not None and (not isinstance(image, str) or is_url(image)):
        raise SampleError(f"{where}: image is {image!r}; allowed: the path of an image file")
    return Sample(prompt, None if image is None else folder / image, where)
