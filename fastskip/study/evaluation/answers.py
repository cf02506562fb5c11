"""A model's answers to items with their scores, so that two models can be compared item by item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastskip.intervals import Estimate, mean_difference, mean_score
from fastskip.study.evaluation.metrics import Metric, scale_of
from fastskip.wording import Scale


@dataclass(frozen=True, slots=True)
class Judged:
    """One item, the model's answer, and its score: in [0, 1], or in [0, 10] under CIDEr."""

    kind: str
    question: str
    references: tuple[str, ...]
    metric: Metric
    answer: str
    score: float

    @property
    def item(self) -> tuple[str, str, tuple[str, ...]]:
        """The item itself, without the answer."""
        return self.kind, self.question, self.references


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One model's answers to all items of an exam, in its order."""

    judged: tuple[Judged, ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of items, in order of first appearance."""
        return tuple(dict.fromkeys(each.kind for each in self.judged))

    @property
    def parts(self) -> dict[Scale, Evaluation]:
        """The items grouped by scale: only scores on the same scale can be averaged."""
        present = {each.metric.scale for each in self.judged}
        return {
            scale: Evaluation(tuple(each for each in self.judged if each.metric.scale is scale))
            for scale in Scale
            if scale in present
        }

    def scores(self, *kinds: str) -> NDArray[np.float64]:
        """The scores of the items of these kinds; of all items if none is given.

        Raises:
            ValueError: no item is of one of the kinds.
            ScaleError: the scores are on different scales.
        """
        chosen = self._of(kinds)
        scale_of(each.metric for each in chosen)
        return np.array([each.score for each in chosen])

    def mean(self, *kinds: str) -> float:
        """The mean score of these kinds."""
        return float(self.scores(*kinds).mean())

    def estimate(self, *kinds: str, seed: int = 0) -> Estimate:
        """The mean score of these kinds with its interval (`intervals.mean_score`)."""
        return mean_score(self.scores(*kinds), is_share=self._is_share(kinds), seed=seed)

    def minus(self, other: Evaluation, *kinds: str, seed: int = 0) -> Estimate:
        """How much better this model does than another on the same items, with its interval
        (`intervals.mean_difference`); an evaluation minus itself is exactly 0.

        Raises:
            ValueError: the other model answered different items.
        """
        ours, theirs = ([each.item for each in one.judged] for one in (self, other))
        if ours != theirs:
            raise ValueError("evaluations: on different items; allowed: two of the same exam")
        before, after = other.scores(*kinds), self.scores(*kinds)
        if other is self:
            return Estimate(0.0, 0.0, 0.0)
        return mean_difference(before, after, is_share=self._is_share(kinds), seed=seed)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"judged": [asdict(each) for each in self.judged]}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Evaluation:
        """What `to_dict` gave."""
        return cls(
            tuple(
                Judged(
                    **{
                        **each,
                        "references": tuple(each["references"]),
                        "metric": Metric(each["metric"]),
                    }
                )
                for each in document["judged"]
            )
        )

    def _is_share(self, kinds: Sequence[str]) -> bool:
        return scale_of(each.metric for each in self._of(kinds)) is Scale.SHARE

    def _of(self, kinds: Sequence[str]) -> list[Judged]:
        for kind in kinds:
            if kind not in self.kinds:
                raise ValueError(f"kind: {kind!r}; allowed: {', '.join(self.kinds)}")
        return [each for each in self.judged if not kinds or each.kind in kinds]
