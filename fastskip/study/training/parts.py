"""The parameters that each choice of parts trains, and LoRA adapters."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastskip.families import DRAWING, ENCODERS, text_model_of
from fastskip.study.training.settings import Lora, Parts, Precision, SettingsError
from fastskip.wording import dtype_name

_PROJECTOR = (
    "projector",
    "connector",
    "aligner",
    "vision_projection",
    "visual_embeddings_table",
    "image_newline",
    "visual.merger",
)
_HALVES = {torch.bfloat16, torch.float16}
logger = logging.getLogger(__name__)


def names_of(model: Any, parts: Parts) -> frozenset[str]:
    """The names of the model's own parameters that are trained; none for LORA and ROUTERS.

    Raises:
        SettingsError: the model has no such part.
    """
    names = {
        name for name, _ in model.named_parameters() if not any(part in name for part in DRAWING)
    }
    projector = {name for name in names if any(part in name for part in _PROJECTOR)}
    if parts is Parts.PROJECTOR:
        if not projector:
            others = ", ".join(part for part in Parts if part is not Parts.PROJECTOR)
            raise SettingsError("parts", parts.value, f"{others} (this model has no projector)")
        return frozenset(projector)
    if parts is Parts.LANGUAGE:
        sees = {name for name in names if any(part in name for part in ENCODERS)}
        return frozenset(names - (sees - projector))
    return frozenset(names) if parts is Parts.EVERYTHING else frozenset()


def check_precision(model: Any, names: Collection[str], precision: Precision) -> None:
    """Warns if the trained weights are held in half precision.

    Raises:
        SettingsError: frozen weights have a dtype that does not mix with bfloat16 autocast.
    """
    frozen = {p.dtype for name, p in model.named_parameters() if name not in names}
    unfit = ", ".join(sorted(dtype_name(d) for d in frozen - {torch.bfloat16, torch.float32}))
    if unfit and precision is Precision.BFLOAT16:
        allowed = f"weights, or a model in bfloat16 or float32, not {unfit}"
        raise SettingsError("precision", precision.value, allowed)
    halves = {p.dtype for name, p in model.named_parameters() if name in names} & _HALVES
    if halves and precision is Precision.WEIGHTS:
        logger.warning(
            "the trained weights are held in %s, where small updates are lost; better: a model in "
            "float32, or in bfloat16 with precision bfloat16",
            ", ".join(sorted(map(dtype_name, halves))),
        )


@contextmanager
def learning(model: Any, names: frozenset[str], precision: Precision) -> Iterator[None]:
    """Within this block only the named parameters require gradients; with BFLOAT16 they are held in
    fp32 meanwhile."""
    before = {name: (p.requires_grad, p.dtype) for name, p in model.named_parameters()}
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
            if name in names and precision is Precision.BFLOAT16:
                parameter.data = parameter.data.float()
        yield
    finally:
        for name, parameter in model.named_parameters():
            if name in before:  # adapters were not
                required, dtype = before[name]
                parameter.requires_grad_(required)
                parameter.data = parameter.data.to(dtype)
                parameter.grad = None


def adapted(model: Any, lora: Lora, seed: int) -> Any:
    """The model with fresh adapters on the linear layers of its decoder, as a ``peft.PeftModel``.

    The adapters stay in the model itself; its own parameters are frozen.

    Raises:
        SettingsError: a linear layer is not a plain one: it has adapters already, or is sparse.
    """
    peft = _peft()
    layers = text_model_of(model).layers
    prefix = next(name for name, module in model.named_modules() if module is layers)
    linear = _linears_of(layers)
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=rf"{re.escape(prefix)}\.\d+\..*\b({'|'.join(sorted(linear))})",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return peft.get_peft_model(model, config)


def _linears_of(layers: nn.Module) -> set[str]:
    """The names of the linear modules within a decoder layer."""
    found = {name: type(m) for name, m in layers.named_modules() if hasattr(m, "in_features")}
    for name, kind in found.items():
        if not issubclass(kind, nn.Linear):
            unfit = f"{name} is a {kind.__module__}.{kind.__name__}"
            allowed = f"other parts, or a decoder of plain linear layers ({unfit})"
            raise SettingsError("parts", "lora", allowed)
    return {name.rpartition(".")[2] for name in found}


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        allowed = "other parts, or: pip install 'fastskip[train]'"
        raise SettingsError("parts", "lora", f"{allowed} (peft is missing)") from error
    return peft
