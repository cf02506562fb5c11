"""Examples as a model's inputs, with labels on the answers alone.

The checkpoint's own chat template is rendered turn by turn, so that an answer begins exactly where
a prompt of ``generate`` ends. It ends with the template's own end token; where a template writes
none (that of LLaVA-1.5 on the hub), the tokenizer's end-of-sequence token is put there, as LLaVA
was trained. The conversation is tokenised as a whole, and a token is learned if it holds a
character of an answer or is its end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastskip.images import ImageError, load_image
from fastskip.study.training.examples import PLACEHOLDER, DataError, Example

IGNORED = -100
"""The label of a token that is not learned."""
Features = dict[str, Tensor]
Span = tuple[int, int]


class Encoder:
    """Encodes examples for one processor (of a text-only model: its tokenizer)."""

    def __init__(self, processor: Any, max_tokens: int | None = None) -> None:
        """``max_tokens``: longer examples are errors."""
        self._processor, self._max_tokens = processor, max_tokens
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self._reads_images = hasattr(processor, "image_processor")
        self._image = str(processor.image_token) if self._reads_images else None
        if not self.tokenizer.is_fast:
            raise DataError(
                f"processor: {type(self.tokenizer).__name__} does not say which characters a token "
                "holds; allowed: a fast tokenizer (one with a tokenizer.json)"
            )

    def __call__(self, example: Example) -> Features:
        """``input_ids`` and ``labels`` ``[T]`` int64, and what the processor makes of the images.

        Raises:
            DataError: an image cannot be read, the template cannot say it, or it is too long.
        """
        if example.images and not self._reads_images:
            raise DataError(f"{example.where}: has images; allowed: none, this model reads text")
        text, spans = self.render(example)
        begin = self.tokenizer.bos_token
        special = {"add_special_tokens": not (begin and text.startswith(begin))}
        plain = self.tokenizer(text, return_offsets_mapping=True, **special)
        ids = torch.tensor(plain["input_ids"])
        learned = torch.tensor([_is_within(at, spans) for at in plain["offset_mapping"]])
        if not self._reads_images:
            features = {"input_ids": ids}
        else:
            made = self._processed(example, text, special)
            features = {
                name: value
                for name, value in made.items()
                if name not in ("attention_mask", "token_type_ids")
            }
            features["input_ids"] = features["input_ids"][0]
        features["labels"] = self._labels(example, features["input_ids"], ids, learned)
        length = len(features["input_ids"])
        if self._max_tokens is not None and length > self._max_tokens:
            allowed = f"at most {self._max_tokens} positions"
            raise DataError(f"{example.where}: {length} tokens; allowed: {allowed}")
        return features

    def render(self, example: Example) -> tuple[str, list[Span]]:
        """The conversation as text, and where its answers lie in it, their end tokens included."""
        text, rendered, spans = "", "", []
        messages: list[dict[str, Any]] = []
        unplaced = (
            0
            if any(PLACEHOLDER in turn.question for turn in example.turns)
            else len(example.images)
        )
        for turn in example.turns:
            self._check_answer(turn.answer, example.where)
            messages.append({"role": "user", "content": self._content(turn.question, unplaced)})
            unplaced = 0
            prompt = self._converse(messages, example, is_prompt=True)
            answer = turn.answer.strip()
            content = [{"type": "text", "text": answer}] if self._reads_images else answer
            messages.append({"role": "assistant", "content": content})
            whole = self._converse(messages, example, is_prompt=False)
            if not prompt.startswith(rendered) or not whole.startswith(prompt):
                raise DataError(
                    f"{example.where}: chat template: writes earlier turns anew as a conversation "
                    "goes on; allowed: one that only appends"
                )
            text += prompt[len(rendered) :]
            rest, end = self._ended(whole[len(prompt) :])
            spans.append((len(text), len(text) + end))
            text, rendered = text + rest, whole
        return text[: spans[-1][1]], spans

    def _content(self, question: str, unplaced: int) -> Any:
        """A user's turn for the template; images at its begin or end stand first, as in prompts."""
        if not self._reads_images:
            return question.strip()
        question, count = question.strip(), unplaced
        while question.startswith(PLACEHOLDER):
            question, count = question.removeprefix(PLACEHOLDER).lstrip(), count + 1
        while question.endswith(PLACEHOLDER):
            question, count = question.removesuffix(PLACEHOLDER).rstrip(), count + 1
        assert self._image is not None
        question = question.replace(PLACEHOLDER, self._image)
        return [{"type": "image"}] * count + [{"type": "text", "text": question}]

    def _converse(
        self, messages: list[dict[str, Any]], example: Example, *, is_prompt: bool
    ) -> str:
        if not self._processor.chat_template:
            return self._without_template(messages, is_prompt=is_prompt)
        try:
            text = self._processor.apply_chat_template(
                messages, add_generation_prompt=is_prompt, tokenize=False
            )
        # a template is a program of the checkpoint's author: it can fail in any way
        except Exception as error:
            allowed = "one that takes user and assistant in turn"
            raise DataError(
                f"{example.where}: chat template: {error}; allowed: {allowed}"
            ) from error
        return str(text)

    def _without_template(self, messages: list[dict[str, Any]], *, is_prompt: bool) -> str:
        """As LLaVA-1.5 was trained; of a text-only model, the bare texts."""
        text = ""
        for message in messages:
            content = message["content"]
            if not self._reads_images:
                text += f" {content}" if text else content
            elif message["role"] == "assistant":
                text += f" {content[0]['text']}{self.tokenizer.eos_token}"
            else:
                images = f"{self._image}\n" * (len(content) - 1)
                text += f"USER: {images}{content[-1]['text']} ASSISTANT:"
        return text

    def _ended(self, piece: str) -> tuple[str, int]:
        """What a template wrote after a prompt, and where the answer in it ends."""
        ends = [
            piece.rfind(token) + len(token)
            for token in self.tokenizer.all_special_tokens
            if token in piece
        ]
        if ends:
            return piece, max(ends)
        if not self.tokenizer.eos_token:
            raise DataError("processor: no end-of-sequence token; allowed: a tokenizer with one")
        piece = piece.rstrip() + self.tokenizer.eos_token
        return piece, len(piece)

    def _check_answer(self, answer: str, where: str) -> None:
        for token in self.tokenizer.all_special_tokens:
            if token in answer:
                raise DataError(f"{where}: an answer holds {token!r}; allowed: plain text")

    def _processed(self, example: Example, text: str, special: dict[str, bool]) -> Any:
        try:
            images = [
                load_image(image) if isinstance(image, Path) else image for image in example.images
            ]
        except ImageError as error:
            raise DataError(f"{example.where}: {error}") from error
        # Nested: all images belong to this one text, which decides how anyres models crop them.
        given = {"images": [images]} if images else {}
        return self._processor(text=text, **given, **special, return_tensors="pt")

    def _labels(self, example: Example, ids: Tensor, plain: Tensor, learned: Tensor) -> Tensor:
        """Labels of ``ids [T]``, where each placeholder of ``plain [t]`` has become several."""
        token = -1 if self._image is None else self.tokenizer.convert_tokens_to_ids(self._image)
        words, own = ids != token, plain != token
        if not torch.equal(ids[words], plain[own]):
            raise DataError(
                f"{example.where}: the processor's tokens are not those of its tokenizer; allowed: "
                "a processor that only repeats placeholders"
            )
        labels = torch.full_like(ids, IGNORED)
        labels[words] = plain.masked_fill(~learned, IGNORED)[own]
        return labels


def _is_within(token: Span, spans: list[Span]) -> bool:
    """Whether a token holds a character of one of the spans; tokens of no characters do not."""
    first, last = token
    return first < last and any(first < end and start < last for start, end in spans)
