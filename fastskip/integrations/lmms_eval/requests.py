"""Converts lmms-eval's requests into `generate` options, conversations and batches.

Nothing here imports lmms-eval: a request is any object with the `args` of lmms-eval's `Instance`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from PIL.Image import Image

from fastskip.integrations.lmms_eval.messages import Conversation, RequestError, conversation_of

PASSED = frozenset(
    {
        "early_stopping",
        "length_penalty",
        "max_new_tokens",
        "min_new_tokens",
        "no_repeat_ngram_size",
        "num_beams",
        "repetition_penalty",
    }
)
SAMPLING = frozenset({"temperature", "top_k", "top_p"})
STOPS = ("until", "stop_sequences")
UNUSED = frozenset({"image_aspect_ratio"})
"""Options for LLaVA's own code; here the checkpoint's processor decides how to crop images."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a request's answer is generated.

    Attributes:
        generate: arguments of `generate`, except the number of new tokens.
        new_tokens: the maximum length of an answer; `None` if the task does not set it.
        until: stop strings, which are not part of the answer.
    """

    generate: Mapping[str, Any]
    new_tokens: int | None
    until: tuple[str, ...]

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """From a task's `generation_kwargs`: greedy unless a temperature or `do_sample` says
        otherwise.

        Raises:
            RequestError: an option is unknown.
        """
        known = PASSED | SAMPLING | UNUSED | {"do_sample", *STOPS}
        unknown = sorted(given.keys() - known)
        if unknown:
            allowed = ", ".join(sorted(known))
            raise RequestError(f"generation_kwargs: {', '.join(unknown)}; allowed: {allowed}")
        temperature = given.get("temperature")
        samples = given.get("do_sample")
        samples = bool(temperature) if samples is None else samples and temperature != 0
        names = PASSED | SAMPLING if samples else PASSED
        generate = {n: given[n] for n in sorted(names) if given.get(n) is not None}
        new_tokens = generate.pop("max_new_tokens", None)
        until: list[str] = []
        for name in STOPS:
            stops = given.get(name) or ()
            until += [stops] if isinstance(stops, str) else stops
        # explicit, since a checkpoint's own generation config may differ
        generate = {"do_sample": bool(samples), "num_beams": 1} | generate
        return cls(generate, new_tokens, tuple(stop for stop in until if stop))

    @property
    def is_timed(self) -> bool:
        """Whether tokens can be timed one by one, which beam search does not allow."""
        return bool(self.generate["num_beams"] == 1)

    def cut(self, answer: str) -> str:
        """An answer up to the first stop string."""
        ends = [place for stop in self.until if (place := answer.find(stop)) >= 0]
        return answer[: min(ends, default=len(answer))]


@dataclass(frozen=True, slots=True)
class Question:
    """One request, ready to run. `place`: the index of its answer."""

    place: int
    task: str
    document: Any
    said: Conversation

    @property
    def images(self) -> tuple[Image, ...]:
        """Its images, in order."""
        return self.said.images


def named(questions: Sequence[Question]) -> str:
    """The tasks and documents of the questions, for messages."""
    task = ", ".join(repr(name) for name in dict.fromkeys(each.task for each in questions))
    documents = ", ".join(str(each.document) for each in questions)
    return f"task {task}, doc{'s' * (len(questions) > 1)} {documents}"


class Pictured(Protocol):
    """Something that may come with images."""

    @property
    def images(self) -> tuple[Image, ...]: ...


Asked = TypeVar("Asked", bound=Pictured)


@dataclass(frozen=True, slots=True)
class Batch:
    """Questions of one task that are answered in one call."""

    questions: tuple[Question, ...]
    options: Options

    @property
    def task(self) -> str:
        """The task of all its questions."""
        return self.questions[0].task


def batches(requests: Sequence[Any], documents: Mapping[str, Any], size: int) -> Iterator[Batch]:
    """Requests of `generate_until` in batches of one task, split and set of options.

    Within a group the longest contexts come first, which limits padding and makes a batch that is
    too large fail at once. Images are loaded when their batch is due: those of at most two batches
    are in memory.

    Args:
        requests: with `args` context, `doc_to_messages`, options, document index, task, split.
        documents: the documents of each task, by split.
        size: prompts per batch.
    Raises:
        RequestError: a request cannot be used.
    """
    groups: dict[tuple[str, str, str], list[int]] = {}
    for place, request in enumerate(requests):
        _, _, given, _, task, split = request.args
        key = (task, split, json.dumps(given, sort_keys=True, default=str))
        groups.setdefault(key, []).append(place)
    for (task, split, _), places in groups.items():
        try:
            options = Options.of(requests[places[0]].args[2] or {})
        except RequestError as error:
            raise RequestError(f"task {task!r}: {error}") from error
        places.sort(key=lambda place: -len(str(requests[place].args[0])))
        questions = (
            question(place, requests[place].args, documents[task][split]) for place in places
        )
        for full in filled(questions, size):
            yield Batch(full, options)


def filled(questions: Iterable[Asked], size: int) -> Iterator[tuple[Asked, ...]]:
    """Full batches, with and without images kept separate; incomplete batches come last."""
    waiting: dict[bool, list[Asked]] = {True: [], False: []}
    for each in questions:
        own = waiting[bool(each.images)]
        own.append(each)
        if len(own) == size:
            yield tuple(own)
            own.clear()
    yield from (tuple(own) for own in waiting.values() if own)


def question(place: int, args: Sequence[Any], documents: Any) -> Question:
    """A request of `generate_until` with its conversation.

    Raises:
        RequestError: its messages cannot be used.
    """
    _, messages_of, _, document, task, _ = args
    with_messages: Callable[[Any], Any] = messages_of
    try:
        said = conversation_of(with_messages(documents[document]))
    # a task is its author's code and can fail in any way; name the document
    except Exception as error:
        raise RequestError(f"task {task!r}, doc {document}: {error}") from error
    return Question(place, task, document, said)
