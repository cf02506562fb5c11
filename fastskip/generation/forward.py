"""The text model's forward: from embedded columns to normalised hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from fastskip.decoder.attention_maps import AttentionMaps
from fastskip.decoder.cache import SkipCache
from fastskip.decoder.deep_features import DeepFeatures
from fastskip.decoder.plain_forward import ForwardOptions
from fastskip.families import DEEP_INPUTS, check_mode, final_norm_of
from fastskip.generation.cache_name import CACHE_NAME
from fastskip.generation.columns import (
    axes_of,
    cache_of,
    codes_of,
    positions_of,
    real_columns,
    split_axes,
)
from fastskip.generation.refusals import check_maps, check_unpacked
from fastskip.generation.runtime import Runtime
from fastskip.tokens import PAD, TokenLayout


def decode_columns(
    text_model: Any, runtime: Runtime, h: Tensor, inputs: dict[str, Any]
) -> BaseModelOutputWithPast:
    """Runs the decoder on embedded columns ``h [B, T, D]``; ``inputs`` as Hugging Face names them.

    Raises ``UnsupportedModelError`` in a mode that would give wrong results.

    Returns ``last_hidden_state [B, T, D]``, or ``[B, k, D]`` if the outer model names the columns
    whose logits it reads in ``kept_columns [B, k]``; rows of pads are unspecified.
    """
    check_mode(text_model)
    wants_gradient = torch.is_grad_enabled() and (
        h.requires_grad or any(p.requires_grad for p in text_model.parameters())
    )
    runtime.refresh(wants_gradient=wants_gradient)
    cache, is_returned = cache_of(text_model, runtime, inputs, wants_gradient=wants_gradient)
    check_unpacked(inputs, keeps_cache=is_returned)
    real = real_columns(inputs.get("attention_mask"), cache, *h.shape[:2])
    layout = _lay_out(text_model, runtime, cache, inputs, real, keeps_cache=is_returned)
    shape = runtime.plan.shape
    asked = _output_flag(text_model, inputs, "output_hidden_states")
    states = _HiddenStates(asked, shape.depth) if asked else None
    maps = None
    if _output_flag(text_model, inputs, "output_attentions"):
        check_maps(cache)
        maps = AttentionMaps(layout, shape.depth, shape.num_heads)
    every_row = states is not None or maps is not None
    kept = _Kept.of(inputs.get("kept_columns"), real, every_row=every_row)
    options = ForwardOptions(
        wanted=None if kept is None else kept.rows,
        wants_gradient=wants_gradient,
        keeps_cache=is_returned,
        watch=None if states is None else states.watch,
        maps=maps,
        features=DeepFeatures.of(
            *map(inputs.get, DEEP_INPUTS), placeholders=inputs.get("placeholders")
        ),
    )
    out = runtime.decoder.run(h, layout, cache, options)
    out = final_norm_of(text_model)(out)
    hidden = layout.unpack(out) if kept is None or kept.rows is None else kept.unpack(out)
    shown = None if states is None else states.all(layout, hidden)
    if kept is not None and kept.rows is None:
        hidden = kept.pick(hidden)
    return BaseModelOutputWithPast(
        last_hidden_state=hidden,
        hidden_states=shown,
        attentions=None if maps is None else maps.all(hidden),
        **{CACHE_NAME: cache if is_returned else None},
    )


def _lay_out(
    text_model: Any,
    runtime: Runtime,
    cache: SkipCache,
    inputs: dict[str, Any],
    real: Tensor,
    *,
    keeps_cache: bool,
) -> TokenLayout:
    """The rows of a forward: the columns that are ``real [B, T]``, their classes and positions."""
    codes = codes_of(text_model, runtime, cache, inputs, keeps_cache=keeps_cache)
    in_text, axes = split_axes(runtime, inputs.get("position_ids"), cache, real)
    positions = positions_of(runtime, in_text, cache, real)
    axes = axes_of(runtime, axes, positions, cache, real)
    return runtime.decoder.lay_out(codes.masked_fill(~real, PAD), positions, cache, axes)


def _output_flag(text_model: Any, inputs: dict[str, Any], name: str) -> Any:
    """An ``output_*`` option, as passed to this call or else as set in the config."""
    found = inputs.get(name)
    return getattr(text_model.config, name, False) if found is None else found


class _HiddenStates:
    """The hidden states that a call asks for: the input of each layer, and what the last norm
    returns."""

    def __init__(self, asked: bool | int | Sequence[int], depth: int) -> None:
        self._depth, self._shown = depth, _shown(asked, depth + 1)
        self._seen: list[Tensor | None] = []

    def watch(self, layer: int, rows: Tensor) -> None:
        """Keeps the input ``[N, D]`` of a layer."""
        self._seen.append(rows.clone() if layer in self._shown else None)

    def all(self, layout: TokenLayout, last: Tensor) -> tuple[Tensor | None, ...]:
        """``[B, T, D]`` each, ``None`` for those not asked for; ``last``: that after all layers."""
        inner = (None if rows is None else layout.unpack(rows) for rows in self._seen)
        return *inner, last if self._depth in self._shown else None


def _shown(asked: bool | int | Sequence[int], count: int) -> frozenset[int]:
    """Which of ``count`` hidden states to return: all, none, or (transformers 5.24) some, by index;
    negative indices count from the end, others out of range are ignored."""
    if isinstance(asked, bool):
        return frozenset(range(count) if asked else ())
    chosen = [asked] if isinstance(asked, int) else asked
    return frozenset(index % count for index in chosen if -count <= index < count)


@dataclass(frozen=True, slots=True)
class _Kept:
    """The columns whose logits are read.

    ``columns [B, k]``; ``is_real [B, k]``: which of them are not pads; ``rows``: flat indices into
    ``B * T`` of the real ones, or ``None`` if every row continues to the end anyway.
    """

    columns: Tensor
    is_real: Tensor
    rows: Tensor | None

    @classmethod
    def of(cls, columns: Tensor | None, real: Tensor, *, every_row: bool) -> _Kept | None:
        batch, width = real.shape
        if columns is None or columns.numel() == real.numel():
            return None
        is_real = real.gather(1, columns)
        flat = columns + torch.arange(batch)[:, None] * width
        return cls(columns, is_real, None if every_row else flat[is_real])

    def unpack(self, rows: Tensor) -> Tensor:
        """``[n, D]`` of the real columns -> ``[B, k, D]``; pads read zero."""
        shape = (*self.columns.shape, rows.shape[-1])
        if bool(self.is_real.all()):
            return rows.view(shape)
        spots = self.is_real.reshape(-1).nonzero().squeeze(1).to(rows.device)
        blank = rows.new_zeros(self.columns.numel(), rows.shape[-1])
        return blank.index_copy(0, spots, rows).view(shape)

    def pick(self, hidden: Tensor) -> Tensor:
        """``[B, T, D] -> [B, k, D]``."""
        index = self.columns.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1])
        return hidden.gather(1, index)
