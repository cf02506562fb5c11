"""What the fused operations read and write: plain groups of tensors, checked where they are made.

Letters: ``n`` rows, ``D`` hidden size, ``F`` FFN size, ``H`` query heads, ``G`` key/value heads,
``K`` head dim, ``B`` sequences, ``P`` pages of a sequence. Index tensors are int32 unless
stated otherwise, and on the device of the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

PAGE = 64
"""Slots per page of a cache: one tile of keys in an attention kernel."""


class Activation(Enum):
    """The activation between the two products of an FFN."""

    GATED_SILU = "gated_silu"
    """``silu(gate) * up``; the first product has ``2F`` rows, gate first (Llama)."""
    RELU = "relu"
    """``max(x, 0)``; the first product has ``F`` rows (OPT)."""


@dataclass(frozen=True, slots=True)
class Norm:
    """RMS norm ``x / rms(x) * weight``, or LayerNorm if ``is_centred``; weights ``[D]``."""

    weight: Tensor
    epsilon: float
    bias: Tensor | None = None
    is_centred: bool = False


@dataclass(frozen=True, slots=True)
class HalfNorm:
    """An RMS norm of ``n`` rows, half applied: the next product still has to divide its rows by
    their root mean square, in its epilogue.

    Attributes:
        norm: the norm.
        rows: ``[n, D]``: rows times the norm's weights, in the dtype of the data.
        squares: ``[n, parts]`` fp32: partial sums of each row's mean square, before the weights.
    """

    norm: Norm
    rows: Tensor
    squares: Tensor

    @staticmethod
    def is_of(norm: Norm, dtype: torch.dtype) -> bool:
        """Whether a norm has such a half; in fp16, rows times its weights could overflow."""
        return not norm.is_centred and norm.bias is None and dtype != torch.float16


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMS norms of each query head and each key head before rotation; weights ``[K]``."""

    queries: Norm
    keys: Norm


@dataclass(frozen=True, slots=True)
class Linear:
    """``x @ weight.T + bias``; ``weight [M, E]`` with dense rows, ``bias [M]`` or none."""

    weight: Tensor
    bias: Tensor | None = None

    def rows(self, first: int, last: int | None = None) -> Linear:
        """This linear, restricted to some of the weight's rows."""
        bias = self.bias
        return Linear(self.weight[first:last], None if bias is None else bias[first:last])


@dataclass(frozen=True, slots=True)
class Rotation:
    """Rotary tables, ``[positions, K / 2]`` each, in the dtype of the data: one row per position,
    or one per row of a forward."""

    cosine: Tensor
    sine: Tensor


@dataclass(frozen=True, slots=True)
class Targets:
    """Where the cache entries of ``n`` rows go.

    ``positions [n]``: rows of the rotary tables. ``sequences [n]``, ``slots [n]``: the cache slot;
    a row whose slot is negative leaves no entry.
    """

    positions: Tensor
    sequences: Tensor
    slots: Tensor


@dataclass(frozen=True, slots=True)
class Pages:
    """The keys and values of one layer, in pages of ``PAGE`` slots.

    Slot ``s`` of sequence ``b`` lies in page ``s // PAGE`` of that sequence. Pages may lie in any
    slab, so that a cache grows without moving; ``table`` therefore holds addresses, as element
    offsets from the first element of ``anchor``, which outlives every cache. From there, ``offset``
    leads to this layer's ``[2, G, PAGE, K]``: keys, then values.

    Attributes:
        anchor: any tensor of the data's dtype; only its address is used.
        table: ``[B, P]`` int64.
        offset: elements from the start of a page to this layer's part of it.
        groups, head_dim: ``G`` and ``K``.
        slabs: the memory that the offsets point into; kernels do not read this list.
    """

    anchor: Tensor
    table: Tensor
    offset: int
    groups: int
    head_dim: int
    slabs: Sequence[Tensor]

    @property
    def plane(self) -> int:
        """Elements from the keys of a page to its values."""
        return self.groups * PAGE * self.head_dim


@dataclass(frozen=True, slots=True)
class Bounds:
    """Where each of ``B`` sequences begins in a list of rows, and where the last one ends.

    Attributes:
        host: ``B + 1`` numbers, read by the torch implementation.
        device: ``[B + 1]``: the same for kernels; a replayed graph reads its current contents.
    """

    host: tuple[int, ...]
    device: Tensor

    @classmethod
    def of(cls, host: Sequence[int], device: torch.device) -> Bounds:
        """The bounds, with a copy on ``device``."""
        return cls(tuple(host), torch.tensor(host, dtype=torch.int32, device=device))

    @property
    def sequences(self) -> int:
        """``B``."""
        return len(self.host) - 1


@dataclass(frozen=True, slots=True)
class Reach:
    """What each of ``n`` query rows sees: the first ``limits`` entries of its sequence.

    Entries of a sequence lie in column order, so "every earlier entry and its own" is a count.

    Attributes:
        limits: ``[n]``, in query order.
        order: ``[n]`` query rows, sequence by sequence, limits ascending within each; rows after
            the last sequence attend to nothing, and their output is unspecified.
        bounds: where each sequence's rows begin in ``order``.
        is_whole: exactly these rows hold entries: plain causal attention of whole sequences.
        runs: ``[n]``, 1 or 0 as decided on the device: rows with 0 attend to nothing, and their
            output is unspecified; limits then ascend among the others.
    """

    limits: Tensor
    order: Tensor
    bounds: Bounds
    is_whole: bool = False
    runs: Tensor | None = None


@dataclass(frozen=True, slots=True)
class StepReach:
    """Query row ``b`` sees the first ``counts[b] + extra`` entries of sequence ``b``.

    ``counts [B]`` may change on the device between launches; ``most`` is a rough bound on their
    sum, which only decides how a launch splits its work. ``arrivals`` is int32 scratch of at least
    ``B * H`` zeros, which a launch leaves zero. ``runs [B]``: rows with 0, as decided on the
    device, attend to nothing, and their output is unspecified.
    """

    counts: Tensor
    extra: int
    most: int
    arrivals: Tensor
    runs: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Projection:
    """One layer's path from the residual stream to queries and cache entries.

    ``linear`` has ``(queries + 2G) * K`` rows: query heads, keys, values; queries, or keys and
    values, may be missing. ``rotation`` is ``None`` for models without RoPE. ``pages`` is ``None``
    if no entries are made. ``leaves_all``: where only chosen rows run, whether the others leave
    entries anyway. ``head_norms``: for models that have them.
    """

    norm: Norm
    linear: Linear
    rotation: Rotation | None
    targets: Targets
    pages: Pages | None
    head_dim: int
    leaves_all: bool = True
    head_norms: HeadNorms | None = None

    @property
    def heads(self) -> int:
        """The number of query heads."""
        entries = 0 if self.pages is None else 2 * self.pages.groups
        return self.linear.weight.shape[0] // self.head_dim - entries


@dataclass(frozen=True, slots=True)
class Feed:
    """The first half of an FFN: norm, product, activation."""

    norm: Norm
    linear: Linear
    activation: Activation

    @property
    def width(self) -> int:
        """``F``."""
        rows = self.linear.weight.shape[0]
        return rows // 2 if self.activation is Activation.GATED_SILU else rows


@dataclass(frozen=True, slots=True)
class Term:
    """``x @ weight.T + bias``, a summand of a residual update: ``x [n, E]``."""

    x: Tensor
    linear: Linear


@dataclass(frozen=True, slots=True)
class Choice:
    """The greedy sampler's state on the device; ``B`` rows.

    Attributes:
        tokens: ``[B]`` int64: the tokens to feed next.
        history: ``[steps, B]`` int64: every token chosen, by step.
        step: ``[1]``: the row of ``history`` that is written next.
        unfinished: ``[B]``: 1 until the sequence has produced one of ``stops``.
        stops: ``[k]`` int64: tokens that end a sequence; may be empty.
        pad: what a finished sequence yields.
        counts: ``[sets, B]``: entries of each sequence in each entry table, advanced by ``grows``.
        grows: ``[sets, B]``: 1 where a step adds an entry; a row may be a decision's flags.
        positions: ``[B]``: position of the row to feed next, advanced by one.
    """

    tokens: Tensor
    history: Tensor
    step: Tensor
    unfinished: Tensor
    stops: Tensor
    pad: int
    counts: Tensor
    grows: Tensor
    positions: Tensor


ARRIVALS = 1024
"""Size of the zeroed scratch by which ``feed`` and ``add_terms_`` count programs sharing work."""


def elements_between(first: Tensor, last: Tensor) -> int:
    """Elements of ``first`` from its start to the start of ``last``; 0 for tensors without data."""
    return (last.data_ptr() - first.data_ptr()) // first.element_size()
