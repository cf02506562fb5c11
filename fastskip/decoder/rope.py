"""Rotary tables of a decoder, by position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RotaryTable:
    """Cosines and sines of the model's own rotary module, tabulated once and then indexed.

    Only RoPE whose frequencies do not depend on the sequence may be tabulated; loading refuses the
    others.
    """

    def __init__(self, rotary: Any) -> None:
        self.rotary = rotary
        self._cosine: Tensor | None = None
        self._sine: Tensor | None = None
        self._halves: tuple[Tensor, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"rotary": self.rotary, "_cosine": None, "_sine": None, "_halves": None}

    def at(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Tables ``[N, 1, K]`` for ``positions [N]`` in the dtype and on the device of ``like``.

        The first half of the sines is negated, as ``ops.rotate`` wants it.
        """
        needed = int(positions.max()) + 1 if len(positions) else 1
        cosine, sine = self._tables(needed, like)
        if len(positions) == 1:
            return cosine[needed - 1 : needed], sine[needed - 1 : needed]
        index = positions.to(like.device)
        return cosine[index], sine[index]

    def halves(self, needed: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[P, K / 2]`` of the positions below ``needed`` (and of some more),
        dense, as kernels read them."""
        cosine, sine = self._tables(needed, like)
        if self._halves is None:
            half = cosine.shape[-1] // 2
            self._halves = cosine[:, 0, :half].contiguous(), sine[:, 0, half:].contiguous()
        return self._halves

    def _tables(self, needed: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Tables ``[P, 1, K]`` that reach to ``needed``; made again only where they do not."""
        cosine, sine = self._cosine, self._sine
        if (
            cosine is None
            or sine is None
            or cosine.shape[0] < needed
            or cosine.dtype != like.dtype
            or cosine.device != like.device
        ):
            cosine, sine = self._tabulate(needed, like)
        return cosine, sine

    def _tabulate(self, needed: int, like: Tensor) -> tuple[Tensor, Tensor]:
        length = max(64, 1 << (needed - 1).bit_length())
        positions = torch.arange(length, device=like.device)[None]
        with torch.no_grad():
            cosine, sine = self.rotary(like.detach(), positions)
            half = sine.shape[-1] // 2
            signed = torch.cat((-sine[..., :half], sine[..., half:]), dim=-1)
        self._cosine, self._sine = cosine[0, :, None], signed[0, :, None]
        self._halves = None
        return self._cosine, self._sine
