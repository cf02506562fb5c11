"""Converts a model's pruned linears to sparse forms in memory, and back to dense."""

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
from fastskip.sparse.structured import semi_structured_
from fastskip.wording import dtype_name


@dataclass(frozen=True, slots=True)
class Compression:
    """Which projections became sparse, and the bytes of their weights before and after."""

    names: tuple[str, ...]
    dense_bytes: int
    sparse_bytes: int


def compress_(model: Any, form: Weights | str = Weights.BITMAP) -> Compression:
    """Converts every pruned projection to a sparse form, in place, one at a time.

    A projection counts as pruned if bitmap and values take fewer bytes than the dense weight. A
    prepared model then calls its modules one by one, without the fused GPU operations, and keeps
    the storage that its projections were merged into; ``fastskip.load_model(..., weights=form)``
    compresses before it prepares. Sparse weights cannot be trained. ``expand_`` undoes the
    conversion. A model that is already sparse is converted to the given form.

    Args:
        form: ``"bitmap"`` or ``"csr"``, see ``Weights``.
    Raises:
        SparseError: no projection has enough zeros, one is not a plain linear, or the form does not
            support this device or dtype.
    """
    form = _checked_form(form, model)
    _check_plain(model)
    names, dense_bytes, sparse_bytes = [], 0, 0
    for matrix in matrices(model):
        made = _to_form(form, matrix)
        if made is not None:
            names.append(matrix.name)
            dense_bytes += made.in_features * made.out_features * made.get_buffer("values").itemsize
            sparse_bytes += made.nbytes
            matrix.replace(made)
    _check_some(names)
    return Compression(tuple(names), dense_bytes, sparse_bytes)


def expand_(model: Any) -> None:
    """Converts every sparse projection back to a plain linear, in place, one at a time."""
    for matrix in sparse_matrices(model):
        matrix.replace(matrix.module.to_linear())


def convert_(model: Any, weights: Weights | str) -> None:
    """Converts pruned projections to the form ``weights``; raises as ``compress_`` and
    ``semi_structured_`` do."""
    if weights == Weights.DENSE:
        expand_(model)
    elif weights == Weights.SEMI_STRUCTURED:
        expand_(model)
        semi_structured_(model)
    else:
        compress_(model, weights)


@contextmanager
def compressed(model: Any) -> Iterator[None]:
    """Within this block ``model`` is sparse; afterwards its own modules are restored.

    Both forms are in memory meanwhile. A model that is already sparse stays as it is.
    """
    if any(True for _ in sparse_matrices(model)):
        yield
        return
    _check_plain(model)
    replaced = []
    try:
        for matrix in matrices(model):
            made = _to_form(Weights.BITMAP, matrix)
            if made is not None:
                matrix.replace(made)
                replaced.append(matrix)
        _check_some(replaced)
        yield
    finally:
        for matrix in replaced:
            matrix.replace(matrix.module)


def sparse_matrices(model: Any) -> list[Matrix]:
    """The projections that are sparse in memory."""
    return [matrix for matrix in matrices(model) if isinstance(matrix.module, SparseLinear)]


def least_zeros(weight: Tensor) -> int:
    """The smallest number of zeros for which a weight takes fewer bytes as bitmap and values."""
    rows, columns = weight.shape
    return (bitmap_bytes(rows, columns) + 4 * (rows + 1)) // weight.element_size() + 1


def _to_form(form: Weights, matrix: Matrix) -> SparseLinear | None:
    """A projection in a sparse form; ``None`` if it is not pruned."""
    module = matrix.module
    if not isinstance(module, SparseLinear) and not _pays(matrix.weight):
        return None
    if form is Weights.CSR and isinstance(module, CsrLinear):
        return module
    made = BitmapLinear.of(module)
    return CsrLinear.from_bitmap(made) if form is Weights.CSR else made


def _check_plain(model: Any) -> None:
    """Raises ``SparseError`` for a module that cannot be converted, before any is replaced."""
    for matrix in matrices(model):
        kind = type(matrix.module)
        if not issubclass(kind, SparseLinear) and kind is not nn.Linear:
            allowed = "plain linears: merge adapters into them first"
            raise SparseError(matrix.name, f"a {kind.__module__}.{kind.__name__}", allowed)


def _check_some(found: Sequence[object]) -> None:
    if not found:
        allowed = "a pruned model (fastskip prune): a bitmap pays off only with enough zeros"
        raise SparseError("model", "no projection has enough zeros", allowed)


def _pays(weight: Tensor) -> bool:
    return weight.numel() - int(weight.count_nonzero()) >= least_zeros(weight)


def _checked_form(form: Weights | str, model: Any) -> Weights:
    if form not in (Weights.BITMAP, Weights.CSR):
        raise SparseError("form", repr(form), f"{Weights.BITMAP}, {Weights.CSR}")
    if form == Weights.CSR:
        dtype, device = model.dtype, model.device
        if device.type != "cpu" or dtype != torch.float32 or not torch.backends.mkl.is_available():
            found = f"'csr' of {dtype_name(dtype)} on {device}"
            raise SparseError("form", found, "'csr' of float32 on a CPU by a torch with MKL")
    return Weights(form)
