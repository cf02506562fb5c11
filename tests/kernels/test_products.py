"""The inner loops by themselves: both forms, every norm, rows and widths that fit no block."""

from itertools import product as combinations

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastskip.kernels import numerics, products
from fastskip.kernels.operands import blocks_for, product_candidates
from fastskip.ops import fused
from fastskip.ops.allocate import empty
from fastskip.ops.contracts import Norm
from tests.budget import assert_within_budget
from tests.kernels.paging import exact
from tests.kernels.sublayers import DTYPES, STREAM, TENSOR

WEIGHT_ROWS, WIDTH = 24, 100
NORMS = {"none": 0, "RMS": 1, "LayerNorm": 2}


@triton.jit
def _product_kernel(  # type: ignore[no-untyped-def]
    weights,
    inputs,
    out_ptr,
    rows,
    M: tl.constexpr,
    E: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
):
    pair = tl.arange(0, BLOCK_M // 2)
    m = products.pair_rows(tl.minimum(pair, M // 2 - 1), M // 2, M // 2)
    start = tl.program_id(0) * BLOCK_N
    y = products.product(weights, m, inputs, start, rows, E, NORM, BLOCK_N, BLOCK_E, STAGES)
    first, second = products.split_pairs(y)
    n = start + tl.arange(0, BLOCK_N)
    is_written = (pair < M // 2)[:, None] & (n < rows)[None, :]
    out_ptr += n[None, :] * M + pair[:, None]
    numerics.store(out_ptr, first, is_written)
    numerics.store(out_ptr + M // 2, second, is_written)


@triton.jit
def _pair_rows_kernel(  # type: ignore[no-untyped-def]
    out_ptr, SPAN: tl.constexpr, GAP: tl.constexpr, PAIRS: tl.constexpr
):
    rows = products.pair_rows(tl.arange(0, PAIRS), SPAN, GAP)
    tl.store(out_ptr + tl.arange(0, 2 * PAIRS), rows)


def reference(
    h: Tensor, index: Tensor | None, change: Tensor | None, norm: Norm | None, weight: Tensor
) -> Tensor:
    if norm is not None:
        x = fused.normalize(h, norm, index=index, change=change)
    else:
        x = h if index is None else h[index.long()]
        x = x if change is None else x + change
    return F.linear(x, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("block", [1, 2, 4, 16], ids=lambda block: f"{block} rows")
def test_product(block: int, kind: int, dtype: torch.dtype, device: torch.device) -> None:
    """Two tiles of rows, the last not full; 24 weight rows in a block of 32; 100 columns."""
    rows = block + 1
    h, weight = exact(rows + 2, WIDTH, seed=1), exact(WEIGHT_ROWS, WIDTH, seed=2, scale=0.1)
    gain, shift = exact(WIDTH, seed=3), exact(WIDTH, seed=4)
    changed, picked = exact(rows, WIDTH, seed=5), torch.randperm(rows + 2)[:rows].int()
    for has_index, has_change in combinations((False, True), repeat=2):
        index = picked if has_index else None
        change = changed if has_change else None

        def run(dtype: torch.dtype, index: Tensor | None, change: Tensor | None) -> Tensor:
            x = h if index is not None else h[:rows]
            norm = Norm(gain.to(dtype), 1e-2, shift.to(dtype) if kind == 2 else None, kind == 2)
            change = None if change is None else change.to(dtype)
            return reference(x.to(dtype), index, change, norm if kind else None, weight.to(dtype))

        def place(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, dtype)

        out = empty((rows, WEIGHT_ROWS), dtype, device)
        _product_kernel[(2,)](
            products.Weights(place(weight), WIDTH),
            products.Inputs(
                x=place(h),
                stride=WIDTH,
                index=None if index is None else index.to(device),
                change=place(change),
                change_stride=WIDTH,
                gain=place(gain) if kind else None,
                shift=place(shift) if kind == 2 else None,
                epsilon=1e-2,
            ),
            out,
            rows,
            M=WEIGHT_ROWS,
            E=WIDTH,
            NORM=kind,
            BLOCK_M=32,
            BLOCK_N=block,
            BLOCK_E=64,
            STAGES=2,
        )
        eager, truth = run(dtype, index, change), run(torch.float64, index, change)
        assert_within_budget("product", out.cpu(), eager, truth)


@pytest.mark.parametrize(
    ("span", "gap", "expected"),
    [
        (2, 2, [0, 2, 1, 3, 4, 6, 5, 7]),
        (100, 100, [0, 100, 1, 101, 2, 102, 3, 103]),
        (3, 3, [0, 3, 1, 4, 2, 5, 6, 9]),
    ],
)
def test_pair_rows(span: int, gap: int, expected: list[int], device: torch.device) -> None:
    out = torch.zeros(8, dtype=torch.int32, device=device)
    _pair_rows_kernel[(1,)](out, SPAN=span, GAP=gap, PAIRS=4)
    assert out.tolist() == expected


def test_blocks_go_by_the_size_of_an_element() -> None:
    """A tile of fp32 is as many bytes as one of bf16, and never much wider than a row."""
    x = torch.empty(1, 4096)
    for dtype, config, expected in (
        (torch.bfloat16, STREAM, (32, 1, 64)),
        (torch.float32, STREAM, (32, 1, 32)),
        (torch.bfloat16, TENSOR, (64, 16, 64)),
        (torch.float32, TENSOR, (8, 4, 128)),
    ):
        blocks, options = blocks_for("feed", config, x.to(dtype), 1, (64, 4096))
        assert (blocks["BLOCK_M"], blocks["BLOCK_N"], blocks["BLOCK_E"]) == expected
        assert options == {"num_warps": 4}
    assert blocks_for("feed", STREAM, x.bfloat16(), 1, (64, 24))[0]["BLOCK_E"] == 32
    assert blocks_for("feed", STREAM, x, 1, (64, 3))[0]["BLOCK_E"] == 16


@pytest.mark.parametrize("rows", [1, 2, 4, 16, 32, 64])
def test_candidates_fit(rows: int) -> None:
    """In shared memory of 227 KB and in registers, roughly: the compiler has the last word."""
    for config in product_candidates(rows):
        m, n, e = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_E"]
        if config["STAGES"] > 1:
            assert (m + n) * e * 2 * config["STAGES"] <= 227 << 10
        if n < 16:
            assert m * e * n / (32 * config["num_warps"]) <= 64
