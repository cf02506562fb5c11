"""Checkpoints that store pruned matrices as bitmap and values: smaller files, the same numbers.

An ordinary Hugging Face checkpoint of the variant ``sparse`` (``model.sparse.safetensors``), in
which ``<projection>.bitmap`` and ``<projection>.values`` replace ``<projection>.weight``, and a
``fastskip_sparse.json`` that lists these projections with their numbers of values. Stock
transformers finds no weights in such a folder and raises, rather than loading half of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastskip.ops.bitmaps import bitmap_bytes
from fastskip.sparse.convert import compressed, sparse_matrices
from fastskip.sparse.linear import BitmapLinear
from fastskip.sparse.matrices import SparseError, matrices

LAYOUT_FILE = "fastskip_sparse.json"
VARIANT = "sparse"
SCHEMA_VERSION = 1
_DENSE_FILES = ("model.safetensors", "model.safetensors.index.json")
_READABLE = f"a {LAYOUT_FILE} written by fastskip"


@dataclass(frozen=True, slots=True)
class SparseLayout:
    """How many entries a sparse checkpoint keeps of each sparse projection, by name."""

    kept: Mapping[str, int]

    @classmethod
    def of(cls, model: Any) -> SparseLayout:
        """The layout of a model that is sparse in memory."""
        return cls({m.name: m.module.kept for m in sparse_matrices(model)})

    @classmethod
    def read(cls, file: Path) -> SparseLayout:
        """Reads ``fastskip_sparse.json``.

        Raises:
            SparseError: the file is unreadable or malformed.
        """
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SparseError(str(file), error, _READABLE) from error
        version = document.get("schema_version") if isinstance(document, dict) else None
        if version != SCHEMA_VERSION:
            raise SparseError(f"{file}: schema_version", repr(version), str(SCHEMA_VERSION))
        kept = document.get("kept")
        if not isinstance(kept, dict) or not all(type(n) is int and n >= 0 for n in kept.values()):
            raise SparseError(f"{file}: kept", type(kept).__name__, _READABLE)
        return cls(kept)

    def write(self, file: Path) -> None:
        document = {"schema_version": SCHEMA_VERSION, "kept": dict(self.kept)}
        file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def save_sparse(model: Any, folder: str | os.PathLike[str], **options: Any) -> None:
    """Writes a sparse checkpoint of a pruned model, which may be plain, prepared or already sparse.

    ``fastskip.load_model`` reads it with bitwise the same weights. ``options`` are passed to the
    model's ``save_pretrained``.

    Raises:
        SparseError: the model has too few zeros, or the folder contains a dense checkpoint.
    """
    with compressed(model):
        write_sparse(model, folder, lambda **more: model.save_pretrained(folder, **options, **more))


def write_sparse(model: Any, folder: str | os.PathLike[str], write: Callable[..., Any]) -> Any:
    """Writes a model that is sparse in memory with ``write(variant=...)``, then its layout file."""
    check_unmixed(Path(folder), wants_sparse=True)
    result = write(variant=VARIANT)
    SparseLayout.of(model).write(Path(folder) / LAYOUT_FILE)
    return result


def check_unmixed(folder: Path, *, wants_sparse: bool = False) -> None:
    """Raises ``SparseError`` for a folder with both a sparse and a dense checkpoint: ambiguous."""
    dense = [name for name in _DENSE_FILES if (folder / name).is_file()]
    if dense and (wants_sparse or (folder / LAYOUT_FILE).is_file()):
        allowed = f"either {dense[0]} or {LAYOUT_FILE}"
        raise SparseError(str(folder), "a dense and a sparse checkpoint in one folder", allowed)


def read_sparse(model_class: Any, path: str, layout: SparseLayout, **options: Any) -> Any:
    """``model_class.from_pretrained`` for a sparse checkpoint; its projections stay sparse.

    Returns the model, an instance of ``model_class`` itself, and the loading info.

    Raises:
        SparseError: the layout does not fit the model, or a bitmap does not match its values.
    """

    def __init__(self: Any, *arguments: Any, **keywords: Any) -> None:
        model_class.__init__(self, *arguments, **keywords)
        _make_room_(self, layout)

    # Hugging Face builds the module tree and then fills it; a subclass makes projections sparse in
    # between.
    members = {"__init__": __init__, "__module__": model_class.__module__}
    reader: Any = type(model_class.__name__, (model_class,), members)
    model, found = reader.from_pretrained(
        path, variant=VARIANT, output_loading_info=True, **options
    )
    model.__class__ = model_class
    for matrix in sparse_matrices(model):
        # Kernels read as many values as the bitmap has bits set.
        bits = int(matrix.module.packed.starts[-1])
        if bits != matrix.module.kept:
            allowed = f"a bitmap of {matrix.module.kept} entries, the number of values"
            raise SparseError(f"{path}: {matrix.name}", f"a bitmap of {bits} entries", allowed)
    return model, found


def _make_room_(model: Any, layout: SparseLayout) -> None:
    known = {matrix.name: matrix for matrix in matrices(model)}
    for name, kept in layout.kept.items():
        matrix = known.get(name)
        if matrix is None:
            raise SparseError(f"{LAYOUT_FILE}: kept", name, f"projections such as {min(known)}")
        linear = matrix.module
        if kept > linear.weight.numel():
            allowed = f"at most {linear.weight.numel()} entries of {list(linear.weight.shape)}"
            raise SparseError(f"{LAYOUT_FILE}: {name}", kept, allowed)
        sizes = linear.in_features, linear.out_features
        width = bitmap_bytes(1, linear.in_features)
        bitmap = torch.empty(len(linear.weight), width, dtype=torch.uint8)
        values = linear.weight.new_empty(kept)
        bias = None if linear.bias is None else torch.empty_like(linear.bias)
        matrix.replace(BitmapLinear(*sizes, bitmap, values, bias))
