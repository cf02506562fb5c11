"""Greedy decoding and sampling: Hugging Face's contract, our decoder without its overhead.

A step embeds one token per sequence, runs the decoder on the GENERATED rows and applies the head;
logits processors, stopping criteria, scores and streamers see exactly what Hugging Face's own loop
would show them. If calling the model does more than its class does (hooks, a replaced ``forward``),
each step calls the model. Beam search and assisted decoding run in Hugging Face's loops on the
prepared forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.utils import GenerateDecoderOnlyOutput

from fastskip.decoder.anatomy import has_hooks, is_plain
from fastskip.decoder.cache import SkipCache
from fastskip.decoder.fused.paged_cache import PagedCache
from fastskip.families import (
    MULTIMODAL,
    final_norm_of,
    has_custom_forward,
    logits_of,
    logits_scaling,
    scaled,
    text_model_of,
)
from fastskip.generation.cache_name import CACHE_NAME
from fastskip.generation.device_loop import GreedyEnd, StepLogits, decode_greedily
from fastskip.generation.runtime import Runtime
from fastskip.ops.allocate import on_host, to_device
from fastskip.policy import TokenClass
from fastskip.tokens import CODES


def sample(
    model: Any,
    runtime: Runtime,
    stock: Callable[..., Any],
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """``GenerationMixin._sample`` for a prepared model.

    ``stock`` (Hugging Face's loop on the prepared forward) runs whatever needs a full forward per
    step: no cache, hidden states or attention maps, several processes in lockstep.
    """
    wants_outputs = generation_config.output_hidden_states or generation_config.output_attentions
    if not model_kwargs.get("use_cache") or wants_outputs or synced_gpus:
        return stock(
            model,
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )
    config, asked = generation_config, _Outputs(generation_config)
    # Before the prefill: reading them afterwards would wait for it.
    end, pad = GreedyEnd.of(stopping_criteria, _stops_of(config)), _pad_of(config)
    outputs = model._prefill(
        input_ids, config, model_kwargs, is_first_iteration=not config.is_assistant
    )
    cache: SkipCache = outputs[CACHE_NAME]
    # An fp32 copy, as in Hugging Face: processors may write to it.
    logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32)
    called = _CalledSteps(model, outputs, model_kwargs) if _does_more(model) else None
    del outputs
    is_greedy = not (config.do_sample or logits_processor or asked.reads_logits)
    if is_greedy and end is not None and isinstance(cache, PagedCache) and called is None:
        with on_host():
            given = to_device(input_ids, logits.device)  # ids may be on the host
            tokens = decode_greedily(
                model, runtime, cache, given, logits, end, pad=pad, streamer=streamer
            ).to(input_ids.device)
    else:
        tokens = _decode(
            input_ids,
            logits,
            called or _OwnSteps(model, runtime, cache, logits.device),
            logits_processor,
            stopping_criteria,
            config,
            asked,
            streamer,
        )
    return asked.of(tokens, cache, streamer)


def _decode(
    input_ids: Tensor,
    logits: Tensor,
    next_logits: Callable[[Tensor], Tensor],
    logits_processor: Any,
    stopping_criteria: Any,
    config: Any,
    asked: _Outputs,
    streamer: Any,
) -> Tensor:
    """Chooses token after token, until the criteria stop every sequence: all tokens ``[B, T + n]``.

    ``logits [B, V]``: of the first; ``next_logits``: from all tokens so far to those of the next.
    """
    pad, home = config._pad_token_tensor, input_ids.device
    is_padding = any(hasattr(criteria, "eos_token_id") for criteria in stopping_criteria)
    unfinished = torch.ones(len(input_ids), dtype=torch.long, device=home)
    while True:
        logits = logits.to(home, torch.float32)
        next_scores = logits_processor(input_ids, logits)
        asked.note(next_scores, logits)
        if config.do_sample:
            probabilities = torch.nn.functional.softmax(next_scores, dim=-1)
            tokens = torch.multinomial(probabilities, num_samples=1).squeeze(1)
        else:
            tokens = torch.argmax(next_scores, dim=-1)
        if is_padding:
            tokens = tokens * unfinished + pad * (1 - unfinished)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        unfinished = unfinished & ~stopping_criteria(input_ids, asked.scores)
        if not bool(unfinished.any()):
            return input_ids
        logits = next_logits(input_ids)


class _Outputs:
    """What ``generate`` returns, as far as its config asks for more than tokens.

    Attributes:
        scores, logits: ``[B, V]`` for each new token, after and before the processors; ``None`` if
            nobody asks.
    """

    def __init__(self, config: Any) -> None:
        self._is_object = config.return_dict_in_generate
        self.scores: tuple[Tensor, ...] | None = None
        self.logits: tuple[Tensor, ...] | None = None
        if self._is_object and config.output_scores:
            self.scores = ()
        if self._is_object and config.output_logits:
            self.logits = ()

    @property
    def reads_logits(self) -> bool:
        """Whether each step's logits are needed, whatever chooses its tokens."""
        return self.scores is not None or self.logits is not None

    def note(self, scores: Tensor, logits: Tensor) -> None:
        if self.scores is not None:
            self.scores = (*self.scores, scores)
        if self.logits is not None:
            self.logits = (*self.logits, logits)

    def of(self, tokens: Tensor, cache: SkipCache, streamer: Any) -> Any:
        """The result, from all tokens ``[B, T]``; ends the stream."""
        if streamer is not None:
            streamer.end()
        if not self._is_object:
            return tokens
        return GenerateDecoderOnlyOutput(
            sequences=tokens, scores=self.scores, logits=self.logits, **{CACHE_NAME: cache}
        )


def _does_more(model: Any) -> bool:
    """Whether calling the model, or a model inside it, does more than its class does."""
    parts = [model, model.get_decoder(), text_model_of(model)]
    if model.config.model_type in MULTIMODAL:
        parts.append(model.model)
    classes = [getattr(part, "_fastskip_origin", (type(part),))[0] for part in parts]
    return any(map(has_hooks, parts)) or any(map(has_custom_forward, classes))


class _CalledSteps:
    """Steps as Hugging Face's loop runs them: calls of the model with all its keyword arguments."""

    def __init__(self, model: Any, outputs: Any, model_kwargs: dict[str, Any]) -> None:
        self._model, self._kwargs = model, model_kwargs
        self._note(outputs)

    def __call__(self, input_ids: Tensor) -> Tensor:
        """All tokens so far ``[B, T]`` -> logits ``[B, V]`` of the next ones."""
        inputs = self._model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=1, **self._kwargs
        )
        outputs = self._model(**inputs, return_dict=True)
        self._note(outputs)
        logits: Tensor = outputs.logits[:, -1]
        return logits

    def _note(self, outputs: Any) -> None:
        self._kwargs = self._model._update_model_kwargs_for_generation(outputs, self._kwargs)


def _stops_of(config: Any) -> tuple[Tensor | None, list[int]]:
    """The stop tokens as the criteria's tensor, and as host values."""
    ids = config.eos_token_id
    ids = ids.tolist() if isinstance(ids, Tensor) else ids
    if ids is None:
        return None, []
    return config._eos_token_tensor, list(ids) if isinstance(ids, Sequence) else [ids]


def _pad_of(config: Any) -> int:
    """The token that pads finished sequences."""
    if config._pad_token_tensor is None:
        return 0
    # Hugging Face's choice, without a host sync to read its tensor.
    return int(_stops_of(config)[1][0] if config.pad_token_id is None else config.pad_token_id)


def _head_of(model: Any, runtime: Runtime) -> Callable[[Tensor], Tensor]:
    """The head; a plain linear one runs as the implementation's own linear."""
    head, scaling = model.get_output_embeddings(), logits_scaling(model.config)
    if not is_plain(head, nn.Linear):
        return partial(logits_of, model)
    linear = runtime.decoder.ops.linear
    return lambda rows: scaled(linear(rows, head.weight, head.bias), scaling)


class _OwnSteps:
    """Steps that call only the decoder, the embedding before it and the head after it."""

    def __init__(
        self, model: Any, runtime: Runtime, cache: SkipCache, device: torch.device
    ) -> None:
        self._model, self._runtime, self._cache = model, runtime, cache
        self._device = device
        self._step: _DecodeStep | StepLogits | None = None

    def __call__(self, input_ids: Tensor) -> Tensor:
        """All tokens so far ``[B, T]`` -> logits ``[B, V]`` of the next ones."""
        with on_host():
            if self._step is None:  # only now: the first token needs none
                kind = StepLogits if isinstance(self._cache, PagedCache) else _DecodeStep
                self._step = kind(self._model, self._runtime, self._cache)
            return self._step(input_ids[:, -1].to(self._device))


class _DecodeStep:
    """Decode steps: tokens ``[B]`` in, logits ``[B, V]`` of the next ones out."""

    def __init__(self, model: Any, runtime: Runtime, cache: SkipCache) -> None:
        self._embed = model.get_input_embeddings()
        self._head = _head_of(model, runtime)
        self._norm = final_norm_of(text_model_of(model))
        self._decoder, self._cache = runtime.decoder, cache
        codes = torch.full((cache.seen.batch, 1), CODES[TokenClass.GENERATED])
        positions, axes = cache.seen.following(1)
        self._layout = self._decoder.lay_out(codes, positions, cache, axes)

    def __call__(self, tokens: Tensor) -> Tensor:
        out = self._decoder.run(self._embed(tokens[:, None]), self._layout, self._cache)
        self._layout = self._layout.advanced()
        logits: Tensor = self._head(self._norm(out))
        return logits
