"""Smaller images: the cheapest baseline for methods that drop or skip image rows.

The image is shrunk before the vision tower, which then emits fewer rows; the language model is
unchanged. VTC-Bench (arXiv 2510.07143) finds that this beats many published methods.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any


class SmallerImagesError(ValueError):
    """Images cannot be made smaller; says what is allowed."""


def shrunk_processor(processor: Any, factor: int) -> Any:
    """A copy of a processor that shrinks both sides of every image by ``factor``.

    Raises:
        SmallerImagesError: the factor is not an integer of at least 2, or does not leave a whole
            number of patches per side.
    """
    if type(factor) is not int or factor < 2:
        raise SmallerImagesError(f"factor: {factor}; allowed: an integer of at least 2")
    found = deepcopy(processor)
    images, patch = found.image_processor, getattr(found, "patch_size", None)
    sides = {**dict(images.size), **dict(getattr(images, "crop_size", None) or {})}
    if not patch or any(side % (factor * patch) for side in sides.values()):
        raise SmallerImagesError(
            f"factor: {factor}; allowed: one that leaves whole patches of {patch} in {sides}"
        )
    for name in ("size", "crop_size"):
        old = getattr(images, name, None)
        if old:
            setattr(images, name, {side: length // factor for side, length in dict(old).items()})
    return found


@contextmanager
def taking_smaller_images(model: Any) -> Iterator[None]:
    """Within this block a LLaVA-1.5 takes images smaller than it was trained on: transformers
    interpolates the position embeddings of its vision tower.

    Raises:
        SmallerImagesError: the model is not a LLaVA-1.5.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind != "llava":
        raise SmallerImagesError(
            f"model: of type {kind!r}; allowed: 'llava', whose images have one fixed size"
        )
    hook = model.model.vision_tower.register_forward_pre_hook(_interpolate, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _interpolate(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, kwargs | {"interpolate_pos_encoding": True}
