"""What a policy may cost: "tpot 1.5x", "ttft 80ms", "flops 0.7"."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from fastskip.wording import significant


class BudgetError(ValueError):
    """A budget that cannot be parsed, or that no policy can meet; says what is possible."""


class Quantity(StrEnum):
    """The limited quantity.

    FLOPS: of decoder and lm_head in one `generate` call. TTFT: time to the first token, including
    the vision tower. TPOT: time per further token.
    """

    FLOPS = "flops"
    TTFT = "ttft"
    TPOT = "tpot"

    @property
    def label(self) -> str:
        """The name in texts."""
        return "FLOPs" if self is Quantity.FLOPS else self.value.upper()

    @property
    def phase(self) -> str | None:
        """The phase whose time it is; `None` for FLOPs."""
        return {Quantity.TTFT: "prefill", Quantity.TPOT: "decode"}.get(self)

    @property
    def seconds(self) -> str | None:
        """The field of results with its measured seconds; `None` for FLOPs."""
        return None if self is Quantity.FLOPS else f"{self.value}_s"


ALLOWED = (
    'a quantity and a limit: "tpot 1.5x" or "ttft 1.3x" (times faster than dense), "ttft 80ms" or '
    '"tpot 0.02s" (at most), "flops 0.7" or "flops 70%" (of the dense FLOPs), "flops 1.4x" (times '
    "fewer)"
)
_FORM = re.compile(r"\s*(\w+)\s+([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*(x|ms|s|%)?\s*")


@dataclass(frozen=True, slots=True)
class Budget:
    """The most that a policy may cost; either `share` or `most_s` is set.

    Attributes:
        quantity: what is limited.
        share: of the dense model's cost, in (0, 1].
        most_s: seconds.
    """

    quantity: Quantity
    share: float | None = None
    most_s: float | None = None

    def __post_init__(self) -> None:
        if (self.share is None) == (self.most_s is None):
            raise BudgetError(f"budget: {self.share}, {self.most_s}; allowed: one of share, most_s")
        if self.share is not None and not 0 < self.share <= 1:
            raise BudgetError(f"budget: {self.share:g} of dense; allowed: a share in (0, 1]")
        if self.most_s is not None:
            if self.quantity is Quantity.FLOPS:
                raise BudgetError(f"budget: FLOPs in seconds; allowed: {ALLOWED}")
            if not (math.isfinite(self.most_s) and self.most_s > 0):
                raise BudgetError(f"budget: {self.most_s} s; allowed: a time above 0")

    @property
    def least(self) -> float | None:
        """How many times cheaper than dense a policy must be; `None` for a limit in seconds."""
        return None if self.share is None else 1 / self.share

    def limit(self, dense_s: float | None) -> float:
        """The limit as a share of dense; `dense_s`: the dense model's time, if time is limited."""
        if self.share is not None:
            return self.share
        assert self.most_s is not None
        if dense_s is None:
            raise BudgetError("budget: a time; allowed: only once the dense model is measured")
        return min(1.0, self.most_s / dense_s)

    @property
    def text(self) -> str:
        """The budget in words."""
        name = self.quantity.label
        if self.most_s is not None:
            return f"{name} under {1e3 * self.most_s:g} ms"
        if self.quantity is Quantity.FLOPS:
            return f"{self.share:.4g} of the dense FLOPs"
        return f"{name} {self.least:.4g}x faster"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "quantity": self.quantity.value,
            "share": self.share,
            "least": self.least,
            "most_s": self.most_s,
            "text": self.text,
        }


def parse_budget(text: str) -> Budget:
    """A budget as a user writes it.

    Raises:
        BudgetError: it cannot be parsed; the message says what is allowed.
    """
    found = _FORM.fullmatch(text.lower())
    if found is None or found[1] not in tuple(Quantity):
        raise BudgetError(f"budget: {text!r}; allowed: {ALLOWED}")
    quantity, number, unit = Quantity(found[1]), float(found[2]), found[3]
    is_flops = quantity is Quantity.FLOPS
    if unit is None and not is_flops:
        raise BudgetError(f"budget: {text!r} has no unit; allowed: x, ms or s after the number")
    if unit in ("ms", "s"):
        if is_flops:
            raise BudgetError(f"budget: {text!r}; allowed: FLOPs as a share, in % or with x")
        return Budget(quantity, most_s=number / 1e3 if unit == "ms" else number)
    if unit == "x":
        if number < 1:
            raise BudgetError(f"budget: {text!r}; allowed: 1x or more")
        return Budget(quantity, share=1 / number)
    share = number / 100 if unit == "%" else number
    if not is_flops or not 0 < share <= 1:
        allowed = "a share in (0, 1]" if is_flops else "x, ms or s after the number"
        raise BudgetError(f"budget: {text!r}; allowed: {allowed}")
    return Budget(quantity, share=share)


def impossible(budget: Budget, least_share: float, dense_s: float | None) -> BudgetError:
    """The error for a budget below the least that skipping can reach, `least_share` of dense."""
    if budget.quantity is Quantity.FLOPS:
        reach = f"{least_share:.3g} of the dense FLOPs"
    else:
        reach = f"{budget.quantity.label} {1 / least_share:.3g}x faster"
        if dense_s is not None:
            least, dense = (significant(1e3 * each) for each in (least_share * dense_s, dense_s))
            reach += f" ({least} ms; dense takes {dense} ms)"
    return BudgetError(
        f"budget: {budget.text} cannot be reached; the limit, with everything skipped: {reach}"
    )
