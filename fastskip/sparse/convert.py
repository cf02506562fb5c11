"""A model's pruned linears made sparse in memory, and dense again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastskip.ops.bitmaps import bitmap_bytes
from fastskip.sparse.linear import BitmapLinear, CsrLinear, SparseLinear, Weights
from fastskip.sparse.matrices import Matrix, SparseError, matrices


@dataclass(frozen=True, slots=True)
class Compression:
    """What became sparse, and the bytes that its weights took before and take now."""

    names: tuple[str, ...]
    dense_bytes: int
    sparse_bytes: int


def compress_(model: Any, form: Weights | str = Weights.BITMAP) -> Compression:
    """Holds every pruned projection without its zeros, in place.

    Pruned: bitmap and values take fewer bytes than the dense weight. Layers with such projections
    compute them one by one, on plain torch (``impl="reference"``); training them is over.
    ``expand_`` undoes it. A model that is sparse already gets the form asked for.

    Args:
        form: ``"bitmap"`` or ``"csr"``, see ``Weights``.
    Raises:
        SparseError: no projection has enough zeros, one is not a plain linear, or the form is not
            for this device or dtype.
    """
    form = _checked_form(form, model)
    before = {matrix.name: _bytes_of(matrix) for matrix in matrices(model)}
    _compress(list(matrices(model)))
    for matrix in sparse_matrices(model):
        if form is Weights.CSR and isinstance(matrix.module, BitmapLinear):
            matrix.replace(CsrLinear.from_bitmap(matrix.module))
        elif form is Weights.BITMAP and isinstance(matrix.module, CsrLinear):
            matrix.replace(BitmapLinear.from_linear(matrix.module.to_linear()))
    after = {matrix.name: _bytes_of(matrix) for matrix in sparse_matrices(model)}
    return Compression(tuple(after), sum(before[name] for name in after), sum(after.values()))


def expand_(model: Any) -> None:
    """Makes every sparse projection a plain linear again, one at a time, in place."""
    for matrix in sparse_matrices(model):
        matrix.replace(matrix.module.to_linear())


def hold_(model: Any, weights: Weights | str) -> None:
    """Holds pruned projections as asked, dense ones included; errors as ``compress_``."""
    if weights == Weights.DENSE:
        expand_(model)
    else:
        compress_(model, weights)


@contextmanager
def compressed(model: Any) -> Iterator[None]:
    """Within this block ``model`` is sparse; afterwards it has its own modules back.

    Both forms are in memory meanwhile. A model that is sparse already stays as it is.
    """
    if any(True for _ in sparse_matrices(model)):
        yield
        return
    replaced = _compress(list(matrices(model)))
    try:
        yield
    finally:
        for matrix in replaced:
            matrix.replace(matrix.module)


def sparse_matrices(model: Any) -> list[Matrix]:
    """The projections that are sparse in memory."""
    return [matrix for matrix in matrices(model) if isinstance(matrix.module, SparseLinear)]


def _compress(found: Sequence[Matrix]) -> list[Matrix]:
    """Makes pruned linears bitmaps; returns what was there before."""
    for matrix in found:  # before anything is replaced
        if not isinstance(matrix.module, SparseLinear) and type(matrix.module) is not nn.Linear:
            allowed = "plain linears: merge adapters into them first"
            raise SparseError(matrix.name, f"a {type(matrix.module).__name__}", allowed)
    replaced = []
    for matrix in found:
        if not isinstance(matrix.module, SparseLinear) and _pays(matrix.weight):
            matrix.replace(BitmapLinear.from_linear(matrix.module))
            replaced.append(matrix)
    if not replaced and not any(isinstance(matrix.module, SparseLinear) for matrix in found):
        allowed = "a pruned model (fastskip prune): a bitmap needs zeros to pay for itself"
        raise SparseError("model", "no projection has enough zeros", allowed)
    return replaced


def _pays(weight: Tensor) -> bool:
    zeros = weight.numel() - int(weight.count_nonzero())
    rows, columns = weight.shape
    return zeros * weight.element_size() > bitmap_bytes(rows, columns) + 4 * (rows + 1)


def _bytes_of(matrix: Matrix) -> int:
    module = matrix.module
    return module.nbytes if isinstance(module, SparseLinear) else int(matrix.weight.nbytes)


def _checked_form(form: Weights | str, model: Any) -> Weights:
    if form not in (Weights.BITMAP, Weights.CSR):
        raise SparseError("form", repr(form), f"{Weights.BITMAP}, {Weights.CSR}")
    if form == Weights.CSR:
        dtype, device = model.dtype, model.device
        if device.type != "cpu" or dtype != torch.float32 or not torch.backends.mkl.is_available():
            found = f"'csr' of {str(dtype).removeprefix('torch.')} on {device}"
            raise SparseError("form", found, "'csr' of float32 on a CPU by a torch with MKL")
    return Weights(form)
