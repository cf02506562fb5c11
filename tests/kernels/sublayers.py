"""Norms, products, projections and feeds for kernel tests: the same numbers in every dtype."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from fastskip.ops.contracts import (
    Activation,
    Feed,
    HeadNorms,
    Linear,
    Norm,
    Pages,
    Projection,
    Rotation,
    Targets,
)
from fastskip.ops.routes import Chosen
from tests.budget import assert_within_budget
from tests.kernels.paging import build_pages, exact

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TRUTH = torch.float64

STREAM = {"BLOCK_M": 32, "BLOCK_N": 1, "BLOCK_E": 64, "STAGES": 2, "num_warps": 4}
STREAM_2 = {**STREAM, "BLOCK_N": 2}
STREAM_4 = {**STREAM, "BLOCK_N": 4}
TENSOR = {"BLOCK_M": 64, "BLOCK_N": 16, "BLOCK_E": 64, "STAGES": 2, "num_warps": 4}
APART = {**TENSOR, "NORM_APART": 1}
CONFIGS = {
    "stream": STREAM,
    "stream 2": STREAM_2,
    "stream 4": STREAM_4,
    "tensor": TENSOR,
    "norm apart": APART,
}


WIDE = {"BLOCK_M": 64, "BLOCK_E": 128}
GUARDED = {
    # Programs have more than one tile each.
    "a row": {**STREAM, **WIDE, "PROGRAMS": 5},
    "stream": {**STREAM_2, **WIDE, "PROGRAMS": 3},
    "tensor": {**TENSOR, **WIDE, "PROGRAMS": 1},
    # More than one block along the sum: a loop of one inside the loop over tiles, with the norm
    # apart, is what the pipeliner of Triton 3.6 fails on (sm_90); no model is that narrow.
    "norm apart": {**APART, **WIDE, "BLOCK_E": 64, "PROGRAMS": 1},
}
GUARDED_FORMS = [
    pytest.param(config, dtype, id=f"{name}-{dtype}")
    for name, config in GUARDED.items()
    for dtype in DTYPES
    # fp32 is streamed in any case.
    if dtype != torch.float32 or config["BLOCK_N"] <= 4
]
SOME, ALL, NONE = (1, 0, 1, 1, 0), (1,) * 5, (0,) * 5
"""Flags of five rows; in blocks of two some are busy, partly busy, idle."""


@dataclass(frozen=True)
class Place:
    """Where the tensors of a problem live."""

    dtype: torch.dtype
    device: torch.device

    def numbers(self, *shape: int, seed: int, scale: float = 1.0) -> Tensor:
        return exact(*shape, seed=seed, scale=scale).to(self.device, self.dtype)

    def integers(self, *values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def chosen(self, flags: Sequence[int] | None) -> Chosen | None:
        return None if flags is None else Chosen(self.integers(*flags))

    def norm(self, width: int, *, seed: int, is_centred: bool = False) -> Norm:
        # Far from 1 and from each other, so that a weight at a wrong element shows.
        weight = 2 + self.numbers(width, seed=seed, scale=0.5).bfloat16().to(self.dtype)
        bias = self.numbers(width, seed=seed + 1) if is_centred else None
        return Norm(weight.bfloat16().to(self.dtype), 1e-2, bias, is_centred)

    def linear(self, rows: int, width: int, *, seed: int, has_bias: bool = False) -> Linear:
        weight = self.numbers(rows, width, seed=seed, scale=width**-0.5)
        return Linear(weight, self.numbers(rows, seed=seed + 1) if has_bias else None)


def head_norms(place: Place, size: int, *, seed: int) -> HeadNorms:
    """Two norms that differ in all they have."""
    queries, keys = (place.norm(size, seed=each) for each in (seed, seed + 1))
    return HeadNorms(queries, replace(keys, epsilon=5e-2))


@dataclass(frozen=True)
class ProjectionCase:
    """Up to six rows of three sequences, some without an entry, on both sides of page borders."""

    queries: int
    groups: int
    head_dim: int
    width: int
    has_rotation: bool = True
    has_pages: bool = True
    has_bias: bool = False
    is_centred: bool = False
    leaves_all: bool = True
    has_head_norms: bool = False

    def build(self, rows: int, place: Place, *, seed: int = 0) -> Projection:
        half = self.head_dim // 2
        total = (self.queries + 2 * self.groups * self.has_pages) * self.head_dim
        angles = exact(16, half, seed=9).float()
        tables = (
            part.bfloat16().to(place.device, place.dtype) for part in (angles.cos(), angles.sin())
        )
        slots = (63, 64, -1, 2, 130, 0) if seed == 0 else (3, -1, 65, 64, 7, 129)
        targets = Targets(
            place.integers(*(7, 0, 3, 15, 2, 11)[:rows]),
            place.integers(*(1, 0, 1, 0, 1, 2)[:rows]),
            place.integers(*slots[:rows]),
        )
        pages = build_pages(
            (70, 140, 200),
            groups=self.groups,
            head_dim=self.head_dim,
            dtype=place.dtype,
            device=place.device,
            layer=1 if seed == 0 else 0,
        )
        return Projection(
            place.norm(self.width, seed=seed + 1, is_centred=self.is_centred),
            place.linear(total, self.width, seed=seed + 3, has_bias=self.has_bias),
            Rotation(*tables) if self.has_rotation else None,
            targets,
            pages if self.has_pages else None,
            self.head_dim,
            self.leaves_all,
            head_norms(place, self.head_dim, seed=seed + 11) if self.has_head_norms else None,
        )


@dataclass(frozen=True)
class FeedCase:
    """One FFN."""

    inner: int
    width: int
    activation: Activation = Activation.GATED_SILU
    has_bias: bool = False
    is_centred: bool = False

    def build(self, place: Place, *, seed: int = 0) -> Feed:
        rows = self.inner * (2 if self.activation is Activation.GATED_SILU else 1)
        return Feed(
            place.norm(self.width, seed=seed + 1, is_centred=self.is_centred),
            place.linear(rows, self.width, seed=seed + 5, has_bias=self.has_bias),
            self.activation,
        )


def memory(pages: Pages) -> Tensor:
    return torch.cat([slab.flatten() for slab in pages.slabs])


def assert_same_entries(actual: Pages, eager: Pages, truth: Pages) -> None:
    """Entries within budget, and nothing else written."""
    ours, theirs, true = memory(actual).cpu(), memory(eager).cpu(), memory(truth).cpu()
    written = ~true.isnan()
    assert written.any()
    assert torch.equal(~ours.isnan(), written)
    assert_within_budget("entries", ours[written], theirs[written], true[written])
