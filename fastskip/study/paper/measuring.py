"""What every cell is measured on: held-out items, and the workload of a typical one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from fastskip.demo.evaluation import Item as Asked
from fastskip.demo.evaluation import held_out
from fastskip.demo.scenes import QuestionKind, draw
from fastskip.demo.text import ASSISTANT, IMAGE_TOKENS
from fastskip.plan.single_call import SingleCall
from fastskip.study.evaluation.exam import Exam
from fastskip.study.evaluation.items import Item
from fastskip.study.evaluation.metrics import Metric

CAPTION = QuestionKind.CAPTION.value
QUESTIONS = tuple(kind for kind in QuestionKind if kind is not QuestionKind.CAPTION)
QUESTION_KINDS = tuple(kind.value for kind in QUESTIONS)
TEXT_BEFORE = 2
"""The begin token and "USER:"."""
FIRST_SEED = 1000
"""The scenes of seed 0 are drawn with this seed; other parts of the package use low ones."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured per seed: items, and steps and sequences per step of each training."""

    questions: int = 100
    captions: int = 36
    steps: int = 60
    sequences: int = 10
    similarity_samples: int = 64
    timing_rounds: int = 7


QUICK = Effort(questions=60, captions=24, steps=20, similarity_samples=16, timing_rounds=3)


def asked(seed: int, effort: Effort) -> list[Asked]:
    """The held-out questions and captions of one seed; training saw none of their scenes."""
    return [
        *held_out(effort.questions, FIRST_SEED + seed, QUESTIONS),
        *held_out(effort.captions, FIRST_SEED + seed, (QuestionKind.CAPTION,)),
    ]


def items_of(found: Sequence[Asked]) -> list[Item]:
    """Scenes and questions as items: questions scored by exact match, captions by F1."""
    return [
        Item(
            question.text,
            (question.answer,),
            (draw(scene),),
            kind=question.kind.value,
            metric=Metric.CAPTION if question.kind is QuestionKind.CAPTION else Metric.EXACT,
        )
        for scene, question in found
    ]


def exam_of(seed: int, effort: Effort, processor: Any, config: Any) -> Exam:
    """The items of one seed, ready to be answered by models."""
    items = items_of(asked(seed, effort))
    return Exam(items, processor, config=config, batch_size=64, new_tokens=32)


def workload(found: Sequence[Asked], tokenizer: Any) -> SingleCall:
    """The rows of a typical item: mean counts, rounded, including the end token."""

    def length(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    around = TEXT_BEFORE + length(ASSISTANT)
    n_text = around + round(fmean(length(question.text) for _, question in found))
    n_new = 1 + round(fmean(length(question.answer) for _, question in found))
    return SingleCall(IMAGE_TOKENS, n_text, TEXT_BEFORE, n_new)
