"""The vocabulary product (LM head), with the final norm before and the greedy choice after it.

    logits[n, v] = norm(h[n]) @ weight[v] + bias[v]

``h [n, D]``, ``weight [V, D]``, ``bias [V]``, ``logits [n, V]`` in the storage dtype. One kernel,
grid ``(n / BLOCK_N, V / BLOCK_M)``; adjacent programs share weights. It writes the logits, or the
best of each program's ``BLOCK_M`` logits as a ranked candidate (see ``sampler``), or both:
``sampler.finish`` then chooses among ``V / BLOCK_M`` candidates per row. The rounded logits are
ranked, so the choice is that of ``choose(head_logits(..))``. The inner loops are those of
``products``; ``NORM_APART`` in a configuration gives the norm its own launch, and with ``LONG`` the
grid has that many persistent programs (``operands.share_out``). Tuning table: ``head``, shape
``(V, D)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastskip.kernels import numerics, overlap, products
from fastskip.kernels.gradients import refuse_gradients
from fastskip.kernels.launch import launch
from fastskip.kernels.operands import (
    blocks_for,
    half_candidates,
    product_candidates,
    rows_read,
    share_out,
    weights_of,
)
from fastskip.kernels.sampler import finish, ranked
from fastskip.ops.allocate import empty
from fastskip.ops.contracts import Choice, HalfNorm, Linear, Norm

MOST_TILES = 65535


@triton.jit
def _head_tile(
    part,
    start,
    inputs,
    weights,
    logits_ptr,
    partials_ptr,
    stride_ln,
    stride_pn,
    rows,
    V: tl.constexpr,
    D: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The logits of ``BLOCK_M`` tokens, and the best of them."""
    v = part * BLOCK_M + tl.arange(0, BLOCK_M)
    owned = tl.minimum(v, V - 1)
    y = products.product(weights, owned, inputs, start, rows, D, NORM, BLOCK_N, BLOCK_E, STAGES)
    if weights.bias is not None:
        y += numerics.load(weights.bias + owned)[:, None]
    n = start + tl.arange(0, BLOCK_N)
    if logits_ptr is not None:
        place_ptr = logits_ptr + n.to(tl.int64)[None] * stride_ln + v[:, None]
        numerics.store(place_ptr, y, (v < V)[:, None] & (n < rows)[None])
    if partials_ptr is not None:
        logit = numerics.round_to(y, weights.weight.dtype.element_ty).to(tl.float32)
        # Columns past the end have larger indices, so they lose to every logit, even to -inf.
        logit = tl.where((v < V)[:, None], logit, float("-inf"))
        best = tl.max(ranked(logit, v[:, None]), 0)
        tl.store(partials_ptr + n.to(tl.int64) * stride_pn + part, best, mask=n < rows)


@triton.jit
def _head_kernel(
    inputs,
    weights,
    logits_ptr,
    partials_ptr,
    stride_ln,
    stride_pn,
    rows,
    V: tl.constexpr,
    D: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
    IS_LONG: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    start = tl.program_id(0) * BLOCK_N
    part = tl.program_id(1)
    if OVERLAP:
        overlap.wait()
    if IS_LONG:
        for number in tl.range(part, tl.cdiv(V, BLOCK_M), tl.num_programs(1), flatten=True):
            _head_tile(
                number,
                start,
                inputs,
                weights,
                logits_ptr,
                partials_ptr,
                stride_ln,
                stride_pn,
                rows,
                V,
                D,
                NORM,
                BLOCK_M,
                BLOCK_N,
                BLOCK_E,
                STAGES,
            )
    else:
        _head_tile(
            part,
            start,
            inputs,
            weights,
            logits_ptr,
            partials_ptr,
            stride_ln,
            stride_pn,
            rows,
            V,
            D,
            NORM,
            BLOCK_M,
            BLOCK_N,
            BLOCK_E,
            STAGES,
        )


def head_logits(
    h: Tensor,
    norm: Norm | None,
    head: Linear,
    *,
    half: HalfNorm | None = None,
    config: Mapping[str, Any] | None = None,
) -> Tensor:
    """The final norm (unless already applied) and the vocabulary product: ``[n, D] -> [n, V]``.

    ``half``: the half norm, if already taken.
    """
    rows, columns = len(h), len(head.weight)
    logits = empty((rows, columns), h.dtype, h.device)
    _launch_head(h, norm, head, logits, False, half, config)
    return logits


def head_choose(
    h: Tensor,
    norm: Norm | None,
    head: Linear,
    choice: Choice,
    *,
    logits: Tensor | None = None,
    half: HalfNorm | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """``choose(head_logits(h, norm, head), choice)`` in two launches: ``h [B, D]``.

    ``logits [B, V]``: receives the logits, if given; ``half``: as for ``head_logits``.
    """
    partials = _launch_head(h, norm, head, logits, True, half, config)
    assert partials is not None
    finish(partials, choice)


def candidates(rows: int, shape: tuple[int, ...]) -> list[dict[str, int]]:
    """Configurations worth timing; ``shape`` as in the tables."""
    return _that_fit(product_candidates(rows, may_be_long=True), shape)


def head_half_candidates(rows: int, shape: tuple[int, ...]) -> list[dict[str, int]]:
    """For rows of a half norm."""
    return _that_fit(half_candidates(rows), shape)


def _that_fit(configs: list[dict[str, int]], shape: tuple[int, ...]) -> list[dict[str, int]]:
    """Those whose grid has no more tiles than CUDA allows along its second axis."""
    return [each for each in configs if triton.cdiv(shape[0], each["BLOCK_M"]) <= MOST_TILES]


def _launch_head(
    h: Tensor,
    norm: Norm | None,
    head: Linear,
    logits: Tensor | None,
    does_rank: bool,
    half: HalfNorm | None,
    config: Mapping[str, Any] | None,
) -> Tensor | None:
    """Launches the product; returns the ranked candidates ``[n, parts]`` if ``does_rank``."""
    refuse_gradients(h=h, logits=logits)
    (rows, width), columns = h.shape, len(head.weight)
    over = None if half is None else "head_half"
    blocks, options = blocks_for("head", config, h, rows, (columns, width), over=over)
    is_apart = bool(blocks.pop("NORM_APART", False))
    norms = [] if norm is None else [norm]
    x = rows_read(h, norms, index=None, is_apart=is_apart, half=half)
    parts = triton.cdiv(columns, blocks["BLOCK_M"])
    partials = empty((rows, parts), torch.int64, h.device) if does_rank else None
    programs, is_long = share_out(blocks, parts, parts, may_be_long=True)
    launch(
        _head_kernel,
        (triton.cdiv(rows, blocks["BLOCK_N"]), programs),
        options,
        inputs=x.first,
        weights=weights_of(head),
        logits_ptr=logits,
        partials_ptr=partials,
        stride_ln=0 if logits is None else logits.stride(0),
        stride_pn=0 if partials is None else partials.stride(0),
        rows=rows,
        V=columns,
        D=width,
        NORM=x.form,
        IS_LONG=is_long,
        **blocks,
    )
    return partials
