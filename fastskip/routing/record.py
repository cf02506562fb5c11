"""Router decisions, read back for verification, plots and calibration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastskip.policy import Sublayer


@dataclass(frozen=True, slots=True)
class Decisions:
    """One forward's decisions, on the host.

    Attributes:
        first_column: the column of the first entry of the masks.
        codes: ``[B, T]`` token class of each column, -1 for pads.
        skipped: by layer and sublayer, ``[B, T]`` bool: rows that a router let skip it and that
            would have run it otherwise. Layers and sublayers without routers are absent, unless
            rows exited before them.
        candidates: with the same keys, ``[B, T]`` bool: rows that a router decided on.
    """

    first_column: int
    codes: Tensor
    skipped: Mapping[tuple[int, Sublayer], Tensor]
    candidates: Mapping[tuple[int, Sublayer], Tensor]


@dataclass(slots=True)
class RoutingRecord:
    """The decisions of all forwards while recording, in order."""

    forwards: list[Decisions] = field(default_factory=list)

    def skipped(self, layer: int, sublayer: Sublayer) -> Tensor:
        """``[B, C]``: the masks of one layer and sublayer, concatenated over all forwards' columns.

        The forwards must belong to one generation.
        """
        return torch.cat(
            [
                each.skipped.get((layer, sublayer), torch.zeros_like(each.codes, dtype=torch.bool))
                for each in self.forwards
            ],
            dim=1,
        )

    def all_skipped(self) -> dict[tuple[int, str], Tensor]:
        """``skipped`` wherever rows may have skipped, by layer and the sublayer's name."""
        keys = {key for each in self.forwards for key in each.skipped}
        return {(layer, part.value): self.skipped(layer, part) for layer, part in sorted(keys)}

    def rates(self) -> dict[tuple[int, Sublayer], float]:
        """The share of candidates that skipped, by layer and sublayer."""
        counts = sorted(self._counts().items())
        return {key: skipped / asked for key, (skipped, asked) in counts if asked}

    @property
    def rate(self) -> float:
        """The share of all candidates that skipped; 0 without candidates."""
        skipped, asked = map(sum, zip((0, 0), *self._counts().values(), strict=True))
        return skipped / asked if asked else 0.0

    def _counts(self) -> dict[tuple[int, Sublayer], tuple[int, int]]:
        """How many candidates skipped, and how many there were, by layer and sublayer."""
        found: dict[tuple[int, Sublayer], tuple[int, int]] = {}
        for each in self.forwards:
            for key, mask in each.candidates.items():
                skipped, asked = found.get(key, (0, 0))
                skipped += int((each.skipped[key] & mask).sum())
                found[key] = skipped, asked + int(mask.sum())
        return found
