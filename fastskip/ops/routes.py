"""Device-side decisions: what the routing operations read and write.

A *verdict* decides for each candidate row whether it runs. Every row has a score, larger the more
it wants to skip, and skips if the score reaches the verdict's bar. The result is a flag per row in
device memory, ``runs [n]`` int32, which the guarded operations read first; the host never waits for
it. Letters as in ``ops.contracts``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

import torch
from torch import Tensor

N = TypeVar("N", int, Tensor)
EPSILON = 1e-6
"""Added to a row's mean square before the ``LINEAR`` score divides by its root."""


class Score(Enum):
    """How much a row wants to skip; all in fp32."""

    COSINE = "cosine"
    """``cos(in, out)`` of the last layer that the row ran in full; ``-inf`` before the first."""
    CHANGE = "change"
    """``-||out - in|| / ||in||`` of that layer; ``-inf`` before the first."""
    LINEAR = "linear"
    """``-(weight . h / rms(h) + bias)``: a row that scores high runs."""
    RANDOM = "random"
    """``-u``, ``u`` in (0, 1] drawn from the verdict's salt and the row's position (``draw``)."""


class Group(Enum):
    """Which candidates decide together."""

    ROW = "row"
    SEQUENCE = "sequence"
    BATCH = "batch"


class Agreement(Enum):
    """The score of a group: ``MEAN``, or ``ANY`` (the minimum: it runs if any of its rows would).

    With ``RANDOM``, either way, a group has the score of its row with the largest position.
    """

    MEAN = "mean"
    ANY = "any"


class Move(Enum):
    """How a ``Trace`` is updated before the verdicts, as rows begin a layer; or it is only read."""

    NONE = "none"
    START = "start"
    """``found`` is reset, then ``snapshot`` is taken."""
    NEXT = "next"
    """``found`` is updated for rows that ran the layer just left, then ``snapshot`` is taken."""


@dataclass(frozen=True, slots=True)
class Switch:
    """A SWITCH node of a CUDA graph: body ``b`` is for up to ``(b + 1) * step`` chosen rows.

    ``handle``: of its condition; 0 means no node.
    """

    handle: int
    step: int


@dataclass(frozen=True, slots=True)
class Chosen:
    """Which rows of ``h [n, D]`` run; the tensors of the others stay as they are.

    ``runs [n]``: 1 or 0. ``index [n]``, ``count [1]``: the same rows compacted, where many-row
    products need it; ``None`` where the flags are enough. ``bound``: the most rows that there can
    be, where the host knows it; ``index`` then has this length, with rows that do not run at its
    end, and outputs of an FFN's first half, and terms, have one row per element of ``index``.
    """

    runs: Tensor
    index: Tensor | None = None
    count: Tensor | None = None
    bound: int | None = None

    def at_most(self, bound: int) -> Chosen:
        """The same rows, which number at most ``bound``; ``index`` must cover all rows."""
        assert self.index is not None
        return Chosen(self.runs, self.index[:bound], self.count, bound)


@dataclass(frozen=True, slots=True)
class Trace:
    """What ``COSINE`` and ``CHANGE`` look at.

    ``snapshot [n, D]``: each row as its layer began. ``found [n, 2]`` fp32: cosine and relative
    change of the last layer that it ran in full; ``-inf``, ``+inf`` before the first.
    """

    snapshot: Tensor
    found: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a decision is based on.

    Attributes:
        score: what is compared with ``bar``: a row skips where ``score >= bar``. NaN runs.
        bar: rounded to fp32 for the comparison.
        weight: ``[D]`` fp32, and ``bias``: for ``LINEAR``.
        salt: 32 bits, for ``RANDOM``.
        group, agreement: which rows decide together, and how.
        capacity: for ``LINEAR`` with ``Group.ROW``: instead of a bar, the ``ceil(capacity * m)`` of
            a sequence's ``m`` candidates that score lowest run; ties go to the lowest position,
            then the lowest row.
    """

    score: Score
    bar: float
    weight: Tensor | None = None
    bias: float = 0.0
    salt: int = 0
    group: Group = Group.ROW
    agreement: Agreement = Agreement.MEAN
    capacity: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict(Terms):
    """One decision on every candidate.

    ``runs [n]``: written where ``candidates [n]`` is 1, left as it is elsewhere.
    """

    runs: Tensor
    candidates: Tensor


@dataclass(frozen=True, slots=True)
class Route:
    """Verdicts on rows of the current residual stream, and the trace update before them.

    Attributes:
        verdicts: at most two if a residual update carries them, else any number; may be empty.
        positions, sequences: ``[n]``.
        trace: needed by ``COSINE``, ``CHANGE`` and every move.
        move: how the trace is updated.
        ran: flags ``[n]`` of the layer just left; ``found`` is updated where all are 1.
        arrivals: int32 scratch of at least 1 zero, which a launch leaves zero.
    """

    verdicts: Sequence[Verdict]
    positions: Tensor
    sequences: Tensor
    trace: Trace | None
    move: Move
    ran: Sequence[Tensor]
    arrivals: Tensor


def mixed(value: N) -> N:
    """A 32-bit hash whose bits depend on all bits of ``value`` (MurmurHash3's finaliser)."""
    value = value & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        value = (value ^ value >> shift) * factor & 0xFFFFFFFF
    return value ^ value >> 16


def signed(salt: int) -> int:
    """The int32 with the 32 bits of ``salt``, as kernels take it."""
    return (salt & 0xFFFFFFFF ^ 0x80000000) - 0x80000000


def draw(positions: Tensor, salt: int) -> Tensor:
    """``u`` in (0, 1] of each position, fp32: ``(mixed(position * 0x9E3779B1 ^ salt) >> 8) + 1``
    in units of ``2 ** -24``: a rate of 0 never reaches it, 1 always does."""
    value = mixed(positions.to(torch.int64) * 0x9E3779B1 ^ salt)
    return ((value >> 8) + 1).to(torch.float32) / (1 << 24)


def draw_one(position: int, salt: int) -> float:
    """``draw`` of one position."""
    return ((mixed(position * 0x9E3779B1 ^ salt) >> 8) + 1) / (1 << 24)
