"""The set of kept weights of one matrix."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastskip.ops.bitmaps import pack_bits, unpack_bits

Shape = tuple[int, int]


@dataclass(frozen=True, slots=True)
class KeptSet:
    """The kept weights of one matrix ``[M, E]``, as a bitmap of ``ops.bitmaps``."""

    bitmap: Tensor
    columns: int

    @classmethod
    def of(cls, mask: Tensor) -> KeptSet:
        """From a boolean ``[M, E]``, True where a weight is kept."""
        return cls(pack_bits(mask), mask.shape[1])

    @property
    def shape(self) -> Shape:
        return len(self.bitmap), self.columns

    @property
    def mask(self) -> Tensor:
        """Boolean ``[M, E]``, True where a weight is kept."""
        return unpack_bits(self.bitmap, self.columns)
