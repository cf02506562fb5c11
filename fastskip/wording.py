"""How numbers are worded: counts of things, dtypes, and scores on their scale."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

FEW_ITEMS = 100
"""Fewer items than this reveal only large differences."""


def counted(number: int, noun: str) -> str:
    """For example "1 item" and "2 items"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def significant(value: float, digits: int = 3) -> str:
    """A number in so many digits, or in all before its point: 0.123, 12.3, 1234, never 1.23e+03."""
    return f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def dtype_name(dtype: torch.dtype) -> str:
    """For example "bfloat16", without torch in front of it."""
    return str(dtype).removeprefix("torch.")


class Scale(StrEnum):
    """The unit of scores; a mean over different scales is meaningless."""

    SHARE = "share"
    """From 0 to 1, shown in percent."""
    CIDER = "cider"
    """From 0 to 10, shown times 100, as in papers."""

    @classmethod
    def of(cls, metric: str) -> Scale:
        """The scale of a metric's scores."""
        return cls.CIDER if metric == cls.CIDER else cls.SHARE

    @property
    def heading(self) -> str:
        """The heading of a column of such scores."""
        return "score" if self is Scale.SHARE else "CIDEr"

    @property
    def points(self) -> str:
        """The unit of differences of such scores, times 100."""
        return "points" if self is Scale.SHARE else "CIDEr"

    @property
    def axis(self) -> str:
        """The label of an axis of such scores."""
        return "score, %" if self is Scale.SHARE else "CIDEr, times 100"

    def text(self, score: float) -> str:
        """For example "98.5%", or "112.3" for CIDEr."""
        return f"{score:.1%}" if self is Scale.SHARE else f"{100 * score:.1f}"
