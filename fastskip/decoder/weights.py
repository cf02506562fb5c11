"""How the projections of a decoder layer are computed: merged, or module by module.

Merged: q, k, v (and gate, up) are row ranges of one storage (see ``decoder.merging``). This form is
used only while it is provably the same computation; otherwise a layer calls its modules one by one,
so LoRA, hooks and quantised linears stay correct.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastskip.decoder.anatomy import NORM_NUMBERS, LayerParts, norm_of, parts_of
from fastskip.decoder.merging import can_merge, lie_in, merge
from fastskip.ops import Operations
from fastskip.ops.contracts import Activation, HeadNorms, Linear, Norm


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """The weights of one layer as the operations read them; views of merged storages.

    ``qkv``, ``queries``, ``keys_values``: the merged projection of attention and parts of it.
    ``feed``, ``down``: the two projections of the FFN. ``activation``: ``None`` if the operations
    do not know it. ``head_norms``: of models that have them. ``multiplier``: of what each sublayer
    adds to the residual stream.
    """

    attention_norm: Norm
    qkv: Linear
    queries: Linear
    keys_values: Linear
    output: Linear
    ffn_norm: Norm
    feed: Linear
    activation: Activation | None
    down: Linear
    head_norms: HeadNorms | None = None
    multiplier: float = 1.0


class Products(Protocol):
    """The projections and norms of one layer. Letters as in ``ops.reference``."""

    def attention_norm(self, x: Tensor) -> Tensor:
        """``N1``: ``[N, D] -> [N, D]``."""

    def ffn_norm(self, x: Tensor) -> Tensor:
        """``N2``: ``[N, D] -> [N, D]``."""

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[N, D] -> [N, H + G, K]`` (queries, then keys) and values ``[N, G, K]``; here and below
        with head norms, if there are any."""

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[N, D] ->`` keys and values ``[N, G, K]``: what a row that skips attention leaves."""

    def queries(self, x: Tensor) -> Tensor:
        """``[N, D] -> [N, H, K]``."""

    def attention_output(self, x: Tensor) -> Tensor:
        """What attention adds to the residual stream: ``[N, H * K] -> [N, D]``."""

    def ffn(self, x: Tensor) -> Tensor:
        """What the FFN adds, without its norm: ``[N, D] -> [N, D]``."""


class ModuleProducts:
    """Every projection by the layer's own module."""

    def __init__(self, parts: LayerParts, head_dim: int) -> None:
        self.attention_norm, self.ffn_norm = parts.attention_norm, parts.ffn_norm
        self.attention_output, self.ffn = parts.attend_out, parts.run_ffn
        self._parts, self._head_dim = parts, head_dim
        self._query_norm, self._key_norm = parts.head_norms or (_unchanged, _unchanged)

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.keys_values(x)
        return torch.cat((self.queries(x), keys), dim=1), values

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        keys = self._key_norm(self._heads(self._parts.keys(x)))
        return keys, self._heads(self._parts.values(x))

    def queries(self, x: Tensor) -> Tensor:
        queries: Tensor = self._query_norm(self._heads(self._parts.queries(x)))
        return queries

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self._head_dim)


class MergedProducts:
    """One GEMM for q, k, v and one for the FFN's input.

    ``weights``: views of the merged storages, made once.
    """

    def __init__(self, parts: LayerParts, head_dim: int, ops: Operations) -> None:
        """Builds the storages and turns the modules' parameters into views of them."""
        self._parts, self._ops, self._head_dim = parts, ops, head_dim
        attention_norm, ffn_norm, *head_norms = (_known(norm_of(norm)) for norm in parts.norms)
        qkv, rows = merge(parts.qkv), parts.queries.out_features
        self.weights = LayerWeights(
            attention_norm=attention_norm,
            qkv=qkv,
            queries=qkv.rows(0, rows),
            keys_values=qkv.rows(rows),
            output=Linear(parts.output.weight, parts.output.bias),
            ffn_norm=ffn_norm,
            feed=merge(parts.feed),
            activation=parts.known_activation,
            down=Linear(parts.down.weight, parts.down.bias),
            head_norms=HeadNorms(*head_norms) if head_norms else None,
            multiplier=parts.multiplier,
        )
        groups = parts.keys.out_features // head_dim
        self._split = [rows // head_dim + groups, groups]
        self._others = self._unshared(parts)

    @staticmethod
    def _unshared(parts: LayerParts) -> tuple[Any, ...]:
        modules = (*parts.norms, parts.output, parts.down)
        names = ("weight", "bias", *NORM_NUMBERS)
        weights = (getattr(m, name, None) for m in modules for name in names)
        return (parts.activation, parts.multiplier, *weights)

    def is_current(self, parts: LayerParts) -> bool:
        """Whether the parameters are the same, at the same addresses, as when this was made."""
        others = self._unshared(parts)
        return (
            lie_in(self.weights.qkv, parts.qkv)
            and lie_in(self.weights.feed, parts.feed)
            and all(a is b for a, b in zip(others, self._others, strict=True))
        )

    @property
    def is_fusable(self) -> bool:
        """Whether the fused operations support this layer's activation and head norms."""
        norms = self.weights.head_norms
        is_known = norms is None or not (norms.queries.is_centred or norms.keys.is_centred)
        return self.weights.activation is not None and is_known

    def attention_norm(self, x: Tensor) -> Tensor:
        return self._ops.normalize(x, self.weights.attention_norm)

    def ffn_norm(self, x: Tensor) -> Tensor:
        return self._ops.normalize(x, self.weights.ffn_norm)

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        merged = self._heads(x, self.weights.qkv)
        heads, values = torch.split_with_sizes(merged, self._split, dim=1)
        norms, groups = self.weights.head_norms, self._split[1]
        if norms is not None:
            queries = self._ops.normalize(heads[:, :-groups], norms.queries)
            keys = self._ops.normalize(heads[:, -groups:], norms.keys)
            heads = torch.cat((queries, keys), dim=1)
        return heads, values

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self._heads(x, self.weights.keys_values).chunk(2, dim=1)
        norms = self.weights.head_norms
        return keys if norms is None else self._ops.normalize(keys, norms.keys), values

    def queries(self, x: Tensor) -> Tensor:
        queries, norms = self._heads(x, self.weights.queries), self.weights.head_norms
        return queries if norms is None else self._ops.normalize(queries, norms.queries)

    def _heads(self, x: Tensor, linear: Linear) -> Tensor:
        return self._apply(x, linear).view(len(x), -1, self._head_dim)

    def _apply(self, x: Tensor, linear: Linear) -> Tensor:
        return self._ops.linear(x, linear.weight, linear.bias)

    def attention_output(self, x: Tensor) -> Tensor:
        return self._change(self._apply(x, self.weights.output))

    def ffn(self, x: Tensor) -> Tensor:
        feed, activation, down = self.weights.feed, self.weights.activation, self.weights.down
        if activation is None:
            return self._change(self._apply(self._parts.activate(self._apply(x, feed)), down))
        return self._change(self._ops.feed_forward(x, feed, activation, down))

    def _change(self, output: Tensor) -> Tensor:
        multiplier = self.weights.multiplier
        return output if multiplier == 1.0 else output.mul_(multiplier)


class BlockWeights:
    """One decoder layer's projections, in the form that is currently correct.

    ``parts``: the layer's parts as of the last ``refresh``.
    """

    def __init__(self, layer: Any, head_dim: int, ops: Operations) -> None:
        self.layer = layer
        self._head_dim, self._ops = head_dim, ops
        self._merged: MergedProducts | None = None
        self.parts = parts_of(layer)
        self.products: Products = ModuleProducts(self.parts, head_dim)

    def __getstate__(self) -> dict[str, Any]:
        # A copy's parameters have storages of their own; merged ones are built on its first use.
        modules = ModuleProducts(self.parts, self._head_dim)
        return {**self.__dict__, "_merged": None, "products": modules}

    @property
    def is_merged(self) -> bool:
        return self.products is self._merged

    @property
    def merged(self) -> MergedProducts | None:
        """The merged form, if it is the one in use."""
        return self._merged if self.is_merged else None

    @property
    def can_merge(self) -> bool:
        """Whether the layer's modules allow the merged form."""
        return can_merge(parts_of(self.layer))

    def refresh(self, *, wants_gradient: bool) -> None:
        """Chooses the form anew, since anything in the layer may have changed.

        Storages whose parameters moved (``.to``, ``deepcopy``, ``assign=True``) are rebuilt.
        """
        parts = self.parts = parts_of(self.layer)
        if wants_gradient or not can_merge(parts):
            self.products = ModuleProducts(parts, self._head_dim)
            return
        if self._merged is None or not self._merged.is_current(parts):
            self._merged = None  # frees the old storages before the new ones are made
            self._merged = MergedProducts(parts, self._head_dim, self._ops)
        self.products = self._merged


def _unchanged(heads: Tensor) -> Tensor:
    """Stands in for a missing head norm."""
    return heads


def _known(norm: Norm | None) -> Norm:
    """A norm already checked to be supported."""
    assert norm is not None
    return norm
