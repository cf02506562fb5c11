"""Converts lmms-eval's messages into a conversation that `prompts.rendering` can render."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL.Image import Image

from fastskip.prompts.conversations import PLACEHOLDER, Turn
from fastskip.prompts.images import load_image


class RequestError(ValueError):
    """A request that cannot be answered; names the task, the document and what is allowed."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Earlier turns and a question, with one ``<image>`` in place of each image.

    `system`: the system message; may be empty.
    """

    question: str
    images: tuple[Image, ...] = ()
    history: tuple[Turn, ...] = ()
    system: str = ""


def conversation_of(messages: Iterable[Mapping[str, Any]]) -> Conversation:
    """A conversation from dicts with `role` and `content`: a text, or a list of texts and of dicts
    with `type` and `text` or `url`.

    A system message may come first, then user and assistant alternate, ending with the user; only
    the user may send images.

    Raises:
        RequestError: the messages are in another order, or a content type is unknown.
        ImageError: an image file cannot be used.
    """
    said = [(message.get("role"), *_read(message)) for message in messages]
    system = ""
    if said and said[0][0] == "system":
        _, system, _ = said.pop(0)
    roles = [role for role, _, _ in said]
    if not roles or roles != [("user", "assistant")[n % 2] for n in range(len(roles) // 2 * 2 + 1)]:
        raise RequestError(
            f"roles: {', '.join(map(str, roles)) or 'none'}; allowed: user and assistant "
            "alternating, a user last, and optionally one system message first"
        )
    texts = [text for _, text, _ in said]
    turns = zip(texts[:-1:2], texts[1::2], strict=True)
    images = tuple(image for _, _, own in said for image in own)
    return Conversation(texts[-1], images, tuple(Turn(*turn) for turn in turns), system)


def _read(message: Mapping[str, Any]) -> tuple[str, list[Image]]:
    """A message's text, with a placeholder for each of its images, and the images."""
    role, content = message.get("role"), message.get("content")
    parts = [_part(each) for each in ([content] if isinstance(content, str) else content or ())]
    images = [part for part in parts if not isinstance(part, str)]
    text = _joined([part for part in parts if isinstance(part, str)])
    if not images:
        return text, images
    if role != "user":
        raise RequestError(f"{role}: {len(images)} images; allowed: images from the user only")
    placed = text.count(PLACEHOLDER)
    if placed not in (0, len(images)):
        raise RequestError(
            f"{role}: {placed} {PLACEHOLDER} in the text for {len(images)} images; allowed: one "
            "per image, or none (images then keep their places in the message)"
        )
    if not placed:
        text = _joined([part if isinstance(part, str) else PLACEHOLDER for part in parts])
    return text, images


def _part(part: Any) -> str | Image:
    if isinstance(part, str):
        return part
    kind = part.get("type")
    if kind == "text":
        return str(part["text"])
    if kind == "image":
        return picture(part["url"])
    raise RequestError(f"content: {kind!r}; allowed: text, image")


def _joined(parts: Sequence[str]) -> str:
    """Joins the parts of a message, inserting spaces so that no two words merge."""
    text = ""
    for part in parts:
        is_apart = not text or not part or text[-1].isspace() or part[0].isspace()
        text += part if is_apart else f" {part}"
    return text


def picture(source: Any) -> Image:
    """An in-memory image or an image file, as RGB.

    Raises:
        ImageError: the file cannot be used.
    """
    if isinstance(source, Image):
        return source if source.mode == "RGB" else source.convert("RGB")
    return load_image(source)
