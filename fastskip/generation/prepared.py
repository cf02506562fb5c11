"""The classes of a prepared model: the checkpoint's own, with our decoder inside.

A prepared model's class is a subclass made from the checkpoint's class, with its name. It differs
in three places: the text model's ``forward`` runs our decoder; the outer ``forward`` tells it the
class of each column and which logits are read; ``generate`` runs our loop for greedy decoding and
sampling. This file and ``loop.py`` are the only ones that touch private Hugging Face names
(``_sample``, ``_prefill``, ``_prepare_cache_for_generation``).
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from fastskip.decoder.cache import SkipCache
from fastskip.families import MULTIMODAL, text_model_of
from fastskip.generation.classes import classify
from fastskip.generation.loop import sample
from fastskip.generation.runtime import Runtime
from fastskip.generation.saving import save
from fastskip.policy import TokenClass
from fastskip.tokens import PAD


def prepare(model: Any, runtime: Runtime) -> None:
    """Makes ``model`` (and its inner models) prepared, in place."""
    text_model = text_model_of(model)
    if model.config.model_type in MULTIMODAL:
        _adopt(model.model, PreparedBackbone, runtime)
    _adopt(text_model, PreparedDecoder, runtime)
    _adopt(model, PreparedModel, runtime)


def _adopt(module: Any, mixin: type, runtime: Runtime) -> None:
    base: Any = type(module)
    module.__class__ = prepared_class(base, mixin)
    module._fastskip = runtime


@functools.cache
def prepared_class(base: Any, mixin: type) -> type:
    """``base`` with ``mixin`` in front: same name, same module, ``isinstance`` holds."""
    signature = inspect.signature(base.forward)

    # generate() reads the signature of forward to learn what a model accepts.
    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._fastskip is None:
            return base.forward(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs).arguments
        del bound["self"]
        return self._run(bound | bound.pop("kwargs", {}))

    extra = inspect.Parameter("token_classes", inspect.Parameter.KEYWORD_ONLY, default=None)
    *named, rest = signature.parameters.values()
    forward.__signature__ = signature.replace(parameters=[*named, extra, rest])  # type: ignore[attr-defined]
    members = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "forward": forward,
        "_fastskip_origin": (base, mixin),
    }
    return type(base.__name__, (mixin, base), members)


def _restore(base: type, mixin: type) -> Any:
    made: Any = prepared_class(base, mixin)
    return made.__new__(made)


class _Prepared:
    """What the prepared classes share.

    Before ``prepare`` has set the runtime (an instance made from the class itself) they behave as
    their base.
    """

    _fastskip: Runtime | None = None
    _fastskip_origin: tuple[type, type]

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, self._fastskip_origin, self.__dict__

    @property
    def _runtime(self) -> Runtime:
        assert self._fastskip is not None
        return self._fastskip


class PreparedDecoder(_Prepared):
    """The text model: embeddings in, normalised hidden states out."""

    def _run(self: Any, inputs: dict[str, Any]) -> Any:
        ids, embeddings = inputs.get("input_ids"), inputs.get("inputs_embeds")
        if (ids is None) == (embeddings is None):
            raise ValueError("specify exactly one of input_ids and inputs_embeds")
        if inputs.get("output_attentions") or getattr(self.config, "output_attentions", False):
            raise ValueError(
                "output_attentions: attention weights are not kept; use the plain model"
            )
        h = self.embed_tokens(ids) if embeddings is None else embeddings
        with self._runtime.lock:
            output = _decode_columns(self, self._runtime, h, inputs)
        is_tuple = inputs.get("return_dict") is False
        return output.to_tuple() if is_tuple else output


def _decode_columns(
    text_model: Any, runtime: Runtime, h: Tensor, inputs: dict[str, Any]
) -> BaseModelOutputWithPast:
    batch, width = h.shape[:2]
    cache, is_returned = _cache_of(text_model, runtime, inputs)
    real = _real_columns(inputs.get("attention_mask"), cache, batch, width)
    codes = _codes_of(text_model, runtime, cache, inputs).masked_fill(~real, PAD)
    positions = _positions_of(runtime, inputs.get("position_ids"), cache, real)
    wants_gradient = torch.is_grad_enabled() and (
        h.requires_grad or any(p.requires_grad for p in text_model.parameters())
    )
    wants_hidden = inputs.get("output_hidden_states")
    if wants_hidden is None:
        wants_hidden = getattr(text_model.config, "output_hidden_states", False)
    kept, wanted = inputs.get("kept_columns"), None
    if kept is not None and not wants_hidden and batch * width > kept.numel():
        is_real = real.gather(1, kept)
        flat = kept + torch.arange(batch)[:, None] * width
        wanted = flat[is_real]
    seen: list[Tensor] = []
    runtime.decoder.refresh(wants_gradient=wants_gradient)
    layout = runtime.decoder.lay_out(codes, positions, cache)
    out = runtime.decoder.run(
        h,
        layout,
        cache,
        wanted=wanted,
        wants_gradient=wants_gradient,
        keeps_cache=is_returned,
        watch=(lambda _, rows: seen.append(rows.clone())) if wants_hidden else None,
    )
    out = text_model.norm(out)
    if kept is None or wanted is None:
        hidden = layout.unpack(out)
    elif bool(is_real.all()):
        hidden = out.view(batch, -1, out.shape[-1])
    else:
        # Pads among the kept columns: their logits are unspecified, zero rows keep the shape.
        spots = is_real.reshape(-1).nonzero().squeeze(1).to(out.device)
        hidden = out.new_zeros(kept.numel(), out.shape[-1]).index_copy(0, spots, out)
        hidden = hidden.view(batch, -1, out.shape[-1])
    states = (*(layout.unpack(rows) for rows in seen), hidden) if wants_hidden else None
    if kept is not None and wanted is None and kept.shape[1] < width:
        # Every row went on, for the hidden states; the head reads the kept columns alone.
        index = kept.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1])
        hidden = hidden.gather(1, index)
    return BaseModelOutputWithPast(
        last_hidden_state=hidden,
        past_key_values=cache if is_returned else None,
        hidden_states=states,
    )


def _cache_of(text_model: Any, runtime: Runtime, inputs: dict[str, Any]) -> tuple[SkipCache, bool]:
    """The cache of this forward, and whether the caller gets it back."""
    cache = inputs.get("past_key_values")
    if cache is not None:
        runtime.check_cache(cache)
        return cache, True
    use_cache = inputs.get("use_cache")
    if use_cache is None:
        use_cache = bool(getattr(text_model.config, "use_cache", True))
    return SkipCache(runtime.plan), use_cache


def _real_columns(mask: Any, cache: SkipCache, batch: int, width: int) -> Tensor:
    """Which of the new columns are no pads: ``[B, T]`` bool, host."""
    if mask is None:
        return torch.ones(batch, width, dtype=torch.bool)
    total = cache.columns + width
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[0] != batch:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask: {shape}; needed: [{batch}, {total}]")
    real = mask.detach().cpu() != 0
    if real.shape[1] == width and cache.columns and width != total:
        # Only the new columns are described; what is cached stays as it is.
        return real
    if real.shape[1] != total:
        raise ValueError(f"attention_mask: {tuple(mask.shape)}; needed: [{batch}, {total}]")
    if cache.columns and not torch.equal(real[:, : cache.columns], cache.codes != PAD):
        raise ValueError("attention_mask: hides or shows columns that the cache already holds")
    return real[:, cache.columns :]


def _codes_of(
    text_model: Any, runtime: Runtime, cache: SkipCache, inputs: dict[str, Any]
) -> Tensor:
    """Class codes ``[B, T]``; the outer model has worked them out unless this is a direct call."""
    codes = classify(
        runtime.plan,
        text_model.config,
        inputs,
        first_column=cache.columns,
        prompt_columns=None,
    )
    assert codes is not None
    return codes


def _positions_of(runtime: Runtime, given: Any, cache: SkipCache, real: Tensor) -> Tensor:
    """RoPE positions ``[B, T]``, host: what is given, or columns, as in Hugging Face.

    But within ``generate`` new columns follow on from the sequence's last real row: with right
    padding Hugging Face would continue from a pad.
    """
    if runtime.session is not None and cache.columns:
        return cache.last_positions()[:, None] + real.cumsum(1)
    if given is None:
        positions = torch.arange(cache.columns, cache.columns + real.shape[1]).expand_as(real)
    else:
        positions = given.detach().cpu().to(torch.int64)
        if positions.ndim != 2 or positions.shape[1] != real.shape[1]:
            raise ValueError(
                f"position_ids: {tuple(positions.shape)}; needed: {list(real.shape)} or "
                f"[1, {real.shape[1]}]"
            )
        positions = positions.expand_as(real)
    end = real.shape[1] if runtime.session is None else runtime.session.prompt_columns
    if end < real.shape[1]:  # no cache: every step brings the prompt and what was generated
        last = positions[:, :end].masked_fill(~real[:, :end], -1).max(dim=1, keepdim=True).values
        return torch.cat((positions[:, :end], last + real[:, end:].cumsum(1)), dim=1)
    return positions


class PreparedBackbone(_Prepared):
    """The multimodal model without head: classifies columns if the outer model has not."""

    def _run(self: Any, inputs: dict[str, Any]) -> Any:
        if inputs.get("token_classes") is None:
            inputs["token_classes"] = _classes_of(self.config, self._runtime, inputs)
        return self._fastskip_origin[0].forward(self, **inputs)


class PreparedModel(_Prepared):
    """The model that users hold."""

    def _run(self: Any, inputs: dict[str, Any]) -> Any:
        runtime = self._runtime
        with runtime.lock:
            inputs["token_classes"] = _classes_of(self.config, runtime, inputs)
            inputs["kept_columns"] = _kept_columns(runtime, inputs)
            return self._fastskip_origin[0].forward(self, **inputs)

    def generate(self: Any, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Hugging Face's ``generate``; a second thread waits for the first."""
        base: Any = self._fastskip_origin[0]
        if self._fastskip is None:
            return base.generate(self, inputs, *args, **kwargs)
        with self._runtime.generating(_prompt_columns(inputs, kwargs)):
            return base.generate(self, inputs, *args, **kwargs)

    def _prepare_cache_for_generation(
        self: Any,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        runtime = self._fastskip
        if runtime is None:
            self._fastskip_origin[0]._prepare_cache_for_generation(
                self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
            return
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation: {generation_config.cache_implementation!r}; allowed: None "
                "(a prepared model brings a compact cache of its own)"
            )
        cache = model_kwargs.get("past_key_values")
        if cache is None:
            if generation_config.use_cache is False:
                _check_guidance(runtime, generation_config)
                return
            cache = model_kwargs["past_key_values"] = SkipCache(runtime.plan)
        else:
            runtime.check_cache(cache)
            # Hugging Face asks this of caches that users hand in.
            cache._is_user_defined = True
        cache.reserve = max_cache_length
        # An assistant is called once a draft, on one cache: its prompt stays the first one.
        if not (generation_config.is_assistant and cache.columns):
            assert runtime.session is not None
            cache.prompt_columns = max(runtime.session.prompt_columns, cache.columns)

    def _sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        base: Any = self._fastskip_origin[0]
        if self._fastskip is None:
            return base._sample(self, *args, **kwargs)
        return sample(self, self._runtime, base._sample, *args, **kwargs)

    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As Hugging Face's, plus ``fastskip_policy.json``.

        ``export_per_layer_config=True`` also writes the policy as transformers'
        ``per_layer_config`` (skips of all tokens only). Stock transformers loads that and runs
        dense, silently.
        """
        base: Any = self._fastskip_origin[0]
        if self._fastskip is None:
            return base.save_pretrained(self, save_directory, *args, **kwargs)
        export = kwargs.pop("export_per_layer_config", False)
        write = functools.partial(base.save_pretrained, self, save_directory, *args, **kwargs)
        return save(self.config, self._runtime.plan, save_directory, write, export=export)


def _classes_of(config: Any, runtime: Runtime, inputs: dict[str, Any]) -> Tensor | None:
    cache = inputs.get("past_key_values")
    if cache is not None:
        runtime.check_cache(cache)
    ids = inputs.get("input_ids")
    present = ids if ids is not None else inputs.get("inputs_embeds")
    if present is None:
        return None
    return classify(
        runtime.plan,
        config,
        inputs,
        first_column=0 if cache is None else cache.columns,
        prompt_columns=runtime.prompt_end(cache, present.shape[1]),
    )


def _kept_columns(runtime: Runtime, inputs: dict[str, Any]) -> Tensor | None:
    """``[B, k]`` columns (of the new ones) whose logits are read; ``None``: all, or unknown."""
    keep = inputs.get("logits_to_keep", 0)
    ids = inputs.get("input_ids")
    present = ids if ids is not None else inputs.get("inputs_embeds")
    if present is None or isinstance(keep, Tensor) or not keep or inputs.get("labels") is not None:
        return None
    batch, width = present.shape[:2]
    mask = inputs.get("attention_mask")
    if runtime.session is not None and keep == 1 and mask is not None:
        # With right padding a sequence goes on from its last real row, not from a pad.
        columns = torch.arange(width).expand(batch, width)
        last = columns.masked_fill(mask.cpu()[:, -width:] == 0, -1).max(dim=1).values
        return last.clamp_min(0)[:, None]
    return torch.arange(max(0, width - keep), width).expand(batch, -1)


def _prompt_columns(inputs: Tensor | None, kwargs: dict[str, Any]) -> int:
    """Columns of the prompt, those in a kept cache included."""
    names = ("input_ids", "inputs_embeds")
    present = [inputs, *(kwargs.get(name) for name in names)]
    shapes = [t.shape for t in present if isinstance(t, Tensor) and t.ndim > 1]
    batch, width = max(((shape[0], shape[1]) for shape in shapes), default=(1, 1))
    mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
    if mask is not None:
        # Hugging Face drops a mask of ones before a forward can see its shape.
        if mask.ndim != 2 or (shapes and mask.shape[0] != batch) or mask.shape[1] < width:
            raise ValueError(f"attention_mask: {tuple(mask.shape)}; needed: [{batch}, {width}]")
        width = mask.shape[1]
    if isinstance(cache, SkipCache) and cache.columns >= width:
        width += cache.columns  # only the new tokens were given
    return width


def _check_guidance(runtime: Runtime, generation_config: Any) -> None:
    """Without a cache, the guidance processor's forwards cannot be told from the model's own."""
    together = {TokenClass.TEXT, TokenClass.GENERATED}
    is_guided = generation_config.guidance_scale not in (None, 1)
    if is_guided and not any(together <= group for group in runtime.plan.groups):
        raise ValueError(
            "use_cache: False with guidance_scale; needed: True, since the policy treats text and "
            "generated rows differently"
        )
