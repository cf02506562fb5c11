"""How near a model's answers are to the dense model's, where nobody says what is right."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AnswerAgreement:
    """By item, in the exam's order.

    Attributes:
        tokens: the share of the dense answer's tokens before the first that differs, in [0, 1].
        divergence: Kullback-Leibler divergence, in nats, of the model's distribution of the first
            answer token from the dense model's: 0 where they are the same.
    """

    tokens: tuple[float, ...]
    divergence: tuple[float, ...]

    @property
    def means(self) -> tuple[float, float]:
        """Of the tokens, and of the divergence."""
        return fmean(self.tokens), fmean(self.divergence)


class AnswerLog:
    """What a model answered to the items of an exam, token by token; `note` is an `Exam`'s watch.

    Keeps `V` numbers an item on the host.
    """

    def __init__(self, ends: Collection[int]) -> None:
        """`ends`: tokens that end an answer; what comes after one is filling."""
        self._ends = frozenset(ends)
        self._answers: dict[int, tuple[int, ...]] = {}
        self._first: dict[int, Tensor] = {}

    def note(self, items: Sequence[int], tokens: Tensor, scores: Tensor) -> None:
        """The answers of some items: `tokens [B, n]`, the first one's `scores [B, V]`."""
        logs = F.log_softmax(scores, dim=-1).cpu()
        for item, answer, log in zip(items, tokens.tolist(), logs, strict=True):
            self._answers[item] = self._ended(answer)
            self._first[item] = log

    def against(self, dense: AnswerLog) -> AnswerAgreement:
        """How near these answers are to those of the dense model.

        Raises:
            ValueError: the dense model answered other items.
        """
        if self._answers.keys() != dense._answers.keys():
            raise ValueError("answers: of different items; allowed: two logs of the same exam")
        tokens, divergence = [], []
        for item in sorted(self._answers):
            mine, theirs = self._answers[item], dense._answers[item]
            pairs = zip(mine, theirs, strict=False)
            same = next(
                (n for n, (a, b) in enumerate(pairs) if a != b), min(map(len, (mine, theirs)))
            )
            tokens.append(same / len(theirs))
            # log_softmax of a token that is ruled out is -inf on both sides; of a model that
            # overflows no token is likely, as it has no distribution
            own, true = (
                log[item].nan_to_num(nan=-1e9, neginf=-1e9) for log in (self._first, dense._first)
            )
            found = F.kl_div(own, true, reduction="sum", log_target=True)
            divergence.append(max(0.0, float(found)))
        return AnswerAgreement(tuple(tokens), tuple(divergence))

    def _ended(self, answer: Sequence[int]) -> tuple[int, ...]:
        for number, token in enumerate(answer):
            if token in self._ends:
                return tuple(answer[: number + 1])
        return tuple(answer)


def end_tokens(model: object) -> frozenset[int]:
    """Tokens that end an answer of a model's `generate`."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = torch.as_tensor([] if found is None else found, dtype=torch.int64).flatten()
    return frozenset(ids.tolist())
