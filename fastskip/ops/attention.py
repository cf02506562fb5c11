"""Softmax attention in plain torch, in the form that is faster on the CPU at hand.

Torch's fused kernel multiplies in tiles. With AMX these are fast in every dtype. Without, its bf16
takes three times as long as products of large blocks of queries, so blocks it is.
``benchmarks/attention.py`` measures both. Letters as in ``ops.reference``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastskip.ops import processor

# Queries per block: enough to keep a core busy, few enough to skip most of what causality hides.
_BLOCK = 128
# Queries from which on the fused kernel is the faster form with AMX, in any dtype.
_FUSED = 64
_FULL = (torch.float32, torch.float64)


def attend(
    queries: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    visible: Tensor | None,
    *,
    is_causal: bool,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention of one sequence, or of several with the same layout.

    Args:
        queries: ``[B, H, N, K]``.
        keys, values: segments of the cache in slot order, each ``[B, G, S_i, K]``.
        visible: ``[N, S]`` bool, ``S`` = sum of ``S_i``; ``None`` = every slot.
        is_causal: the queries belong to the last ``N`` slots, and each sees its own and all before
            it; needs ``visible is None``.
        scale: factor on the scores.
        dropout: probability, on the attention weights.
    Returns:
        ``[B, H, N, K]``.
    """
    causal = is_causal and queries.shape[2] > 1
    if dropout or queries.requires_grad or _fuses_fast(queries, len(keys)):
        return attend_fused(
            queries, keys, values, visible, is_causal=causal, scale=scale, dropout=dropout
        )
    return attend_in_blocks(queries, keys, values, visible, is_causal=causal, scale=scale)


def reads_in_place(entries: Tensor) -> bool:
    """Whether few queries read keys and values like ``entries`` where they lie, though these are
    the first slots of a longer segment. Batched products in half precision copy them first;
    torch's fused kernel, which takes the place of these products with AMX, does not."""
    return entries.dtype in _FULL or _multiplies_tiles(entries)


def _fuses_fast(queries: Tensor, segments: int) -> bool:
    """Whether torch's fused kernel is the faster form here. It takes one segment: few queries are
    not worth a copy of several, and in full precision products are as fast for them."""
    if not _multiplies_tiles(queries):
        return False
    return queries.shape[2] >= _FUSED or (segments == 1 and queries.dtype not in _FULL)


def _multiplies_tiles(x: Tensor) -> bool:
    return x.device.type == "cpu" and processor.has_amx(x.dtype)


def attend_fused(
    queries: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    visible: Tensor | None,
    *,
    is_causal: bool,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """``attend`` by torch's kernel, which in training keeps less for the backward pass."""
    key, value = _joined(keys), _joined(values)
    rows, slots = queries.shape[2], key.shape[2]
    if is_causal and rows < slots:  # torch would let the first query see the first slot alone
        whole = torch.ones(rows, slots, dtype=torch.bool, device=queries.device)
        visible, is_causal = whole.tril_(slots - rows), False
    return F.scaled_dot_product_attention(
        queries,
        key,
        value,
        attn_mask=visible,
        is_causal=is_causal,
        scale=scale,
        dropout_p=dropout,
        enable_gqa=key.shape[1] != queries.shape[1],
    )


def attend_in_blocks(
    queries: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    visible: Tensor | None,
    *,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """``attend`` block by block of queries: a product with the slots that they may see, a softmax
    and a second product. Scores of slots that no query of a block sees are never computed."""
    rows, slots = queries.shape[2], sum(key.shape[2] for key in keys)
    if rows <= _BLOCK:
        mask = _additive_mask(visible, rows, slots, queries, is_causal=is_causal)
        return _attend_block(queries, keys, values, mask, scale)
    key, value = _joined(keys), _joined(values)
    outputs = []
    for start in range(0, rows, _BLOCK):
        block = queries[:, :, start : start + _BLOCK]
        stop = start + block.shape[2]
        seen = slots - rows + stop if is_causal else slots
        shown = None if visible is None else visible[start:stop]
        mask = _additive_mask(shown, block.shape[2], seen, queries, is_causal=is_causal)
        own = [key[:, :, :seen]], [value[:, :, :seen]]
        outputs.append(_attend_block(block, *own, mask, scale))
    return torch.cat(outputs, dim=2)


def _joined(segments: Sequence[Tensor]) -> Tensor:
    return segments[0] if len(segments) == 1 else torch.cat(list(segments), dim=2)


def _additive_mask(
    visible: Tensor | None, rows: int, slots: int, like: Tensor, *, is_causal: bool
) -> Tensor | None:
    """The additive mask ``[N, S]``, minus infinity where a query does not see a slot; if any."""
    if visible is None:
        return _causal_mask(rows, slots, like) if is_causal and rows > 1 else None
    zeros = torch.zeros(visible.shape, dtype=like.dtype, device=like.device)
    return zeros.masked_fill_(~visible, float("-inf"))


def _causal_mask(rows: int, slots: int, like: Tensor) -> Tensor:
    """The causal mask of up to a block of queries, which belong to the last of ``slots``."""
    width = max(_BLOCK, 1 << (slots - 1).bit_length())
    return _triangle(width, like.dtype, like.device)[_BLOCK - rows :, width - slots :]


@functools.lru_cache(maxsize=8)
def _triangle(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[block, width]``: the causal mask of a block of queries on the last of ``width`` slots.

    Its bottom right corner is the mask of fewer queries on fewer slots.
    """
    with torch.inference_mode(False):
        whole = torch.full((_BLOCK, width), float("-inf"), dtype=dtype, device=device)
        return whole.triu_(width - _BLOCK + 1)


def _attend_block(
    queries: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """Attention of a block of queries; ``mask [N, S]`` is added to their scores.

    The query heads that share a key head become rows of one product, so nothing is repeated.
    """
    batch, heads, rows, width = queries.shape
    groups = keys[0].shape[1]
    alike = heads // groups
    grouped = queries.reshape(batch * groups, alike * rows, width)
    added: Sequence[Tensor | None] = [None] * len(keys)
    if mask is not None:
        mask = mask.repeat(alike, 1) if alike > 1 else mask
        added = mask.split([key.shape[2] for key in keys], dim=-1)
    scores = [
        _scores(grouped, key.flatten(0, 1).transpose(1, 2), scale, own)
        for key, own in zip(keys, added, strict=True)
    ]
    score = scores[0] if len(scores) == 1 else torch.cat(scores, dim=-1)
    weights = torch.softmax(score, dim=-1)
    if len(keys) == 1:
        return torch.bmm(weights, values[0].flatten(0, 1)).view(batch, heads, rows, width)
    parts = weights.split([key.shape[2] for key in keys], dim=-1)
    products = [
        torch.bmm(part, value.flatten(0, 1)) for part, value in zip(parts, values, strict=True)
    ]
    return sum(products[1:], products[0]).view(batch, heads, rows, width)


def _scores(queries: Tensor, keys: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """``scale * (queries @ keys) + mask``, batched, as one operation: in half precision, scaling or
    masking afterwards would round once more."""
    if mask is not None:
        return torch.baddbmm(mask, queries, keys, alpha=scale)
    blank = queries.new_empty(1).expand(len(queries), queries.shape[1], keys.shape[2])
    return torch.baddbmm(blank, queries, keys, beta=0, alpha=scale)
