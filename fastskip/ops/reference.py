"""The operations in plain torch: the definition of correctness and the CPU path.

Letters: ``N`` rows, ``D`` hidden size, ``F`` FFN size, ``H`` query heads, ``G`` key/value heads,
``K`` head dim, ``S`` cache slots. Nothing here knows of tokens, layers or policies. Every function
is out of place, and therefore safe for autograd, except where its name ends in ``_``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Up to this many query rows a pair of batched products beats the fused kernel in half precision,
# which is tuned for long query blocks (on CPUs by a factor of five at one row).
_FEW_QUERIES = 8
_HALVES = (torch.bfloat16, torch.float16)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """``x / rms(x) * weight`` over the last axis; the mean square is taken in fp32. ``[N, D]``."""
    return F.rms_norm(x, weight.shape, weight, epsilon)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``: ``[N, D] x [M, D] -> [N, M]``."""
    return F.linear(x, weight, bias)


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
    """Softmax attention of one sequence, or of several sequences of equal length.

    Args:
        queries: ``[B, H, N, K]``.
        keys, values: segments of the cache in slot order, each ``[B, G, S_i, K]``.
        visible: ``[N, S]`` bool, ``S`` = sum of ``S_i``; ``None`` = every slot.
        is_causal: query ``n`` sees slots ``0..n``; needs ``N == S`` and ``visible is None``.
        scale: factor on the scores.
        dropout: probability, on the attention weights.
    Returns:
        ``[B, H, N, K]``.
    """
    rows = queries.shape[2]
    if rows <= _FEW_QUERIES and not dropout and (queries.dtype in _HALVES or len(keys) > 1):
        if is_causal and rows > 1:
            visible = torch.ones(rows, rows, dtype=torch.bool, device=queries.device).tril_()
        return _attend_few(queries, keys, values, visible, scale)
    key = keys[0] if len(keys) == 1 else torch.cat(list(keys), dim=2)
    value = values[0] if len(values) == 1 else torch.cat(list(values), dim=2)
    shares_heads = key.shape[1] != queries.shape[1]
    shape = queries.shape
    if shares_heads and rows == 1 and visible is None:
        # The query heads of one key head become rows of it: nothing is repeated.
        queries = queries.reshape(shape[0], key.shape[1], -1, shape[3])
        is_causal = shares_heads = False
    out = F.scaled_dot_product_attention(
        queries,
        key,
        value,
        attn_mask=visible,
        is_causal=is_causal,
        scale=scale,
        dropout_p=dropout,
        enable_gqa=shares_heads,
    )
    return out.reshape(shape)


def _attend_few(
    queries: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    visible: Tensor | None,
    scale: float,
) -> Tensor:
    """``attend`` for a handful of query rows: two batched products a segment, no copy of the cache.

    The query heads that share a key head become rows of one product.
    """
    batch, heads, rows, width = queries.shape
    groups = keys[0].shape[1]
    grouped = queries.reshape(batch * groups, heads // groups * rows, width)
    scores = [_scaled_product(grouped, key.flatten(0, 1).transpose(1, 2), scale) for key in keys]
    score = scores[0] if len(scores) == 1 else torch.cat(scores, dim=-1)
    if visible is not None:
        score = score.view(batch * groups, heads // groups, rows, -1)
        score = score.masked_fill(~visible, float("-inf")).flatten(1, 2)
    wide = torch.promote_types(score.dtype, torch.float32)
    weights = torch.softmax(score, dim=-1, dtype=wide).to(queries.dtype)
    if len(keys) == 1:
        return torch.bmm(weights, values[0].flatten(0, 1)).view(batch, heads, rows, width)
    parts = weights.split([key.shape[2] for key in keys], dim=-1)
    products = [
        torch.bmm(part, value.flatten(0, 1)) for part, value in zip(parts, values, strict=True)
    ]
    return sum(products[1:], products[0]).view(batch, heads, rows, width)


def _scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``scale * (a @ b)``, batched, as one operation."""
    shape = (a.shape[0], a.shape[1], b.shape[2])
    return torch.baddbmm(a.new_empty(1).expand(shape), a, b, beta=0, alpha=scale)
