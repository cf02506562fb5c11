"""Which entries each query row of a forward sees, and the attention over them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastskip.decoder.entries import Entries
from fastskip.ops import Operations
from fastskip.plan.layer_plan import LayerPlan
from fastskip.policy import TokenClass
from fastskip.tokens import CODES, Rows, TokenLayout

IMAGE = CODES[TokenClass.IMAGE]
# Queries whose runs are shorter than this on average are gathered.
_SHORT_RUN = 64

# Row and column indices on the host: on so few, NumPy takes a fifth of torch's time.
Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _View:
    """Queries of one sequence, or of all sequences at once if these match.

    ``rows``: the ``b * n`` queries in the packed query tensor; ``count``: entries they may see;
    ``visible``: ``[n, count]``, or ``None`` for all; ``is_causal``: the last ``n`` entries are the
    queries' own, and each query sees the entries up to its own.
    """

    rows: slice | Tensor
    sequences: slice
    count: int
    visible: Tensor | None
    is_causal: bool

    @property
    def batch(self) -> range:
        """The indices of the sequences."""
        return range(self.sequences.start, self.sequences.stop)


class AttentionPattern:
    """The views of one set of query rows: for all layers of one entry table or, in a decode step,
    for any layer."""

    def __init__(self, views: list[_View] | None, order: Tensor | None, batch: int = 0) -> None:
        """``order`` restores the packed order of the views' concatenated outputs.

        ``views=None``: row ``b`` of ``batch`` is the newest of sequence ``b`` and sees all of its
        entries, however many a layer has."""
        self._views, self._order, self._batch = views, order, batch

    @classmethod
    def of(
        cls, sequences: Tensor, columns: Tensor, batch: int, layer: int, entries: Entries
    ) -> AttentionPattern:
        """For query rows ``[n]`` (host); ``layer`` is any layer of the entry table."""
        own, at = sequences.numpy(), columns.numpy()
        views = [
            view
            for b in range(batch)
            for view in _views(b, own, at, entries.columns(layer, b).numpy())
        ]
        # Sorted by row, so that the outputs need no reordering.
        views.sort(key=lambda view: view.rows.start if isinstance(view.rows, slice) else -1)
        merged = _merge(views, batch, len(columns))
        return cls(merged, _inverse(merged, len(columns)))

    @classmethod
    def newest(cls, batch: int) -> AttentionPattern:
        """For a decode step: row ``b`` is the newest of sequence ``b``, sees all its entries."""
        return cls(None, None, batch)

    @classmethod
    def unimodal(
        cls, sequences: Tensor, columns: Tensor, codes: Tensor, layer: int, entries: Entries
    ) -> AttentionPattern:
        """For query rows ``[n]`` (host) that see only their own modality: image, or not image."""
        views = []
        for b in sorted(set(sequences.tolist())):
            mine = (sequences == b).nonzero().squeeze(1)
            seen = entries.columns(layer, b) <= columns[mine][:, None]
            is_image = entries.codes(layer, b) == IMAGE
            alike = is_image == (codes[mine] == IMAGE)[:, None]
            views.append(_View(mine, slice(b, b + 1), seen.shape[1], seen & alike, False))
        return cls(views, _inverse(views, len(columns)))

    def attend(
        self,
        queries: Tensor,
        layer: int,
        entries: Entries,
        ops: Operations,
        scale: float,
        dropout: float,
    ) -> Tensor:
        """``[n, H, K]`` rotated queries -> ``[n, H * K]``."""
        outputs = []
        for view, q in self._by_view(queries, layer, entries):
            keys, values = entries.read(layer, view.sequences, view.count)
            visible = None if view.visible is None else view.visible.to(q.device)
            out = ops.attend(
                q, keys, values, visible, is_causal=view.is_causal, scale=scale, dropout=dropout
            )
            outputs.append(out.transpose(1, 2).reshape(q.shape[0] * q.shape[2], -1))
        packed = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return packed if self._order is None else packed[self._order.to(packed.device)]

    def weights(
        self, queries: Tensor, layer: int, entries: Entries, scale: float
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yields, for the same queries, by sequence: its number, the index past the last entry
        that each query sees ``[n]`` (host), and the attention weights ``[H, n, s]``."""
        for view, q in self._by_view(queries, layer, entries):
            key = torch.cat(entries.read(layer, view.sequences, view.count)[0], dim=2)
            rows, slots = q.shape[2], key.shape[2]
            visible = view.visible
            if visible is None:
                visible = torch.ones(rows, slots, dtype=torch.bool)
                visible = visible.tril(slots - rows) if view.is_causal else visible
            heads = q.float().unflatten(1, (key.shape[1], -1))
            scores = heads @ key.float().unsqueeze(2).transpose(-1, -2) * scale
            scores = scores.masked_fill(~visible.to(scores.device), float("-inf"))
            found = scores.softmax(-1).flatten(1, 2).to(q.dtype)
            reach = slots - visible.flip(1).int().argmax(1)
            for sequence, own in zip(view.batch, found, strict=True):
                yield sequence, reach, own

    def _by_view(
        self, queries: Tensor, layer: int, entries: Entries
    ) -> Iterator[tuple[_View, Tensor]]:
        """Each view with its queries: ``[b, H, n, K]``."""
        views = self._newest(entries.counts(layer)) if self._views is None else self._views
        for view in views:
            q = queries if len(views) == 1 and self._order is None else queries[view.rows]
            yield view, q.view(len(view.batch), -1, *q.shape[1:]).transpose(1, 2)

    def _newest(self, counts: list[int]) -> list[_View]:
        if len(set(counts)) == 1:
            whole = slice(0, self._batch)
            return [_View(whole, whole, counts[0], None, False)]
        single = [slice(b, b + 1) for b in range(self._batch)]
        return [_View(b, b, count, None, False) for b, count in zip(single, counts, strict=True)]


def sees_all(layer: LayerPlan, layout: TokenLayout, count: int) -> bool:
    """Whether ``count`` query rows are a decode step's: one per sequence, which sees all of it."""
    return layout.is_step and count == layout.batch and not layer.unimodal


def pattern_of(
    layer: LayerPlan, layout: TokenLayout, queries: Rows, entries: Entries
) -> AttentionPattern:
    """What ``queries``, the packed rows that attend in a layer, see there."""
    if sees_all(layer, layout, queries.count):
        return AttentionPattern.newest(layout.batch)
    sequences, columns = queries.take(layout.sequences), queries.take(layout.columns)
    if layer.unimodal:
        codes = queries.take(layout.codes)
        return AttentionPattern.unimodal(sequences, columns, codes, layer.index, entries)
    return AttentionPattern.of(sequences, columns, layout.batch, layer.index, entries)


def _views(
    sequence: int, sequences: Numbers, columns: Numbers, entry_columns: Numbers
) -> list[_View]:
    """The views of one sequence's queries.

    Queries that are contiguous both in memory and in the cache form one causal view, which needs
    neither mask nor copy. If such runs are short, all queries are gathered into one view instead:
    a call per run would cost more than the copy.
    """
    mine = (sequences == sequence).nonzero()[0]
    if not len(mine):
        return []
    # How many entries each query sees; its own is the last of them.
    seen = entry_columns.searchsorted(columns[mine], side="right")
    breaks = (mine[1:] - mine[:-1] != 1) | (seen[1:] - seen[:-1] != 1)
    starts = [0, *(breaks.nonzero()[0] + 1).tolist(), len(mine)]
    here = slice(sequence, sequence + 1)
    if len(starts) == 2 or len(mine) >= _SHORT_RUN * (len(starts) - 1):
        return [
            _View(
                slice(int(mine[start]), int(mine[stop - 1]) + 1),
                here,
                int(seen[stop - 1]),
                None,
                stop - start > 1,
            )
            for start, stop in pairwise(starts)
        ]
    order = np.argsort(seen, kind="stable")
    rows, reach = torch.from_numpy(mine[order]), torch.from_numpy(seen[order])
    count = int(reach[-1])
    if bool((reach.diff() == 1).all()):
        return [_View(rows, here, count, None, True)]
    return [_View(rows, here, count, torch.arange(count) < reach[:, None], False)]


def _merge(views: list[_View], batch: int, total: int) -> list[_View]:
    """One view for all sequences if they match: equally many rows, which see the same slots.

    Rows in order then need no copy, and rows that are gathered anyway need no further one;
    contiguous runs that are out of order stay separate views.
    """
    if len(views) < 2 or len(views) != batch or total % batch:
        return views
    ordered = sorted(views, key=lambda view: view.sequences.start)
    first = ordered[0]
    if not all(_see_alike(first, view, n) for n, view in enumerate(ordered)):
        return views
    rows = [_ids(view.rows, total) for view in ordered]
    if any(len(own) != total // batch for own in rows):
        return views
    ids = np.concatenate(rows)
    if np.array_equal(ids, np.arange(total)):
        where: slice | Tensor = slice(0, total)
    elif any(isinstance(view.rows, slice) for view in ordered):
        return views
    else:
        where = torch.from_numpy(ids)
    return [_View(where, slice(0, batch), first.count, first.visible, first.is_causal)]


def _see_alike(first: _View, view: _View, sequence: int) -> bool:
    """Whether a view is that of ``sequence`` and its rows see what those of ``first`` see."""
    one, other = first.visible, view.visible
    is_same = one is other if one is None or other is None else torch.equal(one, other)
    form = view.sequences.start, view.count, view.is_causal
    return is_same and form == (sequence, first.count, first.is_causal)


def _inverse(views: list[_View], total: int) -> Tensor | None:
    """The order that undoes the views' grouping of rows; ``None`` if they are in order."""
    pieces = [_ids(view.rows, total) for view in views]
    order = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)
    if len(order) == total and bool((order[1:] > order[:-1]).all()):
        return None
    inverse = np.empty_like(order)
    inverse[order] = np.arange(total)
    return torch.from_numpy(inverse)


def _ids(rows: slice | Tensor, total: int) -> Numbers:
    return np.arange(*rows.indices(total)) if isinstance(rows, slice) else rows.numpy()
