"""Decoding on the device executor: Hugging Face's contract, without waiting for the host.

Greedy decoding that stops only at a length or at stop tokens needs no answer from the host, so the
host launches steps ahead and reads tokens as they arrive; streamers get them in order. Whatever was
computed past the end is dropped. Other decoding reads the logits of each step.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from fastskip.decoder.fused.paged_cache import PagedCache
from fastskip.generation.device_step import DeviceStep, StepRequest
from fastskip.generation.runtime import Runtime
from fastskip.ops.allocate import to_device
from fastskip.policy import Sublayer
from fastskip.routing import Decisions, RoutingRecord

# Steps launched before the host reads the tokens of the first of them.
AHEAD = 2


@dataclass(frozen=True, slots=True)
class GreedyEnd:
    """When greedy decoding ends: at ``columns`` in all, or once every sequence has stopped."""

    columns: int
    stops: tuple[int, ...]

    @classmethod
    def of(cls, criteria: Any, known: tuple[Tensor | None, list[int]]) -> GreedyEnd | None:
        """The end that the criteria describe; ``None`` if they involve anything else.

        ``known``: the stop tokens of a criterion and their host values, which saves a host sync.
        """
        tokens, ids = known
        lengths = [one.max_length for one in criteria if type(one) is MaxLengthCriteria]
        given = [one.eos_token_id for one in criteria if type(one) is EosTokenCriteria]
        stops = [ids if each is tokens else each.tolist() for each in given]
        if len(lengths) + len(stops) != len(criteria) or not lengths or len(stops) > 1:
            return None
        return cls(min(lengths), tuple(stops[0]) if stops else ())


class StepLogits:
    """Decode steps: tokens ``[B]`` in, fp32 logits ``[B, V]`` of the next ones out."""

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
            asked = StepRequest(
                self._model, self._runtime.fused_decoder, cache, columns, chooses=False
            )
            step = self._step = self._runtime.steps.take(asked)
            step.state.load(cache, tokens, ())
        elif has_grown:
            step.state.load_pages(cache)
        step.state.choice.tokens[:batch] = tokens
        if self._room == 0:
            self._runtime.decoder.check_places(cache.seen.next_places(), cache.columns + 1)
        self._room -= 1
        step.run()
        answers = PendingDecisions(self._runtime.decoder.record, step, cache)
        answers.note()
        answers.commit(1)
        assert step.logits is not None
        # A copy, since the next step overwrites this memory.
        return step.logits[:batch].to(torch.float32, copy=True)


class _Transfer:
    """Tokens and flags of one step on their way to the host."""

    def __init__(self, tokens: Tensor, unfinished: Tensor) -> None:
        # Copies, since the next step overwrites this memory.
        self._parts = [
            part.to("cpu", non_blocking=True, copy=True) for part in (tokens, unfinished)
        ]
        self._event = None
        if tokens.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> tuple[Tensor, bool]:
        """Waits for the step; returns its tokens ``[B]`` and whether any sequence continues."""
        if self._event is not None:
            self._event.synchronize()
        tokens, unfinished = self._parts
        return tokens, bool(unfinished.any())


class PendingDecisions:
    """Router decisions of launched steps, held until the steps are committed: to the cache, and to
    a record.

    Flags are copied on the device after each step, since the next one overwrites them, and only if
    something needs them.
    """

    def __init__(self, record: RoutingRecord | None, step: DeviceStep, cache: PagedCache) -> None:
        self._record, self._state, self._cache = record, step.state, cache
        self._batch = cache.seen.batch
        self._held: list[Tensor] = []
        self._answers: list[dict[tuple[int, Sublayer], tuple[Tensor, Tensor]]] = []

    def note(self) -> None:
        """Notes the step just launched."""
        held = self._state.held(self._batch)
        if held is not None:
            self._held.append(held)
        if self._record is None:
            return
        if self._state.routes is not None:
            self._answers.append(self._state.routes.answers())
        elif self._state.plan.removals:  # decode steps remove no rows
            self._answers.append({})

    def commit(self, steps: int) -> None:
        """Commits the first ``steps`` of them."""
        cache, batch = self._cache, self._batch
        held = torch.stack(self._held[:steps], dim=-1).bool() if self._held and steps else None
        first = cache.columns
        cache.commit_steps(steps, held)
        codes = cache.seen.codes[:, first:]
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
    """Decodes greedily and returns all tokens ``[B, T + n]``.

    ``input_ids [B, T]``: the prompt; ``logits [B, V]``: those at its end. Afterwards the cache
    holds every token but the last, as after Hugging Face's loop.

    Raises:
        ValueError: the model has no position for the next token.
    """
    batch, most = input_ids.shape[0], end.columns - input_ids.shape[1]
    first = torch.argmax(logits, dim=-1)
    stops = to_device(torch.tensor(end.stops, dtype=first.dtype), first.device)
    transfer = _Transfer(first, ~torch.isin(first, stops))
    asked = StepRequest(
        model,
        runtime.fused_decoder,
        cache,
        columns=max(cache.reserve, cache.columns + most),
        chooses=True,
        stops=len(end.stops),
        pad=pad,
    )
    # Overlaps with prefill. A missing step is captured later, so as not to delay the first token.
    step = runtime.steps.find(asked) if most > 1 else None
    if step is not None:
        step.state.load(cache, first, end.stops)
    tokens, continues = transfer.wait()
    if streamer is not None:
        streamer.put(tokens)
    if not continues or most <= 1:
        return torch.cat((input_ids, first[:, None]), dim=1)
    if step is None:
        step = runtime.steps.take(asked)
        step.state.load(cache, first, end.stops)
    steps = min(most - 1, runtime.decoder.room(cache))
    arrived, continues = _run_ahead(step, cache, steps, runtime.decoder.record, streamer)
    if continues and arrived < most - 1:
        runtime.decoder.check_places(cache.seen.next_places(), cache.columns + 1)
    chosen = step.state.choice.history[:arrived, :batch].T
    return torch.cat((input_ids, first[:, None], chosen), dim=1)


def _run_ahead(
    step: DeviceStep, cache: PagedCache, steps: int, record: RoutingRecord | None, streamer: Any
) -> tuple[int, bool]:
    """Runs up to ``steps`` decode steps, launching them ahead of the tokens that arrive.

    Commits those whose tokens arrived; returns their number, and whether any sequence continues.
    """
    choice, batch = step.state.choice, cache.seen.batch
    answers = PendingDecisions(record, step, cache)
    transfers: deque[_Transfer] = deque()
    launched, arrived, continues = 0, 0, True
    try:
        while arrived < steps and continues:
            while launched < steps and len(transfers) < AHEAD:
                if cache.make_room_for_steps(launched, 1):
                    step.state.load_pages(cache)
                step.run()
                answers.note()
                launched += 1
                transfers.append(_Transfer(choice.tokens[:batch], choice.unfinished[:batch]))
            tokens, continues = transfers.popleft().wait()
            arrived += 1
            if streamer is not None:
                streamer.put(tokens)
    finally:  # a streamer may raise, as in Hugging Face's loop
        answers.commit(arrived)
    return arrived, continues
