"""The closed vocabulary of fastskip: the enums of policies and plans, and their error."""

from __future__ import annotations

from enum import StrEnum
from typing import Any


class TokenClass(StrEnum):
    """What a row is: filled by image features, other prompt text, or generated."""

    IMAGE = "image"
    TEXT = "text"
    GENERATED = "generated"


class Sublayer(StrEnum):
    """The two halves of a decoder layer; a skipped block is both."""

    ATTENTION = "attention"
    FFN = "ffn"


class SkippedKV(StrEnum):
    """What a row that skips attention leaves in that layer's cache.

    PROJECT: its own K and V. REUSE: a copy of its entry of the nearest lower layer that holds one.
    OMIT: nothing, so later queries of the layer do not see the row. HIDDEN: what the attention
    would have read, N1 h cut into heads, as K (rotated) and as V; for multi-head models only.
    """

    PROJECT = "project"
    REUSE = "reuse"
    OMIT = "omit"
    HIDDEN = "hidden"


class Arrangement(StrEnum):
    """How a layer's sublayers are wired: one after the other, from one input, or with the next."""

    SEQUENTIAL = "sequential"
    PARALLEL = "parallel"
    PAIR = "pair"


class Norm(StrEnum):
    """What the FFN of a parallel layer reads: its own norm of the block's input, the attention's,
    or its own norm of the attention's."""

    OWN = "own"
    SHARED = "shared"
    STACKED = "stacked"


class Combine(StrEnum):
    """How the two blocks of a pair change the residual stream."""

    SUM = "sum"
    MEAN = "mean"


class Mask(StrEnum):
    """What attention does not see: UNIMODAL, rows of the other modality, both ways."""

    UNIMODAL = "unimodal"


class Semantics(StrEnum):
    """What a policy means where it does not say: this project's definitions, or what the paper's
    reference code does."""

    CLEAN = "clean"
    REFERENCE = "reference"


class Measure(StrEnum):
    """What a similarity router looks at: how alike a layer's input and output were, or how far the
    output had moved, ||out - in|| / ||in||."""

    COSINE = "cosine"
    CHANGE = "change"


class Group(StrEnum):
    """Which rows of a forward decide together: none, those of a sequence, or all of the batch."""

    ROW = "row"
    SEQUENCE = "sequence"
    BATCH = "batch"


class Agreement(StrEnum):
    """How a group decides: by the mean of its scores, or it runs if any of its rows would."""

    MEAN = "mean"
    ANY = "any"


class Ranking(StrEnum):
    """Which rows a removal keeps: those that the last row of the prompt attended to most
    (ATTENTION) or would attend to most in the layer to come (NEXT_ATTENTION), RANDOM ones, or
    evenly spaced ones (SPACING)."""

    ATTENTION = "attention"
    NEXT_ATTENTION = "next_attention"
    RANDOM = "random"
    SPACING = "spacing"


class PolicyError(ValueError):
    """A policy that cannot be used; names the field, its value and what is allowed."""

    def __init__(self, field: str, value: object, allowed: str, problem: str | None = None) -> None:
        self.field, self.value, self.allowed, self.problem = field, value, allowed, problem
        try:
            shown = repr(value)
        except (ValueError, RecursionError):  # thousands of digits, or of lists in lists
            shown = "a value too long to show"
        shown = shown if len(shown) <= 120 else shown[:117] + "..."
        super().__init__(f"{field}: {problem or f'got {shown}'}; allowed: {allowed}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.field, self.value, self.allowed, self.problem)

    def under(self, path: str) -> PolicyError:
        """The same error, its field seen from one level further out."""
        return PolicyError(f"{path}.{self.field}", self.value, self.allowed, self.problem)


class PolicyFitWarning(UserWarning):
    """A policy is loaded onto another model than its provenance says that it was made for."""
