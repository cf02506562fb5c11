"""The closed vocabulary of fastskip: the enums of policies and plans, and their error type."""

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

    PROJECT: its own K and V. REUSE: a copy of its entry in the nearest lower layer that holds one.
    OMIT: nothing, so later queries of the layer do not see the row. HIDDEN: the attention's input,
    N1 h, split into heads, as K (rotated) and as V; for multi-head attention only.
    """

    PROJECT = "project"
    REUSE = "reuse"
    OMIT = "omit"
    HIDDEN = "hidden"


class Arrangement(StrEnum):
    """How a layer is wired: sublayers in sequence, sublayers in parallel from the same input, or
    two consecutive layers as a pair from the same input."""

    SEQUENTIAL = "sequential"
    PARALLEL = "parallel"
    PAIR = "pair"


class Norm(StrEnum):
    """What the FFN of a parallel layer reads: its own norm of the block's input (OWN), the
    attention's norm of it (SHARED), or its own norm of the attention's norm (STACKED)."""

    OWN = "own"
    SHARED = "shared"
    STACKED = "stacked"


class Combine(StrEnum):
    """How the changes of a pair's two blocks enter the residual stream."""

    SUM = "sum"
    MEAN = "mean"


class Mask(StrEnum):
    """What attention masks. UNIMODAL: image rows and all other rows do not see each other."""

    UNIMODAL = "unimodal"


class Semantics(StrEnum):
    """How a policy's unspecified details are read: by this project's definitions (CLEAN), or as
    the papers' code computes them (REFERENCE)."""

    CLEAN = "clean"
    REFERENCE = "reference"


class Measure(StrEnum):
    """What a similarity router measures: the cosine similarity of a layer's input and output, or
    their relative change, ||out - in|| / ||in||."""

    COSINE = "cosine"
    CHANGE = "change"


class Group(StrEnum):
    """Which rows of a forward decide together: none, those of a sequence, or the whole batch."""

    ROW = "row"
    SEQUENCE = "sequence"
    BATCH = "batch"


class Agreement(StrEnum):
    """How a group decides: by the mean of its scores, or running if any of its rows would run."""

    MEAN = "mean"
    ANY = "any"


class Ranking(StrEnum):
    """Which rows a removal keeps: those that the last row of the prompt attended to most
    (ATTENTION) or would attend to most in the next layer (NEXT_ATTENTION), random ones (RANDOM), or
    evenly spaced ones (SPACING)."""

    ATTENTION = "attention"
    NEXT_ATTENTION = "next_attention"
    RANDOM = "random"
    SPACING = "spacing"


def shown(value: object) -> str:
    """A value as messages show it, cut if it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # integers of thousands of digits, deep nesting
        return "a value too long to show"
    return text if len(text) <= 120 else text[:117] + "..."


class PolicyError(ValueError):
    """An invalid policy; names the field, its value and what is allowed."""

    def __init__(self, field: str, value: object, allowed: str, problem: str | None = None) -> None:
        self.field, self.value, self.allowed, self.problem = field, value, allowed, problem
        super().__init__(f"{field}: {problem or f'got {shown(value)}'}; allowed: {allowed}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.field, self.value, self.allowed, self.problem)

    def under(self, path: str) -> PolicyError:
        """The same error with its field prefixed by `path`."""
        return PolicyError(f"{path}.{self.field}", self.value, self.allowed, self.problem)


class PolicyFitWarning(UserWarning):
    """A policy is loaded onto a different model than the one recorded in its provenance."""
