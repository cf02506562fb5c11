"""Whole `generate` calls on real shapes: Hugging Face, our dense model, and policies."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import fastskip
from benchmarks.floors import work_of
from benchmarks.gpu.ceilings import ceilings_of
from benchmarks.gpu.cells import Cell, Setting, is_lost
from benchmarks.gpu.inputs import SEVEN, THIRTEEN, TINY, Widths
from benchmarks.gpu.models import PEERS, load, shape
from benchmarks.gpu.results import Values
from benchmarks.gpu.timing import synchronize
from benchmarks.memory import peak_bytes, reset_peak
from benchmarks.mixes import MIX, Mix, mixed_prompts
from benchmarks.peers import DENSE, HF, Peer
from benchmarks.shapes import Models, prompts
from fastskip.garbage import no_collection
from fastskip.plan import SkipPlan
from fastskip.plan.costs import Ceilings
from fastskip.timing import Arrivals, on_entry, rotated, warm_counts

UNLIKE = Mix(4 * MIX.images, 4 * MIX.texts)
TINY_MIX = Mix((1, 0), (2, 4))
N_NEW = 128
ROUNDS, LEAST_ROUNDS = 5, 2
GROUPS = ("ttft", "prefill", "tpot", "tpot_mean", "call")


@dataclass
class Contender:
    """A peer, how its model is selected, and what was measured."""

    peer: Peer
    plan: SkipPlan
    select: Callable[[], Any]
    samples: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: int | None = None
    tokens: Tensor | None = None
    failure: str | None = None
    """Why it is no longer timed."""

    def median(self, quantity: str) -> float | None:
        found = self.samples.get(quantity)
        return statistics.median(found) if found else None


def measure(setting: Setting, widths: Widths, batch: int, mix: Mix | None = None) -> Values:
    """Times all peers in turn; a peer that fails is dropped, and the line says why.

    ``mix``: unlike prompts, one for each sequence of the batch.
    """
    ceilings = ceilings_of(setting)
    widths, n_new = (TINY, 3) if setting.is_tiny else (widths, N_NEW)
    device = setting.device.type
    both = load(widths, setting.dtype, device, setting.impl)
    kind = shape(widths, device)
    if setting.is_tiny:
        batch, mix = min(batch, 2), mix and TINY_MIX
    if mix is None:
        inputs = prompts(both.hf, kind, batch)
        rows = [(widths.n_image, widths.n_text)] * batch
    else:
        inputs = mixed_prompts(both.hf, kind, mix)
        rows = list(zip(mix.image_rows(both.hf), mix.text_rows(kind), strict=True))
    contenders, failures = _called(both, inputs, n_new, setting)
    count = rounds(contenders, inputs, n_new, setting)
    failures |= {each.peer.name: each.failure for each in contenders if each.failure is not None}
    contenders = [each for each in contenders if each.failure is None]
    if not contenders:
        raise RuntimeError("\n".join(failures.values()))
    images, texts = map(list, zip(*rows, strict=True))
    about: dict[str, Any] = {"widths": widths.name, "batch": len(rows), "n_new": n_new}
    about |= {
        "n_image": widths.n_image if mix is None else images,
        "n_text": widths.n_text if mix is None else texts,
        "rounds": count,
    }
    floors = {
        each.peer.name: floors_of(each.plan, rows, n_new, ceilings, kind.text_before)
        for each in contenders
    }
    peers = _summary(contenders, about, floors)
    return {**about, "peers": peers, "failures": failures}


def _called(
    both: Models, inputs: dict[str, Tensor], n_new: int, setting: Setting
) -> tuple[list[Contender], dict[str, str]]:
    """The peers after their first calls, and by name why others failed."""
    contenders = []
    failures = {}
    for peer in PEERS:
        contender = _contender(peer, both)
        try:
            first_call(contender, inputs, n_new, setting.device.type)
            contenders.append(contender)
        except Exception:
            if is_lost(setting.device):
                raise
            failures[peer.name] = traceback.format_exc(limit=-6)
            torch.compiler.reset()
    return contenders, failures


def _contender(peer: Peer, both: Models) -> Contender:
    policy = (peer.policy or DENSE.policy)(both.depth)  # type: ignore[misc]
    plan = fastskip.plan_of(fastskip.set_policy(both.ours, policy))
    if peer.policy is None:
        return Contender(peer, plan, lambda: both.hf)
    return Contender(peer, plan, lambda: fastskip.set_policy(both.ours, policy))


def first_call(contender: Contender, inputs: dict[str, Tensor], n_new: int, device: str) -> None:
    """Compiles and captures. Peak memory: what it takes beyond what was held, plus the weights."""
    model = contender.select()
    reset_peak(device)
    held = torch.cuda.memory_allocated() if device == "cuda" else 0
    contender.tokens = _generate(contender, model, inputs, n_new)
    if contender.peer.policy is not None:
        _generate(contender, model, inputs, 1)  # prompts are captured on their second call
    peak = peak_bytes(device)
    if device == "cuda" and peak is not None:
        weights = sum({p.data_ptr(): p.nbytes for p in model.parameters()}.values())
        peak = peak - held + weights
    contender.peak_bytes = peak


def rounds(
    contenders: Sequence[Contender], inputs: dict[str, Tensor], n_new: int, setting: Setting
) -> int:
    """Times all in turn, in an order that rotates every round; returns the number of rounds.

    One that fails is not timed again.
    """
    most = 1 if setting.is_tiny else ROUNDS
    for number in range(most):
        begin = time.perf_counter()
        for contender in rotated(contenders, number):
            if contender.failure is None:
                _try(contender, inputs, n_new, setting)
        took = time.perf_counter() - begin
        if number + 1 >= LEAST_ROUNDS and setting.seconds_left < 1.2 * took:
            return number + 1
    return most


def _try(contender: Contender, inputs: dict[str, Tensor], n_new: int, setting: Setting) -> None:
    try:
        _time(contender, inputs, n_new, setting.device.type)
    except Exception:
        if is_lost(setting.device):
            raise
        contender.failure = traceback.format_exc(limit=-6)


def _time(contender: Contender, inputs: dict[str, Tensor], n_new: int, device: str) -> None:
    """One sample of each quantity."""
    model = contender.select()
    counts = warm_counts(torch.device(device), n_new, n_new)
    # Hugging Face's default needs no capture, only the free memory back that other captures took;
    # its compiled steps are captured again, since each call has its own static cache.
    is_plain = contender.peer.policy is None and contender.peer.hf_cache is None
    for count in (1,) if is_plain else counts:
        _generate(contender, model, inputs, count)
    with no_collection():
        watch = Arrivals()
        begin, call = _timed(partial(_generate, contender, model, inputs, n_new, watch), device)
        entry = _Entry(device)
        # Only now: a hook makes compiled code recompile.
        hook = on_entry(model, entry)
        try:
            _timed(partial(_generate, contender, model, inputs, 1), device)
            prefill = entry.seconds_since()
        finally:
            hook.remove()
    first, *_ = stamps = watch.tokens
    gaps = [b - a for a, b in pairwise(stamps)]
    found = {
        "ttft": first - begin,
        "prefill": prefill,
        "tpot": statistics.median(gaps),
        "tpot_mean": statistics.mean(gaps),
        "call": call,
    }
    for quantity, value in found.items():
        if value is not None:
            contender.samples.setdefault(quantity, []).append(value)


class _Entry:
    """When the decoder was entered, on the device's clock."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._event: Any = None
        self._began: float | None = None

    def __call__(self) -> None:
        self._began = time.perf_counter()
        if self._device == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    def seconds_since(self) -> float | None:
        """Seconds since then; ``None`` if the decoder was never called as a module."""
        if self._began is None:
            return None
        if self._event is None:
            return time.perf_counter() - self._began
        end = torch.cuda.Event(enable_timing=True)
        end.record()
        end.synchronize()
        seconds: float = self._event.elapsed_time(end) / 1e3
        return seconds


def _generate(
    contender: Contender,
    model: Any,
    inputs: dict[str, Tensor],
    n_new: int,
    streamer: Arrivals | None = None,
) -> Tensor:
    cache = contender.peer.hf_cache
    options = {} if cache is None else {"cache_implementation": cache}
    tokens: Tensor = model.generate(
        **inputs, max_new_tokens=n_new, do_sample=False, streamer=streamer, **options
    )
    made = tokens[:, inputs["input_ids"].shape[1] :]
    if made.shape[1] != n_new:
        raise RuntimeError(f"generate made {made.shape[1]} tokens instead of {n_new}")
    return made.cpu()


def _timed(run: Callable[[], object], device: str) -> tuple[float, float]:
    """The start time, and the duration in seconds."""
    synchronize(torch.device(device))
    begin = time.perf_counter()
    run()
    synchronize(torch.device(device))
    return begin, time.perf_counter() - begin


def _summary(
    contenders: Sequence[Contender],
    about: dict[str, Any],
    floors: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """Milliseconds, shares and ratios of every peer."""
    by_name = {each.peer.name: each for each in contenders}
    found = {}
    for each in contenders:
        own: dict[str, Any] = {"label": each.peer.label, "peak_bytes": each.peak_bytes}
        for quantity in GROUPS:
            seconds = each.median(quantity)
            own[f"{quantity}_ms"] = None if seconds is None else 1e3 * seconds
            own[f"{quantity}_samples_ms"] = [1e3 * x for x in each.samples.get(quantity, [])]
            for other in (HF.name, "hf_static", DENSE.name):
                base = by_name[other].median(quantity) if other in by_name else None
                ratio = base / seconds if base and seconds else None
                own[f"{quantity}_vs_{other}"] = ratio
        call = each.median("call")
        own["tokens_per_s"] = about["batch"] * about["n_new"] / call if call else None
        tpot = each.median("tpot")
        own["decode_tokens_per_s"] = about["batch"] / tpot if tpot else None
        for quantity, floor in floors[each.peer.name].items():
            seconds = each.median(quantity)
            own[f"{quantity}_floor_ms"] = 1e3 * floor
            own[f"{quantity}_share_of_floor"] = floor / seconds if seconds else None
            # Arrangements save launches, which no floor counts.
            if each.peer.policy and DENSE.name in floors and not each.plan.policy.arrangements:
                ideal = floors[DENSE.name][quantity] / floor
                ratio = own[f"{quantity}_vs_dense"]
                own[f"{quantity}_share_of_ideal"] = ratio / ideal if ratio else None
        own["tokens_as_hf"] = _agreement(each, by_name.get(HF.name))
        found[each.peer.name] = own
    return found


def floors_of(
    plan: SkipPlan,
    rows: Sequence[tuple[int, int]],
    n_new: int,
    ceilings: Ceilings,
    before: int,
    rates: tuple[float | None, float | None] = (None, None),
) -> dict[str, float]:
    """Floor seconds of the prefill, without vision, and of a mean decode step; as `work_of`."""
    found = work_of(plan, rows, n_new, ceilings, text_before=before, rates=rates)
    return {"prefill": found["prefill"].floor, "tpot": found["decode"].floor}


def _agreement(own: Contender, hf: Contender | None) -> float | None:
    """The share of tokens before the first one that differs from Hugging Face's.

    In low precision on random weights near-ties soon resolve differently: a low share is fine.
    """
    if hf is None or hf.tokens is None or own.tokens is None:
        return None
    same = (own.tokens == hf.tokens).int().cumprod(1)
    return float(same.float().mean())


def _cell(widths: Widths, batch: int) -> Cell:
    about = f"{widths.name.upper()} with random weights at batch {batch}"
    minutes = (2.7 if batch == 1 else 3.0) if widths is SEVEN and batch < 64 else 5.0
    is_default = widths is SEVEN and batch in (1, 16)
    run = partial(measure, widths=widths, batch=batch)
    return Cell(f"e2e.{widths.name}.b{batch}", about, minutes, run, is_default)


CELLS = [
    *(_cell(widths, batch) for widths in (SEVEN, THIRTEEN) for batch in (1, 16, 4, 64)),
    Cell(
        "e2e.7b.unlike",
        "7B with random weights, 16 unlike prompts, padded",
        5.0,
        partial(measure, widths=SEVEN, batch=len(UNLIKE), mix=UNLIKE),
    ),
]
