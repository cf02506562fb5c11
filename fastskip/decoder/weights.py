"""How the projections of a decoder layer are computed: merged, or module by module.

Merged: q, k, v (and gate, up) are row ranges of one storage, and the checkpoint's parameters are
views of it, so weights are held once, and optimisers and state dicts see no difference. The merged
form is used only while it is provably the same computation; otherwise a layer calls its modules one
by one, so LoRA, hooks and quantised linears stay correct.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastskip.decoder.anatomy import (
    NORM_NUMBERS,
    LayerParts,
    has_hooks,
    is_plain,
    norm_of,
    parts_of,
)
from fastskip.ops import Operations
from fastskip.ops.allocate import empty
from fastskip.ops.contracts import Activation, HeadNorms, Linear, Norm


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """The weights of one layer as the fused operations read them; views of merged storages.

    ``qkv``, ``queries``, ``keys_values``: the merged projection of attention and parts of it.
    ``feed``, ``down``: the two projections of the FFN. ``head_norms``: of models that have them.
    """

    attention_norm: Norm
    qkv: Linear
    queries: Linear
    keys_values: Linear
    output: Linear
    ffn_norm: Norm
    feed: Linear
    activation: Activation
    down: Linear
    head_norms: HeadNorms | None = None


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
        """The output projection: ``[N, H * K] -> [N, D]``."""

    def ffn(self, x: Tensor) -> Tensor:
        """``[N, D] -> [N, D]``, without norm and residual."""


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
    """One GEMM for q, k, v and one for the FFN's input; views of the storages are made once."""

    def __init__(self, parts: LayerParts, head_dim: int, ops: Operations) -> None:
        """Builds the storages and turns the modules' parameters into views of them."""
        self._parts, self._ops, self._head_dim = parts, ops, head_dim
        norms = list(map(norm_of, parts.norms))
        self._attention_norm, self._ffn_norm = (_known(norm) for norm in norms[:2])
        self._head_norms = HeadNorms(*map(_known, norms[2:])) if norms[2:] else None
        self._qkv = _merge((parts.queries, parts.keys, parts.values))
        self._feed = _merge(parts.feed)
        rows = parts.queries.out_features
        self._q, self._kv = self._qkv.rows(0, rows), self._qkv.rows(rows)
        groups = parts.keys.out_features // head_dim
        self._split = [rows // head_dim + groups, groups]
        self._output = Linear(parts.output.weight, parts.output.bias)
        self._down = Linear(parts.down.weight, parts.down.bias)
        self._activation = parts.known_activation
        self._others = self._unshared(parts)

    @staticmethod
    def _unshared(parts: LayerParts) -> tuple[Any, ...]:
        modules = (*parts.norms, parts.output, parts.down)
        names = ("weight", "bias", *NORM_NUMBERS)
        weights = (getattr(m, name, None) for m in modules for name in names)
        return (parts.activation, *weights)

    def is_current(self, parts: LayerParts) -> bool:
        """Whether the parameters are the same, at the same addresses, as when this was made."""
        qkv = (parts.queries, parts.keys, parts.values)
        others = self._unshared(parts)
        return (
            _lie_in(self._qkv, qkv)
            and _lie_in(self._feed, parts.feed)
            and all(a is b for a, b in zip(others, self._others, strict=True))
        )

    @property
    def is_fusable(self) -> bool:
        """Whether the fused operations support this layer's activation and head norms."""
        norms = self._head_norms
        is_known = norms is None or not (norms.queries.is_centred or norms.keys.is_centred)
        return self._activation is not None and is_known

    def layer_weights(self) -> LayerWeights:
        """The weights for the fused operations, which must know the activation."""
        assert self._activation is not None
        return LayerWeights(
            attention_norm=self._attention_norm,
            qkv=self._qkv,
            queries=self._q,
            keys_values=self._kv,
            output=self._output,
            ffn_norm=self._ffn_norm,
            feed=self._feed,
            activation=self._activation,
            down=self._down,
            head_norms=self._head_norms,
        )

    def attention_norm(self, x: Tensor) -> Tensor:
        return self._ops.normalize(x, self._attention_norm)

    def ffn_norm(self, x: Tensor) -> Tensor:
        return self._ops.normalize(x, self._ffn_norm)

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        merged = self._heads(x, self._qkv)
        heads, values = torch.split_with_sizes(merged, self._split, dim=1)
        if self._head_norms is not None:
            groups = self._split[1]
            queries, keys = heads[:, :-groups], heads[:, -groups:]
            heads = torch.cat((self._norm_queries(queries), self._norm_keys(keys)), dim=1)
        return heads, values

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self._heads(x, self._kv).chunk(2, dim=1)
        return self._norm_keys(keys), values

    def queries(self, x: Tensor) -> Tensor:
        return self._norm_queries(self._heads(x, self._q))

    def _heads(self, x: Tensor, linear: Linear) -> Tensor:
        return self._apply(x, linear).view(len(x), -1, self._head_dim)

    def _apply(self, x: Tensor, linear: Linear) -> Tensor:
        return self._ops.linear(x, linear.weight, linear.bias)

    def _norm_queries(self, heads: Tensor) -> Tensor:
        norms = self._head_norms
        return heads if norms is None else self._ops.normalize(heads, norms.queries)

    def _norm_keys(self, heads: Tensor) -> Tensor:
        norms = self._head_norms
        return heads if norms is None else self._ops.normalize(heads, norms.keys)

    def attention_output(self, x: Tensor) -> Tensor:
        return self._apply(x, self._output)

    def ffn(self, x: Tensor) -> Tensor:
        if self._activation is None:
            return self._apply(self._parts.activate(self._apply(x, self._feed)), self._down)
        return self._ops.feed_forward(x, self._feed, self._activation, self._down)


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
        return _can_merge(parts_of(self.layer))

    def refresh(self, *, wants_gradient: bool) -> None:
        """Chooses the form anew, since anything in the layer may have changed.

        Storages whose parameters moved (``.to``, ``deepcopy``, ``assign=True``) are rebuilt.
        """
        parts = self.parts = parts_of(self.layer)
        if wants_gradient or not _can_merge(parts):
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


def _can_merge(parts: LayerParts) -> bool:
    """Whether linears are plain, without hooks and alike in each group, and norms supported."""
    return (
        all(is_plain(module, nn.Linear) for module in parts.linears)
        and not any(has_hooks(module) for module in parts.modules)
        and not any(norm_of(norm) is None for norm in parts.norms)
        and not parts.dropout
        and _are_alike((parts.queries, parts.keys, parts.values))
        and _are_alike(parts.feed)
    )


def _are_alike(modules: Sequence[Any]) -> bool:
    """Same dtype and device, all trained or none, all with a bias or none, all in memory."""
    first = modules[0]
    return first.weight.device.type != "meta" and all(
        module.weight.dtype == first.weight.dtype
        and module.weight.device == first.weight.device
        and module.weight.requires_grad == first.weight.requires_grad
        and (module.bias is None) == (first.bias is None)
        for module in modules
    )


def _merge(modules: Sequence[Any]) -> Linear:
    """One linear, with storages of its own, for modules that read the same input."""
    for module in modules:
        if _leave_with_own_storage not in module._state_dict_hooks.values():
            module.register_state_dict_post_hook(_leave_with_own_storage)
    has_bias = modules[0].bias is not None
    return Linear(_share(modules, "weight"), _share(modules, "bias") if has_bias else None)


def _share(modules: Sequence[Any], name: str) -> Tensor:
    """One storage for the modules' parameters, which become views of it."""
    parameters = [getattr(module, name) for module in modules]
    # Made for all later forwards, including those with gradients.
    with torch.inference_mode(False), torch.no_grad():
        shape = (sum(len(parameter) for parameter in parameters), *parameters[0].shape[1:])
        if _are_adjacent(parameters, parameters[0]):  # another model has merged these very weights
            first: Tensor = parameters[0].detach()
            return first.as_strided(shape, first.stride())
        storage = empty(shape, parameters[0].dtype, parameters[0].device)
        start = 0
        for parameter in parameters:
            view = storage[start : start + len(parameter)]
            parameter.data = view.copy_(parameter)
            start += len(view)
    return storage


def _are_adjacent(parameters: Sequence[Any], start: Tensor | None) -> bool:
    """Whether the parameters lie one after the other from ``start`` on, in its storage; if that is
    ``None``, whether there are none."""
    if start is None:
        return all(parameter is None for parameter in parameters)
    storage, address = start.untyped_storage().data_ptr(), start.data_ptr()
    for parameter in parameters:
        if (
            parameter is None
            or parameter.data_ptr() != address
            or parameter.dtype != start.dtype
            or not parameter.is_contiguous()
            or parameter.untyped_storage().data_ptr() != storage
        ):
            return False
        address += parameter.nbytes
    return True


def _leave_with_own_storage(
    module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    """State-dict hook: views of a larger storage are copied out of it.

    ``accelerate``'s savers drop views silently. Parameters themselves (``keep_vars=True``) are
    not replaced.
    """
    for name in ("weight", "bias"):
        tensor = state.get(prefix + name)
        if tensor is None or isinstance(tensor, nn.Parameter):
            continue
        if tensor.untyped_storage().nbytes() > tensor.nbytes:
            state[prefix + name] = tensor.clone()


def _lie_in(merged: Linear, modules: Sequence[Any]) -> bool:
    """Whether the modules' weights and biases lie in those of ``merged``."""
    return all(
        _are_adjacent([getattr(module, name) for module in modules], getattr(merged, name))
        for name in ("weight", "bias")
    )
