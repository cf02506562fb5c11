"""Which rows each layer of a forward computes, as the plan determines them."""

from __future__ import annotations

import torch

from fastskip.decoder.attention import pattern_of, sees_all
from fastskip.decoder.entries import Entries
from fastskip.decoder.layer import BlockRows
from fastskip.plan import LayerPlan, SkipPlan
from fastskip.policy import TokenClass
from fastskip.tokens import CODES, Rows, TokenLayout


class PlannedRows:
    """The ``BlockRows`` of one forward; layers that do the same share them."""

    def __init__(
        self, plan: SkipPlan, layout: TokenLayout, entries: Entries, narrow: Rows | None
    ) -> None:
        self._plan, self._layout, self._entries, self._narrow = plan, layout, entries, narrow
        self._made: dict[tuple[object, ...], BlockRows] = {}
        # For the last layer, whose rows are few: their codes, and the rows of each class set.
        self._narrow_codes: list[int] | None = None
        self._narrow_rows: dict[frozenset[TokenClass], Rows] = {}

    def of(self, layer: LayerPlan, is_last: bool) -> BlockRows:
        """The rows of a layer; ``is_last``: in the plan's last step, whose rows may be few."""
        narrow = self._narrow if is_last else None
        # A hollow layer has slots of its own, which matter to rows that see only some of them.
        count = self._continuing(layer.attending, narrow).count if layer.hollow else 0
        looks = count and not sees_all(layer, self._layout, count)
        key = (layer.row_sets, layer.table if looks else None, narrow is not None)
        found = self._made.get(key)
        if found is None:
            found = self._made[key] = self._make(layer, narrow)
        return found

    def _make(self, layer: LayerPlan, narrow: Rows | None) -> BlockRows:
        rows = self._layout.rows
        joint = rows(layer.attending) if narrow is None else rows(frozenset())
        stored = rows(layer.projecting - layer.attending if narrow is None else layer.projecting)
        reused = tuple((source, rows(classes)) for source, classes in layer.reusing.items())
        attending = self._continuing(layer.attending, narrow)
        pattern = None
        if attending.count:
            queries = attending.through(narrow)
            pattern = pattern_of(layer, self._layout, queries, self._entries)
        is_pair = layer.partner is not None
        paired = layer.arranged if is_pair else frozenset()
        return BlockRows(
            joint=joint,
            stored=stored,
            raw=rows(layer.leaving_hidden),
            reused=tuple((source, copied) for source, copied in reused if copied.count),
            narrow=narrow,
            attending=attending,
            replaced=self._continuing(layer.replaced, narrow),
            feeding=self._continuing(layer.feeding - layer.beside, narrow),
            beside=self._continuing(layer.beside, narrow),
            paired=self._continuing(paired, narrow),
            alone=self._continuing(layer.attending - paired if is_pair else frozenset(), narrow),
            merged=rows(paired),
            pattern=pattern,
        )

    def _continuing(self, classes: frozenset[TokenClass], narrow: Rows | None) -> Rows:
        """The rows of some classes among those that continue, indexing these."""
        if narrow is None:
            return self._layout.rows(classes)
        found = self._narrow_rows.get(classes)
        if found is None:
            found = self._narrow_rows[classes] = self._among(narrow, classes)
        return found

    def _among(self, narrow: Rows, classes: frozenset[TokenClass]) -> Rows:
        if self._narrow_codes is None:
            self._narrow_codes = narrow.take(self._layout.codes).tolist()
        wanted = {CODES[token_class] for token_class in classes}
        index = [row for row, code in enumerate(self._narrow_codes) if code in wanted]
        if len(index) == len(self._narrow_codes):
            return Rows(slice(0, len(index)), len(index))
        return Rows(torch.tensor(index, dtype=torch.int64), len(index))
