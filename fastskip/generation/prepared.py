"""The classes of a prepared model: the checkpoint's own, with our decoder inside.

A prepared model's class is a subclass of the checkpoint's class, with the same name. It differs in
few places: the text model's ``forward`` runs our decoder; the outer ``forward`` passes on the class
of each column and which logits are read; ``generate`` runs our loop for greedy decoding and
sampling; on a GPU the vision tower runs as a CUDA graph, while the host works out where its
features go. This file and ``loop.py`` are the only ones that touch private Hugging Face names
(``_sample``, ``_prefill``, ``_prepare_cache_for_generation`` and the like).
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastskip.decoder.cache import SkipCache
from fastskip.decoder.candidates import Lens
from fastskip.decoder.fused.stack import FusedDecoder
from fastskip.families import (
    MULTIMODAL,
    UnsupportedModelError,
    final_norm_of,
    logits_of,
    placeholders,
    text_model_of,
    tower_of,
)
from fastskip.generation.cache_name import CACHE_NAME, takes_old_name
from fastskip.generation.classes import host_ids
from fastskip.generation.columns import classes_of, kept_columns, prompt_columns
from fastskip.generation.forward import decode_columns
from fastskip.generation.loop import sample
from fastskip.generation.prepared_class import Prepared, adopt
from fastskip.generation.refusals import (
    check_cache_kind,
    check_chunks,
    check_drafts,
    check_gradients,
    check_guidance,
    check_modality,
    check_parts,
)
from fastskip.generation.runtime import Runtime
from fastskip.generation.saving import save, write_policy
from fastskip.ops.allocate import on_host, to_device
from fastskip.routing import RouterError
from fastskip.sparse.checkpoint import write_sparse
from fastskip.sparse.convert import sparse_matrices

_uncompiled = torch.compiler.disable(
    reason="a prepared model chooses rows and grows its cache at run time"
)


def prepare(model: Any, runtime: Runtime) -> None:
    """Makes ``model`` (and its inner models) prepared, in place."""
    text_model = text_model_of(model)
    runtime.decoder.lens = _lens_of(model)
    if model.config.model_type in MULTIMODAL:
        adopt(model.model, PreparedBackbone, runtime)
    _adopt_tower(model, runtime)
    adopt(text_model, PreparedDecoder, runtime)
    adopt(model, PreparedModel, runtime)


def _adopt_tower(model: Any, runtime: Runtime) -> None:
    tower = tower_of(model) if model.config.model_type in MULTIMODAL else None
    is_one = tower is None or isinstance(tower, PreparedTower)
    if not is_one and isinstance(runtime.decoder, FusedDecoder):
        adopt(tower, PreparedTower, runtime)


def _follow(model: Any, runtime: Runtime) -> None:
    """Follows a model that may have been moved to another device."""
    before = runtime.decoder
    runtime.follow(text_model_of(model))
    if runtime.decoder is not before:
        _adopt_tower(model, runtime)


def _first_cache(model: Any, runtime: Runtime, config: Any) -> SkipCache | None:
    """An empty cache for a call of ``generate``; ``None`` if it uses none, or if its first forward
    has to make it."""
    if config.use_cache is False:
        check_guidance(runtime, config)
        return None
    check_parts(model, runtime)
    if "forward" in vars(model):
        return None  # a wrapper may change how to compute
    runtime.decoder.attach(text_model_of(model))
    with on_host():
        runtime.decoder.refresh(wants_gradient=False)
        assert runtime.session is not None
        runtime.session.is_refreshed = True
        return runtime.decoder.new_cache()


def _lens_of(model: Any) -> Lens:
    """Final norm (on request) and head on rows of the residual stream: ``[n, D] -> [n, V]``."""
    held = weakref.ref(model)  # weak: the model holds this function

    def read(rows: Tensor, normed: bool) -> Tensor:
        model = held()
        if model is None:
            raise RouterError("head: the model around it was freed; keep the whole model")
        rows = final_norm_of(text_model_of(model))(rows) if normed else rows
        return logits_of(model, rows)

    return read


class PreparedDecoder(Prepared):
    """The text model: embeddings in, normalised hidden states out."""

    @_uncompiled
    def _run(self: Any, inputs: dict[str, Any]) -> Any:
        ids, embeddings = inputs.get("input_ids"), inputs.get("inputs_embeds")
        if (ids is None) == (embeddings is None):
            raise ValueError("specify exactly one of input_ids and inputs_embeds")
        if inputs.get("is_causal") is False:
            raise ValueError("is_causal: False; allowed: True (rows never attend to later ones)")
        h = self.embed_tokens(ids) if embeddings is None else embeddings
        if not h.shape[1]:
            raise ValueError("input_ids: no columns; allowed: one or more")
        self._runtime.follow(self)
        with self._runtime.running(), on_host():
            self._runtime.decoder.attach(self)
            output = decode_columns(self, self._runtime, h, inputs)
        is_tuple = inputs.get("return_dict") is False
        return output.to_tuple() if is_tuple else output


class PreparedBackbone(Prepared):
    """The multimodal model without head: classifies columns unless the outer model has."""

    @_uncompiled
    def _run(self: Any, inputs: dict[str, Any]) -> Any:
        with self._runtime.running():
            if inputs.get("token_classes") is None:
                with on_host():
                    inputs["token_classes"] = classes_of(self.config, self._runtime, inputs)
            inputs["cache_is_given"] = inputs.get(CACHE_NAME) is not None
            _recall_deltas(self, inputs)
            known = self._runtime.ids if self._runtime.plan.shape.deep_layers else None
            if known is not None and known[0] is inputs.get("input_ids"):
                inputs["placeholders"] = placeholders(self.config, known[1])
            return self._fastskip_origin[0].forward(self, **inputs)

    def get_placeholder_mask(
        self: Any, input_ids: Any, inputs_embeds: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Hugging Face's mask, computed on the host.

        Hugging Face compares the numbers of placeholders and features. On the device, that makes
        the host wait for the vision tower instead of laying out rows.
        """
        find = self._fastskip_origin[0].get_placeholder_mask
        known = None if self._fastskip is None else self._runtime.ids
        if known is None or known[0] is not input_ids:
            return find(self, input_ids, inputs_embeds, *args, **kwargs)
        with on_host():
            like = torch.empty(()).expand(inputs_embeds.shape)
            found = find(self, known[1], like, *args, **kwargs)
        if isinstance(found, tuple):
            return tuple(_mask_on(inputs_embeds.device, mask) for mask in found)
        return _mask_on(inputs_embeds.device, found)


_FOR_DECODER = ("token_classes", "kept_columns", "cache_is_given", "placeholders")
"""Inputs for the decoder alone; transformers from 5.24 on passes them to the tower as well."""


def _mask_on(device: torch.device, mask: Tensor) -> Tensor:
    """A mask of columns, ``[B, T]`` or ``[B, T, D]`` (constant along ``D``), on a device, without a
    host sync."""
    columns = mask if mask.ndim < 3 else mask[..., :1]
    return to_device(columns.contiguous(), device).expand(mask.shape)


def _recall_deltas(backbone: Any, inputs: dict[str, Any], ids: Any = None) -> None:
    """Makes Hugging Face count text that follows a cache from the cache's last row: its models only
    remember the end of the last prompt they saw, which may belong to another conversation."""
    cache = inputs.get(CACHE_NAME)
    deltas = cache.seen.rope_deltas() if isinstance(cache, SkipCache) else None
    if deltas is not None:
        given = (ids, inputs.get("input_ids"), inputs.get("inputs_embeds"))
        backbone.rope_deltas = deltas.to(next(each.device for each in given if each is not None))


class PreparedTower(Prepared):
    """The vision tower: Hugging Face's forward, possibly as a CUDA graph inside ``generate``."""

    extra_inputs = ()

    def _run(self: Any, inputs: dict[str, Any]) -> Any:
        forward, runtime = self._fastskip_origin[0].forward, self._runtime
        if not runtime.is_generating:
            return forward(self, **inputs)
        seen = {name: given for name, given in inputs.items() if name not in _FOR_DECODER}
        return runtime.tower.run(self, forward, seen)


class PreparedModel(Prepared):
    """The model that users hold."""

    @_uncompiled
    def _run(self: Any, inputs: dict[str, Any]) -> Any:
        runtime = self._runtime
        check_parts(self, runtime)
        _follow(self, runtime)
        check_gradients(inputs)
        with runtime.running():
            runtime.decoder.lens = _lens_of(self)
            with on_host():
                given, ids = inputs.get("input_ids"), host_ids(inputs)
                known = inputs if ids is None else {**inputs, "input_ids": ids}
                inputs["token_classes"] = classes_of(self.config, runtime, known)
                # The host reads these: now, since later it would wait for the vision tower.
                for name in ("attention_mask", "position_ids"):
                    if isinstance(inputs.get(name), Tensor):
                        inputs[name] = inputs[name].cpu()
                inputs["kept_columns"] = kept_columns(runtime, inputs)
            before, runtime.ids = runtime.ids, None if ids is None else (given, ids)
            try:
                return self._fastskip_origin[0].forward(self, **inputs)
            finally:
                runtime.ids = before

    @takes_old_name
    def generate(self: Any, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Hugging Face's ``generate``; a second thread waits for the first."""
        base: Any = self._fastskip_origin[0]
        if self._fastskip is None:
            return base.generate(self, inputs, *args, **kwargs)
        check_modality(kwargs)
        kwargs.pop("logits_to_keep", None)  # generate reads the last column only
        _follow(self, self._runtime)
        given = kwargs.get("position_ids") is not None
        with self._runtime.generating(prompt_columns(inputs, kwargs), gives_positions=given):
            if CACHE_NAME in kwargs and self.config.model_type in MULTIMODAL:
                _recall_deltas(self.model, kwargs, inputs)
            try:
                return base.generate(self, inputs, *args, **kwargs)
            except torch.OutOfMemoryError as error:
                error.add_note(
                    "generate: memory grows with the batch size, the prompt, max_new_tokens and "
                    "num_beams; lower one of them"
                )
                raise

    def _maybe_prepare_encoder_kwargs_for_generation(
        self: Any,
        inputs_tensor: Tensor,
        model_kwargs: dict[str, Any],
        model_input_name: str | None,
        generation_config: Any,
    ) -> Any:
        """From 5.24 on, transformers encodes images before the first forward, which must then wait
        for them to read its prompt. So a forward that is their only user encodes them itself."""
        config = generation_config
        copies = max(config.num_beams, config.num_return_sequences)
        is_one = copies == 1 and config.use_cache and config.prefill_chunk_size is None
        if self._fastskip is not None and is_one:
            return model_kwargs
        base: Any = self._fastskip_origin[0]
        return base._maybe_prepare_encoder_kwargs_for_generation(
            self, inputs_tensor, model_kwargs, model_input_name, generation_config
        )

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
        assert runtime.session is not None
        check_cache_kind(generation_config)
        if getattr(generation_config, "prefill_chunk_size", None) is not None:
            check_chunks(runtime, generation_config, model_kwargs.get("attention_mask"))
        cache = model_kwargs.get(CACHE_NAME)
        if cache is None:
            cache = _first_cache(self, runtime, generation_config)
            if cache is None:
                return
            model_kwargs[CACHE_NAME] = cache
        else:
            runtime.check_cache(cache)
            # Hugging Face reads this flag on caches that users pass in.
            cache._is_user_defined = True
        check_drafts(generation_mode, cache, model_kwargs.get("attention_mask"))
        cache.reserve = max_cache_length
        # An assistant is called once per draft, on one cache: its prompt stays the first one.
        if not (generation_config.is_assistant and cache.columns):
            cache.prompt_columns = max(runtime.session.prompt_columns, cache.columns)

    def _sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        base: Any = self._fastskip_origin[0]
        if self._fastskip is None:
            return base._sample(self, *args, **kwargs)
        return sample(self, self._runtime, base._sample, *args, **kwargs)

    def init_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Refused: Hugging Face's continuous batching brings its own cache and attention."""
        if self._fastskip is None:
            return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]
        raise UnsupportedModelError(
            "generate_batch", "continuous batching", "generate, with a batch of any prompts"
        )

    def generate_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As ``init_continuous_batching``."""
        if self._fastskip is None:
            return super().generate_batch(*args, **kwargs)  # type: ignore[misc]
        return self.init_continuous_batching()

    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As in Hugging Face, plus ``fastskip_policy.json`` and its routers' weights.

        ``export_per_layer_config=True`` also writes the policy as transformers'
        ``per_layer_config`` (all-token skips only). Stock transformers loads that and silently runs
        dense. A model that is sparse in memory is saved in the format of
        ``fastskip.sparse.save_sparse``.
        """
        base: Any = self._fastskip_origin[0]
        if self._fastskip is None:
            return base.save_pretrained(self, save_directory, *args, **kwargs)
        export = kwargs.pop("export_per_layer_config", False)
        write = partial(base.save_pretrained, self, save_directory, *args, **kwargs)
        if "variant" not in kwargs and sparse_matrices(self):
            write = partial(write_sparse, self, save_directory, write)
        if not (args[0] if args else kwargs.get("is_main_process", True)):
            return write()
        return save(self.config, self._runtime.plan, save_directory, write, export=export)

    def _upload_modified_files(self: Any, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        if self._fastskip is not None:
            write_policy(self._runtime.plan.policy, working_dir)  # uploaded with the rest
        base: Any = self._fastskip_origin[0]
        return base._upload_modified_files(self, working_dir, *args, **kwargs)
