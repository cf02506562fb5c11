"""Who computes a product: the kernels of few rows, the vendor's library, or ``row_gemm``.

Decided by measurement, per shape, in tables like those of a kernel: ``tables/<gpu>/choice.json``,
and ``choice_scattered.json`` for residual updates of indexed rows, where the library needs a launch
more. ``shape`` is ``(M, E)``: weight rows of the whole operation, and their length (the longest of
several). ``config`` is ``{"by": ..}``:

- ``few_rows``: one launch with everything around the product in it (``projection``, ``feed``,
  ``parallel``, ``residual``, ``head``);
- ``library``: torch's product, with launches of their own for the norm and what follows;
- ``row_gemm``: the same with this project's product, which has activation and scatter in it.
"""

from __future__ import annotations

import torch

from fastskip.kernels import tuning

FEW_ROWS, LIBRARY, ROW_GEMM = "few_rows", "library", "row_gemm"
TABLES = ("choice", "choice_scattered")


def choose_product(
    device: torch.device, rows: int, shape: tuple[int, int], *, is_scattered: bool = False
) -> str:
    """Who computes a product of ``shape`` on ``rows`` rows on this device."""
    by: str = tuning.config_for(TABLES[is_scattered], device, rows, shape)["by"]
    return by


def candidates(rows: int, shape: tuple[int, ...]) -> list[dict[str, str]]:
    """All three, while the rows are few enough for each."""
    names = (FEW_ROWS, LIBRARY, ROW_GEMM) if rows <= 256 else (LIBRARY, ROW_GEMM)
    return [{"by": name} for name in names]
