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

from fastskip.decoder.seen_columns import STAYS, SeenColumns
from fastskip.decoder.slots import EntryTable, Segment
from fastskip.ops.allocate import empty, outside_inference_mode
from fastskip.ops.attention import reads_in_place
from fastskip.plan import SkipPlan
from fastskip.plan.layer_plan import Staged, Table
from fastskip.policy import TokenClass
from fastskip.tokens import TokenLayout, member


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
        seen: the columns seen so far.
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
        self.seen = SeenColumns()
        self.tables: dict[Table, EntryTable] = {}
        self.entries: dict[int, LayerEntries] = {}
        # Router state kept across forwards, by rule number.
        self.routing: dict[int, dict[str, Any]] = {}

    # The decoder's interface.

    @property
    def columns(self) -> int:
        """Columns seen, pads included."""
        return self.seen.count

    def check_batch(self, batch: int) -> None:
        """Raises ``ValueError`` if columns of ``batch`` sequences cannot be appended."""
        if self.columns and self.seen.batch != batch:
            raise ValueError(
                f"past_key_values: holds {self.seen.batch} sequences, the input has {batch}"
            )

    def grow(self, layout: TokenLayout, like: Tensor | None) -> None:
        """Makes room for a forward's rows in every layer; stored entries never move.

        ``like`` gives dtype and device of the buffers; with ``None`` none are allocated (nothing
        is kept). The columns count as seen only after ``commit``, so a forward that fails leaves
        the cache unchanged.
        """
        batch = layout.batch
        self.check_batch(batch)
        if self.seen.batch != batch:
            self.reset()  # the buffers of a cropped cache are of another batch size
            self.seen = SeenColumns(batch)
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

    def held(self, key: Table) -> Tensor:
        """``[B, C]``: which columns have entries in the layers of a table, host."""
        table = self.tables[key]
        if table.held is not None:
            return table.held
        assert isinstance(key, Staged)
        return member(self.seen.codes_at(key.stage), key.classes)

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
        self.seen.append(layout.source, layout.source_positions, gone, layout.source_axes)
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
        self.seen.crop(keep)
        for key, table in self.tables.items():
            table.held = None if table.held is None else table.held[:, :keep]
            table.counts = self.held(key).sum(1).tolist()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps (or repeats) the given sequences."""
        host = indices.cpu()
        self.seen.select(host)
        for table in self.tables.values():
            table.counts = [table.counts[sequence] for sequence in host.tolist()]
            table.held = None if table.held is None else table.held[host]
        for entries in self.entries.values():
            entries.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(self.seen.batch).repeat_interleave(repeats))

    def reset(self) -> None:
        """Drops all columns and frees the buffers."""
        self.seen = SeenColumns()
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
        return self.seen.batch if self.columns else -1

    @property
    def max_batch_size(self) -> int:
        return self.batch_size

    def activate_past_recording(self) -> None:
        """Nothing to enable: every column stays until it is cropped."""

    def __len__(self) -> int:
        return self.plan.shape.depth

    def __repr__(self) -> str:
        return (
            f"SkipCache(columns={self.columns}, sequences={self.seen.batch}, "
            f"live_bytes={self.live_bytes()})"
        )
