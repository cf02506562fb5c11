"""The operations in plain torch: the definition of correctness and the CPU path.

Letters: ``N`` rows, ``D`` hidden size, ``F`` FFN size, ``H`` query heads, ``G`` key/value heads,
``K`` head dim, ``S`` cache slots. Nothing here knows about tokens, layers or policies. Every
function is out of place, and therefore safe for autograd, unless its name ends in ``_``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastskip.ops.contracts import Activation, Norm

# Queries per block: enough to keep a core busy, few enough to skip most of what causality hides.
_BLOCK = 128
_HALVES = (torch.bfloat16, torch.float16)


def normalize(x: Tensor, norm: Norm) -> Tensor:
    """RMS norm or LayerNorm over the last axis, ``[N, D]``."""
    if norm.is_centred:
        return F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.epsilon)
    return rms_norm(x, norm.weight, norm.epsilon)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """``x / rms(x) * weight`` over the last axis; the mean square is taken in fp32. ``[N, D]``."""
    if x.dtype in _HALVES:
        return F.rms_norm(x, weight.shape, weight, epsilon)
    # In full precision nothing is cast, and these few steps cost half as much as torch's function.
    squares = x * x
    scale = squares.mean(-1, keepdim=True).add_(epsilon).rsqrt_()
    if wants_gradient(x, weight):
        return x * scale * weight
    # Fresh memory from the system costs more than the arithmetic, so that of the squares is reused.
    return torch.mul(x, scale, out=squares).mul_(weight)


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether autograd records operations on these."""
    return torch.is_grad_enabled() and any(each.requires_grad for each in tensors)


def activate(x: Tensor, activation: Activation) -> Tensor:
    """``[N, 2F] -> [N, F]`` if gated, else ``[N, F] -> [N, F]``."""
    return gated_silu(x) if activation is Activation.GATED_SILU else F.relu(x)


def gated_silu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of rows that hold both, gate first: ``[N, 2F] -> [N, F]``."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up) if not gate_up.requires_grad else F.silu(gate) * up


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding in Hugging Face's half-split form: ``[N, H, K]`` with tables ``[N, 1, K]``.

    ``sine`` carries the sign: its first half is negated, so that the rotation is one roll, one
    product and one fused multiply-add.
    """
    return torch.addcmul(x * cosine, x.roll(x.shape[-1] // 2, -1), sine)


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

    Block by block: a product of queries with the slots that they may see, a softmax and a second
    product. On CPUs that is faster than torch's fused kernel (three times in bf16), whose blocks
    are small, and scores of slots that no query of a block sees are never computed.
    """
    rows, slots = queries.shape[2], sum(key.shape[2] for key in keys)
    if is_causal and rows > 1 and (dropout or queries.requires_grad):
        visible = torch.ones(rows, slots, dtype=torch.bool, device=queries.device)
        visible, is_causal = visible.tril_(slots - rows), False
    if dropout or queries.requires_grad:
        return _attend_fused(queries, keys, values, visible, scale, dropout)
    if rows <= _BLOCK:
        mask = _additive_mask(visible, rows, slots, queries, is_causal=is_causal)
        return _attend_block(queries, keys, values, mask, scale)
    key = keys[0] if len(keys) == 1 else torch.cat(list(keys), dim=2)
    value = values[0] if len(values) == 1 else torch.cat(list(values), dim=2)
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


def _attend_fused(
    queries: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    visible: Tensor | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """Torch's fused attention: in training, it keeps less for the backward pass."""
    key, value = torch.cat(list(keys), dim=2), torch.cat(list(values), dim=2)
    return F.scaled_dot_product_attention(
        queries,
        key,
        value,
        attn_mask=visible,
        scale=scale,
        dropout_p=dropout,
        enable_gqa=key.shape[1] != queries.shape[1],
    )
