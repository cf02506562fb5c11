"""Decoding on the device executor: Hugging Face's contract, the host a little behind the device.

With greedy decoding that only stops at lengths and stop tokens the device needs no answer from the
host, so the host launches ahead and reads tokens when they have arrived; streamers get them in
order. What was computed past the end is dropped. Other decoding takes the logits of each step.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from fastskip.decoder.paged_cache import PagedCache
from fastskip.generation.device_step import DeviceStep
from fastskip.generation.runtime import Runtime
from fastskip.ops.allocate import to_device
from fastskip.policy import Sublayer
from fastskip.routing import Decisions, RoutingRecord

# Steps launched before the host looks at the tokens of the first of them.
AHEAD = 2


@dataclass(frozen=True, slots=True)
class GreedyEnd:
    """When a greedy decoding ends: ``columns`` in all, or a stop token in every sequence."""

    columns: int
    stops: tuple[int, ...]

    @classmethod
    def of(cls, criteria: Any, known: tuple[Tensor | None, list[int]]) -> GreedyEnd | None:
        """The end that the criteria describe; ``None`` if they ask for more than that.

        ``known``: stop tokens of a criterion, for which the device is then not waited.
        """
        tokens, ids = known
        lengths = [one.max_length for one in criteria if type(one) is MaxLengthCriteria]
        given = [one.eos_token_id for one in criteria if type(one) is EosTokenCriteria]
        stops = [ids if each is tokens else each.tolist() for each in given]
        if len(lengths) + len(stops) != len(criteria) or not lengths or len(stops) > 1:
            return None
        return cls(min(lengths), tuple(stops[0]) if stops else ())


class StepLogits:
    """Tokens ``[B]`` in, logits ``[B, V]`` fp32 of the following ones out."""

    def __init__(self, model: Any, runtime: Runtime, cache: PagedCache) -> None:
        self._model, self._runtime, self._cache = model, runtime, cache
        self._step: DeviceStep | None = None
        self._room = runtime.decoder.room(cache)

    def __call__(self, tokens: Tensor) -> Tensor:
        cache, batch = self._cache, len(tokens)
        has_grown = cache.make_room_for_steps(0, 1)
        columns = max(cache.reserve, cache.columns + 1)
        step = self._step
        if step is None or columns > step.state.shape.slots:
            step = self._step = self._runtime.steps.take(
                self._model, self._runtime.fused_decoder, cache, columns=columns, chooses=False
            )
            step.state.load(cache, tokens, ())
        elif has_grown:
            step.state.load_pages(cache)
        step.state.choice.tokens[:batch] = tokens
        if self._room == 0:
            self._runtime.decoder.check_places(cache.next_places(), cache.columns + 1)
        self._room -= 1
        step.run()
        answers = Answers(self._runtime.decoder.record, step, cache)
        answers.note()
        answers.commit(1)
        assert step.logits is not None
        # A copy, since the next step writes to the same memory.
        return step.logits[:batch].to(torch.float32, copy=True)


class _Mail:
    """Tokens and flags of one step on their way to the host."""

    def __init__(self, tokens: Tensor, unfinished: Tensor) -> None:
        # Copies, since the next step writes to the same memory.
        self._parts = [
            part.to("cpu", non_blocking=True, copy=True) for part in (tokens, unfinished)
        ]
        self._event = None
        if tokens.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def open(self) -> tuple[Tensor, bool]:
        """Waits for the step: its tokens ``[B]``, and whether any sequence goes on."""
        if self._event is not None:
            self._event.synchronize()
        tokens, unfinished = self._parts
        return tokens, bool(unfinished.any())


class Answers:
    """What routers decided in steps, until the steps count: in a cache, and for a record.

    Flags are copied on the device step by step, since the next step writes to the same memory, and
    only where somebody needs them.
    """

    def __init__(self, record: RoutingRecord | None, step: DeviceStep, cache: PagedCache) -> None:
        self._record, self._state, self._cache = record, step.state, cache
        self._batch = cache.codes.shape[0]
        self._held: list[Tensor] = []
        self._answers: list[dict[tuple[int, Sublayer], tuple[Tensor, Tensor]]] = []

    def note(self) -> None:
        """A step was launched."""
        held = self._state.held(self._batch)
        if held is not None:
            self._held.append(held)
        if self._record is None:
            return
        if self._state.routes is not None:
            self._answers.append(self._state.routes.answers())
        elif self._state.plan.removals:  # whose steps send nobody away
            self._answers.append({})

    def commit(self, steps: int) -> None:
        """The first ``steps`` of them count."""
        cache, batch = self._cache, self._batch
        held = torch.stack(self._held[:steps], dim=-1).bool() if self._held and steps else None
        first = cache.columns
        cache.commit_steps(steps, held)
        codes = cache.codes[:, first:]
        for number, answers in enumerate(self._answers[:steps]):
            assert self._record is not None
            skipped, asked = (
                {key: pair[part][:batch, None].cpu() for key, pair in sorted(answers.items())}
                for part in range(2)
            )
            column = slice(number, number + 1)
            self._record.forwards.append(
                Decisions(first + number, codes[:, column], skipped, asked)
            )


def decode_greedily(
    model: Any,
    runtime: Runtime,
    cache: PagedCache,
    input_ids: Tensor,
    logits: Tensor,
    end: GreedyEnd,
    *,
    pad: int,
    streamer: Any,
) -> Tensor:
    """All tokens ``[B, T + n]`` from ``input_ids [B, T]`` and the prompt's last ``logits [B, V]``.

    The cache then holds every token but the last, as after Hugging Face's loop.

    Raises:
        ValueError: the model has no position for the next token.
    """
    batch, most = input_ids.shape[0], end.columns - input_ids.shape[1]
    first = torch.argmax(logits, dim=-1)
    stops = to_device(torch.tensor(end.stops, dtype=first.dtype), first.device)
    mail = _Mail(first, ~torch.isin(first, stops))
    find = partial(
        runtime.steps.find,
        model,
        runtime.fused_decoder,
        cache,
        columns=max(cache.reserve, cache.columns + most),
        stops=len(end.stops),
        pad=pad,
        chooses=True,
    )
    # While the prompt runs; but nobody waits for the first token until a step is captured.
    step = find() if most > 1 else None
    if step is not None:
        step.state.load(cache, first, end.stops)
    tokens, goes_on = mail.open()
    if streamer is not None:
        streamer.put(tokens)
    if not goes_on or most <= 1:
        return torch.cat((input_ids, first[:, None]), dim=1)
    if step is None:
        step = find(makes=True)
        assert step is not None
        step.state.load(cache, first, end.stops)
    choice = step.state.choice
    steps = min(most - 1, runtime.decoder.room(cache))
    answers = Answers(runtime.decoder.record, step, cache)
    mails: deque[_Mail] = deque()
    launched = arrived = 0
    try:
        while arrived < steps and goes_on:
            if launched < steps and len(mails) < AHEAD:
                if cache.make_room_for_steps(launched, 1):
                    step.state.load_pages(cache)
                step.run()
                answers.note()
                launched += 1
                mails.append(_Mail(choice.tokens[:batch], choice.unfinished[:batch]))
                continue
            tokens, goes_on = mails.popleft().open()
            arrived += 1
            if streamer is not None:
                streamer.put(tokens)
    finally:  # a streamer may raise, as in Hugging Face's loop
        answers.commit(arrived)
    if goes_on and arrived < most - 1:
        runtime.decoder.check_places(cache.next_places(), cache.columns + 1)
    chosen = choice.history[:arrived, :batch].T
    return torch.cat((input_ids, first[:, None], chosen), dim=1)
