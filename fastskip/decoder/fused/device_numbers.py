"""Numbers of a forward's rows at fixed addresses on the device, sent again for each forward."""

from __future__ import annotations

import torch
from torch import Tensor

from fastskip.decoder.fused.row_numbers import RowNumbers
from fastskip.decoder.fused.rows import Recipe
from fastskip.ops.allocate import copy_over

# Numbers per chunk of device memory; larger recipes get a chunk of their own.
CHUNK = 1 << 15
# Each tensor begins at a multiple of this many numbers, since kernels are compiled for that.
ALIGNMENT = 16


class DeviceNumbers:
    """The numbers that recipes yield, in chunks of device memory, and the recipes to rewrite them.

    ``send`` is a ``rows.Send``.
    """

    def __init__(self, numbers: RowNumbers, device: torch.device) -> None:
        self._numbers, self._device = numbers, device
        self._recipes: list[tuple[Recipe, Tensor]] = []
        self._chunks: list[tuple[Tensor, Tensor]] = []
        self._free = 0

    def send(self, recipe: Recipe) -> Tensor:
        """The recipe's numbers on the device, int32; after ``load`` those of the next forward."""
        found = recipe(self._numbers).to(torch.int32)
        size = -(-found.numel() // ALIGNMENT) * ALIGNMENT
        if not self._chunks or self._free < size:
            self._add_chunk(max(CHUNK, size))
        host, device = self._chunks[-1]
        start = len(host) - self._free
        self._free -= size
        there = slice(start, start + found.numel())
        host[there] = found
        device[there].copy_(found)
        self._recipes.append((recipe, host[there]))
        return device[there]

    def load(self, numbers: RowNumbers) -> None:
        """Sends the numbers of another forward with equally many rows to the same addresses."""
        self._numbers = numbers
        for recipe, host in self._recipes:
            found = recipe(numbers)
            if found.shape != host.shape:  # copy_ would broadcast
                raise RuntimeError(
                    f"recipe: numbers {list(found.shape)}; allowed: {list(host.shape)}, as captured"
                )
            host.copy_(found)
        for host, device in self._chunks:
            copy_over(host, device)

    def _add_chunk(self, size: int) -> None:
        host = torch.zeros(size, dtype=torch.int32)
        self._chunks.append((host, torch.zeros(size, dtype=torch.int32, device=self._device)))
        self._free = size
