"""Score captions against human references with pycocoevalcap (the extra `captions`).

CIDEr (Vedantam et al., "CIDEr: Consensus-based Image Description Evaluation", 2015; CIDEr-D, with
n-grams up to length four and the usual factor of ten), BLEU-1 to 4 and ROUGE-L. pycocoevalcap's
METEOR, SPICE and PTB tokenizer are Java programs and are not used: `tokens` splits texts instead,
so scores can differ from those computed on PTB-tokenized texts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from fastskip.wording import counted

INSTALL = "pip install 'fastskip[captions]'"
LEAST = 2
"""Fewest captions that CIDEr can score: a word that occurs in every item's references weighs 0."""
_TOKEN = re.compile(r"\d+(?:[.,]\d+)+|n't\b|'(?:s|m|d|re|ve|ll)\b|\w+(?:-\w+)*")
_NOT = re.compile(r"(?<=\w)(?=n't\b)")


class CaptionError(ValueError):
    """Captions cannot be scored; says what is missing and what is allowed."""


@dataclass(frozen=True, slots=True)
class CaptionScores:
    """Corpus scores: CIDEr (10 at most, about 1 among humans), BLEU-1 to 4, ROUGE-L."""

    cider: float
    bleu: tuple[float, ...]
    rouge_l: float

    @classmethod
    def of(cls, answers: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
        """Score answers against the human references of each.

        Raises:
            CaptionError: there are too few, or the scorers are not installed.
        """
        check(len(answers))
        from pycocoevalcap.bleu.bleu_scorer import BleuScorer
        from pycocoevalcap.rouge.rouge import Rouge

        texts, true = _tokenized(answers, references)
        bleu, rouge = BleuScorer(n=4), Rouge()
        for caption, own in zip(texts, true, strict=True):
            bleu += (caption, own)
        found, _ = bleu.compute_score(option="closest", verbose=0)
        return cls(
            cider=fmean(cider(answers, references)),
            bleu=tuple(float(each) for each in found),
            rouge_l=fmean(
                float(rouge.calc_score([caption], own))
                for caption, own in zip(texts, true, strict=True)
            ),
        )


def cider(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """The CIDEr of each answer, from 0 to 10; the corpus score is their mean.

    N-gram weights (IDF) come from the references of all items, each item being one document.

    Raises:
        CaptionError: there are too few, or the scorers are not installed.
    """
    check(len(answers))
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    scorer: Any = CiderScorer()
    for caption, own in zip(*_tokenized(answers, references), strict=True):
        scorer += (caption, own)
    _, found = scorer.compute_score()
    return [float(each) for each in found]


def check(count: int) -> None:
    """Check that `count` captions can be scored in this environment.

    Raises:
        CaptionError: there are too few, or the scorers are not installed.
    """
    if count < LEAST:
        allowed = f"{LEAST} or more, since words are weighted by how many items they occur in"
        raise CaptionError(f"metric cider: {counted(count, 'item')}; allowed: {allowed}")
    try:
        import pycocoevalcap.cider.cider_scorer  # noqa: F401
    except ImportError as error:
        allowed = f"with pycocoevalcap installed ({INSTALL})"
        raise CaptionError(f"metric cider: {error}; allowed: {allowed}") from error


def tokens(text: str) -> list[str]:
    """Lower-case words without punctuation; `n't`, `'s` and the like are separate words."""
    return _TOKEN.findall(_NOT.sub(" ", text.lower().replace("\u2019", "'")))


def _tokenized(
    answers: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """Texts as the scorers expect them: tokens joined by spaces."""
    return (
        [" ".join(tokens(answer)) for answer in answers],
        [[" ".join(tokens(each)) for each in own] for own in references],
    )
