"""How long a prefill and a decode step take: all contenders in turn, medians over rounds."""

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
WARM_TOKENS = 2
LEAST_ROUNDS = 3
HOPELESS = 1.5
"""A number of threads that is so many times slower in both phases at first is not timed."""


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one `generate` call.

    `prefill`: from where the decoder is entered with the prompt's embeddings to the first token;
    the vision tower is not in it. `decode`: the median step to a further token. `ttft`: from the
    call to the first token, vision tower and all.
    """

    prefill: float
    decode: float
    ttft: float


@dataclass(frozen=True, slots=True)
class Timing:
    """One phase of one contender: the better number of threads, its runs and their median."""

    threads: int
    samples: tuple[float, ...]

    @property
    def seconds(self) -> float:
        return statistics.median(self.samples)


Runs = Mapping[tuple[str, int], Sequence[Times]]
"""By name and number of threads."""
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
    """Let all contenders run in turn, in up to `rounds` rounds or until `budget_s` is used.

    Every round starts elsewhere, so that what disturbs the machine hits all of them alike.
    """
    contenders = [(name, count) for name in names for count in threads]
    runs: dict[tuple[str, int], list[T]] = {each: [] for each in contenders}
    began = time.perf_counter()
    for number in range(rounds):
        spent = time.perf_counter() - began
        if number >= LEAST_ROUNDS and spent * (number + 1) / number > budget_s:
            break
        first = number * len(contenders) // rounds
        for name, count in (*contenders[first:], *contenders[:first]):
            with threads_set(count):
                runs[name, count].append(run(name))
        on_round()
    return runs


def promising(threads: Sequence[int], run: Callable[[], Times]) -> list[int]:
    """The numbers of threads that may turn out the better ones, by one run with each.

    Where other programs use the cores, threads wait for each other and each run takes an age.
    """
    probes = {}
    for count in threads:
        with threads_set(count):
            probes[count] = run()
    least = {phase: min(getattr(times, phase) for times in probes.values()) for phase in PHASES}
    return [
        count
        for count, times in probes.items()
        if any(getattr(times, phase) <= HOPELESS * least[phase] for phase in PHASES)
    ]


def best(runs: Runs, name: str, phase: Phase) -> Timing:
    """The better number of threads."""
    timings = [
        Timing(threads, tuple(getattr(times, phase) for times in made))
        for (other, threads), made in runs.items()
        if other == name
    ]
    return min(timings, key=lambda timing: timing.seconds)


@contextmanager
def endless(model: Any) -> Iterator[None]:
    """Within this block the model knows no token that ends an answer."""
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
    """What `work` returns, called from a frame that has taken stack for all frames above it.

    CPython takes its stack in pieces. Where one happens to end between a caller and what it calls
    again and again, each call takes a piece from the system and gives it back: depending on how
    many frames lay below, Hugging Face's prompt or ours of 16 ms took up to 21.
    """
    return work()


# A frame that may need so many slots gets a piece of a megabyte, half of which is left then.
with_stack_room.__code__ = with_stack_room.__code__.replace(co_stacksize=1 << 16)


@torch.inference_mode()
def _time_once(model: Any, inputs: Mapping[str, Tensor], new_tokens: int) -> Times:
    def generate(count: int) -> tuple[float, list[float]]:
        """When the decoder was entered, and when each token came."""
        entered, arrivals = [0.0], Arrivals()
        hook = on_entry(model, lambda: entered.append(time.perf_counter()))
        try:
            model.generate(**inputs, do_sample=False, max_new_tokens=count, streamer=arrivals)
        finally:
            hook.remove()
        return entered[-1], arrivals.tokens

    # what is computed on first use is not timed: a policy is set once and used often
    for count in warm_counts(model.device, new_tokens, WARM_TOKENS):
        generate(count)
    with no_collection():
        began = time.perf_counter()
        entered, tokens = generate(new_tokens)
    if len(tokens) != new_tokens:
        raise RuntimeError(f"{len(tokens)} tokens were made, {new_tokens} wanted")
    steps = [b - a for a, b in itertools.pairwise(tokens)]
    return Times(tokens[0] - entered, statistics.median(steps), tokens[0] - began)


def on_entry(model: Any, note: Callable[[], object]) -> RemovableHandle:
    """Calls ``note`` when the model's decoder is entered next, unless the handle is removed.

    Only once, since steps of a decoder that is hooked are whole forwards.
    """

    def enter(*_: Any) -> None:
        handle.remove()
        note()

    handle: RemovableHandle = model.get_decoder().register_forward_pre_hook(enter)
    return handle


def warm_counts(device: torch.device, new_tokens: int, least: int) -> tuple[int, ...]:
    """The new tokens of calls to make before a timed one, after a policy was set.

    On a GPU a policy that was just set captures its steps anew, and a prompt when its shape comes
    again; and a capture gives what memory is free back to the driver, which one more call asks for.
    """
    return (new_tokens, 1, new_tokens) if device.type == "cuda" else (least,)


class Arrivals:
    """A streamer: when each token of an answer reached the host.

    It changes nothing in how tokens are made, unlike a stopping criterion: our loop on a GPU
    launches ahead of it, and compiled code stays compiled.
    """

    def __init__(self) -> None:
        self._stamps: list[float] = []

    @property
    def tokens(self) -> list[float]:
        """Times of `time.perf_counter`; the prompt, which comes first, is not among them."""
        return self._stamps[1:]

    def put(self, tokens: Tensor) -> None:
        self._stamps.append(time.perf_counter())

    def end(self) -> None:
        pass


@contextmanager
def threads_set(count: int) -> Iterator[None]:
    """So many threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage is collected within the block."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
