"""A training step: forward with loss, and backward; every peer on the same weights.

Either the projector learns and all else is frozen, as in the paper, or everything learns. A peer is
timed only if its gradients match those of autograd through the masked dense computation.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import fastskip
from benchmarks.gate import truth_of
from benchmarks.peers import DENSE, HF, Peer
from benchmarks.shapes import Models, Shape, models, prompts
from fastskip.policy import SkipPolicy
from fastskip.study.training import Parts
from fastskip.study.training.parts import names_of
from fastskip.timing import rotated
from fastskip.verification.budget import measure
from fastskip.verification.cells import GENERATED, IMAGE, TEXT
from fastskip.verification.oracle import MaskedOracle
from fastskip.wording import dtype_name

ANSWER = 8
"""Tokens at the end of each sequence that serve as labels."""
IGNORED = -100
GROUPS = ("train-forward", "train-backward", "train-step")


@dataclass(frozen=True)
class TrainingCase:
    """The work that all peers do."""

    shape: Shape
    dtype: torch.dtype
    batch: int
    parts: Parts
    peers: tuple[Peer, ...]
    rounds: int = 5

    @property
    def name(self) -> str:
        dtype = dtype_name(self.dtype)
        return f"{self.shape.name}-{dtype}-b{self.batch}-{self.parts}"


@dataclass
class TrainingMeasurement:
    """By peer: (forward, backward) seconds of every round, or why it was not timed."""

    runs: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def samples(self, peer: str, group: str) -> list[float]:
        forward, backward = zip(*self.runs[peer], strict=True)
        both = [sum(each) for each in self.runs[peer]]
        return {GROUPS[0]: list(forward), GROUPS[1]: list(backward), GROUPS[2]: both}[group]

    def seconds(self, peer: str, group: str) -> float:
        return statistics.median(self.samples(peer, group))


def measure_training(case: TrainingCase) -> TrainingMeasurement:
    """Gates every policy, then times all peers in turn, in an order that rotates every round."""
    both = models(case.shape.build, case.dtype, "cpu")
    result = TrainingMeasurement()
    policies = {p.name: p.policy(both.depth) for p in case.peers if p.policy is not None}
    short = labelled(prompts(both.hf, case.shape, 1))
    for name, policy in policies.items():
        fault = gradient_fault(both, case.parts, policy, short)
        if fault is not None:
            result.failures[name] = fault
    inputs = labelled(prompts(both.hf, case.shape, case.batch))
    contenders = [peer for peer in case.peers if peer.name not in result.failures]
    for number in range(case.rounds + 1):  # the first one warms up
        for peer in rotated(contenders, number):
            model = both.hf
            if peer.policy is not None:
                model = fastskip.set_policy(both.ours, policies[peer.name])
            times = _timed(model, case.parts, inputs)
            if number:
                result.runs.setdefault(peer.name, []).append(times)
    return result


def labelled(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The prompts, with their last tokens as labels."""
    labels = inputs["input_ids"].clone()
    labels[:, :-ANSWER] = IGNORED
    return {**inputs, "labels": labels}


def gradient_fault(
    both: Models, parts: Parts, policy: SkipPolicy, inputs: dict[str, Tensor]
) -> str | None:
    """What is wrong with a policy's gradients; ``None`` if they are right."""
    pair = both.hf, truth_of(both.hf)
    eager, exact = (_masked_gradients(model, parts, policy, inputs) for model in pair)
    ours = fastskip.set_policy(both.ours, policy)
    with _Learning(ours, parts) as learning:
        ours(**inputs, use_cache=False).loss.backward()
        found = learning.gradients()
    for name, gradient in found.items():
        budget = measure(name, gradient, eager[name], exact[name])
        if not budget.holds:
            return str(budget)
    return None


def _masked_gradients(
    model: Any, parts: Parts, policy: SkipPolicy, inputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    given = dict(inputs)
    labels = given.pop("labels")
    classes = torch.where(given["input_ids"] == model.config.image_token_id, IMAGE, TEXT)
    classes[labels != IGNORED] = GENERATED
    given["pixel_values"] = given["pixel_values"].to(model.dtype)
    with _Learning(model, parts) as learning:
        with MaskedOracle(model, policy.to_dict()) as oracle:
            logits = oracle.forward(**given, token_classes=classes)
        cross_entropy(logits[:, :-1].mT.float(), labels[:, 1:]).backward()
        return learning.gradients()


class _Learning:
    """Within this block the given parts require gradients; on exit these are cleared."""

    def __init__(self, model: Any, parts: Parts) -> None:
        self._model, self._names = model, names_of(model, parts)

    def __enter__(self) -> _Learning:
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_(name in self._names)
        return self

    def __exit__(self, *_: object) -> None:
        self._model.requires_grad_(False)
        self._model.zero_grad(set_to_none=True)

    def gradients(self) -> dict[str, Tensor]:
        """By parameter; zeros where no gradient flowed."""
        return {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for name, p in self._model.named_parameters()
            if name in self._names
        }


def _timed(model: Any, parts: Parts, inputs: dict[str, Tensor]) -> tuple[float, float]:
    with _Learning(model, parts):
        began = time.perf_counter()
        loss = model(**inputs, use_cache=False).loss
        middle = time.perf_counter()
        loss.backward()
        ended = time.perf_counter()
    return middle - began, ended - middle


def speed_ups(measurement: TrainingMeasurement, peer: str, group: str) -> dict[str, float]:
    """Over our dense model and over Hugging Face's."""
    own = measurement.seconds(peer, group)
    return {
        "speedup_vs_dense": measurement.seconds(DENSE.name, group) / own,
        "speedup_vs_hf": measurement.seconds(HF.name, group) / own,
    }
