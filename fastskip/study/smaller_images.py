"""Smaller images: the cheapest baseline of all methods that leave image rows out.

The picture is shrunk before the vision tower, which then gives fewer rows; nothing in the language
model changes. VTC-Bench (arXiv 2510.07143) finds that this beats many published methods.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any


class SmallerImagesError(ValueError):
    """Images that cannot be made smaller; says what can."""


def shrunk_processor(processor: Any, factor: int) -> Any:
    """A processor that shrinks the sides of every image by ``factor``: a copy.

    Raises:
        SmallerImagesError: the factor is no whole number from 2, or leaves less than one patch a
            side or parts of patches.
    """
    if type(factor) is not int or factor < 2:
        raise SmallerImagesError(f"factor: {factor}; allowed: a whole number from 2")
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
    """Within this block a LLaVA-1.5 takes images smaller than it was trained on: the positions of
    its vision tower are interpolated, as transformers does it.

    Raises:
        SmallerImagesError: another kind of model.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind != "llava":
        raise SmallerImagesError(
            f"model: of type {kind!r}; allowed: 'llava', whose images are of one size"
        )
    hook = model.model.vision_tower.register_forward_pre_hook(_interpolate, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _interpolate(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, kwargs | {"interpolate_pos_encoding": True}
