"""Pruned weights stored without their zeros: in memory, on disk, and in GEMMs of few rows."""

from fastskip.sparse.checkpoint import save_sparse
from fastskip.sparse.convert import Compression, compress_, expand_
from fastskip.sparse.linear import SparseLinear, Weights
from fastskip.sparse.matrices import SparseError
from fastskip.sparse.structured import semi_structured_

__all__ = [
    "Compression",
    "SparseError",
    "SparseLinear",
    "Weights",
    "compress_",
    "expand_",
    "save_sparse",
    "semi_structured_",
]
