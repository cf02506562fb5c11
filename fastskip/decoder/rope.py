"""Rotary tables of a decoder, by position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastskip.ops.allocate import outside_inference_mode, to_device


class RotaryTable:
    """Cosines and sines of the model's own rotary module, tabulated once and then indexed.

    Only frequencies that do not depend on the sequence can be tabulated; loading refuses others.
    Those of dynamic RoPE qualify up to a length.

    Attributes:
        limit: how many positions there are; ``None``: unlimited.
        axis: ``[K / 2]`` the axis that a frequency depends on: time, height or width (Qwen2-VL,
            arXiv:2409.12191, section 2.1: M-RoPE), host; ``None``: all use a single position.
    """

    def __init__(self, rotary: Any) -> None:
        self.rotary = rotary
        self.limit: int | None = None
        if getattr(rotary, "rope_type", None) == "dynamic":
            self.limit = rotary.config.max_position_embeddings
            # A long prompt under Hugging Face leaves its frequencies behind; a short one resets
            # them.
            with torch.no_grad():
                rotary(rotary.inv_freq, rotary.inv_freq.new_zeros(1, 1))
        # Kept alive, so that no other tensor reuses its identity.
        self._frequencies = getattr(rotary, "inv_freq", None)
        self.axis: Tensor | None = None
        if getattr(rotary, "mrope_section", None) is not None:
            self.axis = _axis_of(rotary)
        self._made_of = _facts_of(rotary)
        self._cosine: Tensor | None = None
        self._sine: Tensor | None = None
        self._halves: tuple[Tensor, Tensor] | None = None

    def is_of(self, rotary: Any) -> bool:
        """Whether the tables are those of a rotary module in its current state."""
        return rotary is self.rotary and _facts_of(rotary) == self._made_of

    def __getstate__(self) -> dict[str, Any]:
        state = {"_cosine": None, "_sine": None, "_halves": None, "_made_of": None}
        return {**self.__dict__, **state}

    def at(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Tables ``[N, 1, K]`` for ``positions [N]`` in the dtype and on the device of ``like``.

        The first half of the sines is negated, as ``ops.rotate`` expects.
        """
        needed = int(positions.max()) + 1 if len(positions) else 1
        cosine, sine = self._tables(needed, like)
        if len(positions) == 1:
            return cosine[needed - 1 : needed], sine[needed - 1 : needed]
        index = to_device(positions, like.device)
        return cosine[index], sine[index]

    def at_axes(self, axes: Tensor, needed: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Like ``at``, for rows at ``axes [3, N]`` (time, height, width), all below ``needed``."""
        cosine, sine = self.halves_at(axes, needed, like)
        return torch.cat((cosine, cosine), 1)[:, None], torch.cat((-sine, sine), 1)[:, None]

    def halves_at(self, axes: Tensor, needed: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[N, K / 2]`` of such rows, dense, as kernels read them."""
        assert self.axis is not None
        index = to_device(axes.long()[to_device(self.axis, axes.device)].t(), like.device)
        cosine, sine = self.halves(needed, like)
        return cosine.gather(0, index), sine.gather(0, index)

    def halves(self, needed: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[P, K / 2]`` of the positions below ``needed`` (and of some more),
        dense, as kernels read them."""
        cosine, sine = self._tables(needed, like)
        if self._halves is None:
            half = cosine.shape[-1] // 2
            self._halves = cosine[:, 0, :half].contiguous(), sine[:, 0, half:].contiguous()
        return self._halves

    def _tables(self, needed: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Tables ``[P, 1, K]`` of at least ``needed`` positions; rebuilt only where necessary."""
        needed = needed if self.limit is None else min(needed, self.limit)
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
        length = length if self.limit is None else min(length, self.limit)
        # Tables made in a caller's inference mode could not be used where gradients are wanted.
        with (
            outside_inference_mode(),
            torch.no_grad(),
            torch.autocast(like.device.type, enabled=False),
        ):
            positions = torch.arange(length, device=like.device)[None]
            if self.axis is not None:
                positions = positions.expand(3, 1, -1)  # the same in time, height and width
            cosine, sine = self.rotary(like.detach(), positions)
            half = sine.shape[-1] // 2
            signed = torch.cat((-sine[..., :half], sine[..., half:]), dim=-1)
            self._cosine, self._sine = cosine[0, :, None], signed[0, :, None]
        self._halves = None
        return self._cosine, self._sine


def _axis_of(rotary: Any) -> Tensor:
    """``[K / 2]``: the axis that each frequency depends on, as the module itself picks it: in
    consecutive sections in Qwen2-VL, interleaved in Qwen3-VL."""
    width = len(rotary.inv_freq)
    numbers = torch.arange(3.0)[:, None, None, None].repeat(1, 1, 1, width)
    picked: Tensor = rotary.recomposition_frequencies(numbers)
    return picked[0, 0, :width].long()


def _facts_of(rotary: Any) -> tuple[object, ...]:
    """What the angles depend on, as far as a user's own module has these attributes."""
    frequencies = getattr(rotary, "inv_freq", None)
    version = None
    if frequencies is not None and not frequencies.is_inference():
        version = frequencies._version
    return id(frequencies), version, getattr(rotary, "attention_scaling", None)
