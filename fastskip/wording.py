"""How numbers are told: counts of things, and scores on their scale."""

from enum import StrEnum

FEW_ITEMS = 100
"""Fewer items than these show large differences only."""


def counted(number: int, noun: str) -> str:
    """Such as "1 item" and "2 items"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


class Scale(StrEnum):
    """What scores are counted in; a mean over both would say nothing."""

    SHARE = "share"
    """From 0 to 1, told in percent."""
    CIDER = "cider"
    """From 0 to 10, told times 100, as papers do."""

    @classmethod
    def of(cls, metric: str) -> "Scale":
        """That of a metric's scores."""
        return cls.CIDER if metric == cls.CIDER else cls.SHARE

    @property
    def heading(self) -> str:
        """What a column of such scores is called."""
        return "score" if self is Scale.SHARE else "CIDEr"

    @property
    def points(self) -> str:
        """What differences of such scores, times 100, are called."""
        return "points" if self is Scale.SHARE else "CIDEr"

    @property
    def axis(self) -> str:
        """What an axis of such scores is called."""
        return "score, %" if self is Scale.SHARE else "CIDEr, times 100"

    def text(self, score: float) -> str:
        """Such as "98.5%", and "112.3" of CIDEr."""
        return f"{score:.1%}" if self is Scale.SHARE else f"{100 * score:.1f}"
