"""One case, all peers round-robin: time stamps from inside `generate`, medians over rounds."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

import fastskip
from benchmarks.gate import Gate, GateError
from benchmarks.memory import peak_bytes, reset_peak
from benchmarks.peers import DEFAULT, DENSE, HF, Peer
from benchmarks.shapes import Models, Shape, models, prompts
from fastskip.plan import SkipPlan
from fastskip.policy import SkipPolicy

GROUPS = ("prefill", "decode", "e2e")
THREADS = tuple(sorted({1, torch.get_num_threads()}))
WARM_TOKENS = 4
HOPELESS = 1.3
"""A number of threads that is so many times slower at the warm-up is not timed."""


@dataclass(frozen=True)
class Case:
    """What all peers do."""

    shape: Shape
    dtype: torch.dtype
    batch: int
    n_new: int = 16
    rounds: int = 3
    peers: tuple[Peer, ...] = DEFAULT
    device: str = "cpu"

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        length = f"{self.shape.n_text}+{self.n_new}"
        return f"{self.shape.name}-{dtype}-b{self.batch}-{length}"


@dataclass(frozen=True)
class Run:
    """Seconds of one `generate` call, and what it made."""

    prefill: float
    decode: float
    e2e: float
    ttft: float
    peak_bytes: int | None
    tokens: Tensor


@dataclass
class Measurement:
    """The runs of every (peer, threads) of a case, and what is wrong with peers that failed."""

    case: Case
    n_visual: int
    plans: dict[str, SkipPlan] = field(default_factory=dict)
    runs: dict[tuple[str, int], list[Run]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    attention: dict[str, str] = field(default_factory=dict)

    def best(self, peer: str, group: str) -> tuple[int, list[Run]]:
        """The number of threads with the lower median, and the runs made with it."""
        made = {threads: runs for (name, threads), runs in self.runs.items() if name == peer}
        threads = min(made, key=lambda count: median(made[count], group))
        return threads, made[threads]

    def seconds(self, peer: str, group: str) -> float:
        return median(self.best(peer, group)[1], group)


def median(runs: Iterable[Run], quantity: str) -> float:
    """The median of a field of `Run`, in seconds."""
    return statistics.median(float(getattr(run, quantity)) for run in runs)


class ReplayClock:
    """A timer that shows recorded durations: each call of `play` moves it on by the next one."""

    def __init__(self) -> None:
        self.now = 0.0
        self._durations: Iterator[float] = iter(())

    def __call__(self) -> float:
        return self.now

    def load(self, durations: Sequence[float]) -> None:
        self.now, self._durations = 0.0, iter(durations)

    def play(self) -> None:
        self.now += next(self._durations)


class _Stopwatch:
    """Time stamps of one `generate` call: a stopping criterion that never stops it.

    It is asked after every token, by Hugging Face's loop as by ours.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self.entries: list[float] = []
        self.tokens: list[float] = []

    def now(self) -> float:
        if self._device != "cpu":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def enter(self, *_: Any) -> None:
        """A hook: the decoder is entered."""
        self.entries.append(self.now())

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.tokens.append(self.now())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def measure(case: Case, selected: Collection[str] | None = None) -> Measurement:
    """Check the peers of a case, then time them; the baselines are always among them.

    Args:
        case: What to run.
        selected: Names of the peers that are wanted; all by default.
    """
    wanted = {HF.name, DENSE.name, *(selected or (peer.name for peer in case.peers))}
    peers = [peer for peer in case.peers if peer.name in wanted]
    both = models(case.shape, case.dtype, case.device)
    inputs = prompts(both.hf, case.shape, case.batch)
    result = Measurement(case, both.hf.config.image_seq_length)
    gate = Gate.of(both)
    policies = {peer.name: (peer.policy or DENSE.policy)(both.depth) for peer in peers}  # type: ignore[misc]
    for peer in peers:
        _check(gate, peer, policies[peer.name], result)
    del gate  # a copy of the model in a higher precision
    if DENSE.name in result.failures:
        return result
    peers = [peer for peer in peers if peer.name not in result.failures]

    def run(peer: Peer, threads: int, n_new: int = case.n_new) -> Run:
        model = both.hf if peer.policy is None else _under(both, policies[peer.name])
        with threads_set(threads):
            return _run(model, inputs, n_new, case.device, peer.hf_cache)

    counts = THREADS if case.device == "cpu" else (torch.get_num_threads(),)
    contenders = []
    kept: dict[bool, list[int]] = {}
    for peer in peers:  # the baselines come first and settle the threads of the others
        is_hf = peer.policy is None
        probes = {count: run(peer, count, WARM_TOKENS) for count in kept.get(is_hf, counts)}
        kept.setdefault(is_hf, promising(probes))
        contenders += [(peer, count) for count in kept[is_hf]]
    step = max(1, len(contenders) // case.rounds)
    for number in range(case.rounds):
        first = number * step % len(contenders)
        for peer, count in (*contenders[first:], *contenders[:first]):
            result.runs.setdefault((peer.name, count), []).append(run(peer, count))
    if case.dtype == torch.float32:
        _compare_tokens(result)
    return result


def _check(gate: Gate, peer: Peer, policy: SkipPolicy, result: Measurement) -> None:
    """The plan of a peer, and whether it is obeyed."""
    ours = fastskip.set_policy(gate.models.ours, policy)
    result.plans[peer.name] = fastskip.plan_of(ours)
    result.attention[peer.name] = "fastskip reference"
    if peer.policy is None:  # the plan of Hugging Face's model is the dense one
        result.attention[peer.name] = gate.models.hf.config.text_config._attn_implementation
        return
    try:
        gate.check(policy)
    except GateError as error:
        result.failures[peer.name] = str(error)


def _compare_tokens(result: Measurement) -> None:
    """In fp32 our dense model and every cache of Hugging Face give Hugging Face's tokens."""
    (first, *_), *_ = (runs for (name, _), runs in result.runs.items() if name == HF.name)
    for peer in result.case.peers:
        if peer.policy is not None and peer is not DENSE:
            continue
        for runs in (runs for (name, _), runs in result.runs.items() if name == peer.name):
            if any(not torch.equal(run.tokens, first.tokens) for run in runs):
                result.failures[peer.name] = "tokens differ from Hugging Face's in fp32"


def _under(both: Models, policy: SkipPolicy) -> Any:
    ours = fastskip.set_policy(both.ours, policy)
    # Computed on first use; whoever keeps one policy pays for them once.
    plan = fastskip.plan_of(ours)
    _ = plan.fingerprint, plan.steps, plan.groups
    return ours


def _run(model: Any, inputs: dict[str, Tensor], n_new: int, device: str, cache: str | None) -> Run:
    watch = _Stopwatch(device)
    options = {} if cache is None else {"cache_implementation": cache}
    hook = model.get_decoder().register_forward_pre_hook(watch.enter)
    reset_peak(device)
    try:
        with _no_collection():
            begin = watch.now()
            tokens = model.generate(
                **inputs,
                max_new_tokens=n_new,
                do_sample=False,
                stopping_criteria=StoppingCriteriaList([watch]),
                **options,
            )
            end = watch.now()
    finally:
        hook.remove()
    if len(watch.tokens) != n_new:
        raise RuntimeError(f"{len(watch.tokens)} tokens were made, {n_new} wanted")
    gaps = [b - a for a, b in zip(watch.tokens, watch.tokens[1:], strict=False)]
    return Run(
        prefill=watch.tokens[0] - watch.entries[0],
        decode=statistics.median(gaps),
        e2e=end - begin,
        ttft=watch.tokens[0] - begin,
        peak_bytes=peak_bytes(device),
        tokens=tokens[:, inputs["input_ids"].shape[1] :].cpu(),
    )


def promising(probes: dict[int, Run]) -> list[int]:
    """The numbers of threads that may turn out best in some group."""
    kept = set()
    for group in GROUPS:
        best = min(getattr(run, group) for run in probes.values())
        kept |= {c for c, run in probes.items() if getattr(run, group) <= HOPELESS * best}
    return sorted(kept)


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
def _no_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
