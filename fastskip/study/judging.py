"""Policies of one model, judged on the same items: scores, agreement with dense, compute, times.

Every policy is held to the dense model, item by item. Times are taken in turn, so that what
disturbs the machine hits all alike.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from statistics import median
from typing import Any

from fastskip.intervals import Estimate
from fastskip.loading import plan_of, record_routing, set_policy
from fastskip.policy import SkipPolicy
from fastskip.study.agreement import AnswerAgreement, AnswerLog, end_tokens
from fastskip.study.captions import CaptionScores
from fastskip.study.comparison import prompt_sizes
from fastskip.study.evaluation import Evaluation, Exam
from fastskip.study.fingerprints import (
    combined,
    model_fingerprint,
    policy_fingerprint,
)
from fastskip.study.items import Item
from fastskip.study.json_file import json_text
from fastskip.study.metrics import Metric, YesNo
from fastskip.study.samples import placed
from fastskip.study.seen_rates import seen_rates
from fastskip.study.smaller_images import taking_smaller_images
from fastskip.timing import endless, time_once

DENSE = "dense"


class Verdict(StrEnum):
    """What the items say of a policy's answers against the dense model's, at 95 %."""

    BETTER = "better"
    WORSE = "worse"
    NOT_TOLD_APART = "not told apart"

    @classmethod
    def of(cls, change: Estimate) -> Verdict:
        """By where the interval of the differences lies."""
        if change.is_above_zero:
            return cls.BETTER
        return cls.WORSE if change.is_below_zero else cls.NOT_TOLD_APART


@dataclass(frozen=True, slots=True)
class Speed:
    """Of the first item, batch 1: medians in seconds, TTFT with the vision tower in it."""

    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class Judgement:
    """One policy, judged.

    Attributes:
        label: how it was named.
        policy: as in a policy file.
        evaluation: its answers and their scores.
        agreement: with the dense model's answers.
        flops: of the decoder and lm_head for the first item, with as many tokens as are timed;
            what routers skip counts as it was seen.
        speed: `None` where times were not taken.
    """

    label: str
    policy: Mapping[str, Any]
    evaluation: Evaluation
    agreement: AnswerAgreement
    flops: int
    speed: Speed | None = None

    def change(self, dense: Judgement) -> Estimate:
        """How much better than dense its answers score, item by item.

        Raises:
            ScaleError: some items are judged by CIDEr and others are not.
        """
        return self.evaluation.minus(dense.evaluation)

    def verdict(self, dense: Judgement) -> Verdict:
        """What the items say; errors as of `change`."""
        return Verdict.of(self.change(dense))

    def yes_no(self, items: Sequence[Item]) -> YesNo | None:
        """Of the items under that metric together; `None` without any."""
        asked = [n for n, item in enumerate(items) if item.metric is Metric.YES_NO]
        if not asked:
            return None
        answers = [self.evaluation.judged[n].answer for n in asked]
        return YesNo.of(answers, [items[n].references[0] for n in asked])

    def captions(self, items: Sequence[Item]) -> CaptionScores | None:
        """Of the items under CIDEr together; `None` without any."""
        asked = [n for n, item in enumerate(items) if item.metric is Metric.CIDER]
        if not asked:
            return None
        answers = [self.evaluation.judged[n].answer for n in asked]
        return CaptionScores.of(answers, [items[n].references for n in asked])

    @property
    def empty(self) -> int:
        """Answers without any text: the model's own, as nothing else is taken for one."""
        return sum(not each.answer for each in self.evaluation.judged)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "label": self.label,
            "policy": dict(self.policy),
            "evaluation": self.evaluation.to_dict(),
            "agreement": asdict(self.agreement),
            "flops": self.flops,
            "speed": None if self.speed is None else asdict(self.speed),
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Judgement:
        """What `to_dict` gave."""
        speed = document["speed"]
        agreement = {name: tuple(values) for name, values in document["agreement"].items()}
        return cls(
            label=document["label"],
            policy=document["policy"],
            evaluation=Evaluation.from_dict(document["evaluation"]),
            agreement=AnswerAgreement(**agreement),
            flops=document["flops"],
            speed=None if speed is None else Speed(**speed),
        )


class JudgementFile:
    """Judgements as they are made, a line of JSON each, so that a run that was cut off goes on."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self) -> dict[str, Judgement]:
        """By fingerprint of what was judged; a line that is damaged, or half of one, is none."""
        found = {}
        if self._path.is_file():
            for line in self._path.read_bytes().splitlines():
                # whatever is not as it was written is asked again
                with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    document = json.loads(line)
                    found[document["of"]] = Judgement.from_dict(document["judgement"])
        return found

    def append(self, of: str, judgement: Judgement) -> None:
        """Adds a line."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")  # behind half a line of a killed process
            text = json_text({"of": of, "judgement": judgement.to_dict()})
            file.write(text.encode() + b"\n")


@dataclass(frozen=True, slots=True)
class _Contender:
    """Who answers which exam; `images`: by how much its images are smaller."""

    label: str
    policy: SkipPolicy
    exam: Exam
    images: int = 1

    def key(self, asked: str) -> str:
        """What a judgement of it is kept under."""
        own = combined(asked, policy_fingerprint(self.policy))
        return own if self.images == 1 else combined(own, self.images)

    @contextmanager
    def on(self, model: Any) -> Iterator[None]:
        """The model as it answers within this block."""
        set_policy(model, self.policy)
        with nullcontext() if self.images == 1 else taking_smaller_images(model):
            yield


def judge(
    model: Any,
    policies: Sequence[tuple[str, SkipPolicy]],
    exam: Exam,
    *,
    smaller: Mapping[int, Exam] | None = None,
    new_tokens: int = 16,
    rounds: int = 5,
    kept: JudgementFile | None = None,
    on_policy: Callable[[str], object] = lambda label: None,
    on_batch: Callable[[], object] = lambda: None,
) -> tuple[Judgement, ...]:
    """Judge the dense model and each policy; the dense one comes first.

    Args:
        model: a prepared one; it is left with the policy that it came with.
        policies: labels and policies; one that is dense is the first one again.
        exam: the items; its first one is what compute and times are of.
        smaller: by how much the images of a dense rival are smaller, and the same items with them
            (`smaller_images.shrunk_processor`).
        new_tokens: tokens that are timed.
        rounds: timed runs of each, 0 for none.
        kept: where judgements are kept; what is there already is not asked again. Times always are.
        on_policy: called with each label before its items are answered.
        on_batch: called after each batch.
    Raises:
        ValueError: `new_tokens` or `rounds` is too small.
        PolicyError: a policy does not fit the model.
        ItemError: an item cannot be used, or the model has no positions for `new_tokens`.
        SmallerImagesError: the model takes no smaller images.
    """
    for name, value, least in (("new_tokens", new_tokens, 2), ("rounds", rounds, 0)):
        if value < least:
            raise ValueError(f"{name}: {value}; allowed: {least} or more")
    if rounds:
        exam.single(0, new_tokens)  # whether they fit is known before anybody answers
    every = [
        _Contender(label, policy, exam) for label, policy in ((DENSE, SkipPolicy()), *policies)
    ]
    for factor, own in (smaller or {}).items():
        every.append(_Contender(f"images 1/{factor}", SkipPolicy(), own, factor))
    before = plan_of(model).policy
    try:
        # What does not fit the model is found before anything takes time; what a policy says of
        # its origin is told when it is judged.
        for each in every:
            set_policy(model, replace(each.policy, provenance={}))
        found = _answered(model, every, new_tokens, kept, on_policy, on_batch)
        if rounds:
            speeds = _timed(model, every, new_tokens, rounds)
            found = [replace(own, speed=speed) for own, speed in zip(found, speeds, strict=True)]
    finally:
        set_policy(model, before)
    return tuple(found)


def _answered(
    model: Any,
    every: Sequence[_Contender],
    new_tokens: int,
    kept: JudgementFile | None,
    on_policy: Callable[[str], object],
    on_batch: Callable[[], object],
) -> list[Judgement]:
    known, exam = {} if kept is None else kept.load(), every[0].exam
    # Rounding is the device's own, and some routers decide by the batch.
    about = model_fingerprint(model), str(model.dtype), model.device.type
    asked = combined(*about, exam.fingerprint, len(exam), exam.new_tokens, new_tokens)
    keys = [each.key(asked) for each in every]
    dense: AnswerLog | None = None
    if not all(key in known for key in keys):
        # Its answers are what the others' are compared with, so it answers again.
        known.pop(keys[0], None)
    found = []
    for key, each in zip(keys, every, strict=True):
        on_policy(each.label)
        judgement = known.get(key)
        if judgement is None:
            log = AnswerLog(end_tokens(model))
            with each.on(model):
                evaluation = each.exam.take(model, on_batch, log.note)
                flops = _flops(model, each.exam, new_tokens)
            dense = dense or log
            agreement = log.against(dense)
            judgement = Judgement(each.label, each.policy.to_dict(), evaluation, agreement, flops)
            if kept is not None:
                kept.append(key, judgement)
        # one that was kept may be of another name, or of an older date
        found.append(replace(judgement, label=each.label, policy=each.policy.to_dict()))
    return found


def _flops(model: Any, exam: Exam, new_tokens: int) -> int:
    """Of the first item; where routers decide, at the rates that are seen with it."""
    inputs, plan = exam.single(0), plan_of(model)
    n_image, n_text, before = prompt_sizes(inputs, model.config)
    if not plan.routed:
        return plan.flops(n_image, n_text, new_tokens, text_before=before)
    with endless(model), record_routing(model) as record:
        model.generate(**placed(inputs, model), do_sample=False, max_new_tokens=new_tokens)
    prompt, steps = (
        plan.expected_cost(n_image, n_text, new_tokens, rate=rate, text_before=before)
        for rate in seen_rates(plan, record, new_tokens)
    )
    return prompt.prefill.flops + steps.decode.flops


def _timed(model: Any, every: Sequence[_Contender], new_tokens: int, rounds: int) -> list[Speed]:
    inputs = [placed(each.exam.single(0), model) for each in every]
    times: list[list[Any]] = [[] for _ in every]
    with endless(model):
        for number in range(rounds):
            first = number * len(every) // rounds
            order = [*range(first, len(every)), *range(first)]
            for place in order:
                with every[place].on(model):
                    times[place].append(time_once(model, inputs[place], new_tokens))
    return [Speed(median(t.ttft for t in own), median(t.decode for t in own)) for own in times]
