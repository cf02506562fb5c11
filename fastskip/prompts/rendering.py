"""Conversations as text, written with the checkpoint's own chat template.

The template is rendered turn by turn, so that an answer begins exactly where a prompt of
``generate`` ends. An answer ends with the template's own end token; if the template writes none (as
LLaVA-1.5's on the hub), the tokenizer's end-of-sequence token is added, as LLaVA was trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastskip.prompts.conversations import PLACEHOLDER, DataError, Example, Turn
from fastskip.prompts.inputs import (
    PromptError,
    check_text,
    check_writable,
    image_in_text,
    placeholder_of,
)

Span = tuple[int, int]


@dataclass(slots=True)
class _Written:
    """A conversation so far: the template's input, its raw output, and the final text."""

    unplaced: int
    """Images that no turn places; they come before the first turn."""
    where: str
    messages: list[dict[str, Any]] = field(default_factory=list)
    rendered: str = ""
    text: str = ""


class Renderer:
    """Writes conversations for one processor (for a text-only model: its tokenizer)."""

    def __init__(self, processor: Any) -> None:
        check_writable(processor)
        self._processor = processor
        self._tokenizer = getattr(processor, "tokenizer", processor)
        self._reads_images = hasattr(processor, "image_processor")
        self._image = placeholder_of(processor) if self._reads_images else None

    def render(self, example: Example) -> tuple[str, list[Span]]:
        """The conversation as text, and the spans of its answers including their end tokens.

        Raises:
            DataError: the template cannot render it.
        """
        written, spans = self._begin(example.turns, len(example.images), example.where), []
        for turn in example.turns:
            self._ask(written, turn.question)
            spans.append(self._answer(written, turn.answer))
        return written.text[: spans[-1][1]], spans

    def prompt(
        self, history: Sequence[Turn], question: str, images: int, where: str, system: str = ""
    ) -> str:
        """Earlier turns with their answers and a question, up to where its answer begins.

        Args:
            history: earlier turns; may be empty.
            question: the current question.
            images: the number of images in all turns together.
            where: how errors name the conversation.
            system: the system message; "" for none.
        Raises:
            DataError: the template cannot render it, or the model is text-only and there are
                images.
        """
        if images and not self._reads_images:
            raise DataError(f"{where}: has images; allowed: none, this is a text-only model")
        written = self._begin((*history, Turn(question, "")), images, where)
        if system.strip():
            self._check_words(system, where)
            content = self._words(system.strip())
            written.messages.append({"role": "system", "content": content})
        for turn in history:
            self._ask(written, turn.question)
            self._answer(written, turn.answer)
        self._ask(written, question)
        self._check_placeholders(written.text, images, where)
        return written.text

    def _check_placeholders(self, text: str, images: int, where: str) -> None:
        if self._image is not None and text.count(self._image) != images:
            found = f"writes {text.count(self._image)} {self._image} for {images} images"
            raise DataError(f"{where}: chat template: {found}; allowed: one per image")
        video = getattr(self._processor, "video_token", None) if self._reads_images else None
        if video and video in text:
            raise DataError(f"{where}: contains {video}; allowed: text and images only")

    def _begin(self, turns: Sequence[Turn], images: int, where: str) -> _Written:
        is_placed = any(PLACEHOLDER in turn.question for turn in turns)
        return _Written(0 if is_placed else images, where)

    def _ask(self, written: _Written, question: str) -> None:
        self._check_words(question, written.where)
        content = self._content(question, written.unplaced)
        written.messages.append({"role": "user", "content": content})
        written.unplaced = 0
        self._append(written, self._apply_template(written, is_prompt=True))

    def _answer(self, written: _Written, answer: str) -> Span:
        self._check_answer(answer, written.where)
        answer = answer.strip()
        written.messages.append({"role": "assistant", "content": self._words(answer)})
        begin, prompt = len(written.text), len(written.rendered)
        whole = self._apply_template(written, is_prompt=False)
        piece, end = self._ended(whole[prompt:], written.where)
        self._append(written, whole)
        written.text = written.text[:begin] + piece
        return begin, begin + end

    def _check_words(self, text: str, where: str) -> None:
        try:
            check_text(text.replace(PLACEHOLDER, "") if self._reads_images else text)
        except PromptError as error:
            raise DataError(f"{where}: {error}") from error

    def _words(self, text: str) -> Any:
        """The content of a turn without images, as the template takes it."""
        return [{"type": "text", "text": text}] if self._reads_images else text

    def _append(self, written: _Written, whole: str) -> None:
        if not whole.startswith(written.rendered):
            raise DataError(
                f"{written.where}: chat template: rewrites earlier turns as the conversation "
                "continues; allowed: one that only appends"
            )
        written.text += whole[len(written.rendered) :]
        written.rendered = whole

    def _content(self, question: str, unplaced: int) -> Any:
        """The content of a user turn, as the template takes it; images at either end of the
        question go first, as in prompts."""
        if not self._reads_images:
            return question.strip()
        question, count = question.strip(), unplaced
        while question.startswith(PLACEHOLDER):
            question, count = question.removeprefix(PLACEHOLDER).lstrip(), count + 1
        while question.endswith(PLACEHOLDER):
            question, count = question.removesuffix(PLACEHOLDER).rstrip(), count + 1
        question = question.replace(PLACEHOLDER, image_in_text(self._processor))
        return [{"type": "image"}] * count + [{"type": "text", "text": question}]

    def _apply_template(self, written: _Written, *, is_prompt: bool) -> str:
        if not self._processor.chat_template:
            return self._without_template(written.messages)
        try:
            text = self._processor.apply_chat_template(
                written.messages, add_generation_prompt=is_prompt, tokenize=False
            )
        # a template is code by the checkpoint's author: it can fail in any way
        except Exception as error:
            has_system = written.messages[0]["role"] == "system"
            turns = f"{'system, then ' * has_system}alternating user and assistant turns"
            allowed = f"one that accepts {turns}"
            raise DataError(
                f"{written.where}: chat template: {error}; allowed: {allowed}"
            ) from error
        return str(text)

    def _without_template(self, messages: list[dict[str, Any]]) -> str:
        """The format that LLaVA-1.5 was trained on; for a text-only model, the bare texts."""
        text = ""
        for message in messages:
            content = message["content"]
            if not self._reads_images:
                text += f" {content}" if text else content
            elif message["role"] == "system":
                text += f"{content[0]['text']} "
            elif message["role"] == "assistant":
                text += f" {content[0]['text']}{self._tokenizer.eos_token}"
            else:
                images = f"{image_in_text(self._processor)}\n" * (len(content) - 1)
                text += f"USER: {images}{content[-1]['text']} ASSISTANT:"
        return text

    def _ended(self, piece: str, where: str) -> tuple[str, int]:
        """The text that a template wrote after a prompt, and where the answer in it ends."""
        ends = [
            piece.rfind(token) + len(token)
            for token in self._tokenizer.all_special_tokens
            if token in piece
        ]
        if ends:
            return piece, max(ends)
        if not self._tokenizer.eos_token:
            raise DataError(
                f"{where}: tokenizer: no end-of-sequence token; allowed: a tokenizer with one"
            )
        piece = piece.rstrip() + self._tokenizer.eos_token
        return piece, len(piece)

    def _check_answer(self, answer: str, where: str) -> None:
        if not answer.strip():
            raise DataError(f"{where}: answer {answer!r}; allowed: non-empty text")
        for token in self._tokenizer.all_special_tokens:
            if token in answer:
                raise DataError(f"{where}: an answer contains {token!r}; allowed: plain text")
