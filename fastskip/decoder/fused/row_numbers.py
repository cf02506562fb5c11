"""Where the rows of a forward lie and what they see, as numbers on the host."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastskip.decoder.deep_features import DeepFeatures
from fastskip.decoder.guards import Classes
from fastskip.tokens import PAD, Rows, TokenLayout, member


class RowNumbers:
    """Numbers of the rows of one forward; all tensors int64, on the host.

    Rows of no class (a layout's idle ones) leave no entry and see nothing, and no router decides on
    them.

    Attributes:
        layout: the rows.
        narrow: those that continue after the last layer's entries; ``None`` for all.
        read: those that are read, where all continue; ``None`` for all.
        features: what is added to some of them after the first layers; ``None``: nothing.
    """

    def __init__(
        self,
        layout: TokenLayout,
        cached: Tensor,
        narrow: Rows | None = None,
        read: Rows | None = None,
        features: DeepFeatures | None = None,
    ) -> None:
        """``cached [B, C]``: codes of the columns before the layout's."""
        self.layout, self.narrow, self.read = layout, narrow, read
        self.features = None if features is None else features.among(layout)
        self._codes = torch.cat((cached, layout.source), dim=1)
        self._seen: dict[Classes, Tensor] = {}

    def every(self) -> Rows:
        """All rows."""
        return Rows(slice(0, len(self.layout)), len(self.layout))

    def of(self, classes: Classes) -> Rows:
        """The rows of some classes."""
        return self.layout.rows(classes)

    def continuing_rows(self) -> Rows:
        """The rows that continue after the last layer's entries."""
        assert self.narrow is not None
        return self.narrow

    def narrowed(self, classes: Classes) -> Rows:
        """The rows of some classes among those that continue, indexing these."""
        index = member(self.continuing_rows().take(self.layout.codes), classes).nonzero().squeeze(1)
        if len(index) == self.continuing_rows().count:
            return Rows(slice(0, len(index)), len(index))
        return Rows(index, len(index))

    def asking(self, classes: Classes) -> Rows:
        """The same rows, indexing all."""
        return self.narrowed(classes).through(self.narrow)

    def columns(self) -> Tensor:
        """``[N]``: where rows lie in the flattened ``[B * T]`` input; idle ones lie anywhere."""
        flat = self.layout.flat
        return torch.arange(len(self.layout)) if flat is None else flat.clamp(min=0)

    def packed(self) -> Tensor:
        """``[N]``: where rows lie among those that are not idle; idle ones lie anywhere."""
        flat = self.layout.flat
        if flat is None:
            return torch.arange(len(self.layout))
        return ((flat >= 0).cumsum(0) - 1).clamp(min=0)

    def reading(self) -> Tensor:
        """Which rows are read, in the order of the output."""
        assert self.read is not None
        return self.read.ids()

    def featured(self, count: int = 0) -> Tensor:
        """The rows that get features, padded to ``count`` with the first row."""
        assert self.features is not None
        rows = self.features.rows
        return F.pad(rows, (0, max(0, count - len(rows))))

    def positions(self, rows: Rows) -> Tensor:
        """The rows' indices into the RoPE tables: their positions or, if they have axes, their own
        numbers, since the tables then have a row for each of them."""
        layout = self.layout
        own = layout.positions if layout.axes is None else torch.arange(len(layout))
        return rows.take(own)

    def axes(self) -> Tensor:
        """``[3 * N]``: the rows' positions in time, then in height, then in width."""
        assert self.layout.axes is not None
        return self.layout.axes.flatten()

    def sequences(self, rows: Rows) -> Tensor:
        return rows.take(self.layout.sequences)

    def flags(self, classes: Classes) -> Tensor:
        """``[N]`` bool: which rows are of some classes."""
        return member(self.layout.codes, classes)

    def limits(self, holding: Classes, rows: Rows) -> Tensor:
        """How many entries of classes ``holding`` lie at or before each row's column: what it
        sees, itself included."""
        seen = self._count(holding)
        limits = seen[self.sequences(rows), rows.take(self.layout.columns)]
        return limits.masked_fill(rows.take(self.layout.codes) == PAD, 0)

    def slots(self, holding: Classes, rows: Rows) -> Tensor:
        """Where rows leave their entries; -1 for those of no class."""
        return self.limits(holding, rows) - 1

    def masked_slots(self, holding: Classes, classes: Classes) -> Tensor:
        """``[N]``: slots of rows of some classes, -1 for the others."""
        return self.slots(holding, self.every()).masked_fill(~self.flags(classes), -1)

    def order(self, rows: Rows, classes: Classes) -> Tensor:
        """Numbers of ``rows``: those of some classes by sequence and column, then the others."""
        others = ~member(rows.take(self.layout.codes), classes)
        place = self.sequences(rows) * self._codes.shape[1] + rows.take(self.layout.columns)
        return torch.argsort(place.masked_fill(others, self._codes.numel()), stable=True)

    def bounds(self, rows: Rows, classes: Classes) -> Tensor:
        """``[B + 1]``: where each sequence begins in ``order``."""
        some = self.sequences(rows)[member(rows.take(self.layout.codes), classes)]
        counts = torch.bincount(some, minlength=self.layout.batch)
        return torch.cat((counts.new_zeros(1), counts.cumsum(0)))

    def is_whole(self, holding: Classes, bounds: Tensor) -> bool:
        """Whether rows with these bounds are all rows that have entries of classes ``holding``."""
        return torch.equal(self._count(holding)[:, -1], bounds.diff())

    def _count(self, holding: Classes) -> Tensor:
        """``[B, C]``: how many entries there are up to each column."""
        seen = self._seen.get(holding)
        if seen is None:
            seen = self._seen[holding] = member(self._codes, holding).cumsum(1)
        return seen
