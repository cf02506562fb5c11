"""Judge one model's policies on the same items: scores, agreement with dense, compute, times.

Every policy is compared with the dense model item by item. Timed runs are interleaved, so that
disturbances on the machine affect all policies alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from fastskip.fingerprints import model_fingerprint
from fastskip.intervals import Estimate, Verdict
from fastskip.loading import plan_of, record_routing, set_policy
from fastskip.plan.costs import generation_cost
from fastskip.policy import SkipPolicy
from fastskip.study.calls import end_tokens, placed
from fastskip.study.counts import check_counts
from fastskip.study.evaluation.agreement import AnswerAgreement, AnswerLog
from fastskip.study.evaluation.answers import Evaluation
from fastskip.study.evaluation.captions import CaptionScores
from fastskip.study.evaluation.comparison import prompt_sizes
from fastskip.study.evaluation.exam import Exam
from fastskip.study.evaluation.items import Item
from fastskip.study.evaluation.metrics import Metric, YesNo
from fastskip.study.evaluation.smaller_images import taking_smaller_images
from fastskip.study.fingerprints import combined, policy_fingerprint
from fastskip.study.kept_lines import KeptLines
from fastskip.study.observed_rates import observed_rates
from fastskip.timing import endless, rotated, time_once

DENSE = "dense"


@dataclass(frozen=True, slots=True)
class Speed:
    """On the first item at batch 1: medians in seconds; TTFT includes the vision tower."""

    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class Judgement:
    """One policy, judged.

    Attributes:
        label: the name it was given.
        policy: as in a policy file.
        evaluation: its answers and their scores.
        agreement: with the dense model's answers.
        flops: of the decoder and lm_head on the first item, with as many new tokens as are timed;
            routers count at the rates observed there.
        speed: `None` if no times were taken.
    """

    label: str
    policy: Mapping[str, Any]
    evaluation: Evaluation
    agreement: AnswerAgreement
    flops: int
    speed: Speed | None = None

    def change(self, dense: Judgement) -> Estimate:
        """How much better than dense its answers score: a paired difference.

        Raises:
            ScaleError: some items are judged by CIDEr and others are not.
        """
        return self.evaluation.minus(dense.evaluation)

    def verdict(self, dense: Judgement) -> Verdict:
        """The verdict on `change`, which documents the errors."""
        return Verdict.of(self.change(dense))

    def yes_no(self, items: Sequence[Item]) -> YesNo | None:
        """Accuracy, precision and recall over the yes/no items; `None` if there are none."""
        asked = [n for n, item in enumerate(items) if item.metric is Metric.YES_NO]
        if not asked:
            return None
        answers = [self.evaluation.judged[n].answer for n in asked]
        return YesNo.of(answers, [items[n].references[0] for n in asked])

    def captions(self, items: Sequence[Item]) -> CaptionScores | None:
        """Corpus scores over the items under CIDEr; `None` if there are none."""
        asked = [n for n, item in enumerate(items) if item.metric is Metric.CIDER]
        if not asked:
            return None
        answers = [self.evaluation.judged[n].answer for n in asked]
        return CaptionScores.of(answers, [items[n].references for n in asked])

    @property
    def empty(self) -> int:
        """How many answers are empty: nothing is substituted for an empty answer."""
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
    """Judgements, appended as JSON lines as they are made, so an interrupted run can resume."""

    def __init__(self, path: Path) -> None:
        self._lines = KeptLines(path, "judgement")

    def load(self) -> dict[str, Judgement]:
        """Judgements by fingerprint of what was judged; damaged lines are ignored."""
        found = {}
        for key, document in self._lines:
            # anything that does not parse is judged again
            with suppress(ValueError, KeyError, TypeError, AttributeError):
                found[key] = Judgement.from_dict(document)
        return found

    def append(self, of: str, judgement: Judgement) -> None:
        """Append a judgement."""
        self._lines.append(of, judgement.to_dict())


@dataclass(frozen=True, slots=True)
class _Contender:
    """A policy and the exam it takes; `images`: the factor that its images are shrunk by."""

    label: str
    policy: SkipPolicy
    exam: Exam
    images: int = 1

    def key(self, asked: str) -> str:
        """The key under which its judgement is stored."""
        own = combined(asked, policy_fingerprint(self.policy))
        return own if self.images == 1 else combined(own, self.images)

    @contextmanager
    def on(self, model: Any) -> Iterator[None]:
        """Within this block the model runs as this contender."""
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
    """Judge the dense model, then each policy.

    Args:
        model: a prepared model; its current policy is restored at the end.
        policies: labels and policies; a dense one repeats the first judgement.
        exam: the items; compute and times are measured on the first.
        smaller: further dense baselines on smaller images: the factor that images are shrunk by,
            and the same items with them (`smaller_images.shrunk_processor`).
        new_tokens: how many tokens the timed runs generate.
        rounds: timed runs of each, 0 for none.
        kept: stores judgements; those already in it are not repeated. Times are always taken anew.
        on_policy: called with each label before its items are answered.
        on_batch: called after each batch.
    Raises:
        ValueError: `new_tokens` or `rounds` is too small.
        PolicyError: a policy does not fit the model.
        ItemError: an item cannot be used, or the model has no positions left for `new_tokens`.
        SmallerImagesError: the model cannot take smaller images.
    """
    check_counts(ValueError, new_tokens=(new_tokens, 2), rounds=(rounds, 0))
    if rounds:
        exam.single(0, new_tokens)  # fail before answering anything if they do not fit
    every = [
        _Contender(label, policy, exam) for label, policy in ((DENSE, SkipPolicy()), *policies)
    ]
    for factor, own in (smaller or {}).items():
        every.append(_Contender(f"images 1/{factor}", SkipPolicy(), own, factor))
    before = plan_of(model).policy
    try:
        # Fail on policies that do not fit the model before spending time; warnings about their
        # provenance are left for when they are judged.
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
    # Rounding depends on the device, and some routers decide per batch.
    about = model_fingerprint(model), str(model.dtype), model.device.type
    asked = combined(*about, exam.fingerprint, len(exam), exam.new_tokens, new_tokens)
    keys = [each.key(asked) for each in every]
    dense: AnswerLog | None = None
    if not all(key in known for key in keys):
        # The others are compared with the dense model's tokens, which are not stored.
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
        # a stored judgement may have another label, or an older provenance
        found.append(replace(judgement, label=each.label, policy=each.policy.to_dict()))
    return found


def _flops(model: Any, exam: Exam, new_tokens: int) -> int:
    """FLOPs on the first item; routers count at the rates observed on it."""
    inputs, plan = exam.single(0), plan_of(model)
    n_image, n_text, before = prompt_sizes(inputs, model.config)
    if not plan.routed:
        return plan.flops(n_image, n_text, new_tokens, text_before=before)
    with endless(model), record_routing(model) as record:
        model.generate(**placed(inputs, model), do_sample=False, max_new_tokens=new_tokens)
    prompt, steps = (
        generation_cost(plan.expected(rate), n_image, n_text, new_tokens, text_before=before)
        for rate in observed_rates(plan, record, new_tokens)
    )
    return prompt.prefill.flops + steps.decode.flops


def _timed(model: Any, every: Sequence[_Contender], new_tokens: int, rounds: int) -> list[Speed]:
    inputs = [placed(each.exam.single(0), model) for each in every]
    times: list[list[Any]] = [[] for _ in every]
    with endless(model):
        for number in range(rounds):
            for place in rotated(range(len(every)), number):
                with every[place].on(model):
                    times[place].append(time_once(model, inputs[place], new_tokens))
    return [Speed(median(t.ttft for t in own), median(t.decode for t in own)) for own in times]
