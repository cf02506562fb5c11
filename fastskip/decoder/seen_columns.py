"""The columns that a cache has seen: what each is, and where text after them goes."""

from __future__ import annotations

import torch
from torch import Tensor

from fastskip.tokens import PAD

STAYS = torch.iinfo(torch.int64).max


class SeenColumns:
    """Columns of ``B`` sequences, pads included; all tensors on the host.

    Attributes:
        codes: ``[B, C]`` class of every column (``tokens.CODES``; ``PAD`` for pads).
        positions: ``[B, C]`` RoPE position of every column.
        gone: ``[B, C]`` the stage of the plan's removals from which a column is no longer a row;
            ``STAYS`` if it is never removed.
        axes: ``[3, B, C]`` position of every column in time, height and width; ``None`` where
            columns have a single position.
    """

    def __init__(self, batch: int = 0) -> None:
        self.codes, self.positions, self.gone = torch.empty(3, batch, 0, dtype=torch.int64).unbind()
        self.axes: Tensor | None = None

    @property
    def batch(self) -> int:
        """``B``."""
        return self.codes.shape[0]

    @property
    def count(self) -> int:
        """``C``."""
        return self.codes.shape[1]

    def append(self, codes: Tensor, positions: Tensor, gone: Tensor, axes: Tensor | None) -> None:
        """Appends new columns; each argument extends the attribute of its name.

        Raises:
            ValueError: either the new columns or the earlier ones have axes, but not both.
        """
        if self.count and (axes is None) != (self.axes is None):
            raise ValueError("axes: needed for all columns of a cache, or for none of them")
        self.codes = torch.cat((self.codes, codes), dim=1)
        self.positions = torch.cat((self.positions, positions), dim=1)
        self.gone = torch.cat((self.gone, gone), dim=1)
        if axes is not None:
            self.axes = axes if self.axes is None else torch.cat((self.axes, axes), dim=2)

    def crop(self, count: int) -> None:
        """Keeps the first ``count`` columns."""
        self.codes, self.positions = self.codes[:, :count], self.positions[:, :count]
        self.gone = self.gone[:, :count]
        self.axes = None if self.axes is None else self.axes[:, :, :count]

    def select(self, sequences: Tensor) -> None:
        """Keeps (or repeats) the given sequences ``[n]``."""
        self.codes, self.positions = self.codes[sequences], self.positions[sequences]
        self.gone = self.gone[sequences]
        self.axes = None if self.axes is None else self.axes[:, sequences]

    def codes_at(self, stage: int) -> Tensor:
        """``codes`` as the layers after ``stage`` removals see them: removed rows are pads."""
        return self.codes.masked_fill(self.gone <= stage, PAD) if stage else self.codes

    def last_positions(self) -> Tensor:
        """``[B]`` largest position of each sequence's real columns; -1 for one without any."""
        if not self.count:
            return torch.full((self.batch,), -1, dtype=torch.int64)
        return self.positions.masked_fill(self.codes == PAD, -1).max(dim=1).values

    def last_axes(self) -> Tensor:
        """``[3, B]`` axes of each sequence's last real column; -1 for a sequence without one."""
        last = self.last_positions()
        if self.axes is None or not self.count:
            return last.expand(3, -1)
        columns = torch.arange(self.count).masked_fill(self.codes == PAD, 0).amax(1)
        found = self.axes.gather(2, columns.expand(3, -1)[:, :, None])[:, :, 0]
        return found.masked_fill(last < 0, -1)

    def following(self, steps: Tensor | int) -> tuple[Tensor, Tensor | None]:
        """The places of text ``steps [B, T]`` after each sequence's last real column: positions
        ``[B, T]`` and, if columns have them, ``axes [3, B, T]``."""
        axes = None if self.axes is None else self.last_axes()[:, :, None] + steps
        return self.last_positions()[:, None] + steps, axes

    def rope_deltas(self) -> Tensor | None:
        """``[B, 1]`` each sequence's next position minus its number of rows (images span fewer
        positions than rows); ``None`` where columns have a single position."""
        if self.axes is None:
            return None
        rows = (self.codes != PAD).sum(1)
        return (self.last_axes().amax(0) + 1 - rows)[:, None]

    def next_places(self) -> Tensor:
        """``[B]`` the RoPE position of each sequence's next row.

        Raises:
            ValueError: it would differ between time, height and width.
        """
        last = self.last_axes()
        if not bool((last == last[0]).all()):
            raise ValueError(
                "input_ids: a prompt that ends in an image; allowed: prompts with text after the "
                "last image, as chat templates write them, or a model with impl='reference'"
            )
        return last[0] + 1
