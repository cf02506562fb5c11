"""Timing of prefills and decode steps: all contenders in turn, medians over rounds."""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from fastskip.garbage import no_collection

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
WARM_TOKENS = 2
LEAST_ROUNDS = 3
PROBE_CUTOFF = 1.5
"""A thread count that, in a probe run, is this many times slower in both phases is not timed."""
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one `generate` call.

    `prefill`: from entering the decoder with the prompt's embeddings to the first token, so without
    the vision tower. `decode`: the median step to a further token. `ttft`: from the call to the
    first token, vision tower included.
    """

    prefill: float
    decode: float
    ttft: float


@dataclass(frozen=True, slots=True)
class Timing:
    """One phase of one contender: its thread count, its runs and their median."""

    threads: int
    samples: tuple[float, ...]

    @property
    def seconds(self) -> float:
        return statistics.median(self.samples)


Runs = Mapping[tuple[str, int], Sequence[Times]]
"""Runs by name and thread count."""
T = TypeVar("T")


def race(
    names: Sequence[str],
    run: Callable[[str], T],
    *,
    threads: Sequence[int],
    rounds: int,
    budget_s: float,
    on_round: Callable[[], object],
) -> Mapping[tuple[str, int], Sequence[T]]:
    """Run all contenders in turn, for up to `rounds` rounds.

    After `LEAST_ROUNDS` rounds, stops before a round that would probably exceed `budget_s`.
    Rounds are `rotated`, so that disturbances of the machine hit all contenders equally.
    """
    contenders = [(name, count) for name in names for count in threads]
    runs: dict[tuple[str, int], list[T]] = {each: [] for each in contenders}
    began = time.perf_counter()
    for number in range(rounds):
        spent = time.perf_counter() - began
        if number >= LEAST_ROUNDS and spent * (number + 1) / number > budget_s:
            break
        for name, count in rotated(contenders, number):
            with threads_set(count):
                runs[name, count].append(run(name))
        on_round()
    return runs


def rotated(items: Sequence[T], number: int) -> list[T]:
    """The items in the order of round `number` (from 0): one circle, entered at changing places.

    The places follow the golden ratio, whose multiples spread evenly however many there are. So
    the items take all positions about equally often, whether a time budget ends the rounds early
    or there are fewer rounds than items.
    """
    first = int(number * _GOLDEN % 1 * len(items))
    return [*items[first:], *items[:first]]


def promising(threads: Sequence[int], run: Callable[[], Times]) -> list[int]:
    """The thread counts that may turn out fastest in some phase, judged by probe runs.

    If other programs use the cores, threads wait for each other and a run takes very long.
    """

    def probe(count: int) -> list[float]:
        with threads_set(count):
            times = run()
        return [getattr(times, phase) for phase in PHASES]

    return fast_counts(threads, probe, PROBE_CUTOFF)


def fast_counts(
    counts: Iterable[int], probe: Callable[[int], Sequence[float]], cutoff: float
) -> list[int]:
    """The counts for which some of the seconds that ``probe`` gives are at most ``cutoff`` times
    the least. A count that looks slow is probed again, since one disturbance must not decide."""
    took = {count: probe(count) for count in counts}
    fast = _fast(took, cutoff)
    for count in [count for count in took if count not in fast]:
        took[count] = [*map(min, took[count], probe(count))]
    return _fast(took, cutoff)


def _fast(took: Mapping[int, Sequence[float]], cutoff: float) -> list[int]:
    least = [min(each) for each in zip(*took.values(), strict=True)]
    return [
        count
        for count, seconds in took.items()
        if any(own <= cutoff * best for own, best in zip(seconds, least, strict=True))
    ]


def best(runs: Runs, name: str, phase: Phase) -> Timing:
    """The timing of a contender's phase with the thread count that is fastest for it."""
    timings = [
        Timing(threads, tuple(getattr(times, phase) for times in made))
        for (other, threads), made in runs.items()
        if other == name
    ]
    return min(timings, key=lambda timing: timing.seconds)


@contextmanager
def endless(model: Any) -> Iterator[None]:
    """Within this block, the model has no end-of-sequence token."""
    config = model.generation_config
    ends, config.eos_token_id = config.eos_token_id, None
    try:
        yield
    finally:
        config.eos_token_id = ends


def time_once(model: Any, inputs: Mapping[str, Tensor], new_tokens: int) -> Times:
    """One greedy call of `generate`; the model must be `endless`."""
    return with_stack_room(lambda: _time_once(model, inputs, new_tokens))


def with_stack_room(work: Callable[[], T]) -> T:
    """Calls `work` from a frame that has reserved stack space for all frames above it.

    CPython allocates its stack in chunks. If a chunk happens to end between a caller and a function
    that it calls repeatedly, each call allocates a chunk and frees it again: depending on the
    number of frames below, a prefill of 16 ms (Hugging Face's or ours) took up to 21 ms.
    """
    return work()


# A frame that declares this many slots gets a chunk of a megabyte, half of which remains free.
with_stack_room.__code__ = with_stack_room.__code__.replace(co_stacksize=1 << 16)


@torch.inference_mode()
def _time_once(model: Any, inputs: Mapping[str, Tensor], new_tokens: int) -> Times:
    def generate(count: int) -> tuple[float, list[float]]:
        """When the decoder was entered, and when each token arrived."""
        entered, arrivals = [0.0], Arrivals()
        hook = on_entry(model, lambda: entered.append(time.perf_counter()))
        try:
            model.generate(**inputs, do_sample=False, max_new_tokens=count, streamer=arrivals)
        finally:
            hook.remove()
        return entered[-1], arrivals.tokens

    # warm-up: first-use costs are not timed, since a policy is set once and used often
    for count in warm_counts(model.device, new_tokens, WARM_TOKENS):
        generate(count)
    with no_collection():
        began = time.perf_counter()
        entered, tokens = generate(new_tokens)
    if len(tokens) != new_tokens:
        raise RuntimeError(f"generate made {len(tokens)} tokens instead of {new_tokens}")
    steps = [b - a for a, b in itertools.pairwise(tokens)]
    return Times(tokens[0] - entered, statistics.median(steps), tokens[0] - began)


def on_entry(model: Any, note: Callable[[], object]) -> RemovableHandle:
    """Calls ``note`` when the model's decoder is next entered, unless the handle is removed.

    Only once, since a hooked decoder runs its decode steps as whole forwards.
    """

    def enter(*_: Any) -> None:
        handle.remove()
        note()

    handle: RemovableHandle = model.get_decoder().register_forward_pre_hook(enter)
    return handle


def warm_counts(device: torch.device, new_tokens: int, least: int) -> tuple[int, ...]:
    """The numbers of new tokens of the warm-up calls before a timed one, after setting a policy.

    On a GPU, setting a policy makes the steps be captured anew, and a prompt is captured the second
    time its shape occurs. A capture also returns free memory to the driver, which one more call
    allocates again.
    """
    return (new_tokens, 1, new_tokens) if device.type == "cuda" else (least,)


class Arrivals:
    """A streamer that records when each token of an answer reaches the host.

    Unlike a stopping criterion it does not change how tokens are generated: our loop on a GPU still
    launches ahead of the host, and compiled code stays compiled.
    """

    def __init__(self) -> None:
        self._stamps: list[float] = []

    @property
    def tokens(self) -> list[float]:
        """Times of `time.perf_counter`, without the prompt, which comes first."""
        return self._stamps[1:]

    def put(self, tokens: Tensor) -> None:
        self._stamps.append(time.perf_counter())

    def end(self) -> None:
        pass


@contextmanager
def threads_set(count: int) -> Iterator[None]:
    """Within this block, torch uses `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
