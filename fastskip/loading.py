"""Loading and preparing models: the public functions."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import transformers
from transformers.activations import ACT2FN

from fastskip import ops
from fastskip.checkpoint_files import check_index, choose_policy, sparse_layout
from fastskip.families import (
    UnsupportedModelError,
    check_config,
    check_installed,
    final_norm_of,
    has_custom_forward,
    is_quantised,
    model_class_name,
    shape_of,
    text_model_of,
)
from fastskip.generation.prepared import prepare
from fastskip.generation.runtime import Runtime, check_decoder
from fastskip.generation.saving import write_policy
from fastskip.plan import ModelShape, SkipPlan, make_plan
from fastskip.policy import PolicyLike, SkipPolicy
from fastskip.policy_fit import check_fit, origin_of
from fastskip.routing import Router, RoutingRecord, build_routers
from fastskip.sparse.bytes_held import bytes_of_weight
from fastskip.sparse.checkpoint import SparseLayout, read_sparse
from fastskip.sparse.convert import convert_
from fastskip.sparse.linear import Weights

_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
_SPREADING = ("auto", "balanced", "balanced_low_0", "sequential", "disk")
"""Values of ``device_map`` that spread the weights over devices."""
_ACTIVATIONS = ("hidden_act", "activation_function", "projector_hidden_act")
"""The fields of configs that name an activation."""
_REFUSED = {
    "torch_dtype": "dtype",
    "attn_implementation": "the runtime's own attention",
    "tp_plan": "one device",
    "distributed_config": "one device",
    "max_memory": "one device",
    "offload_folder": "weights in memory",
    "output_loading_info": "False; missing weights raise an error",
}


def load_model(
    model_id_or_path: str | os.PathLike[str],
    policy: PolicyLike | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    impl: str | None = None,
    attention: str | None = None,
    routers: Mapping[str, Router] | None = None,
    weights: str = "dense",
    **from_pretrained_kwargs: Any,
) -> Any:
    """Loads a checkpoint and prepares it: same class, same ``generate``, faster.

    Args:
        model_id_or_path: a folder or a hub id; safetensors only.
        policy: a ``SkipPolicy``, a dict, the path of a policy file, or the name of a preset.
            ``None`` uses the checkpoint's ``fastskip_policy.json``, else its ``per_layer_config``,
            else dense; the log says which.
        dtype: ``"auto"`` (the checkpoint's), a name, or a ``torch.dtype``.
        device: the model's device; ``None`` means the CPU. Hugging Face's ``device_map`` is
            accepted too if it names a single device, or is ``"auto"`` with at most one GPU.
        impl: the implementation: ``"triton"`` (fused kernels and CUDA graphs; the default on CUDA),
            ``"reference"`` (plain torch, with gradients; the default elsewhere) or ``"torch"`` (the
            GPU executor on torch operations, for debugging). An explicit choice that cannot run
            raises.
        attention: ``None`` for fastskip's own kernels; ``"flash"``: prompts use the flash-attn
            package, which must be installed and fit the policy.
        routers: the user's own routers, by the names that the policy gives them.
        weights: how pruned projections are held in memory, however they are stored: ``"dense"``,
            ``"bitmap"``, ``"csr"`` or ``"2:4"`` (``fastskip.sparse.Weights``). Unless dense, the
            whole decoder calls its modules one by one, whatever ``impl``.
        from_pretrained_kwargs: passed on to Hugging Face's ``from_pretrained``. With
            ``quantization_config``, or a checkpoint that is already quantised, the decoder calls
            its quantised modules one by one.
    Returns:
        An instance of the checkpoint's own Hugging Face class, in evaluation mode.
    Raises:
        UnsupportedModelError: the model or an argument is not supported yet.
        PolicyError: the policy is malformed or does not fit the model.
        SparseError: the files of a sparse checkpoint are inconsistent, or the weights cannot be
            held in the given form.
        FileNotFoundError: there is no such folder.
        TypeError: ``model_id_or_path`` is no path, such as ``None``.
        ValueError: another argument is malformed, or weights are missing.
    Warns:
        PolicyFitWarning: the policy's provenance names a different model.
    """
    _check_arguments(from_pretrained_kwargs)
    if weights not in tuple(Weights):
        raise ValueError(f"weights: {weights!r}; allowed: {', '.join(Weights)}")
    torch_dtype = _dtype_of(dtype)
    target = _device_of(_whole_device(device, from_pretrained_kwargs.pop("device_map", None)))
    ops.resolve(impl, target)  # before the weights are read
    hub: dict[str, Any] = {
        key: from_pretrained_kwargs[key]
        for key in ("revision", "cache_dir", "token", "local_files_only", "subfolder")
        if key in from_pretrained_kwargs
    }
    path = _checked_path(model_id_or_path)
    check_whole(path)
    config = from_pretrained_kwargs.pop("config", None)
    if config is None:
        config = transformers.AutoConfig.from_pretrained(path, **hub)
    check_config(config)
    chosen = choose_policy(policy, path, config, hub)
    shape = shape_of(config)
    make_plan(chosen, shape)
    origin_of(chosen)
    build_routers(chosen, shape.depth, shape.hidden_size, routers)
    options = {"dtype": torch_dtype, **from_pretrained_kwargs}
    layout = sparse_layout(path, hub)
    model = load_unprepared(path, config, target, layout=layout, **options)
    convert_(model, weights)
    return apply_(model, chosen, impl=impl, attention=attention, routers=routers)


def check_whole(path: str) -> None:
    """Raises ``UnsupportedModelError`` for a folder of adapters."""
    if os.path.isfile(os.path.join(path, "adapter_config.json")):
        raise UnsupportedModelError(
            "model",
            path,
            "whole checkpoints (load an adapter with peft.PeftModel.from_pretrained("
            "load_model(BASE), FOLDER), or merge it into the weights with fastskip train --merge)",
        )


def load_unprepared(
    path: str, config: Any, device: Any, *, layout: SparseLayout | None = None, **options: Any
) -> Any:
    """Hugging Face's own model, in evaluation mode on ``device``.

    ``layout``: that of a sparse checkpoint; ``options`` are passed to ``from_pretrained``.

    Raises:
        UnsupportedModelError: an unknown family, one whose vision encoder needs a package that is
            missing, an unknown activation, or an unusable index of the weights' files.
        ValueError: weights are missing.
    """
    check_installed(config)
    _check_activations(config)
    check_index(os.path.join(path, options.get("subfolder", "")))
    model_class = getattr(transformers, model_class_name(config))
    options = {"config": config, "use_safetensors": True, **options}
    if is_quantised(config) or options.get("quantization_config") is not None:
        # Weights are quantised on their final device; some quantisers cannot move them.
        options["device_map"] = {"": device}
    if layout is None:
        model, found = model_class.from_pretrained(path, output_loading_info=True, **options)
    else:
        model, found = read_sparse(model_class, path, layout, **options)
    missing = sorted(found["missing_keys"])
    if missing:  # Hugging Face initialises them at random and warns
        raise ValueError(f"{path}: the checkpoint has no {', '.join(missing)}")
    return (model if "device_map" in options else model.to(device)).eval()


def apply_(
    model: Any,
    policy: PolicyLike | None = None,
    *,
    impl: str | None = None,
    attention: str | None = None,
    routers: Mapping[str, Router] | None = None,
) -> Any:
    """Prepares a model that is already in memory, in place, and returns it.

    An already prepared model gets the new policy and keeps its ``impl`` and ``attention``.
    """
    if attention not in (None, "flash"):
        raise ValueError(f"attention: {attention!r}; allowed: None, 'flash'")
    chosen = SkipPolicy() if policy is None else SkipPolicy.coerce(policy)
    if getattr(model, "_fastskip", None) is not None:
        prepared = _runtime_of(model)
        kept = prepared.decoder.ops.implementation
        if impl is not None and ops.resolve(impl, prepared.device).implementation is not kept:
            allowed = f"None or {kept.value!r}: a prepared model keeps its impl"
            raise ValueError(f"impl: {impl!r}; allowed: {allowed}")
        if attention is not None and not prepared.uses_flash:
            allowed = "None: a prepared model keeps its attention"
            raise ValueError(f"attention: {attention!r}; allowed: {allowed}")
        return set_policy(model, chosen, routers=routers)
    _check_model(model)
    text_model = text_model_of(model)
    if has_custom_forward(type(text_model)):
        raise UnsupportedModelError(
            "text model", type(text_model).__name__, "a class of transformers with its own forward"
        )
    if is_quantised(model.config) and impl not in (None, ops.Implementation.REFERENCE.value):
        raise UnsupportedModelError("impl", impl, "None or 'reference' with quantised weights")
    shape = _shape_of(model)
    own = build_routers(chosen, shape.depth, shape.hidden_size, routers)
    plan = make_plan(chosen, shape)
    check_fit(model, chosen)
    runtime = Runtime(text_model, plan, impl, own)
    if attention is not None:
        runtime.use_flash()
    # Merge now, layer by layer, so that at most one layer is in memory twice.
    runtime.decoder.refresh(wants_gradient=False)
    check_decoder(runtime.decoder)
    prepare(model, runtime)
    return model


def set_policy(
    model: Any, policy: PolicyLike, *, routers: Mapping[str, Router] | None = None
) -> Any:
    """Swaps the policy of a prepared model without reloading; returns the model.

    Afterwards, caches filled under the old policy are refused. ``routers`` and warnings as in
    ``load_model``.
    """
    runtime, chosen = _runtime_of(model), SkipPolicy.coerce(policy)
    shape = _shape_of(model)
    own = build_routers(chosen, shape.depth, shape.hidden_size, routers)
    plan = make_plan(chosen, shape)
    reason = runtime.unsupported_plan(plan)
    if reason is not None:
        check_decoder(runtime.decoder, reason)
    check_fit(model, chosen)
    runtime.set_plan(plan, own)
    return model


def save_policy(model: Any, folder: str | os.PathLike[str]) -> None:
    """Writes a prepared model's policy and its router weights as in a checkpoint folder."""
    write_policy(_runtime_of(model).plan.policy, folder)


@contextmanager
def record_routing(model: Any) -> Iterator[RoutingRecord]:
    """Records what the routers of a prepared model decide within this block.

    Costs a copy of each step's decisions to the host.
    """
    runtime = _runtime_of(model)
    with runtime.recording() as record:
        yield record


@contextmanager
def watching_routers(model: Any, wrap: Callable[[int, Router], Router]) -> Iterator[None]:
    """Within this block, ``wrap(number, router)`` replaces each router; numbers as in the policy.

    Reference only: the fused executors evaluate routers on the device and never call them.
    """
    runtime = _runtime_of(model)
    if runtime.decoder.ops.fused is not None:
        name = runtime.decoder.ops.implementation.value
        raise UnsupportedModelError("impl", name, "impl='reference' to watch routers")
    before = runtime.decoder.routers
    runtime.decoder.routers = [wrap(number, router) for number, router in enumerate(before)]
    try:
        yield
    finally:
        runtime.decoder.routers = before


def plan_of(model: Any) -> SkipPlan:
    """The plan that a prepared model runs; its table notes layers whose GEMMs cannot be merged."""
    runtime = _runtime_of(model)
    plan, shape = runtime.plan, _shape_of(model)
    if shape != plan.shape:  # resized, cast, or held in another form since
        plan = make_plan(plan.policy, shape)
    apart = {
        index: "projections one by one"
        for index, weights in enumerate(runtime.decoder.weights)
        if not weights.can_merge
    }
    return replace(plan, notes=apart) if apart else plan


def _shape_of(model: Any) -> ModelShape:
    """The sizes of a model in memory, including bytes per weight of projections not held plain."""
    shape = shape_of(model.config, final_norm_of(text_model_of(model)).weight.dtype)
    return replace(shape, projection_bytes=bytes_of_weight(model, shape))


def _runtime_of(model: Any) -> Runtime:
    runtime = getattr(model, "_fastskip", None)
    if runtime is None:
        raise TypeError(
            f"model: {type(model).__name__} is not prepared; use fastskip.load_model or "
            "fastskip.apply_ first"
        )
    found: Runtime = runtime
    return found


def _dtype_of(dtype: str | torch.dtype) -> Any:
    if isinstance(dtype, torch.dtype):
        if not dtype.is_floating_point:
            raise ValueError(f"dtype: {dtype}; allowed: {', '.join(_DTYPES)}")
        return dtype
    if dtype not in _DTYPES:
        raise ValueError(f"dtype: {dtype!r}; allowed: {', '.join(_DTYPES)} or a torch.dtype")
    return dtype if dtype == "auto" else getattr(torch, dtype)


def _device_of(device: str | torch.device | None) -> torch.device:
    allowed = "cpu, cuda" if torch.cuda.is_available() else "cpu (no CUDA device is available)"
    try:
        target = torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device: {device!r}; allowed: {allowed}") from None
    if target.type == "meta" or (target.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device: {device!r}; allowed: {allowed}")
    return target


def _whole_device(device: str | torch.device | None, placement: Any) -> str | torch.device | None:
    """The device of the whole model, given as ``device`` or by Hugging Face's ``device_map``."""
    if placement is None:
        return device
    if device is not None:
        allowed = f"None together with device={device!r}"
        raise ValueError(f"device_map: {placement!r}; allowed: {allowed}")
    places = set(placement.values()) if isinstance(placement, Mapping) else {placement}
    place = places.pop() if len(places) == 1 else None
    if place == "auto" and torch.cuda.device_count() < 2:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(place, int):
        return f"cuda:{place}"
    if place is None or place in _SPREADING:
        allowed = "one device for the whole model, such as device='cuda'"
        raise UnsupportedModelError("device_map", placement, allowed)
    named: str | torch.device = place
    return named


def _check_arguments(arguments: dict[str, Any]) -> None:
    for name, allowed in _REFUSED.items():
        if given := arguments.pop(name, None):
            raise UnsupportedModelError(name, given, allowed)
    if arguments.get("use_safetensors") is False:
        raise UnsupportedModelError("use_safetensors", False, "True: pickle files are never read")
    arguments.pop("use_safetensors", None)


def _checked_path(place: Any) -> str:
    """Refuses what is no path, and absent folders that cannot be hub names, which transformers
    calls malformed."""
    allowed = "an existing folder, or a hub name such as llava-hf/llava-1.5-7b-hf"
    path = os.fspath(place) if isinstance(place, (str, os.PathLike)) else None
    if not isinstance(path, str):
        raise TypeError(f"model_id_or_path: {place!r}; allowed: {allowed}")
    is_name = path.count("/") < 2 and not os.path.isabs(path) and not path.startswith((".", "~"))
    if not (is_name and path or os.path.isdir(path)):
        raise FileNotFoundError(f"model_id_or_path: {path!r}: no such folder; allowed: {allowed}")
    return path


def _check_activations(config: Any) -> None:
    """Refuses activations that transformers does not know, since it raises a bare ``KeyError``."""
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    for part, own in {"": config, **parts}.items():
        for field in _ACTIVATIONS:
            value = getattr(own, field, None)
            if isinstance(value, str) and value not in ACT2FN:
                name = f"{part}.{field}" if part else field
                raise UnsupportedModelError(name, value, ", ".join(sorted(ACT2FN)))


def _check_model(model: Any) -> None:
    if not isinstance(model, transformers.PreTrainedModel):
        kind = f"{type(model).__module__}.{type(model).__name__}"
        allowed = "a transformers model, not compiled or wrapped (of PEFT: its get_base_model())"
        raise UnsupportedModelError("model", kind, allowed)
    check_config(model.config)
    own = model_class_name(model.config)
    if not isinstance(model, getattr(transformers, own)):
        raise UnsupportedModelError("model", type(model).__name__, f"the whole {own}")
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) > 1 or "meta" in devices:
        raise UnsupportedModelError("device", sorted(devices), "all weights on one device")
