"""Policy rules that remove rows of a prompt from all later layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fastskip.policy.fields import (
    TokenSet,
    build,
    check_seed,
    finite,
    member,
    plain,
    set_fields,
    token_set,
)
from fastskip.policy.vocabulary import PolicyError, Ranking, TokenClass


@dataclass(frozen=True, slots=True, init=False)
class Keep:
    """Which rows stay: the share `ratio` of the remaining candidates that ranks highest by `by`.

    Of a sequence's `n` image rows, counted over all its images, `floor(ratio * n)` stay.
    """

    by: Ranking
    ratio: float
    required: ClassVar[tuple[str, ...]] = ("by", "ratio")

    def __init__(self, by: Ranking | str, ratio: float) -> None:
        share = finite(ratio)
        if share is None or not 0 <= share < 1:
            raise PolicyError("ratio", ratio, "a number in [0, 1)")
        set_fields(self, by=member(Ranking, by, "by"), ratio=share)

    def count(self, rows: int) -> int:
        """How many of `rows` stay; the tolerance absorbs rounding just below an integer."""
        return math.floor(self.ratio * rows + 1e-6)


@dataclass(frozen=True, slots=True, init=False)
class RemovalRule:
    """After layer `after_layer`, rows of `tokens` that `keep` does not select are removed: later
    layers neither compute them nor hold entries of them.

    The last row of a prompt always stays. `seed`: for RANDOM only, the seed of the draws (0 if
    `None`). Sources: FastV (arXiv 2403.06764) for ATTENTION, PyramidDrop (arXiv 2410.17247) for
    NEXT_ATTENTION, VTW (arXiv 2405.05803) for a ratio of 0.
    """

    after_layer: int
    tokens: TokenSet
    keep: Keep
    seed: int | None
    required: ClassVar[tuple[str, ...]] = ("after_layer", "keep")

    def __init__(
        self,
        after_layer: int,
        tokens: str | Iterable[TokenClass | str] = (TokenClass.IMAGE,),
        keep: Keep | Mapping[str, Any] | None = None,
        seed: int | None = None,
    ) -> None:
        if type(after_layer) is not int or after_layer < 0:
            raise PolicyError("after_layer", after_layer, "a layer index >= 0")
        classes = token_set(tokens)
        if classes != frozenset({TokenClass.IMAGE}):
            raise PolicyError("tokens", plain(classes), f'["{TokenClass.IMAGE}"]')
        kept = keep if isinstance(keep, Keep) else build(Keep, keep, "keep")
        set_fields(self, after_layer=after_layer, tokens=classes, keep=kept, seed=seed)
        if seed is not None:
            if self.keep.by is not Ranking.RANDOM:
                raise PolicyError("seed", seed, f'no seed, or by "{Ranking.RANDOM}"')
            check_seed(seed)

    @property
    def classes(self) -> frozenset[TokenClass]:
        """The classes whose rows may be removed."""
        assert self.tokens != "all"
        return self.tokens

    def to_dict(self) -> dict[str, Any]:
        """Plain data as in the policy file."""
        result = {
            "after_layer": self.after_layer,
            "tokens": plain(self.tokens),
            "keep": {"by": self.keep.by.value, "ratio": self.keep.ratio},
        }
        return result if self.seed is None else result | {"seed": self.seed}
