"""Predicts the time that a plan saves on this machine, by a fit to measured policies.

A plan's roofline floor is a lower bound; kernel launches, caches and the machine's quirks add to
it. So a few policies are timed, interleaved with the dense model, and the time that each saves is
regressed, by non-negative least squares, on the floors of attention and FFN that it saves, on how
many of them it leaves out entirely, and on its parallel blocks and pairs (Lawson and Hanson,
"Solving Least Squares Problems", 1974, chapter 23).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from fastskip.loading import plan_of, set_policy
from fastskip.plan import ModelShape
from fastskip.policy import Arrangement, SkippedKV, SkipPolicy, TokenClass
from fastskip.study.search.changes import ATTENTION, BLOCK, FFN, Change, policy_of
from fastskip.study.search.costing import Costing, Numbers, phase_of
from fastskip.timing import endless, rotated, time_once

_SIGNS = np.array([1.0, 1.0, 1.0, 1.0, -1.0, -1.0])
"""Parallel blocks and pairs save time by their presence, the other parts by their absence."""
TIMES = {"prefill": "ttft", "decode": "tpot"}


@dataclass(frozen=True, slots=True)
class Timed:
    """A policy timed interleaved with the dense model: seconds, one value per round."""

    policy: SkipPolicy
    ttft: tuple[float, ...]
    tpot: tuple[float, ...]

    def saved(self, dense: Timed, phase: str) -> float:
        """The median of the seconds saved against dense, round by round."""
        own, base = (getattr(each, TIMES[phase]) for each in (self, dense))
        return float(median(b - a for a, b in zip(own, base, strict=True)))

    def share(self, dense: Timed, phase: str) -> float:
        """The median of its times as shares of the dense model's, round by round."""
        own, base = (getattr(each, TIMES[phase]) for each in (self, dense))
        return float(median(a / b for a, b in zip(own, base, strict=True)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"policy": self.policy.to_dict(), "ttft": self.ttft, "tpot": self.tpot}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Timed:
        """The inverse of `to_dict`."""
        policy = SkipPolicy.from_dict(document["policy"])
        return cls(policy, tuple(document["ttft"]), tuple(document["tpot"]))


@dataclass(frozen=True)
class Latency:
    """Seconds of the dense model, and the fit of the seconds that plans save, by phase."""

    dense_s: Mapping[str, float]
    coefficients: Mapping[str, tuple[float, ...]]
    errors: Mapping[str, float]
    """Root mean square error of the fit to the measured savings, as a share of dense."""
    probes: int

    def saved(self, saved: Numbers, phase: str) -> float:
        """The predicted seconds that a plan saves, from the numbers that it saves."""
        return float(phase_of(saved, phase) * _SIGNS @ np.array(self.coefficients[phase]))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "dense_s": {TIMES[phase]: seconds for phase, seconds in self.dense_s.items()},
            "coefficients": {phase: list(own) for phase, own in self.coefficients.items()},
            "errors": dict(self.errors),
            "probes": self.probes,
        }


def fit(costing: Costing, groups: Sequence[Sequence[Timed]]) -> Latency:
    """Fits a latency model to measured times.

    `groups`: policies timed together, each group beginning with dense; the first group's dense
    times count as the dense model's.
    """
    from scipy.optimize import nnls

    coefficients, errors, dense_s = {}, {}, {}
    for phase, name in TIMES.items():
        rows, savings = [], []
        for dense, *others in groups:
            # groups timed at different moments: savings are rescaled to the first group's dense
            base = median(getattr(dense, name))
            scale = median(getattr(groups[0][0], name)) / base
            for each in others:
                saved = costing.dense - costing.of(each.policy)
                rows.append(phase_of(saved, phase) * _SIGNS)
                savings.append(each.saved(dense, phase) * scale)
        table, wanted = np.array(rows), np.array(savings)
        sizes = np.abs(table).max(0)
        sizes[sizes == 0] = 1.0
        found, _ = nnls(table / sizes, wanted)
        dense_s[phase] = median(getattr(groups[0][0], name))
        coefficients[phase] = tuple(float(x) for x in found / sizes)
        missed = table / sizes @ found - wanted
        errors[phase] = float(np.sqrt(np.mean(missed**2))) / dense_s[phase]
    return Latency(dense_s, coefficients, errors, sum(len(group) - 1 for group in groups))


def probes(shape: ModelShape) -> list[SkipPolicy]:
    """Policies that separate the times of attention, FFN, classes and wirings."""
    classes, depth = frozenset(shape.classes), shape.depth
    every, half = range(depth), range(1, depth, 2)
    prompt = classes - {TokenClass.GENERATED}
    image = frozenset({TokenClass.IMAGE}) & classes or prompt
    generated = frozenset({TokenClass.GENERATED})
    wanted = [
        (every, Change(classes, FFN)),
        (half, Change(classes, FFN)),
        (every, Change(image, FFN)),
        (every, Change(generated, FFN)),
        (half, Change(classes, ATTENTION)),
        (every, Change(image, ATTENTION)),
        (half, Change(image, ATTENTION, SkippedKV.OMIT)),
        (every, Change(generated, ATTENTION)),
        (half, Change(generated, ATTENTION, SkippedKV.OMIT)),
        (half, Change(classes, BLOCK)),
        (every, Change(image, BLOCK, SkippedKV.OMIT)),
        (half, Change(generated, BLOCK)),
        (every, Change(classes, arrangement=Arrangement.PARALLEL)),
    ]
    if depth > 1:
        pairs = range(0, depth - depth % 2, 2)
        wanted.append((pairs, Change(classes, arrangement=Arrangement.PAIR)))
    return [policy_of((n, (change,)) for n in layers) for layers, change in wanted if layers]


def time_in_turn(
    model: Any,
    policies: Sequence[SkipPolicy],
    inputs: Mapping[str, Any],
    new_tokens: int,
    rounds: int,
    on_round: Callable[[], object] = lambda: None,
) -> list[Timed]:
    """Times the dense model and each policy, interleaved, for `rounds` rounds.

    `inputs`: of one prompt, on the model's device. The model's policy is restored.
    """
    every = [SkipPolicy(), *policies]
    times: list[list[Any]] = [[] for _ in every]
    before = plan_of(model).policy
    try:
        with endless(model):
            for number in range(rounds):
                for place in rotated(range(len(every)), number):
                    set_policy(model, every[place])
                    times[place].append(time_once(model, inputs, new_tokens))
                on_round()
    finally:
        set_policy(model, before)
    return [
        Timed(policy, tuple(t.ttft for t in own), tuple(t.decode for t in own))
        for policy, own in zip(every, times, strict=True)
    ]
