"""Samples to study a model on: a file of prompts, usually with images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastskip.prompts import PromptError, build_inputs
from fastskip.prompts.conversations import DataError, image_names
from fastskip.prompts.images import ImageError, load_image
from fastskip.study.json_lines import Format


class SampleError(ValueError):
    """A sample or its file cannot be used; names it, what is wrong and what is allowed."""


_FORMAT = Format(
    what="samples",
    # What is not needed is passed over, so that the questions of an evaluation serve as samples.
    fields=frozenset({"prompt", "question", "image", "answer", "kind", "metric"}),
    allowed='one JSON object per line, {"prompt": "...", "image": "a.jpg" or ["a.jpg", ...]}; '
    'image is optional, and eval\'s {"question": ..., "answer": ...} serve as well',
    error=SampleError,
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt with any number of images; `where`: how error messages name it."""

    prompt: str
    images: tuple[Path, ...] = ()
    where: str = "sample"


def read_samples(
    path: str | os.PathLike[str], images: str | os.PathLike[str] | None = None
) -> list[Sample]:
    """Read the samples of a JSON Lines file.

    Args:
        path: the file.
        images: the folder that image paths are relative to; by default the file's own.
    Raises:
        SampleError: the file or a line of it cannot be used.
    """
    folder = Path(path).parent if images is None else Path(images)
    if not folder.is_dir():
        raise SampleError(f"images: {folder} is not a folder; allowed: an existing folder")
    return [_sample(document, folder, where) for document, where in _FORMAT.read(path)]


def inputs_of(samples: Sequence[Sample], processor: Any, config: Any, new_tokens: int) -> list[Any]:
    """The model's inputs for each sample.

    Raises:
        SampleError: an image or a prompt cannot be used; names the sample.
    """
    found = []
    for sample in samples:
        try:
            images = [load_image(image) for image in sample.images]
            inputs = build_inputs(
                processor, sample.prompt, images, config=config, max_new_tokens=new_tokens
            )
        except (ImageError, PromptError) as error:
            raise SampleError(f"{sample.where}: {error}") from error
        found.append(inputs)
    return found


def _sample(document: dict[str, Any], folder: Path, where: str) -> Sample:
    named = "question" if "question" in document else "prompt"
    prompt = document.get(named)
    if not isinstance(prompt, str) or not prompt.strip():
        raise SampleError(f"{where}: {named} is {prompt!r}; allowed: a non-empty string")
    if {"prompt", "question"} <= document.keys():
        raise SampleError(f"{where}: has prompt and question; allowed: one of them")
    try:
        images = tuple(folder / name for name in image_names(document, where) if name)
    except DataError as error:
        raise SampleError(str(error)) from error
    return Sample(prompt, images, where)
