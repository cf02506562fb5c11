"""Which query rows of a forward see which entries, and the attention over them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastskip.decoder.entries import Entries
from fastskip.ops import Operations


@dataclass(frozen=True, slots=True)
class _View:
    """Queries of one sequence, or of all sequences at once if they are alike.

    ``rows``: the queries, ``b * n`` of the packed query tensor; ``count``: entries they may see;
    ``visible``: ``[n, count]`` or ``None`` for all; ``is_causal``: query ``i`` sees entries
    ``0..i``.
    """

    rows: slice | Tensor
    sequences: slice
    count: int
    visible: Tensor | None
    is_causal: bool


class AttentionPattern:
    """The views of one set of query rows over the layers of one entry table."""

    def __init__(self, views: list[_View], order: Tensor | None) -> None:
        """``order`` brings the views' outputs, one after the other, back into packed order."""
        self._views, self._order = views, order

    @classmethod
    def of(
        cls, sequences: Tensor, columns: Tensor, batch: int, layer: int, entries: Entries
    ) -> AttentionPattern:
        """For query rows ``[n]`` (host); ``layer`` is any layer of the entry table."""
        views = (_view(b, sequences, columns, entries.columns(layer, b)) for b in range(batch))
        merged = _merge([view for view in views if view is not None], batch, len(columns))
        return cls(merged, _inverse(merged, len(columns)))

    @classmethod
    def newest(cls, batch: int, layer: int, entries: Entries) -> AttentionPattern:
        """For a decode step: row ``b`` is the last of sequence ``b`` and sees all its entries."""
        counts = entries.counts(layer)
        if len(set(counts)) == 1:
            whole = slice(0, batch)
            return cls([_View(whole, whole, counts[0], None, False)], None)
        single = [slice(b, b + 1) for b in range(batch)]
        return cls(
            [_View(b, b, count, None, False) for b, count in zip(single, counts, strict=True)], None
        )

    def attend(
        self,
        queries: Tensor,
        layer: int,
        entries: Entries,
        ops: Operations,
        scale: float,
        dropout: float,
    ) -> Tensor:
        """``[n, H, K]`` queries, rotated -> ``[n, H * K]``."""
        outputs = []
        for view in self._views:
            keys, values = entries.read(layer, view.sequences, view.count)
            alike = keys[0].shape[0]
            q = queries if len(self._views) == 1 and self._order is None else queries[view.rows]
            q = q.view(alike, -1, *q.shape[1:]).transpose(1, 2)
            visible = None if view.visible is None else view.visible.to(q.device)
            out = ops.attend(
                q, keys, values, visible, is_causal=view.is_causal, scale=scale, dropout=dropout
            )
            outputs.append(out.transpose(1, 2).reshape(q.shape[0] * q.shape[2], -1))
        packed = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return packed if self._order is None else packed[self._order.to(packed.device)]


def _view(sequence: int, sequences: Tensor, columns: Tensor, entry_columns: Tensor) -> _View | None:
    mine = (sequences == sequence).nonzero().squeeze(1)
    if not len(mine):
        return None
    own = columns[mine]
    if len(mine) > 1 and not bool((own.diff() > 0).all()):
        order = torch.argsort(own)
        mine, own = mine[order], own[order]
    last = torch.searchsorted(entry_columns, own, right=True)
    count = int(last[-1])
    rows = _as_slice(mine)
    here = slice(sequence, sequence + 1)
    if bool((last == count).all()):
        return _View(rows, here, count, None, False)
    if len(own) == count and bool((last == torch.arange(1, count + 1)).all()):
        return _View(rows, here, count, None, True)
    return _View(rows, here, count, torch.arange(count) < last[:, None], False)


def _merge(views: list[_View], batch: int, total: int) -> list[_View]:
    """One view for all sequences where they are alike: same counts, same visibility, in order."""
    if len(views) < 2 or len(views) != batch or total % batch:
        return views
    first, each = views[0], total // batch
    for number, view in enumerate(views):
        same = (
            view.count == first.count
            and view.is_causal == first.is_causal
            and view.rows == slice(number * each, (number + 1) * each)
            if isinstance(view.rows, slice)
            else False
        )
        if not same or (view.visible is None) != (first.visible is None):
            return views
        if view.visible is not None and first.visible is not None:
            if not torch.equal(view.visible, first.visible):
                return views
    return [_View(slice(0, total), slice(0, batch), first.count, first.visible, first.is_causal)]


def _inverse(views: list[_View], total: int) -> Tensor | None:
    """The order that undoes the views' grouping of rows; ``None`` if they are in order."""
    pieces = [_ids(view.rows, total) for view in views]
    order = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)
    if torch.equal(order, torch.arange(total)):
        return None
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(total)
    return inverse


def _ids(rows: slice | Tensor, total: int) -> Tensor:
    return torch.arange(*rows.indices(total)) if isinstance(rows, slice) else rows


def _as_slice(index: Tensor) -> slice | Tensor:
    start, stop = int(index[0]), int(index[-1]) + 1
    contiguous = stop - start == len(index) and bool((index.diff() == 1).all())
    return slice(start, stop) if contiguous else index
