"""Masks as a safetensors file: one bitmap per matrix, described by its metadata.

Metadata: ``format`` (``fastskip masks``), ``schema_version``, ``fingerprint``, ``columns`` (JSON:
the ``in_features`` of each matrix, since bitmaps are padded) and ``provenance`` (JSON).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastskip.atomic_files import atomic_write
from fastskip.ops.bitmaps import bitmap_bytes, unpack_bits
from fastskip.study.pruning.kept_set import KeptSet
from fastskip.study.pruning.recipe import PruningError

FORMAT = "fastskip masks"
SCHEMA_VERSION = "1"
_ALLOWED = "a mask file written by fastskip"


@dataclass(frozen=True, slots=True)
class MaskFile:
    """The contents of a mask file: kept sets by matrix name, the fingerprint of the model's shapes,
    and the masks' provenance."""

    kept: Mapping[str, KeptSet]
    fingerprint: str
    provenance: Mapping[str, Any]

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the file, whatever device the masks are on."""
        metadata = {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "fingerprint": self.fingerprint,
            "columns": json.dumps({name: own.columns for name, own in self.kept.items()}),
            "provenance": json.dumps(dict(self.provenance)),
        }
        tensors = {name: own.bitmap.cpu().contiguous() for name, own in self.kept.items()}
        with atomic_write(Path(path)) as part:
            save_file(tensors, part, metadata=metadata)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> MaskFile:
        """Reads a file.

        Raises:
            PruningError: the file is missing, malformed, or not a mask file.
        """
        file = Path(path)
        try:
            with safe_open(file, framework="pt") as opened:
                about = opened.metadata() or {}
                names = list(opened.keys())
                tensors = {name: opened.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            raise PruningError(str(file), error, _ALLOWED) from error
        if about.get("format") != FORMAT:
            raise PruningError(str(file), "not a mask file", _ALLOWED)
        if about.get("schema_version") != SCHEMA_VERSION:
            version = repr(about.get("schema_version"))
            raise PruningError(f"{file}: schema_version", version, SCHEMA_VERSION)
        try:
            columns, provenance = json.loads(about["columns"]), json.loads(about["provenance"])
            if not isinstance(provenance, dict):
                raise PruningError(f"{file}: provenance", provenance, "a JSON object")
            kept = {name: _kept(file, name, own, columns[name]) for name, own in tensors.items()}
            return cls(kept, about["fingerprint"], provenance)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise PruningError(str(file), f"incomplete ({error})", _ALLOWED) from error


def _kept(file: Path, name: str, bitmap: torch.Tensor, columns: int) -> KeptSet:
    width = bitmap_bytes(1, columns)
    if bitmap.dtype != torch.uint8 or bitmap.ndim != 2 or bitmap.shape[1] != width:
        found = f"{bitmap.dtype} {list(bitmap.shape)}"
        raise PruningError(f"{file}: {name}", found, f"uint8 [rows, {width}]")
    if bool(unpack_bits(bitmap, 8 * width)[:, columns:].any()):
        # Computations on whole bytes would count them as kept.
        raise PruningError(f"{file}: {name}", f"bits past column {columns}", _ALLOWED)
    return KeptSet(bitmap, columns)
