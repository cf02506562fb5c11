"""The key/value cache: compact per layer, a Hugging Face ``Cache`` to the outside.

The life of an entry: a forward lays out its columns; a row whose class holds an entry in a layer
gets the next free slot of its sequence there; its K (already rotated) and V are written to that
slot once and stay; attention reads slots ``0 .. count`` as a view. What a policy leaves out is not
stored, so layers differ in length, and a layer that nobody attends in holds nothing at all.

To Hugging Face the cache speaks in *columns*: ``get_seq_length`` is the number of columns seen,
whatever a layer holds; ``crop`` and ``reorder_cache`` act on columns and sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import add
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from fastskip.decoder.slots import EntryTable, Segment
from fastskip.layer_plan import Staged, Table, classes_of
from fastskip.ops.allocate import empty, outliving
from fastskip.plan import SkipPlan
from fastskip.policy import TokenClass
from fastskip.tokens import PAD, TokenLayout, member

STAYS = torch.iinfo(torch.int64).max


class LayerEntries:
    """K and V of one layer: one ``[B, G, slots, K]`` buffer each a segment."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def extend(
        self, segments: Sequence[Segment], shape: tuple[int, int, int], like: Tensor
    ) -> None:
        """Adds the buffers of segments that are new; what exists is not touched."""
        batch, groups, width = shape
        for segment in segments[len(self.keys) :]:
            size = (batch, groups, segment.count, width)
            self.keys.append(empty(size, like.dtype, like.device))
            self.values.append(empty(size, like.dtype, like.device))

    def select(self, sequences: Tensor) -> None:
        self.keys = [_selected(buffer, sequences) for buffer in self.keys]
        self.values = [_selected(buffer, sequences) for buffer in self.values]


def _selected(buffer: Tensor, sequences: Tensor) -> Tensor:
    with outliving():  # as ``empty``: more entries will be written to it
        return buffer.index_select(0, sequences.to(buffer.device))


class SkipCache(Cache):
    """Cache of a prepared model; remembers the plan that filled it.

    Attributes:
        codes: ``[B, C]`` class of every column seen (``tokens.CODES``; ``PAD`` for pads), host.
        gone: ``[B, C]`` from which stage of the plan's removals on a column is no row any more,
            host; ``STAYS`` where it stays.
        positions: ``[B, C]`` RoPE position of every column, host.
        axes: ``[3, B, C]`` where every column stands in time, height and width, host; ``None``:
            columns have but one position.
        prompt_columns: inside ``generate``, where the prompt ends; ``None`` outside.
        ends_gradients: a forward with gradients filled it, whose entries are kept without.
    """

    def __init__(self, plan: SkipPlan, *, reserve: int = 0) -> None:
        """``reserve``: columns that are expected in all, so that growth needs no second segment."""
        super().__init__(layers=[])
        self.plan = plan
        self.reserve = reserve
        self.prompt_columns: int | None = None
        self.ends_gradients = False
        self._begin(0)
        self.tables: dict[Table, EntryTable] = {}
        self.entries: dict[int, LayerEntries] = {}
        # What routers keep from forward to forward, by the number of their rule.
        self.routing: dict[int, dict[str, Any]] = {}
        self._layers_by_table = plan.layers_by_table

    def _begin(self, batch: int) -> None:
        """No columns of so many sequences."""
        self.codes, self.positions, self.gone = torch.empty(3, batch, 0, dtype=torch.int64).unbind()
        self.axes: Tensor | None = None

    def _append(self, codes: Tensor, positions: Tensor, gone: Tensor, axes: Tensor | None) -> None:
        """Columns that are new, each part as the attribute of its name."""
        self.codes = torch.cat((self.codes, codes), dim=1)
        self.positions = torch.cat((self.positions, positions), dim=1)
        self.gone = torch.cat((self.gone, gone), dim=1)
        if axes is not None:
            self.axes = axes if self.axes is None else torch.cat((self.axes, axes), dim=2)

    # What the decoder uses.

    @property
    def columns(self) -> int:
        """Columns seen, pads included."""
        return self.codes.shape[1]

    def check_batch(self, batch: int) -> None:
        """Raises ``ValueError`` if new columns of ``batch`` sequences cannot follow on."""
        if self.columns and self.codes.shape[0] != batch:
            raise ValueError(
                f"past_key_values: holds {self.codes.shape[0]} sequences, the input has {batch}"
            )

    def grow(self, layout: TokenLayout, like: Tensor | None) -> None:
        """Makes room for a forward's rows in every layer; nothing that is stored moves.

        ``like`` gives dtype and device of the buffers; ``None`` makes none (nothing is kept). The
        columns count as seen only after ``commit``, so a forward that fails leaves the cache as it
        was.
        """
        batch = layout.batch
        self.check_batch(batch)
        if self.codes.shape[0] != batch:
            self.reset()  # what a cropped cache still allocates has another batch size
            self._begin(batch)
        for table in self._layers_by_table:
            if table not in self.tables:
                self.tables[table] = EntryTable(batch, is_hollow=isinstance(table, int))
        self.enter(0, layout, like)

    def enter(self, stage: int, layout: TokenLayout, like: Tensor | None) -> None:
        """As ``grow``, in the layers after so many removals, whose rows ``layout`` has."""
        for table, layers in self._layers_by_table.items():
            is_here = not isinstance(table, int) and self.plan.layers[layers[0]].stage == stage
            if like is not None and is_here:
                new = layout.counts(classes_of(table))
                needed = list(map(add, self.tables[table].counts, new))
                self.make_room(table, needed, layout, like)

    def make_room(
        self, key: Table, needed: Sequence[int], layout: TokenLayout, like: Tensor
    ) -> None:
        """Room for ``needed[b]`` entries of each sequence in the layers of one table; in a hollow
        layer once that is known."""
        table, slots = self.tables[key], max(needed, default=0)
        if slots <= table.capacity:
            return
        table.reserve(slots + self._later_slots(layout, key, like.dtype))
        shape = (layout.batch, self.plan.shape.num_kv_heads, self.plan.shape.head_dim)
        for layer in self._layers_by_table[key]:
            entries = self.entries.setdefault(layer, LayerEntries())
            entries.extend(table.segments, shape, like)

    def _later_slots(self, layout: TokenLayout, key: Table, dtype: torch.dtype) -> int:
        """Slots that a first segment gets for the columns expected later.

        Batched bf16 products copy operands that are not dense in memory, so there the prompt's
        segment is exactly full and only the short last segment is ever copied.
        """
        is_dense = dtype in (torch.float32, torch.float64)
        holding = self.plan.layers[self._layers_by_table[key][0]].holding
        expected = self.reserve - layout.first_column - layout.width
        return max(0, expected) if is_dense and TokenClass.GENERATED in holding else 0

    def codes_at(self, stage: int) -> Tensor:
        """``codes`` as layers after so many removals know them: who left before is a pad."""
        return self.codes.masked_fill(self.gone <= stage, PAD) if stage else self.codes

    def held(self, key: Table) -> Tensor:
        """``[B, C]``: which columns have entries in the layers of a table, host."""
        table = self.tables[key]
        if table.held is not None:
            return table.held
        stage = key.stage if isinstance(key, Staged) else 0
        return member(self.codes_at(stage), classes_of(key))

    def commit(
        self,
        layout: TokenLayout,
        held: Mapping[Table, Tensor] | None = None,
        left: Sequence[TokenLayout] = (),
    ) -> None:
        """Counts the columns of the forward that just wrote its entries.

        ``held [B, T]``: which of them have entries in each hollow layer; ``left``: the rows that
        each of the plan's removals has left.
        """
        stages = (layout, *left)
        gone = torch.full_like(layout.source, STAYS)
        for stage in reversed(range(1, len(stages))):
            gone[stages[stage].source != layout.source] = stage
        self._append(layout.source, layout.source_positions, gone, layout.source_axes)
        grown = self._count_held(layout, held or {})
        for key, table in self.tables.items():
            if not table.is_hollow:
                own = stages[key.stage] if isinstance(key, Staged) else layout
                new = own.counts(classes_of(key))
            else:
                table.append((held or {})[key])
                new = grown[key]
            table.counts = list(map(add, table.counts, new))

    def _count_held(
        self, layout: TokenLayout, held: Mapping[Table, Tensor]
    ) -> dict[Table, list[int]]:
        """New entries of each sequence in hollow layers, or what may be at most."""
        # Layers whose rows all did the same have one tensor.
        each = {id(columns): columns for columns in held.values()}
        counts = {number: columns.sum(1).tolist() for number, columns in each.items()}
        return {key: counts[id(columns)] for key, columns in held.items()}

    def last_positions(self) -> Tensor:
        """``[B]`` position of each sequence's last real column; -1 for a sequence without one."""
        if not self.columns:
            return torch.full((self.codes.shape[0],), -1, dtype=torch.int64)
        return self.positions.masked_fill(self.codes == PAD, -1).max(dim=1).values

    def last_axes(self) -> Tensor:
        """``[3, B]`` where each sequence's last real column stands; -1 for one without any."""
        last = self.last_positions()
        if self.axes is None or not self.columns:
            return last.expand(3, -1)
        columns = torch.arange(self.columns).masked_fill(self.codes == PAD, 0).amax(1)
        found = self.axes.gather(2, columns.expand(3, -1)[:, :, None])[:, :, 0]
        return found.masked_fill(last < 0, -1)

    def following(self, steps: Tensor | int) -> tuple[Tensor, Tensor | None]:
        """Where text stands so many ``steps [B, T]`` behind each sequence's last real column:
        positions ``[B, T]``, and, if columns have them, ``axes [3, B, T]``."""
        axes = None if self.axes is None else self.last_axes()[:, :, None] + steps
        return self.last_positions()[:, None] + steps, axes

    def rope_deltas(self) -> Tensor | None:
        """``[B, 1]`` how many positions behind the number of its rows each sequence's next one
        stands, images being shorter in places than in rows; ``None``: columns have but one."""
        if self.axes is None:
            return None
        rows = (self.codes != PAD).sum(1)
        return (self.last_axes().amax(0) + 1 - rows)[:, None]

    def next_places(self) -> Tensor:
        """``[B]`` by which position each sequence's next row turns.

        Raises:
            ValueError: it would turn by different ones in time, height and width.
        """
        last = self.last_axes()
        if not bool((last == last[0]).all()):
            raise ValueError(
                "input_ids: a prompt that ends in an image; allowed: text behind images, as chat "
                "templates write it, or a model with impl='reference'"
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
        """Bytes of all buffers: the live ones, the columns reserved for ``generate``, pads of
        ragged batches, and less than ``SEGMENT_SLOTS`` slots a sequence and layer for growth."""
        return sum(
            buffer.numel() * buffer.element_size()
            for entries in self.entries.values()
            for buffer in (*entries.keys, *entries.values)
        )

    # What Hugging Face uses.

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
            "past_key_values: a fastskip cache is filled by the prepared model that made it; "
            "a stock model needs a cache of its own"
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
        """Forgets every column; buffers are given back."""
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
        """Not those of linear attention, whose ids are fed but once (asked from 5.24 on)."""
        return [False] * self.plan.shape.depth

    @property
    def batch_size(self) -> int:
        return self.codes.shape[0] if self.columns else -1

    @property
    def max_batch_size(self) -> int:
        return self.batch_size

    def activate_past_recording(self) -> None:
        """Every column stays until it is cropped, so there is nothing to switch on."""

    def __len__(self) -> int:
        return self.plan.shape.depth

    def __repr__(self) -> str:
        return (
            f"SkipCache(columns={self.columns}, sequences={self.codes.shape[0]}, "
            f"live_bytes={self.live_bytes()})"
        )
