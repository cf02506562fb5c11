"""Cache entries and attention over them in plain torch: the definition, and the kernels' oracle.

Part of ``ops.fused``, in a file of its own. Page tables are read on the host. Letters as in
``ops.contracts``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fastskip.ops.allocate import empty
from fastskip.ops.contracts import PAGE, Pages, Reach, StepReach


def attend_rows(queries: Tensor, reach: Reach, pages: Pages, scale: float) -> Tensor:
    """Softmax attention of ``queries [n, H, K]``, each over the entries it reaches.

    Returns ``[n, H * K]`` in query order.
    """
    out = empty(tuple(queries.shape), queries.dtype, queries.device)
    for sequence, (first, last) in enumerate(pairwise(reach.bounds.host)):
        rows = reach.order[first:last].long()
        if reach.runs is not None:
            rows = rows[reach.runs[rows].bool()]
        if len(rows):
            limits = reach.limits[rows]
            keys, values = entries_of(pages, sequence, int(limits.max()))
            seen = torch.arange(keys.shape[1], device=limits.device) < limits[:, None]
            out[rows] = _attend(queries[rows], keys, values, seen, scale)
    return out.flatten(1)


def attend_step(
    queries: Sequence[Tensor], reach: Sequence[StepReach], pages: Sequence[Pages], scale: float
) -> list[Tensor]:
    """One query per sequence over all of its entries, of one block or of the two of a pair.

    ``[B, H, K]`` each -> ``[B, H * K]`` each.
    """
    found = []
    for each, own, entries in zip(queries, reach, pages, strict=True):
        out = empty(tuple(each.shape), each.dtype, each.device)
        for sequence, query in enumerate(each):
            if own.runs is not None and not own.runs[sequence]:
                continue
            keys, values = entries_of(entries, sequence, int(own.counts[sequence]) + own.extra)
            out[sequence] = _attend(query[None], keys, values, None, scale)[0]
        found.append(out.flatten(1))
    return found


def copy_entries(
    source: Pages,
    target: Pages,
    sequences: Tensor,
    from_slots: Tensor,
    to_slots: Tensor,
    runs: Tensor | None = None,
) -> None:
    """Copies entries of one layer's cache to another's; ``[n]`` each, negative slots are skipped.

    ``runs [n]``: rows with 1, as decided on the device, are skipped too: they have their own
    entries.
    """
    if runs is not None:
        from_slots = torch.where(runs.bool(), -1, from_slots)
    if not len(sequences):
        return
    keys, values = [], []
    for sequence, slot in zip(sequences.tolist(), from_slots.tolist(), strict=True):
        key, value = entries_of(source, sequence, max(slot, 0) + 1)
        keys.append(key[:, -1])
        values.append(value[:, -1])
    reached = torch.where(from_slots < 0, from_slots, to_slots)
    write_entries(target, sequences, reached, torch.stack(keys), torch.stack(values))


def read_entries(pages: Pages, sequences: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values ``[n, G, K]`` of entries, in dense tensors; no slot is negative."""
    found = [
        [part[:, -1] for part in entries_of(pages, sequence, slot + 1)]
        for sequence, slot in zip(sequences.tolist(), slots.tolist(), strict=True)
    ]
    if not found:
        none = pages.anchor.new_empty(2, 0, pages.groups, pages.head_dim)
        return none[0], none[1]
    keys, values = (torch.stack(parts) for parts in zip(*found, strict=True))
    return keys, values


def slab_of(pages: Pages, offset: int) -> tuple[Tensor, int]:
    """The slab holding element ``offset`` of the anchor, and the index in it (on the host)."""
    address = pages.anchor.data_ptr() + offset * pages.anchor.element_size()
    for slab in pages.slabs:
        start = slab.data_ptr()
        if start <= address < start + slab.numel() * slab.element_size():
            return slab, (address - start) // slab.element_size()
    raise IndexError(f"pages.table: offset {offset} lies in none of the {len(pages.slabs)} slabs")


def entries_of(pages: Pages, sequence: int, count: int) -> tuple[Tensor, Tensor]:
    """Keys and values ``[G, count, K]`` of a sequence's first entries, as new tensors.

    Reads the table on the host: for checks, and for the torch implementation.
    """
    shape = (2, pages.groups, PAGE, pages.head_dim)
    size = 2 * pages.plane
    parts = []
    for number in range(-(-count // PAGE)):
        slab, start = slab_of(pages, int(pages.table[sequence, number]))
        flat = slab.view(-1)[start + pages.offset : start + pages.offset + size]
        parts.append(flat.view(shape))
    if not parts:
        none = pages.anchor.new_empty(2, pages.groups, 0, pages.head_dim)
        return none[0], none[1]
    keys, values = torch.cat(parts, dim=2)[:, :, :count]
    return keys, values


def write_entries(
    pages: Pages, sequences: Tensor, slots: Tensor, keys: Tensor, values: Tensor
) -> None:
    """Stores ``keys`` and ``values [n, G, K]``; rows with a negative slot are skipped."""
    shape = (2, pages.groups, PAGE, pages.head_dim)
    for row, (sequence, slot) in enumerate(zip(sequences.tolist(), slots.tolist(), strict=True)):
        if slot < 0:
            continue
        slab, start = slab_of(pages, int(pages.table[sequence, slot // PAGE]))
        flat = slab.view(-1)[start + pages.offset : start + pages.offset + 2 * pages.plane]
        page = flat.view(shape)
        page[0, :, slot % PAGE], page[1, :, slot % PAGE] = keys[row], values[row]


def _attend(
    queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None, scale: float
) -> Tensor:
    """``[n, H, K]`` over ``[G, S, K]``: ``[n, H, K]``."""
    rows, heads, width = queries.shape
    groups = len(keys)
    grouped = queries.view(rows, groups, heads // groups, width).permute(1, 2, 0, 3)
    wide = torch.promote_types(queries.dtype, torch.float32)
    scores = grouped.to(wide) @ keys[:, None].to(wide).transpose(-1, -2) * scale
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    weights = torch.softmax(scores, dim=-1).to(queries.dtype)
    return (weights @ values[:, None]).permute(2, 0, 1, 3).reshape(rows, heads, width)
