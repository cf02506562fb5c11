"""Merged projections: q, k, v (and gate, up) of a layer as row ranges of one storage.

The checkpoint's parameters become views of the storage, so weights are held once and state dicts,
optimisers and ``save_pretrained`` see what they always saw. The merged product is used only while
that is provably the same computation; otherwise a layer calls its modules one by one, so LoRA,
hooks and quantised linears stay right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastskip.ops import Operations
from fastskip.ops.allocate import empty


class MergedLinear:
    """Plain ``nn.Linear`` modules of one input whose rows share a storage ``[sum(M_i), D]``."""

    def __init__(self, modules: Sequence[nn.Linear]) -> None:
        """Builds the storage and turns the modules' parameters into views of it."""
        self.weight, self.bias = _share(modules, "weight"), _share(modules, "bias")
        bounds = [0]
        for module in modules:
            bounds.append(bounds[-1] + module.out_features)
        self.bounds = tuple(bounds)

    def holds(self, modules: Sequence[nn.Linear]) -> bool:
        """Whether the modules' parameters still lie where this storage put them."""
        return _lies_in(self.weight, modules, "weight") and _lies_in(self.bias, modules, "bias")

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of modules ``start`` to ``stop``, as views."""
        first, last = self.bounds[start], self.bounds[stop]
        return self.weight_rows(first, last), None if self.bias is None else self.bias[first:last]

    def weight_rows(self, first: int, last: int) -> Tensor:
        assert self.weight is not None
        return self.weight[first:last]


def _share(modules: Sequence[nn.Linear], name: str) -> Tensor | None:
    parameters = [getattr(module, name) for module in modules]
    if parameters[0] is None:
        return None
    with torch.no_grad():
        rows = sum(parameter.shape[0] for parameter in parameters)
        shape = (rows, *parameters[0].shape[1:])
        storage = empty(shape, parameters[0].dtype, parameters[0].device)
        start = 0
        for parameter in parameters:
            view = storage[start : start + parameter.shape[0]]
            view.copy_(parameter)
            parameter.data = view
            start += parameter.shape[0]
    return storage


def _lies_in(storage: Tensor | None, modules: Sequence[nn.Linear], name: str) -> bool:
    if storage is None:
        return all(getattr(module, name) is None for module in modules)
    address = storage.data_ptr()
    for module in modules:
        parameter = getattr(module, name)
        if parameter is None or parameter.data_ptr() != address or parameter.dtype != storage.dtype:
            return False
        address += parameter.numel() * storage.element_size()
    return address == storage.data_ptr() + storage.numel() * storage.element_size()


def _is_plain(module: nn.Module) -> bool:
    return type(module) is nn.Linear and not _has_hooks(module)


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _can_merge(modules: Sequence[Any]) -> bool:
    """Same input, dtype and device, all with a bias or none, all in memory."""
    weights = [module.weight for module in modules]
    first = weights[0]
    return (
        all(w.dtype == first.dtype and w.device == first.device and w.ndim == 2 for w in weights)
        and first.device.type != "meta"
        and len({module.bias is None for module in modules}) == 1
        and len({module.weight.requires_grad for module in modules}) == 1
    )


class BlockWeights:
    """The weights of one decoder layer, and how its products are computed.

    Letters as in ``ops.reference``; ``head_counts`` are query heads ``H`` and key/value heads ``G``.
    """

    def __init__(self, layer: nn.Module, head_dim: int, ops: Operations) -> None:
        self.layer: Any = layer
        self.ops = ops
        self.head_dim = head_dim
        self.is_merged = False
        self._qkv: MergedLinear | None = None
        self._gate_up: MergedLinear | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy's parameters have storages of their own; the merged ones are rebuilt on next use.
        return {**self.__dict__, "is_merged": False, "_qkv": None, "_gate_up": None}

    def refresh(self, *, wants_gradient: bool) -> None:
        """Decides, once per forward or ``generate``, between the merged and the one-by-one form.

        Storages whose parameters moved (``.to``, ``deepcopy``, ``assign=True``) are rebuilt.
        """
        attention, mlp = self.layer.self_attn, self.layer.mlp
        inputs = (attention.q_proj, attention.k_proj, attention.v_proj)
        # Looked up by name: another kind of FFN (or a wrapped one) may have no such attributes.
        gates = tuple(getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
        modules = (*inputs, attention.o_proj, *gates)
        plain = all(module is not None and _is_plain(module) for module in modules)
        if wants_gradient or not plain or _has_hooks(mlp) or self._has_hooked_norm():
            self.is_merged = False
            return
        if self._qkv is None or not self._qkv.holds(inputs):
            self._qkv = MergedLinear(inputs) if _can_merge(inputs) else None
        if self._gate_up is None or not self._gate_up.holds(gates[:2]):  # type: ignore[arg-type]
            self._gate_up = MergedLinear(gates[:2]) if _can_merge(gates[:2]) else None  # type: ignore[arg-type]
        self.is_merged = self._qkv is not None and self._gate_up is not None

    def _has_hooked_norm(self) -> bool:
        return _has_hooks(self.layer.input_layernorm) or _has_hooks(
            self.layer.post_attention_layernorm
        )

    def attention_norm(self, x: Tensor) -> Tensor:
        """``N1``: ``[N, D] -> [N, D]``."""
        return self._norm(self.layer.input_layernorm, x)

    def ffn_norm(self, x: Tensor) -> Tensor:
        """``N2``: ``[N, D] -> [N, D]``."""
        return self._norm(self.layer.post_attention_layernorm, x)

    def _norm(self, norm: Any, x: Tensor) -> Tensor:
        if self.is_merged:
            return self.ops.rms_norm(x, norm.weight, norm.variance_epsilon)
        out: Tensor = norm(x)
        return out

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[N, D] -> [N, H + G, K]`` (queries, then keys) and values ``[N, G, K]``."""
        attention = self.layer.self_attn
        if self._qkv is not None and self.is_merged:
            merged = self._linear(x, self._qkv, 0, 3)
            split = self._qkv.bounds[2]
            return self._heads(merged[:, :split]), self._heads(merged[:, split:])
        both = torch.cat((attention.q_proj(x), attention.k_proj(x)), dim=-1)
        return self._heads(both), self._heads(attention.v_proj(x))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[N, D] ->`` keys and values ``[N, G, K]``: what a row that skips attention leaves."""
        attention = self.layer.self_attn
        if self._qkv is not None and self.is_merged:
            keys, values = self._linear(x, self._qkv, 1, 3).chunk(2, dim=-1)
            return self._heads(keys), self._heads(values)
        return self._heads(attention.k_proj(x)), self._heads(attention.v_proj(x))

    def queries(self, x: Tensor) -> Tensor:
        """``[N, D] -> [N, H, K]``."""
        if self._qkv is not None and self.is_merged:
            return self._heads(self._linear(x, self._qkv, 0, 1))
        return self._heads(self.layer.self_attn.q_proj(x))

    def attention_output(self, x: Tensor) -> Tensor:
        """The output projection: ``[N, H * K] -> [N, D]``."""
        return self._plain(self.layer.self_attn.o_proj, x)

    def ffn(self, x: Tensor) -> Tensor:
        """``[N, D] -> [N, D]``, without norm and residual."""
        mlp = self.layer.mlp
        if self._gate_up is None or not self.is_merged:
            out: Tensor = mlp(x)
            return out
        gate_up = self._linear(x, self._gate_up, 0, 2)
        if isinstance(mlp.act_fn, nn.SiLU) or type(mlp.act_fn).__name__ == "SiLUActivation":
            return self._plain(mlp.down_proj, self.ops.gated_silu(gate_up))
        gate, up = gate_up.chunk(2, dim=-1)
        return self._plain(mlp.down_proj, mlp.act_fn(gate) * up)

    def _linear(self, x: Tensor, merged: MergedLinear, start: int, stop: int) -> Tensor:
        weight, bias = merged.rows(start, stop)
        return self.ops.linear(x, weight, bias)

    def _plain(self, module: Any, x: Tensor) -> Tensor:
        if self.is_merged:
            return self.ops.linear(x, module.weight, module.bias)
        out: Tensor = module(x)
        return out

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


def own_storages(state: dict[str, Any], names: Sequence[str]) -> None:
    """Gives the named tensors of a state dict storages of their own, in place.

    Views of one storage are dropped silently by some savers (``accelerate``) and refused by
    others, so merged parameters never leave the model as views.
    """
    for name in names:
        tensor = state.get(name)
        if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter):
            state[name] = tensor.clone()
