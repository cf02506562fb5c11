"""Merged storages of a layer's projections, of which the checkpoint's parameters are views.

The weights of modules that read the same input become row ranges of one storage, so they are held
once, and optimisers and state dicts see no difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastskip.decoder.anatomy import LayerParts, has_hooks, is_plain, norm_of
from fastskip.ops.allocate import empty
from fastskip.ops.contracts import Linear


def can_merge(parts: LayerParts) -> bool:
    """Whether linears are plain, without hooks and alike in each group, and norms supported."""
    return (
        all(is_plain(module, nn.Linear) for module in parts.linears)
        and not any(has_hooks(module) for module in parts.modules)
        and not any(norm_of(norm) is None for norm in parts.norms)
        and not parts.dropout
        and _are_alike(parts.qkv)
        and _are_alike(parts.feed)
    )


def merge(modules: Sequence[Any]) -> Linear:
    """One linear, with storages of its own, for modules that read the same input."""
    for module in modules:
        if _leave_with_own_storage not in module._state_dict_hooks.values():
            module.register_state_dict_post_hook(_leave_with_own_storage)
    has_bias = modules[0].bias is not None
    return Linear(_share(modules, "weight"), _share(modules, "bias") if has_bias else None)


def lie_in(merged: Linear, modules: Sequence[Any]) -> bool:
    """Whether the modules' weights and biases lie in those of ``merged``."""
    return all(
        _are_adjacent([getattr(module, name) for module in modules], getattr(merged, name))
        for name in ("weight", "bias")
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
