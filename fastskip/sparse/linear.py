"""Linear layers whose weight is stored without its zeros, in one of two forms."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastskip.ops import bitmaps
from fastskip.ops.bitmaps import Packed

FEW = 8
"""Rows up to which the kernel streams a bitmap's weights; with more, the weight is expanded."""


class Weights(StrEnum):
    """How pruned projections are held in memory.

    DENSE: with their zeros, like any others; every executor runs them. BITMAP: one bit per entry
    plus the values, the fewest bytes; on CUDA, a kernel reads it directly for few rows; otherwise
    it is expanded for every GEMM, which is slow. CSR: torch's compressed rows, fp32 on a CPU; with
    a column index per value, half of the weights take as many bytes as all of them dense, but
    few rows are multiplied faster if enough weights are zero (``benchmarks/sparse.py`` measures
    both). SEMI_STRUCTURED: 2:4 as tensor cores read it, on CUDA (``sparse/structured.py``).
    """

    DENSE = "dense"
    BITMAP = "bitmap"
    CSR = "csr"
    SEMI_STRUCTURED = "2:4"


class SparseLinear(nn.Module):
    """``x @ weight.T + bias`` with a weight ``[M, E]`` that is stored without its zeros.

    Gradients reach the input, never the weight. State dicts contain ``bitmap``, ``values``
    (``ops.bitmaps``) and ``bias``, whatever the form.
    """

    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, False))

    @property
    def packed(self) -> Packed:
        """The weight as bitmap and values."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes that the weight takes in memory."""
        return sum(buffer.nbytes for buffer in self.buffers())

    @property
    def kept(self) -> int:
        """How many entries of the weight are stored."""
        return len(self.get_buffer("values"))

    def to_linear(self) -> nn.Linear:
        """The equivalent plain linear, whose weight is bitwise the one that was packed."""
        made = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        made.weight = nn.Parameter(bitmaps.expand(self.packed), False)
        made.register_parameter("bias", self.bias)
        return made.train(self.training)

    def extra_repr(self) -> str:
        share = self.kept / (self.in_features * self.out_features)
        return f"{self.in_features}, {self.out_features}, kept={share:.1%}"


class BitmapLinear(SparseLinear):
    """The weight as bitmap and values, uint8 ``[M, 4 * ceil(E / 32)]`` and ``[k]``.

    On CUDA, a kernel multiplies few rows directly from these. Otherwise the weight is expanded
    temporarily for each GEMM, which saves memory and costs time.
    """

    bitmap: Tensor
    values: Tensor
    starts: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bitmap: Tensor,
        values: Tensor,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.register_buffer("bitmap", bitmap)
        self.register_buffer("values", values)
        self.register_buffer("starts", None, persistent=False)  # follows from the bitmap

    @classmethod
    def of(cls, other: nn.Linear | SparseLinear) -> BitmapLinear:
        """The equivalent bitmap linear: `other` itself if it is one; otherwise it shares the bias,
        and also the values if `other` is sparse."""
        if isinstance(other, BitmapLinear):
            return other
        if isinstance(other, SparseLinear):
            packed = other.packed
        else:
            packed = bitmaps.pack(other.weight.detach())
        bias = None if other.bias is None else other.bias.detach()
        sizes = other.in_features, other.out_features
        return cls(*sizes, packed.bitmap, packed.values, bias).train(other.training)

    @property
    def packed(self) -> Packed:
        if self.starts is None:
            self.starts = bitmaps.starts_of(self.bitmap, self.in_features)
        return Packed(self.bitmap, self.values, self.starts, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., E] -> [..., M]``."""
        rows = x.reshape(-1, self.in_features)
        if x.device.type == "cuda" and len(rows) <= FEW and not _wants_gradient(x):
            from fastskip.kernels.sparse import sparse_linear

            return sparse_linear(rows, self.packed, self.bias).view(*x.shape[:-1], -1)
        return F.linear(x, bitmaps.expand(self.packed), self.bias)

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        self.starts = None
        super()._load_from_state_dict(*arguments, **keywords)


class CsrLinear(SparseLinear):
    """The weight as compressed rows: int32 ``starts [M + 1]`` and ``places [k]``, ``values [k]``.

    Multiplied by torch's sparse matmul (MKL), whatever the number of rows. For inputs of another
    dtype or device, under autocast and under gradients, the weight is expanded like a bitmap's.
    """

    starts: Tensor
    places: Tensor
    values: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        starts: Tensor,
        places: Tensor,
        values: Tensor,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias)
        for name, tensor in (("starts", starts), ("places", places), ("values", values)):
            self.register_buffer(name, tensor, persistent=False)

    @classmethod
    def from_bitmap(cls, other: BitmapLinear) -> CsrLinear:
        """The same weight; values and bias are shared."""
        packed = other.packed
        bias = None if other.bias is None else other.bias.detach()
        sizes = other.in_features, other.out_features
        made = cls(*sizes, packed.starts, _places_of(packed), packed.values, bias)
        return made.train(other.training)

    @property
    def packed(self) -> Packed:
        mask = torch.zeros(
            self.out_features, self.in_features, dtype=torch.bool, device=self.values.device
        )
        counts = (self.starts[1:] - self.starts[:-1]).long()
        rows = torch.arange(self.out_features, device=counts.device).repeat_interleave(counts)
        mask[rows, self.places.long()] = True
        return Packed(bitmaps.pack_bits(mask), self.values, self.starts, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., E] -> [..., M]``."""
        if _wants_gradient(x) or not self._takes_sparse_product(x):
            return F.linear(x, bitmaps.expand(self.packed), self.bias)
        rows = x.reshape(-1, self.in_features)
        weight = torch.sparse_csr_tensor(
            self.starts,
            self.places,
            self.values,
            (self.out_features, self.in_features),
            check_invariants=False,
        )
        # A matrix-vector product is faster for a single row.
        y = torch.mv(weight, rows[0])[None] if len(rows) == 1 else (weight @ rows.t()).t()
        y = y if self.bias is None else y + self.bias
        return y.reshape(*x.shape[:-1], self.out_features)

    def _takes_sparse_product(self, x: Tensor) -> bool:
        is_single = x.dtype == self.values.dtype == torch.float32
        return is_single and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        packed = self.packed
        destination[prefix + "bitmap"] = packed.bitmap
        destination[prefix + "values"] = packed.values

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        own, sizes = self.packed, (self.in_features, self.out_features)
        other = BitmapLinear(*sizes, own.bitmap, own.values)
        other.bias = self.bias
        other._load_from_state_dict(*arguments, **keywords)
        self.values, self.bias = other.values, other.bias
        self.starts, self.places = other.packed.starts, _places_of(other.packed)


def _places_of(packed: Packed) -> Tensor:
    """The column of each value."""
    mask = bitmaps.unpack_bits(packed.bitmap, packed.columns)
    return mask.nonzero()[:, 1].to(torch.int32)


def _wants_gradient(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad
