"""Hugging Face calls that mean nothing, or something else, under a policy."""

from __future__ import annotations

from typing import Any

import torch
from transformers.generation.utils import GenerationMode

from fastskip.decoder.cache import SkipCache
from fastskip.decoder.fused.paged_cache import PagedCache
from fastskip.families import UnsupportedModelError, text_model_of
from fastskip.generation.cache_name import CACHE_NAME
from fastskip.generation.runtime import Runtime
from fastskip.policy import TokenClass


def check_parts(model: Any, runtime: Runtime) -> None:
    """Raises if the prepared language model has been replaced."""
    if getattr(text_model_of(model), "_fastskip", None) is not runtime:
        raise RuntimeError(
            "language model: replaced after the model was prepared; put it in place first, then "
            "call fastskip.apply_"
        )


def check_cache_kind(generation_config: Any) -> None:
    """Raises if ``generate`` is to make a Hugging Face cache."""
    kind = generation_config.cache_implementation
    if kind not in (None, "dynamic"):
        raise ValueError(
            f"cache_implementation: {kind!r}; allowed: None (a prepared model uses its own compact "
            "cache)"
        )


def check_modality(inputs: dict[str, Any]) -> None:
    """Raises ``UnsupportedModelError`` if ``generate`` would draw images (Janus): its loop brings
    its own cache, and what a policy says of answers says nothing of pictures."""
    mode = inputs.get("generation_mode", "text")
    if mode != "text":
        allowed = "text; images are drawn by the model that Hugging Face loads"
        raise UnsupportedModelError("generation_mode", mode, allowed)


def check_drafts(mode: Any, cache: SkipCache, mask: Any) -> None:
    """Raises where Hugging Face's assisted decoding goes wrong: it feeds the prompt in a cache a
    second time, and continues from the last column even if that is a pad."""
    if mode is not GenerationMode.ASSISTED_GENERATION:
        return
    what = "assistant_model, prompt_lookup_num_tokens: with"
    if cache.columns:
        raise ValueError(f"{what} a non-empty cache; allowed: the whole prompt, without a cache")
    if mask is not None and not bool(mask[:, -1].all()):
        raise ValueError(f"{what} right-padded prompts; allowed: left padding")


def check_unpacked(inputs: dict[str, Any], *, keeps_cache: bool) -> None:
    """Raises for what Hugging Face reads as several sequences packed into one row: positions that
    do not increase one by one, without a mask or a cache."""
    given = inputs.get("position_ids")
    if given is None or keeps_cache or inputs.get("attention_mask") is not None:
        return
    if given.ndim == 3:  # text positions, if given, then time, height and width
        if len(given) == 3:
            return
        given = given[0]
    if bool((given.diff(dim=-1) != 1).any()):
        raise ValueError(
            "position_ids: several sequences packed into one row; allowed: one per row, padded, "
            "with an attention_mask"
        )


def check_maps(cache: SkipCache) -> None:
    """Raises where attention kernels run, which never materialise the weights."""
    if isinstance(cache, PagedCache):
        raise ValueError(
            "output_attentions: True; allowed: False, or a model with impl='reference'"
        )


def check_gradients(inputs: dict[str, Any]) -> None:
    """Raises where gradients would have to flow through a cache, which stops them."""
    cache, embeddings = inputs.get(CACHE_NAME), inputs.get("inputs_embeds")
    is_learning = inputs.get("labels") is not None
    if embeddings is not None and embeddings.requires_grad:
        is_learning = True
    if is_learning and torch.is_grad_enabled() and getattr(cache, "ends_gradients", False):
        raise ValueError(
            f"{CACHE_NAME}: gradients do not flow through a cache to the forward that filled it; "
            "allowed: one forward over all columns, or torch.no_grad() around the first"
        )


def check_chunks(runtime: Runtime, generation_config: Any, mask: Any) -> None:
    """Raises for chunked prefill if the policy or the mask needs the whole prompt."""
    size, policy = generation_config.prefill_chunk_size, runtime.plan.policy
    if policy.removals or not all(rule.is_by_row for rule in policy.routers):
        raise ValueError(
            f"prefill_chunk_size: {size}; allowed: None, as the policy decides on whole prompts"
        )
    if mask is not None and not bool(mask[:, -1].all()):
        raise ValueError(
            f"prefill_chunk_size: {size} with right-padded prompts; allowed: left padding, or None"
        )


def check_guidance(runtime: Runtime, generation_config: Any) -> None:
    """Raises for guidance without a cache: its forwards cannot be told apart from the model's own,
    whose text and generated rows the policy may treat differently."""
    together = {TokenClass.TEXT, TokenClass.GENERATED}
    is_guided = generation_config.guidance_scale not in (None, 1)
    if is_guided and not any(together <= group for group in runtime.plan.groups):
        raise ValueError(
            "use_cache: False with guidance_scale; needed: True, because the policy treats text "
            "and generated rows differently"
        )
