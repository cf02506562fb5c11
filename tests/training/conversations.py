"""Small conversations about small pictures, and the tiny models and processors that read them."""

from typing import Any

import numpy as np
from PIL import Image

import fastskip
from fastskip.study.training import Example, Turn
from tests.checkpoints import VOCAB, build_processor
from tests.models import Kind, tiny_llava

POLICY = {
    "schema_version": 1,
    "rules": [
        {"layers": [1], "tokens": ["image"], "skip": ["block"]},
        {"layers": [2], "tokens": ["generated"], "skip": ["ffn"]},
        {"layers": [3], "tokens": ["text"], "skip": ["attention"]},
    ],
}
WORDS = ("red", "green", "blue", "one", "two", "three")


def picture(number: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def examples(count: int = 8) -> list[Example]:
    """One turn or two, with an image, two, or none; no two alike."""
    found = []
    for number in range(count):
        images = (1, 2, 0)[number % 3]
        turns = [Turn("<image>" * images + f"what is {number}?", WORDS[number % 6])]
        if number % 2:
            turns.append(Turn("and then?", WORDS[(number + 1) % 6] + "!"))
        found.append(
            Example(tuple(turns), tuple(picture(10 * number + each) for each in range(images)))
        )
    return found


def processor(kind: Kind = "llava") -> Any:
    """Without a chat template: conversations are written as LLaVA-1.5 was trained."""
    return build_processor(kind, chat_template=None)


def prepared(policy: Any = POLICY, **options: Any) -> Any:
    return fastskip.apply_(tiny_llava(vocab=VOCAB, **options), policy)


def recompute(model: Any, *, wanted: bool) -> None:
    """Switches gradient checkpointing, whose name changes within transformers 5."""
    switch = "enable" if wanted else "disable"
    names = (f"{kind}_checkpointing_{switch}" for kind in ("activation", "gradient"))
    getattr(model, next(name for name in names if hasattr(model, name)))()
