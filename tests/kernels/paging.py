"""Caches for kernel tests: pages scattered over several slabs, poisoned until written."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastskip.ops.contracts import PAGE, Pages
from fastskip.ops.fused_entries import write_entries

LAYERS = 2
"""Layers that share a page, so that a layer's offset is not always 0."""


def build_pages(
    capacity: Sequence[int],
    *,
    groups: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    layer: int = 1,
) -> Pages:
    """Room for ``capacity[b]`` slots of sequence ``b``, every slot NaN; pages in mixed order."""
    counts = [max(1, -(-slots // PAGE)) for slots in capacity]
    elements = LAYERS * 2 * groups * PAGE * head_dim
    total = sum(counts)
    split = total // 2 + 1
    slabs = [
        torch.full((number * elements,), float("nan"), dtype=dtype, device=device)
        for number in (split, total - split)
        if number
    ]
    anchor = torch.zeros(16, dtype=dtype, device=device)
    size = anchor.element_size()
    starts = [
        (slab.data_ptr() - anchor.data_ptr()) // size + number * elements
        for slab in slabs
        for number in range(slab.numel() // elements)
    ]
    order = torch.randperm(total, generator=torch.Generator().manual_seed(total)).tolist()
    table = torch.full((len(capacity), max(counts) + 1), starts[0], dtype=torch.int64)
    for sequence, count in enumerate(counts):
        for number in range(count):
            table[sequence, number] = starts[order.pop()]
    offset = layer * 2 * groups * PAGE * head_dim
    return Pages(anchor, table.to(device), offset, groups, head_dim, slabs)


def fill_pages(pages: Pages, lengths: Sequence[int], seed: int = 0) -> Pages:
    """Writes the first ``lengths[b]`` entries of each sequence: the same numbers in any dtype."""
    generator = torch.Generator().manual_seed(seed)
    for sequence, length in enumerate(lengths):
        shape = (2, length, pages.groups, pages.head_dim)
        # Values that bf16 and fp16 hold exactly, so that every dtype sees the same input.
        entries = torch.randint(-64, 65, shape, generator=generator).double() / 32
        keys, values = entries.to(pages.anchor)
        where = torch.full((length,), sequence), torch.arange(length)
        write_entries(pages, *where, keys, values)
    return pages


def exact(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Random numbers ``[*shape]`` fp64 that bf16 holds exactly: one input for every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).bfloat16().double()
