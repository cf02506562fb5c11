"""Captions against people's, by the scorers of pycocoevalcap (the extra `captions`).

CIDEr (Vedantam et al., "CIDEr: Consensus-based Image Description Evaluation", 2015; its form D with
four lengths of n-grams and a factor of ten, as the field reports it), BLEU-1 to 4 and ROUGE-L. Its
METEOR, SPICE and PTB tokenizer are Java programs and are not used: texts are parted by `tokens`
here, so that scores can differ from those of texts that the PTB tokenizer has parted.
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
"""Captions that CIDEr needs: a word that all items' references have counts nothing."""
_TOKEN = re.compile(r"\d+(?:[.,]\d+)+|n't\b|'(?:s|m|d|re|ve|ll)\b|\w+(?:-\w+)*")
_NOT = re.compile(r"(?<=\w)(?=n't\b)")


class CaptionError(ValueError):
    """Captions that cannot be scored; says what is missing and what is allowed."""


@dataclass(frozen=True, slots=True)
class CaptionScores:
    """Of captions together: CIDEr (10 at most, about 1 between people), BLEU-1 to 4, ROUGE-L."""

    cider: float
    bleu: tuple[float, ...]
    rouge_l: float

    @classmethod
    def of(cls, answers: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
        """Of answers, and of each what people wrote.

        Raises:
            CaptionError: there are too few, or the scorers are not installed.
        """
        check(len(answers))
        from pycocoevalcap.bleu.bleu_scorer import BleuScorer
        from pycocoevalcap.rouge.rouge import Rouge

        told, true = _parted(answers, references)
        bleu, rouge = BleuScorer(n=4), Rouge()
        for caption, own in zip(told, true, strict=True):
            bleu += (caption, own)
        found, _ = bleu.compute_score(option="closest", verbose=0)
        return cls(
            cider=fmean(cider(answers, references)),
            bleu=tuple(float(each) for each in found),
            rouge_l=fmean(
                float(rouge.calc_score([caption], own))
                for caption, own in zip(told, true, strict=True)
            ),
        )


def cider(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """The CIDEr of each answer, from 0 to 10; that of all together is their mean.

    How much an n-gram counts is taken from the references of all items (one item: one document).

    Raises:
        CaptionError: there are too few, or the scorers are not installed.
    """
    check(len(answers))
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    scorer: Any = CiderScorer()
    for caption, own in zip(*_parted(answers, references), strict=True):
        scorer += (caption, own)
    _, found = scorer.compute_score()
    return [float(each) for each in found]


def check(count: int) -> None:
    """Whether so many captions can be scored here.

    Raises:
        CaptionError: there are too few, or the scorers are not installed.
    """
    if count < LEAST:
        allowed = f"{LEAST} or more, since words are weighed by how many items they are of"
        raise CaptionError(f"metric cider: {counted(count, 'item')}; allowed: {allowed}")
    try:
        import pycocoevalcap.cider.cider_scorer  # noqa: F401
    except ImportError as error:
        allowed = f"with pycocoevalcap installed ({INSTALL})"
        raise CaptionError(f"metric cider: {error}; allowed: {allowed}") from error


def tokens(text: str) -> list[str]:
    """Words in lower case, without punctuation; `n't`, `'s` and the like are words of their own."""
    return _TOKEN.findall(_NOT.sub(" ", text.lower().replace("\u2019", "'")))


def _parted(
    answers: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """Texts as the scorers take them: tokens with spaces between."""
    return (
        [" ".join(tokens(answer)) for answer in answers],
        [[" ".join(tokens(each)) for each in own] for own in references],
    )
