"""Rows to decide on, for tests of kernels that decide."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastskip.ops import fused, fused_routes
from fastskip.ops.routes import Group, Move, Route, Trace, Verdict
from tests.kernels.paging import exact

TRUTH = torch.float64
UNTOUCHED = 7
SIZE = 24
SALT = 0xDEADBEEF


@dataclass(frozen=True)
class Scene:
    """Rows of three sequences in mixed order, some of them no candidates; the second has none.

    ``is_new``: some rows have run no layer yet.
    """

    rows: int = 11
    seed: int = 0
    has_candidates: bool = True
    is_new: bool = True

    def numbers(self, name: str) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + 1)
        sequences = torch.randint(0, 3, (self.rows,), generator=generator)
        positions = torch.randperm(2 * self.rows + 1, generator=generator)[: self.rows]
        members = (torch.arange(self.rows) % 4 != 1) & (sequences != 1) & self.has_candidates
        found = {"sequences": sequences, "positions": positions, "candidates": members}
        return found[name].to(torch.int32)

    def h(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
        return exact(self.rows, SIZE, seed=10 * self.seed + 100 + seed).to(device, dtype)

    def trace(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Trace:
        wide = torch.promote_types(dtype, torch.float32)
        found = exact(self.rows, 2, seed=self.seed + 7).to(device, wide)
        if self.is_new:
            found[::3] = torch.tensor([-math.inf, math.inf])
        return Trace(self.h(dtype, device, seed=1), found)

    def verdict(self, device: torch.device | str = "cpu", **terms: Any) -> Verdict:
        weight = exact(SIZE, seed=3).float().to(device)
        usual = {"bar": -0.4, "weight": weight, "bias": 0.25, "salt": SALT}
        given: dict[str, Any] = {**usual, **terms}
        return Verdict(
            runs=torch.full((self.rows,), UNTOUCHED, dtype=torch.int32, device=device),
            candidates=self.numbers("candidates").to(device),
            **given,
        )

    def ran(self, device: torch.device | str = "cpu") -> list[Tensor]:
        flags = torch.arange(self.rows, dtype=torch.int32, device=device)
        return [(flags % 2).int(), (flags % 5 != 0).int()]

    def route(
        self,
        dtype: torch.dtype,
        found: Sequence[Verdict],
        device: torch.device | str = "cpu",
        move: Move = Move.NEXT,
    ) -> Route:
        return Route(
            found,
            self.numbers("positions").to(device),
            self.numbers("sequences").to(device),
            self.trace(dtype, device),
            move,
            self.ran(device),
            torch.zeros(1, dtype=torch.int32, device=device),
        )

    def bar(self, move: Move = Move.NONE, h: Tensor | None = None, **terms: Any) -> float:
        """A bar that some candidates or groups reach and some do not, far from every score.

        ``h``: other rows than the scene's, in fp64.
        """
        taken = self.route(TRUTH, [], move=move)
        h = self.h(TRUTH) if h is None else h
        fused.route(h, taken)
        assert taken.trace is not None
        own = self.verdict(**terms)
        scores = fused_routes.score(own, h, taken.positions, taken.trace.found)
        members = own.candidates.bool()
        if own.group is not Group.ROW:
            found = []
            for number in taken.sequences[members].unique():
                theirs = scores[members & (taken.sequences == number)]
                found += [theirs.mean(), theirs.min()]
            scores, members = torch.stack(found), torch.ones(len(found), dtype=torch.bool)
        known = scores[members & scores.isfinite()].sort().values
        gaps = known.diff()
        assert gaps.max() > 1e-2, "no room for a bar"
        return float((known[gaps.argmax()] + known[gaps.argmax() + 1]) / 2)
