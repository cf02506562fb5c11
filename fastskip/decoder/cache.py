"""The key/value cache: compact per layer, a Hugging Face ``Cache`` from the outside.

The life of an entry: a forward lays out its columns; a row whose class holds an entry in a layer
gets its sequence's next free slot there; its K (already rotated) and V are written to that slot
once and never move; attention reads slots ``0 .. count`` as a view. What a policy omits is not
stored, so layers differ in length, and a layer in which no class attends holds nothing at all.

Hugging Face sees *columns*: ``get_seq_length`` is the number of columns seen, whatever a layer
holds; ``crop`` and ``reorder_cache`` act on columns and sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import add
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from fastskip.decoder.slots import EntryTable, Segment
from fastskip.ops.allocate import empty, outside_inference_mode
from fastskip.ops.attention import reads_in_place
from fastskip.plan import SkipPlan
from fastskip.plan.layer_plan import Staged, Table
from fastskip.policy import TokenClass
from fastskip.tokens import PAD, TokenLayout, member

STAYS = torch.iinfo(torch.int64).max


class LayerEntries:
    """K and V of one layer: a ``[B, G, slots, K]`` buffer of each per segment."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def extend(
        self, segments: Sequence[Segment], shape: tuple[int, int, int], like: Tensor
    ) -> None:
        """Adds buffers for new segments; existing ones are not touched."""
        batch, groups, width = shape
        for segment in segments[len(self.keys) :]:
            size = (batch, groups, segment.count, width)
            self.keys.append(empty(size, like.dtype, like.device))
            self.values.append(empty(size, like.dtype, like.device))

    def select(self, sequences: Tensor) -> None:
        self.keys = [_selected(buffer, sequences) for buffer in self.keys]
        self.values = [_selected(buffer, sequences) for buffer in self.values]


def _selected(buffer: Tensor, sequences: Tensor) -> Tensor:
    with outside_inference_mode():  # like ``empty``: more entries will be written to it
        return buffer.index_select(0, sequences.to(buffer.device))


class SkipCache(Cache):
    """Cache of a prepared model; remembers the plan that filled it.

    Attributes:
        codes: ``[B, C]`` class of every column seen (``tokens.CODES``; ``PAD`` for pads), host.
        gone: ``[B, C]`` the stage of the plan's removals from which a column is no longer a row,
            host; ``STAYS`` if it is never removed.
        positions: ``[B, C]`` RoPE position of every column, host.
        axes: ``[3, B, C]`` position of every column in time, height and width, host; ``None``
            where columns have a single position.
        prompt_columns: inside ``generate``, where the prompt ends; ``None`` outside.
        ends_gradients: whether a forward with gradients filled it; its entries are kept detached.
    """

    def __init__(self, plan: SkipPlan, *, reserve: int = 0) -> None:
        """``reserve``: columns expected in total, so that growth needs no second segment."""
        super().__init__(layers=[])
        self.plan = plan
        self.reserve = reserve
        self.prompt_columns: int | None = None
        self.ends_gradients = False
        self._begin(0)
        self.tables: dict[Table, EntryTable] = {}
        self.entries: dict[int, LayerEntries] = {}
        # Router state kept across forwards, by rule number.
        self.routing: dict[int, dict[str, Any]] = {}

    def _begin(self, batch: int) -> None:
        """Starts with no columns of ``batch`` sequences."""
        self.codes, self.positions, self.gone = torch.empty(3, batch, 0, dtype=torch.int64).unbind()
        self.axes: Tensor | None = None

    def _append(self, codes: Tensor, positions: Tensor, gone: Tensor, axes: Tensor | None) -> None:
        """Appends new columns; each argument extends the attribute of its name.

        Raises:
            ValueError: either the new columns or the earlier ones have axes, but not both.
        """
        if self.columns and (axes is None) != (self.axes is None):
            raise ValueError("axes: needed for all columns of a cache, or for none of them")
        self.codes = torch.cat((self.codes, codes), dim=1)
        self.positions = torch.cat((self.positions, positions), dim=1)
        self.gone = torch.cat((self.gone, gone), dim=1)
        if axes is not None:
            self.axes = axes if self.axes is None else torch.cat((self.axes, axes), dim=2)

    # The decoder's interface.

    @property
    def columns(self) -> int:
        """Columns seen, pads included."""
        return self.codes.shape[1]

    def check_batch(self, batch: int) -> None:
        """Raises ``ValueError`` if columns of ``batch`` sequences cannot be appended."""
        if self.columns and self.codes.shape[0] != batch:
            raise ValueError(
                f"past_key_values: holds {self.codes.shape[0]} sequences, the input has {batch}"
            )

    def grow(self, layout: TokenLayout, like: Tensor | None) -> None:
        """Makes room for a forward's rows in every layer; stored entries never move.

        ``like`` gives dtype and device of the buffers; with ``None`` none are allocated (nothing
        is kept). The columns count as seen only after ``commit``, so a forward that fails leaves
        the cache unchanged.
        """
        batch = layout.batch
        self.check_batch(batch)
        if self.codes.shape[0] != batch:
            self.reset()  # the buffers of a cropped cache are of another batch size
            self._begin(batch)
        for table in self.plan.layers_by_table:
            if table not in self.tables:
                self.tables[table] = EntryTable(batch, is_hollow=isinstance(table, int))
        self.enter(0, layout, like)

    def enter(self, stage: int, layout: TokenLayout, like: Tensor | None) -> None:
        """Like ``grow``, for the layers after ``stage`` removals, whose rows ``layout`` has."""
        if like is None:
            return
        for table in self.plan.layers_by_table:
            if isinstance(table, Staged) and table.stage == stage:
                new = layout.counts(table.classes)
                needed = list(map(add, self.tables[table].counts, new))
                self.make_room(table, needed, layout, like)

    def make_room(
        self, key: Table, needed: Sequence[int], layout: TokenLayout, like: Tensor
    ) -> None:
        """Makes room for ``needed[b]`` entries of each sequence in the layers of one table; for a
        hollow layer, once that number is known."""
        table, slots = self.tables[key], max(needed, default=0)
        if slots <= table.capacity:
            return
        table.reserve(slots + self._later_slots(layout, key, like))
        shape = (layout.batch, self.plan.shape.num_kv_heads, self.plan.shape.head_dim)
        for layer in self.plan.layers_by_table[key]:
            entries = self.entries.setdefault(layer, LayerEntries())
            entries.extend(table.segments, shape, like)

    def _later_slots(self, layout: TokenLayout, key: Table, like: Tensor) -> int:
        """Extra slots that a segment gets for the columns expected later; none where the unused
        ones would make every read a copy. Then the prompt's segment is exactly full, and only the
        short last one is ever copied."""
        expected = self.reserve - layout.first_column - layout.width
        is_useful = TokenClass.GENERATED in self._holding(key) and reads_in_place(like)
        return max(0, expected) if is_useful else 0

    def _holding(self, key: Table) -> frozenset[TokenClass]:
        """The classes that have, or may have, entries in the layers of a table."""
        return self.plan.layers[key].holding if isinstance(key, int) else key.classes

    def codes_at(self, stage: int) -> Tensor:
        """``codes`` as the layers after ``stage`` removals see them: removed rows are pads."""
        return self.codes.masked_fill(self.gone <= stage, PAD) if stage else self.codes

    def held(self, key: Table) -> Tensor:
        """``[B, C]``: which columns have entries in the layers of a table, host."""
        table = self.tables[key]
        if table.held is not None:
            return table.held
        assert isinstance(key, Staged)
        return member(self.codes_at(key.stage), key.classes)

    def commit(
        self,
        layout: TokenLayout,
        held: Mapping[Table, Tensor] | None = None,
        left: Sequence[TokenLayout] = (),
    ) -> None:
        """Counts the columns of the forward that just wrote its entries.

        ``held [B, T]``: which of them have entries in each hollow layer; ``left``: the layouts of
        the rows that remain after each of the plan's removals.
        """
        stages = (layout, *left)
        gone = torch.full_like(layout.source, STAYS)
        for stage in reversed(range(1, len(stages))):
            gone[stages[stage].source != layout.source] = stage
        self._append(layout.source, layout.source_positions, gone, layout.source_axes)
        grown = self._count_held(layout, held or {})
        for key, table in self.tables.items():
            if isinstance(key, Staged):
                new = stages[key.stage].counts(key.classes)
            else:
                table.append((held or {})[key])
                new = grown[key]
            table.counts = list(map(add, table.counts, new))

    def _count_held(
        self, layout: TokenLayout, held: Mapping[Table, Tensor]
    ) -> dict[Table, list[int]]:
        """New entries of each sequence in hollow layers, or an upper bound."""
        # Layers whose rows all did the same share one tensor.
        each = {id(columns): columns for columns in held.values()}
        counts = {number: columns.sum(1).tolist() for number, columns in each.items()}
        return {key: counts[id(columns)] for key, columns in held.items()}

    def last_positions(self) -> Tensor:
        """``[B]`` largest position of each sequence's real columns; -1 for one without any."""
        if not self.columns:
            return torch.full((self.codes.shape[0],), -1, dtype=torch.int64)
        return self.positions.masked_fill(self.codes == PAD, -1).max(dim=1).values

    def last_axes(self) -> Tensor:
        """``[3, B]`` axes of each sequence's last real column; -1 for a sequence without one."""
        last = self.last_positions()
        if self.axes is None or not self.columns:
            return last.expand(3, -1)
        columns = torch.arange(self.columns).masked_fill(self.codes == PAD, 0).amax(1)
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

    def live_bytes(self) -> int:
        """Bytes of live entries; ``plan.kv_bytes`` predicts them."""
        total = 0
        for layer in self.plan.layers:
            if layer.index in self.entries and layer.holding:
                buffers = self.entries[layer.index].keys
                slots = sum(self.tables[layer.table].counts)
                if buffers:
                    width = buffers[0].shape[1] * buffers[0].shape[3] * buffers[0].element_size()
                    total += 2 * slots * width
        return total

    def allocated_bytes(self) -> int:
        """Bytes of all buffers: live entries, columns reserved for ``generate``, the padding of
        ragged batches, and under ``SEGMENT_SLOTS`` slots for growth per sequence and layer."""
        return sum(
            buffer.numel() * buffer.element_size()
            for entries in self.entries.values()
            for buffer in (*entries.keys, *entries.values)
        )

    # Hugging Face's interface.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen, the same for every layer, whatever a layer holds."""
        return self.columns

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise TypeError(
            "past_key_values: a fastskip cache can only be filled by the prepared model that "
            "created it; use a Hugging Face cache with a stock model"
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last ``-tokens_to_remove`` columns (a positive value keeps that many)."""
        keep = tokens_to_remove if tokens_to_remove > 0 else self.columns + tokens_to_remove
        keep = min(max(keep, 0), self.columns)
        self.codes, self.positions = self.codes[:, :keep], self.positions[:, :keep]
        self.gone = self.gone[:, :keep]
        self.axes = None if self.axes is None else self.axes[:, :, :keep]
        for key, table in self.tables.items():
            table.held = None if table.held is None else table.held[:, :keep]
            table.counts = self.held(key).sum(1).tolist()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps (or repeats) the given sequences."""
        host = indices.cpu()
        self.codes, self.positions = self.codes[host], self.positions[host]
        self.gone = self.gone[host]
        self.axes = None if self.axes is None else self.axes[:, host]
        for table in self.tables.values():
            table.counts = [table.counts[sequence] for sequence in host.tolist()]
            table.held = None if table.held is None else table.held[host]
        for entries in self.entries.values():
            entries.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        batch = self.codes.shape[0]
        self.batch_select_indices(torch.arange(batch).repeat_interleave(repeats))

    def reset(self) -> None:
        """Drops all columns and frees the buffers."""
        self._begin(0)
        self.tables.clear()
        self.entries.clear()
        self.routing.clear()

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.columns > 0

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * self.plan.shape.depth

    @property
    def is_linear(self) -> list[bool]:
        """No layer has linear attention, whose ids may be fed only once (read since 5.24)."""
        return [False] * self.plan.shape.depth

    @property
    def batch_size(self) -> int:
        return self.codes.shape[0] if self.columns else -1

    @property
    def max_batch_size(self) -> int:
        return self.batch_size

    def activate_past_recording(self) -> None:
        """Nothing to enable: every column stays until it is cropped."""

    def __len__(self) -> int:
        return self.plan.shape.depth

    def __repr__(self) -> str:
        return (
            f"SkipCache(columns={self.columns}, sequences={self.codes.shape[0]}, "
            f"live_bytes={self.live_bytes()})"
        )
