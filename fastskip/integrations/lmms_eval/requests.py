"""What lmms-eval asks, as a model needs it: options of `generate`, conversations, batches.

Nothing here imports lmms-eval: a request is anything with `args` as lmms-eval's `Instance` has.
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
"""Meant for LLaVA's own code; how a checkpoint's images are cut is its processor's business."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a request's answer is made.

    Attributes:
        generate: for `generate`, but for the number of new tokens.
        new_tokens: most tokens of an answer; `None`: the task does not say.
        until: texts that end an answer and are not part of it.
    """

    generate: Mapping[str, Any]
    new_tokens: int | None
    until: tuple[str, ...]

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """From a task's `generation_kwargs`: greedy, unless a temperature or `do_sample` asks.

        Raises:
            RequestError: an option is not known.
        """
        known = PASSED | SAMPLING | UNUSED | {"do_sample", *STOPS}
        unknown = sorted(given.keys() - known)
        if unknown:
            allowed = ", ".join(sorted(known))
            raise RequestError(f"generation_kwargs: {', '.join(unknown)}; allowed: {allowed}")
        warmth = given.get("temperature")
        samples = given.get("do_sample")
        samples = bool(warmth) if samples is None else samples and warmth != 0
        names = PASSED | SAMPLING if samples else PASSED
        generate = {n: given[n] for n in sorted(names) if given.get(n) is not None}
        new_tokens = generate.pop("max_new_tokens", None)
        until: list[str] = []
        for name in STOPS:
            stops = given.get(name) or ()
            until += [stops] if isinstance(stops, str) else stops
        # stated, since a checkpoint's own generation config may say otherwise
        generate = {"do_sample": bool(samples), "num_beams": 1} | generate
        return cls(generate, new_tokens, tuple(stop for stop in until if stop))

    @property
    def is_timed(self) -> bool:
        """Whether tokens can be watched one by one."""
        return bool(self.generate["num_beams"] == 1)

    def cut(self, answer: str) -> str:
        """An answer up to the first text that ends it."""
        ends = [place for stop in self.until if (place := answer.find(stop)) >= 0]
        return answer[: min(ends, default=len(answer))]


@dataclass(frozen=True, slots=True)
class Question:
    """One request, ready to be asked. `place`: where its answer belongs."""

    place: int
    task: str
    document: Any
    said: Conversation

    @property
    def images(self) -> tuple[Image, ...]:
        """Its images, in order."""
        return self.said.images


def named(questions: Sequence[Question]) -> str:
    """Which ones they are, for messages."""
    task = ", ".join(repr(name) for name in dict.fromkeys(each.task for each in questions))
    documents = ", ".join(str(each.document) for each in questions)
    return f"task {task}, doc{'s' * (len(questions) > 1)} {documents}"


class Pictured(Protocol):
    """What may come with images."""

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
        """The task that all are of."""
        return self.questions[0].task


def batches(requests: Sequence[Any], documents: Mapping[str, Any], size: int) -> Iterator[Batch]:
    """Requests of `generate_until` in batches of one task and one set of options.

    Within a task long ones come first, so that like pads like and too large a batch fails at once.
    Images are loaded when their batch is due: of no more than two batches at once.

    Args:
        requests: with `args` of context, `doc_to_messages`, options, document, task, split.
        documents: of each task, by split.
        size: prompts at once.
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
    """Full batches, those with images apart from those without; what is left comes last."""
    waiting: dict[bool, list[Asked]] = {True: [], False: []}
    for each in questions:
        own = waiting[bool(each.images)]
        own.append(each)
        if len(own) == size:
            yield tuple(own)
            own.clear()
    yield from (tuple(own) for own in waiting.values() if own)


def question(place: int, args: Sequence[Any], documents: Any) -> Question:
    """A request of `generate_until` with its messages.

    Raises:
        RequestError: its messages cannot be used.
    """
    _, messages_of, _, document, task, _ = args
    with_messages: Callable[[Any], Any] = messages_of
    try:
        said = conversation_of(with_messages(documents[document]))
    # tasks are programs of their authors: what goes wrong in one is told with its document
    except Exception as error:
        raise RequestError(f"task {task!r}, doc {document}: {error}") from error
    return Question(place, task, document, said)
