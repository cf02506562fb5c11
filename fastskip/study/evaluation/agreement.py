"""How closely a model's answers match the dense model's; needs no ground truth."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch.nn.functional as F
from torch import Tensor

from fastskip.study.calls import in_answers


@dataclass(frozen=True, slots=True)
class AnswerAgreement:
    """Per item, in exam order.

    Attributes:
        tokens: the share of the dense answer's tokens before the first mismatch, in [0, 1].
        divergence: KL(dense || this model), in nats, of the distributions over the first answer
            token: 0 where they are identical.
    """

    tokens: tuple[float, ...]
    divergence: tuple[float, ...]

    @property
    def means(self) -> tuple[float, float]:
        """Mean token agreement and mean divergence."""
        return fmean(self.tokens), fmean(self.divergence)


class AnswerLog:
    """A model's answers to an exam, token by token; pass `note` to `Exam.take` as `watch`.

    Keeps `V` numbers per item in host memory.
    """

    def __init__(self, ends: Collection[int]) -> None:
        """`ends`: tokens that end an answer; anything after one is padding."""
        self._ends = frozenset(ends)
        self._answers: dict[int, tuple[int, ...]] = {}
        self._first: dict[int, Tensor] = {}

    def note(self, items: Sequence[int], tokens: Tensor, scores: Tensor) -> None:
        """Record a batch: its answers' `tokens [B, n]`, and the first token's `scores [B, V]`."""
        logs = F.log_softmax(scores, dim=-1).cpu()
        answers = zip(tokens, in_answers(tokens, self._ends), strict=True)
        for item, (answer, is_own), log in zip(items, answers, logs, strict=True):
            self._answers[item] = tuple(answer[is_own].tolist())
            self._first[item] = log

    def against(self, dense: AnswerLog) -> AnswerAgreement:
        """How closely these answers match the dense model's.

        Raises:
            ValueError: the dense model answered different items.
        """
        if self._answers.keys() != dense._answers.keys():
            raise ValueError("answers: to different items; allowed: two logs of the same exam")
        tokens, divergence = [], []
        for item in sorted(self._answers):
            mine, theirs = self._answers[item], dense._answers[item]
            pairs = zip(mine, theirs, strict=False)
            same = next(
                (n for n, (a, b) in enumerate(pairs) if a != b), min(map(len, (mine, theirs)))
            )
            tokens.append(same / len(theirs))
            # a suppressed token has a log-probability of -inf on both sides; a model that
            # overflows (NaN) has no distribution, so every token counts as improbable
            own, true = (
                log[item].nan_to_num(nan=-1e9, neginf=-1e9) for log in (self._first, dense._first)
            )
            found = F.kl_div(own, true, reduction="sum", log_target=True)
            divergence.append(max(0.0, float(found)))
        return AnswerAgreement(tuple(tokens), tuple(divergence))
