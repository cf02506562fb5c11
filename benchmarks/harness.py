"""One case: all peers are checked, then timed round-robin."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastskip
from benchmarks.gate import faults
from benchmarks.mixes import Mix, mixed_prompts
from benchmarks.peers import DEFAULT, DENSE, HF, Peer, dense
from benchmarks.runs import Run, median, run_once
from benchmarks.shapes import FIRST_WORD, Builder, Models, Shape, models, prompts
from fastskip.plan import SkipPlan
from fastskip.policy import SkipPolicy
from fastskip.routing import RoutingRecord
from fastskip.timing import fast_counts, rotated, threads_set
from fastskip.wording import dtype_name

# The default first: one-time work in the first call must not count against one thread.
THREADS = list(dict.fromkeys((torch.get_num_threads(), 1)))
WARM_TOKENS = 4
PROBE_CUTOFF = 1.25
"""A thread count whose trial calls take more than this many times the shortest is not timed."""
_FAULTS: dict[tuple[Builder, torch.dtype, Peer], str | None] = {}


@dataclass(frozen=True)
class Case:
    """The work that all peers do; ``mix``: unlike prompts, one for each sequence of the batch."""

    shape: Shape
    dtype: torch.dtype
    batch: int
    n_new: int = 16
    rounds: int = 3
    peers: tuple[Peer, ...] = DEFAULT
    subject: str = ""
    mix: Mix | None = None

    def prompts(self, model: Any) -> dict[str, torch.Tensor]:
        """The inputs of `generate`."""
        if self.mix is None:
            return prompts(model, self.shape, self.batch)
        return mixed_prompts(model, self.shape, self.mix)

    @property
    def name(self) -> str:
        dtype = dtype_name(self.dtype)
        length = f"{self.shape.n_text}+{self.n_new}" if self.mix is None else f"mixed+{self.n_new}"
        subject = f"-{self.subject}" if self.subject else ""
        return f"{self.shape.name}-{dtype}-b{self.batch}-{length}{subject}"


@dataclass
class Measurement:
    """The runs of each (peer, threads) pair of a case, and why peers failed.

    ``rates``: for peers with routers, the shares of candidates that skipped in the prompt and in
    the decode steps; random draws are the same in every run.
    """

    case: Case
    n_visual: int
    plans: dict[str, SkipPlan] = field(default_factory=dict)
    runs: dict[tuple[str, int], list[Run]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    rates: dict[str, tuple[float, float]] = field(default_factory=dict)

    def best(self, peer: str, group: str) -> tuple[int, list[Run]]:
        """The thread count with the lowest median, and its runs."""
        made = {threads: runs for (name, threads), runs in self.runs.items() if name == peer}
        threads = min(made, key=lambda count: median(made[count], group))
        return threads, made[threads]

    def seconds(self, peer: str, group: str) -> float:
        return median(self.best(peer, group)[1], group)


@torch.no_grad()
def measure(case: Case, selected: Collection[str] | None = None) -> Measurement:
    """Check the peers of a case, then time them; the baselines are always included.

    Args:
        case: What to run.
        selected: Names of the peers to measure; all by default.
    """
    wanted = {HF.name, DENSE.name, *(selected or (peer.name for peer in case.peers))}
    peers = [peer for peer in case.peers if peer.name in wanted]
    both = models(case.shape.build, case.dtype, "cpu")
    result = Measurement(case, both.hf.config.image_seq_length)
    # Hugging Face's model does the work of the dense plan.
    policies = {peer.name: (peer.policy or dense)(both.depth) for peer in peers}
    for name, policy in policies.items():
        result.plans[name] = fastskip.plan_of(fastskip.set_policy(both.ours, policy))
    result.failures |= _faults(case, peers, both)
    if DENSE.name in result.failures:
        return result
    calls = _Calls(case, both, policies)
    sound = [peer for peer in peers if peer.name not in result.failures]
    for peer in sound:
        if result.plans[peer.name].routed:
            result.rates[peer.name] = calls.skip_rates(peer)
    contenders = calls.contenders(sound)
    for number in range(case.rounds):
        for peer, count in rotated(contenders, number):
            result.runs.setdefault((peer.name, count), []).append(calls.run(peer, count))
    if case.dtype == torch.float32:
        _compare_tokens(result)
    return result


class _Calls:
    """Calls of `generate` by the peers of a case."""

    def __init__(self, case: Case, both: Models, policies: Mapping[str, SkipPolicy]) -> None:
        self._case, self._both, self._policies = case, both, policies
        self._inputs = case.prompts(both.hf)

    def run(self, peer: Peer, threads: int, n_new: int | None = None) -> Run:
        """One call of `n_new` tokens; by default as many as the case has."""
        model = self._both.hf if peer.policy is None else self._under(peer)
        with threads_set(threads):
            run_once(model, _short_prompt(self._case.batch), WARM_TOKENS)
            return run_once(model, self._inputs, n_new or self._case.n_new, peer.hf_cache)

    def skip_rates(self, peer: Peer) -> tuple[float, float]:
        """The shares of candidates that a peer's routers let skip, in the prompt and in steps."""
        with fastskip.record_routing(self._under(peer)) as seen:
            self.run(peer, THREADS[0])
        prompt, *steps = seen.forwards[-self._case.n_new :]
        return RoutingRecord([prompt]).rate, RoutingRecord(steps).rate

    def contenders(self, peers: Iterable[Peer]) -> list[tuple[Peer, int]]:
        """The peers, each with the thread counts that may be its fastest.

        Hugging Face's default cache settles the threads of its others, our dense model ours.
        """
        kept: dict[bool, list[int]] = {}
        found = []
        for peer in peers:
            is_ours = peer.policy is not None
            trial = partial(self.run, peer, n_new=WARM_TOKENS)
            if is_ours in kept:
                for count in kept[is_ours]:
                    trial(count)  # for its one-time work
            else:
                kept[is_ours] = promising(THREADS, trial, self._case.n_new)
            found += [(peer, count) for count in kept[is_ours]]
        return found

    def _under(self, peer: Peer) -> Any:
        return fastskip.set_policy(self._both.ours, self._policies[peer.name])


def _faults(case: Case, peers: Iterable[Peer], both: Models) -> dict[str, str]:
    """The gate's verdicts, shared by cases that differ only in batch and lengths."""
    keys = {peer: (case.shape.build, case.dtype, peer) for peer in peers}
    policies = {p.name: p.policy(both.depth) for p in keys if p.policy and keys[p] not in _FAULTS}
    if policies:
        found = faults(both, policies)
        _FAULTS.update({keys[p]: found.get(p.name) for p in keys if p.name in policies})
    return {p.name: fault for p in keys if (fault := _FAULTS.get(keys[p]))}


def _compare_tokens(result: Measurement) -> None:
    """In fp32 our dense model and every cache of Hugging Face's must yield its default's tokens."""
    (first, *_), *_ = (runs for (name, _), runs in result.runs.items() if name == HF.name)
    for peer in result.case.peers:
        if peer.policy is not None and peer is not DENSE:
            continue
        for runs in (runs for (name, _), runs in result.runs.items() if name == peer.name):
            if any(not torch.equal(run.tokens, first.tokens) for run in runs):
                result.failures[peer.name] = "tokens differ from Hugging Face's in fp32"


def _short_prompt(batch: int) -> dict[str, Tensor]:
    """A warm-up prompt: under one policy, first-use computation and first touches of memory are
    paid only once, so they are not timed."""
    ids = torch.full((batch, WARM_TOKENS), FIRST_WORD)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def promising(counts: Iterable[int], trial: Callable[[int], Run], n_new: int) -> list[int]:
    """The thread counts that may turn out fastest for a call of `n_new` tokens."""

    def seconds(count: int) -> list[float]:
        found = trial(count)
        return [found.ttft + (n_new - 1) * found.decode]

    return fast_counts(counts, seconds, PROBE_CUTOFF)
