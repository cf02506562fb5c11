"""Facts about one forward's columns: pads, classes, positions, and which logits are read.

Everything here runs on the host, before the decoder.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastskip.decoder.cache import SkipCache
from fastskip.decoder.recomputing import recomputes
from fastskip.generation.cache_name import CACHE_NAME
from fastskip.generation.classes import classify, given_shape
from fastskip.generation.runtime import Runtime
from fastskip.tokens import PAD


def cache_of(
    text_model: Any, runtime: Runtime, inputs: dict[str, Any], *, wants_gradient: bool
) -> tuple[SkipCache, bool]:
    """The cache for this forward, and whether it is returned to the caller."""
    cache = inputs.get(CACHE_NAME)
    # Some backbones create a Hugging Face cache when they are given none.
    if cache is not None and inputs.get("cache_is_given") is not False:
        runtime.check_cache(cache)
        return cache, True
    use_cache = inputs.get("use_cache")
    if use_cache is None:
        use_cache = bool(getattr(text_model.config, "use_cache", True))
    if wants_gradient and any(recomputes(layer) for layer in text_model.layers):
        use_cache = False  # as in transformers: recomputed layers would store entries twice
    return runtime.decoder.new_cache(), use_cache


def real_columns(mask: Any, cache: SkipCache, batch: int, width: int) -> Tensor:
    """Which of the new columns are not pads: ``[B, T]`` bool, host."""
    cache.check_batch(batch)
    if mask is None:
        return torch.ones(batch, width, dtype=torch.bool)
    total = cache.columns + width
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[0] != batch:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask: {shape}; needed: [{batch}, {total}], 0 for pads (the policy alone "
            "decides which rows see which)"
        )
    real = mask.detach().cpu() != 0
    if real.shape[1] == width and cache.columns:
        # The mask covers only the new columns; cached ones keep theirs.
        return real
    if real.shape[1] != total:
        raise ValueError(f"attention_mask: {tuple(mask.shape)}; needed: [{batch}, {total}]")
    if cache.columns and not torch.equal(real[:, : cache.columns], cache.seen.codes != PAD):
        raise ValueError(
            "attention_mask: changes which cached columns are visible; allowed: the mask they were "
            "cached under (padding after a finished sequence counts as visible), or the whole "
            "conversation without a cache"
        )
    return real[:, cache.columns :]


def codes_of(
    text_model: Any,
    runtime: Runtime,
    cache: SkipCache,
    inputs: dict[str, Any],
    *,
    keeps_cache: bool,
) -> Tensor:
    """Class codes ``[B, T]``. The outer model has already computed them, unless this is a direct
    call or its ``forward`` was wrapped before it was prepared."""
    shape = given_shape(inputs)
    assert shape is not None
    # A cache made for this forward learns here where its prompt ends.
    end = runtime.prompt_end(cache if keeps_cache else None, shape[1])
    is_given = inputs.get("token_classes") is not None
    codes = classify(
        runtime.plan,
        text_model.config,
        inputs,
        first_column=cache.columns,
        prompt_columns=None if is_given else end,
    )
    assert codes is not None
    return codes


def split_axes(
    runtime: Runtime, given: Any, cache: SkipCache, real: Tensor
) -> tuple[Any, Tensor | None]:
    """Splits Hugging Face's ``position_ids`` into text positions (``None`` if not given) and
    positions in time, height and width ``[3, B, T]`` (M-RoPE models only)."""
    if not runtime.decoder.positions.has_axes or getattr(given, "ndim", 0) != 3:
        return given, None
    batch, width = real.shape
    if given.shape[2] == cache.columns + width:  # Hugging Face derives them from the whole mask
        given = given[:, :, cache.columns :]
    count, own, columns = given.shape  # 1: shared, 3: the axes, 4: text first
    if count not in (1, 3, 4) or own not in (1, batch) or columns != width:
        raise ValueError(
            f"position_ids: {tuple(given.shape)}; needed: [3, {batch}, {width}] (time, height, "
            f"width) or [4, {batch}, {width}] (text positions first)"
        )
    axes = given[-3:].detach().cpu().to(torch.int64).expand(3, batch, width)
    return given[0] if given.shape[0] == 4 else None, axes


def axes_of(
    runtime: Runtime, given: Tensor | None, positions: Tensor, cache: SkipCache, real: Tensor
) -> Tensor | None:
    """Positions of columns in time, height and width: ``[3, B, T]``, host; ``None`` if the model
    does not use them.

    As given; else columns count as text and continue the sequence. Within ``generate`` new columns
    continue from the sequence's last real row, as in ``positions_of``.
    """
    if not runtime.decoder.positions.has_axes:
        return None
    width, session = real.shape[1], runtime.session
    if cache.columns and (given is None or (session is not None and width == 1)):
        return cache.seen.following(real.cumsum(1))[1]
    if given is None:
        return positions.expand(3, -1, -1)
    end = width if session is None or cache.columns else session.prompt_columns
    if end >= width:
        return given
    last = torch.arange(end).masked_fill(~real[:, :end], 0).amax(1, keepdim=True)
    begin = given.gather(2, last.expand(3, -1, -1))
    return torch.cat((given[:, :, :end], begin + real[:, end:].cumsum(1)), dim=2)


def positions_of(runtime: Runtime, given: Any, cache: SkipCache, real: Tensor) -> Tensor:
    """Positions ``[B, T]``, host: as given, else counted over all or over real columns, as in
    Hugging Face.

    But within ``generate`` new columns continue from the sequence's last real row: with right
    padding Hugging Face would continue from a pad. Prompt columns keep the caller's positions.
    """
    if runtime.session is not None and cache.columns and not _are_callers(runtime, given, cache):
        return cache.seen.following(real.cumsum(1))[0]
    if given is None:
        positions = _counted(cache, real, counts_pads=runtime.decoder.positions.counts_pads)
    else:
        positions = given.detach().cpu().to(torch.int64)
        if positions.ndim != 2 or positions.shape[1] != real.shape[1]:
            raise ValueError(
                f"position_ids: {tuple(positions.shape)}; needed: {list(real.shape)} or "
                f"[1, {real.shape[1]}]"
            )
        positions = positions.expand_as(real)
    end = real.shape[1] if runtime.session is None else runtime.session.prompt_columns
    if end < real.shape[1]:  # no cache: every step passes the prompt and all new tokens
        last = positions[:, :end].masked_fill(~real[:, :end], -1).max(dim=1, keepdim=True).values
        return torch.cat((positions[:, :end], last + real[:, end:].cumsum(1)), dim=1)
    return positions


def _are_callers(runtime: Runtime, given: Any, cache: SkipCache) -> bool:
    """Whether ``given`` are the caller's own positions of prompt columns that follow a cache."""
    session, end = runtime.session, cache.prompt_columns
    is_callers = session is not None and session.gives_positions and given is not None
    return is_callers and end is not None and cache.columns < end


def _counted(cache: SkipCache, real: Tensor, *, counts_pads: bool) -> Tensor:
    """Default positions of new columns, ``[B, T]``; arbitrary at pads unless pads count."""
    if counts_pads:
        return torch.arange(cache.columns, cache.columns + real.shape[1]).expand_as(real)
    before = (cache.seen.codes != PAD).sum(1, keepdim=True) if cache.columns else 0
    return (before + real.cumsum(1) - 1).clamp_min(0)


def classes_of(config: Any, runtime: Runtime, inputs: dict[str, Any]) -> Tensor | None:
    """Class codes ``[B, T]`` of an outer model's columns, pads not yet marked; ``None`` without
    any.

    Raises for a cache that the model did not fill under its current plan.
    """
    cache = inputs.get(CACHE_NAME)
    if cache is not None:
        runtime.check_cache(cache)
    shape = given_shape(inputs)
    if shape is None:
        return None
    return classify(
        runtime.plan,
        config,
        inputs,
        first_column=0 if cache is None else cache.columns,
        prompt_columns=runtime.prompt_end(cache, shape[1]),
    )


def kept_columns(runtime: Runtime, inputs: dict[str, Any]) -> Tensor | None:
    """The new columns whose logits are read, ``[B, k]``; ``None``: all, or unknown."""
    keep = inputs.get("logits_to_keep", 0)
    shape = given_shape(inputs)
    if shape is None or isinstance(keep, Tensor) or not keep or inputs.get("labels") is not None:
        return None
    if keep < 0:
        raise ValueError(f"logits_to_keep: {keep}; allowed: 0 (all), a column count, a tensor")
    batch, width = shape
    mask = inputs.get("attention_mask")
    if runtime.session is not None and keep == 1 and mask is not None:
        # With right padding a sequence continues from its last real row, not from a pad.
        columns = torch.arange(width).expand(batch, width)
        last = columns.masked_fill(mask.cpu()[:, -width:] == 0, -1).max(dim=1).values
        return last.clamp_min(0)[:, None]
    return torch.arange(max(0, width - keep), width).expand(batch, -1)


def prompt_columns(inputs: Tensor | None, kwargs: dict[str, Any]) -> int:
    """The number of prompt columns, including those in a kept cache."""
    names = ("input_ids", "inputs_embeds")
    present = [inputs, *(kwargs.get(name) for name in names)]
    shapes = [t.shape for t in present if isinstance(t, Tensor) and t.ndim > 1]
    batch, width = max(((shape[0], shape[1]) for shape in shapes), default=(1, 1))
    mask, cache = kwargs.get("attention_mask"), kwargs.get(CACHE_NAME)
    if mask is not None:
        # Hugging Face drops an all-ones mask before a forward can see its shape.
        if mask.ndim != 2 or (shapes and mask.shape[0] != batch) or mask.shape[1] < width:
            raise ValueError(f"attention_mask: {tuple(mask.shape)}; needed: [{batch}, {width}]")
        width = mask.shape[1]
    if isinstance(cache, SkipCache) and cache.columns >= width:
        # Hugging Face would feed some of them a second time.
        raise ValueError(
            f"input_ids: {width} columns, but {CACHE_NAME} already holds {cache.columns}; needed: "
            "the whole conversation, or its new columns with an attention_mask that covers all"
        )
    return width
