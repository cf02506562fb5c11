"""Chooses what computes a product: kernels for few rows, the vendor's library, or ``row_gemm``.

The choice is measured per shape and kept in tables like those of a kernel:
``tables/<gpu>/choice.json``, and ``choice_scattered.json`` for residual updates of indexed rows,
where the library needs one more launch. ``shape`` is ``(M, E)``: the weight rows of the whole
operation, and their length (the longest of several). ``config`` is ``{"by": ..}``:

- ``few_rows``: one launch with everything around the product fused in (``projection``, ``feed``,
  ``parallel``, ``residual``, ``head``);
- ``library``: torch's GEMM, with separate launches for the norm and for what follows;
- ``row_gemm``: likewise, but with this project's GEMM, which fuses activation and scatter.
"""

from __future__ import annotations

import torch

from fastskip.kernels import tuning

FEW_ROWS, LIBRARY, ROW_GEMM = "few_rows", "library", "row_gemm"
TABLES = ("choice", "choice_scattered")


def choose_product(
    device: torch.device, rows: int, shape: tuple[int, int], *, is_scattered: bool = False
) -> str:
    """What computes a product of ``shape`` on ``rows`` rows on this device."""
    by: str = tuning.config_for(TABLES[is_scattered], device, rows, shape)["by"]
    return by


def candidates(rows: int, shape: tuple[int, ...]) -> list[dict[str, str]]:
    """All three, or without ``few_rows`` above 256 rows."""
    names = (FEW_ROWS, LIBRARY, ROW_GEMM) if rows <= 256 else (LIBRARY, ROW_GEMM)
    return [{"by": name} for name in names]
