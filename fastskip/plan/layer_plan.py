"""One decoder layer of a plan: what each token class does there, and the sizes of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from fastskip.policy import Arrangement, Combine, Norm, SkippedKV, Sublayer, TokenClass


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes of one decoder that plans and costs depend on.

    `dtype_bytes`: width of weights and of K and V. `projection_bytes`: mean bytes per weight of the
    layers' projections if they are quantised or sparse. `has_images`: false for text-only models.
    `head_norms`: whether queries and keys are normalised per head. `deep_layers`: after how many of
    the first layers visual features are added to image rows (DeepStack). `window`: the sliding
    window in columns; `None`: full attention.
    """

    depth: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    has_images: bool
    attention_bias: bool = False
    attention_output_bias: bool = False
    ffn_bias: bool = False
    gated_ffn: bool = True
    head_norms: bool = False
    deep_layers: int = 0
    window: int | None = None
    dtype_bytes: int
    projection_bytes: float | None = None
    max_positions: int

    @property
    def classes(self) -> tuple[TokenClass, ...]:
        """The token classes that the model has."""
        return tuple(c for c in TokenClass if self.has_images or c is not TokenClass.IMAGE)

    @property
    def weight_bytes(self) -> float:
        """Bytes of one weight of a layer's projections."""
        return self.dtype_bytes if self.projection_bytes is None else self.projection_bytes

    @property
    def layer_weights(self) -> int:
        """How many weights a layer's projections have, without biases."""
        heads = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        return self.hidden_size * (heads + (3 if self.gated_ffn else 2) * self.ffn_size)

    @property
    def kv_entry_bytes(self) -> int:
        """Bytes of K and V of one row in one layer's cache."""
        return 2 * self.num_kv_heads * self.head_dim * self.dtype_bytes


def shape_of_depth(depth: int) -> ModelShape:
    """A dummy shape of `depth` layers, for uses that depend on the depth alone."""
    return ModelShape(
        depth=depth,
        hidden_size=1,
        ffn_size=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=1,
        vocab_size=1,
        has_images=True,
        dtype_bytes=1,
        max_positions=1,
    )


@dataclass(frozen=True, slots=True)
class Cell:
    """What rows of one class do in one layer.

    `kv` is the effective rule of a row that skips attention (`None` if attention runs): OMIT if the
    layer holds no entries or REUSE finds no source. `kv_source` is the layer that REUSE copies
    from; its entry may itself be a copy. If a router may have left a row without an entry there,
    `kv_fallbacks` are the lower layers to try next, in this order.
    """

    attention: bool
    ffn: bool
    kv: SkippedKV | None = None
    kv_source: int | None = None
    kv_fallbacks: tuple[int, ...] = ()


class Staged(NamedTuple):
    """Rows of `classes` that remain after the first `stage` removals."""

    classes: frozenset[TokenClass]
    stage: int


# Layers of one table hold entries of the same rows. An int is the table of that one layer, in which
# the rows depend on decisions.
Table = Staged | int


class Hollow(NamedTuple):
    """Layers with separate tables, in which rows of `classes` may have entries."""

    classes: frozenset[TokenClass]

    @property
    def stage(self) -> int:
        """No removal precedes them: a policy has routers or removals."""
        return 0


# Layers of one pool need room for the same number of entries: those of one table, or all hollow
# layers with the same classes.
Pool = Staged | Hollow


@dataclass(frozen=True)
class LayerPlan:
    """One layer: its cells, its wiring, and the class sets from which the runtime builds rows.

    `hollow`: classes that hold entries in this layer's cache, but of which a row may lack one
    because a router let it skip. `arranged`: the classes to which the arrangement applies; others
    run the sublayers one after the other. Semantics "reference" only: `replaced`, classes whose
    residual stream is replaced by its attention norm, and `merges_kv`, whether the two layers of a
    pair store the mean of their K and V. `unimodal`: image rows and all others do not see each
    other. `stage`: how many removals precede the layer.
    """

    index: int
    cells: Mapping[TokenClass, Cell] = field(hash=False)
    hollow: frozenset[TokenClass] = frozenset()
    arrangement: Arrangement = Arrangement.SEQUENTIAL
    norm: Norm = Norm.OWN
    combine: Combine = Combine.SUM
    partner: int | None = None
    arranged: frozenset[TokenClass] = frozenset()
    replaced: frozenset[TokenClass] = frozenset()
    merges_kv: bool = False
    unimodal: bool = False
    stage: int = 0

    @cached_property
    def attending(self) -> frozenset[TokenClass]:
        """Classes that run attention."""
        return frozenset(c for c, cell in self.cells.items() if cell.attention)

    @cached_property
    def feeding(self) -> frozenset[TokenClass]:
        """Classes that run the FFN."""
        return frozenset(c for c, cell in self.cells.items() if cell.ffn)

    def running(self, sublayer: Sublayer) -> frozenset[TokenClass]:
        """Classes that run a sublayer."""
        return self.attending if sublayer is Sublayer.ATTENTION else self.feeding

    @cached_property
    def beside(self) -> frozenset[TokenClass]:
        """Classes whose FFN reads the layer's input, in parallel with attention."""
        is_parallel = self.arrangement is Arrangement.PARALLEL
        return self.feeding & self.arranged if is_parallel else frozenset()

    @property
    def is_arranged_whole(self) -> bool:
        """Whether all classes are wired the same way."""
        return self.arrangement is Arrangement.SEQUENTIAL or self.arranged >= self.cells.keys()

    @property
    def holds_kv(self) -> bool:
        """Whether the layer's cache has entries: some class attends here."""
        return bool(self.attending)

    @cached_property
    def projecting(self) -> frozenset[TokenClass]:
        """Classes whose K and V are computed and stored."""
        project = (c for c, cell in self.cells.items() if cell.kv is SkippedKV.PROJECT)
        return self.attending | frozenset(project)

    @cached_property
    def leaving_hidden(self) -> frozenset[TokenClass]:
        """Classes that store the attention's input as K and V (`HIDDEN`)."""
        return frozenset(c for c, cell in self.cells.items() if cell.kv is SkippedKV.HIDDEN)

    @cached_property
    def reusing(self) -> Mapping[int, frozenset[TokenClass]]:
        """Source layer -> classes whose entries are copied from its cache."""
        sources = {
            c: cell.kv_source for c, cell in self.cells.items() if cell.kv_source is not None
        }
        return {
            source: frozenset(c for c, s in sources.items() if s == source)
            for source in sorted(set(sources.values()))
        }

    @cached_property
    def holding(self) -> frozenset[TokenClass]:
        """Classes whose rows have, or may have, an entry in the layer's cache."""
        return self.projecting.union(self.leaving_hidden, *self.reusing.values())

    @cached_property
    def table(self) -> Table:
        """Where the layer's entries are counted; layers of a table hold those of the same rows."""
        return self.index if self.hollow else Staged(self.holding, self.stage)

    @cached_property
    def pool(self) -> Pool:
        """Where the layer's entries are stored."""
        return Hollow(self.holding) if self.hollow else Staged(self.holding, self.stage)

    @cached_property
    def row_sets(self) -> tuple[object, ...]:
        """All that decides which rows enter which part; layers with equal values share rows."""
        stored = self.projecting, self.leaving_hidden, tuple(self.reusing.items())
        wiring = self.beside, self.replaced, self.arrangement is Arrangement.PAIR and self.arranged
        return self.attending, stored, self.feeding, wiring, self.unimodal, self.stage

    def treats(self, token_class: TokenClass) -> tuple[object, ...]:
        """All that the layer does with rows of a class; equal for classes treated the same."""
        wiring = token_class in self.arranged, token_class in self.replaced
        seen = self.unimodal and token_class is TokenClass.IMAGE
        return self.cells[token_class], wiring, seen
