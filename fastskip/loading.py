"""Loading and preparing models: the public verbs."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import transformers

from fastskip import ops
from fastskip.families import (
    UnsupportedModelError,
    check_config,
    check_installed,
    final_norm_of,
    is_quantised,
    is_users_own,
    model_class_name,
    shape_of,
    text_model_of,
)
from fastskip.generation.prepared import prepare
from fastskip.generation.runtime import Runtime, check_decoder
from fastskip.generation.saving import POLICY_FILE, policy_of_config, write_policy
from fastskip.plan import ModelShape, SkipPlan, make_plan
from fastskip.policy import PolicyError, SkipPolicy
from fastskip.policy_fit import check_fit, origin_of
from fastskip.routing import Router, RoutingRecord, build_routers
from fastskip.sparse.bytes_held import bytes_of_weight
from fastskip.sparse.checkpoint import LAYOUT_FILE, SparseLayout, check_unmixed, read_sparse
from fastskip.sparse.convert import hold_
from fastskip.sparse.linear import Weights

logger = logging.getLogger(__name__)

PolicyLike = SkipPolicy | Mapping[str, Any] | str | os.PathLike[str]
_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
_SPREADING = ("auto", "balanced", "balanced_low_0", "sequential", "disk")
"""What ``device_map`` says for weights in several places."""
_REFUSED = {
    "torch_dtype": "dtype",
    "attn_implementation": "the runtime's own attention",
    "tp_plan": "one device",
    "distributed_config": "one device",
    "max_memory": "one device",
    "offload_folder": "weights in memory",
    "output_loading_info": "False; what is missing is an error",
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
        model_id_or_path: a folder or a hub id, safetensors only.
        policy: a ``SkipPolicy``, a dict, a path to a policy file, or a preset's name. ``None``
            takes the checkpoint's ``fastskip_policy.json``, else its ``per_layer_config``, else
            dense; the log says which.
        dtype: ``"auto"`` (the checkpoint's), a name, or a ``torch.dtype``.
        device: where the model goes; ``None`` leaves it on the CPU. Hugging Face's ``device_map``
            is taken too where it names one device for all, or is ``"auto"`` with one GPU or none.
        impl: who computes: ``"triton"`` (fused kernels and CUDA graphs; the choice of ``None`` on
            CUDA), ``"reference"`` (plain torch, with gradients; the choice elsewhere) or
            ``"torch"`` (the GPU's executor on torch operations, to find faults). An explicit
            choice that cannot run raises.
        attention: ``None``, fastskip's own kernels; ``"flash"``: prompts attend by the flash-attn
            package, where it is installed and the policy allows.
        routers: the user's own routers, by the names that the policy gives them.
        weights: how pruned projections are held, whichever way they are stored: ``"dense"``,
            ``"bitmap"``, ``"csr"`` or ``"2:4"`` (``fastskip.sparse.Weights``). Unless dense, the
            whole decoder calls its modules one by one, whatever ``impl``.
        from_pretrained_kwargs: go to Hugging Face's ``from_pretrained``; with
            ``quantization_config``, as for a checkpoint that is quantised already, the decoder
            calls its quantised modules one by one.
    Returns:
        An instance of the checkpoint's own Hugging Face class, in evaluation mode.
    Raises:
        UnsupportedModelError: the model, or an argument, is not supported yet.
        PolicyError: the policy is malformed or does not fit the model.
        SparseError: the files of a sparse checkpoint do not fit together, or the weights cannot be
            held as asked.
        ValueError: another argument is malformed, or weights are missing.
    Warns:
        PolicyFitWarning: the policy's provenance says that it was made for another model.
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
    path = os.fspath(model_id_or_path)
    config = from_pretrained_kwargs.pop("config", None)
    if os.path.isfile(os.path.join(path, "adapter_config.json")):
        raise UnsupportedModelError(
            "model",
            path,
            "whole checkpoints; adapters by peft.PeftModel.from_pretrained(load_model(BASE), "
            "FOLDER), or added to the weights by fastskip train --merge",
        )
    if config is None:
        config = transformers.AutoConfig.from_pretrained(path, **hub)
    check_config(config)
    model_class = model_class_of(config)
    chosen = _choose_policy(policy, path, config, hub)
    shape = shape_of(config)
    make_plan(chosen, shape)
    origin_of(chosen)
    build_routers(chosen, shape.depth, shape.hidden_size, routers)
    options = {"config": config, "dtype": torch_dtype, "use_safetensors": True}
    options |= from_pretrained_kwargs
    if is_quantised(config) or from_pretrained_kwargs.get("quantization_config") is not None:
        # Weights are quantised where they will lie; some quantisers cannot move them.
        options["device_map"] = {"": target}
    layout = _sparse_layout(path, hub)
    if layout is None:
        model, found = model_class.from_pretrained(path, output_loading_info=True, **options)
    else:
        model, found = read_sparse(model_class, path, layout, **options)
    missing = sorted(found["missing_keys"])
    if missing:  # Hugging Face draws them at random and warns
        raise ValueError(f"{path}: the checkpoint has no {', '.join(missing)}")
    if "device_map" not in options:
        model = model.to(target)
    model.eval()
    hold_(model, weights)
    return apply_(model, chosen, impl=impl, attention=attention, routers=routers)


def model_class_of(config: Any) -> Any:
    """Hugging Face's class of a config, for weights that are to be read.

    Raises:
        UnsupportedModelError: an unknown family, or one whose vision encoder is of a package that
            is missing.
    """
    check_installed(config)
    return getattr(transformers, model_class_name(config))


def apply_(
    model: Any,
    policy: PolicyLike | None = None,
    *,
    impl: str | None = None,
    attention: str | None = None,
    routers: Mapping[str, Router] | None = None,
) -> Any:
    """Prepares a model that is already in memory, in place, and returns it.

    A model that is prepared already gets the new policy and keeps its ``impl`` and ``attention``.
    """
    if attention not in (None, "flash"):
        raise ValueError(f"attention: {attention!r}; allowed: None, 'flash'")
    chosen = SkipPolicy() if policy is None else SkipPolicy.coerce(policy)
    if getattr(model, "_fastskip", None) is not None:
        prepared = _runtime_of(model)
        kept = prepared.decoder.ops.implementation
        if impl is not None and ops.resolve(impl, prepared.device).implementation is not kept:
            raise ValueError(f"impl: {impl!r}; allowed: None, or {kept.value!r}, which it keeps")
        return set_policy(model, chosen, routers=routers)
    _check_model(model)
    text_model = text_model_of(model)
    if is_users_own(type(text_model)):
        raise UnsupportedModelError(
            "text model", type(text_model).__name__, "transformers' own class, whose forward we run"
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
    # Merging now, layer by layer, so that no more than one layer is held twice.
    runtime.decoder.refresh(wants_gradient=False)
    check_decoder(runtime.decoder)
    prepare(model, runtime)
    return model


def set_policy(
    model: Any, policy: PolicyLike, *, routers: Mapping[str, Router] | None = None
) -> Any:
    """Swaps the policy of a prepared model without reloading; returns the model.

    Caches that were filled under the old policy are refused afterwards. ``routers`` as in
    ``load_model``. Warns as ``load_model`` does.
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
    """Writes a prepared model's policy as its checkpoints have it, its routers' weights beside."""
    write_policy(_runtime_of(model).plan.policy, folder)


@contextmanager
def record_routing(model: Any) -> Iterator[RoutingRecord]:
    """What routers decide in forwards of a prepared model within this block, read back.

    Costs a copy of each step's decisions to the host.
    """
    runtime = _runtime_of(model)
    with runtime.recording() as record:
        yield record


@contextmanager
def watching_routers(model: Any, wrap: Callable[[int, Router], Router]) -> Iterator[None]:
    """Within this block each router is what ``wrap`` makes of it and its number in the policy.

    Only plain torch asks routers themselves; on the device their terms decide, unseen.
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
    """The plan that a prepared model runs; its table notes layers that miss the merged products."""
    runtime = _runtime_of(model)
    plan, shape = runtime.plan, _shape_of(model)
    if shape != plan.shape:  # resized since, of another dtype, or held in another form
        plan = make_plan(plan.policy, shape)
    apart = {
        index: "projections one by one"
        for index, weights in enumerate(runtime.decoder.weights)
        if not weights.can_merge
    }
    return replace(plan, notes=apart) if apart else plan


def _shape_of(model: Any) -> ModelShape:
    """The sizes of a model in memory, with what its projections take if they are not plain."""
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


def _choose_policy(
    policy: PolicyLike | None, path: str, config: Any, hub: dict[str, Any]
) -> SkipPolicy:
    """An explicit policy wins; then the checkpoint's own file, then its config, then dense."""
    if policy is not None:
        return SkipPolicy.coerce(policy)
    found = _file_of(path, POLICY_FILE, hub)
    if found is not None:
        logger.info("policy: %s", found)
        chosen = SkipPolicy.from_file(found)
        if not Path(path).is_dir():
            _fetch_weights(chosen, path, hub)
        return chosen
    from_config = policy_of_config(config)
    if from_config is not None:
        logger.info("policy: per_layer_config of the checkpoint")
        return from_config
    if Path(path).is_dir() or _is_absent(path, POLICY_FILE, hub):
        logger.info("policy: none given, none in the checkpoint; dense")
    else:
        logger.warning(
            "policy: none given, and the cache does not know whether %s has one (the hub was not "
            "reached); dense",
            path,
        )
    return SkipPolicy()


def _sparse_layout(path: str, hub: dict[str, Any]) -> SparseLayout | None:
    """What a sparse checkpoint says of itself; ``None`` for an ordinary one."""
    found = _file_of(path, LAYOUT_FILE, hub)
    if found is None:
        return None
    check_unmixed(found.parent)
    return SparseLayout.read(found)


def _file_of(path: str, name: str, hub: dict[str, Any]) -> Path | None:
    """One of our own files of a checkpoint, if it has it."""
    if Path(path).is_dir():
        local = Path(path) / hub.get("subfolder", "") / name
        return local if local.is_file() else None
    found = transformers.utils.cached_file(
        path,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub,
    )
    return Path(found) if found else None


def _is_absent(path: str, name: str, hub: dict[str, Any]) -> bool:
    """Whether the cache knows from the hub that a checkpoint does not have a file."""
    inside = PurePosixPath(hub.get("subfolder", ""), name).as_posix()
    places = {key: hub[key] for key in ("revision", "cache_dir") if key in hub}
    found = transformers.utils.try_to_load_from_cache(path, inside, **places)
    return found is not None and not isinstance(found, str)


def _fetch_weights(policy: SkipPolicy, path: str, hub: dict[str, Any]) -> None:
    """Weights of routers come into the cache beside the policy, as the hub has them beside it."""
    for number, rule in enumerate(policy.routers):
        if rule.weights is None:
            continue
        inside = PurePosixPath(rule.weights)
        if inside.is_absolute() or ".." in inside.parts:
            allowed = "a file in the policy's own folder"
            raise PolicyError(f"routers[{number}].weights", rule.weights, allowed)
        transformers.utils.cached_file(path, rule.weights, **hub)


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
    """Where the model goes; Hugging Face's ``device_map`` may say it too, for all of it."""
    if placement is None:
        return device
    if device is not None:
        raise ValueError(f"device_map: {placement!r}; allowed: None beside device={device!r}")
    places = set(placement.values()) if isinstance(placement, Mapping) else {placement}
    place = places.pop() if len(places) == 1 else None
    if place == "auto" and torch.cuda.device_count() < 2:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(place, int):
        return f"cuda:{place}"
    if place is None or place in _SPREADING:
        allowed = "one device for all of the model, as device='cuda'"
        raise UnsupportedModelError("device_map", placement, allowed)
    named: str | torch.device = place
    return named


def _check_arguments(arguments: dict[str, Any]) -> None:
    for name, allowed in _REFUSED.items():
        if given := arguments.pop(name, None):
            raise UnsupportedModelError(name, given, allowed)
    if arguments.get("use_safetensors") is False:
        raise UnsupportedModelError("use_safetensors", False, "True: pickle is never read")
    arguments.pop("use_safetensors", None)


def _check_model(model: Any) -> None:
    if not isinstance(model, transformers.PreTrainedModel):
        kind = f"{type(model).__module__}.{type(model).__name__}"
        allowed = "a model of transformers (of PEFT: get_base_model(); not compiled, not wrapped)"
        raise UnsupportedModelError("model", kind, allowed)
    check_config(model.config)
    own = model_class_name(model.config)
    if not isinstance(model, getattr(transformers, own)):
        raise UnsupportedModelError("model", type(model).__name__, f"the whole {own}")
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) > 1 or "meta" in devices:
        raise UnsupportedModelError("device", sorted(devices), "all weights on one device")
