"""LLaVA-1.5 7B and 13B with random weights made on the device, and small models."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from benchmarks.gpu.inputs import SMALL, TINY, Widths, text_before
from benchmarks.peers import DEFAULT, MORE, Peer
from benchmarks.shapes import PAD_ID, Models, Shape, models, random_model
from fastskip import SkipPolicy

# In all layers, as in the goal for prefill; the preset leaves some layers dense.
IMAGE_FFN = Peer(
    "image_ffn_all",
    "no FFN for image rows in any layer",
    lambda depth: SkipPolicy.preset("image_ffn", start=0, end=depth),
)
# On a GPU Hugging Face compiles the decode step for a static cache.
COMPILED = Peer("hf_static", "Hugging Face, static cache + compile", hf_cache="static")
_KNOWN = {peer.name: peer for peer in (*DEFAULT, *MORE, IMAGE_FFN, COMPILED)}
PEERS = tuple(
    _KNOWN[name]
    for name in (
        *("hf", "hf_static", "dense", "half_blocks"),
        *("image_ffn_all", "frozen_visual", "fastv", "parallel_blocks"),
    )
)


def policies(depth: int, names: Collection[str] | None = None) -> dict[str, SkipPolicy]:
    """Name -> policy of the peers that have one; of all known peers by default."""
    wanted = _KNOWN.values() if names is None else [_KNOWN[name] for name in names]
    return {peer.name: peer.policy(depth) for peer in wanted if peer.policy is not None}


def load(widths: Widths, dtype: torch.dtype, device: str, impl: str | None = None) -> Models:
    """Both models on one set of weights, built once and kept until other widths are loaded."""
    return models(_builder(widths, device), dtype, device, impl)


def shape(widths: Widths, device: str) -> Shape:
    before = text_before(widths.n_text)
    return Shape(widths.name, _builder(widths, device), before, widths.n_text - before)


# One builder per size, because models are cached by their builder.
_builders: dict[tuple[Widths, str], Callable[[torch.dtype], Any]] = {}


def _builder(widths: Widths, device: str) -> Callable[[torch.dtype], Any]:
    if (widths, device) not in _builders:
        # Drop models of other sizes: two large ones do not fit with their caches.
        _builders.clear()
        models.cache_clear()
        gc.collect()
        _builders[widths, device] = partial(_build, widths=widths, device=device)
    return _builders[widths, device]


def _build(dtype: torch.dtype, *, widths: Widths, device: str) -> Any:
    is_tiny = widths.vocabulary < 1000
    vision = CLIPVisionConfig(
        hidden_size=32 if is_tiny else 1024,
        intermediate_size=48 if is_tiny else 4096,
        num_hidden_layers=2 if is_tiny else 24,
        num_attention_heads=2 if is_tiny else 16,
        image_size=14 * round(widths.n_image**0.5),
        patch_size=14,
    )
    text = LlamaConfig(
        hidden_size=widths.hidden,
        intermediate_size=widths.ffn,
        num_hidden_layers=widths.layers,
        num_attention_heads=widths.heads,
        num_key_value_heads=widths.groups,
        head_dim=widths.head_dim,
        vocab_size=widths.vocabulary,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        pad_token_id=PAD_ID,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=widths.vocabulary - 64,
        image_seq_length=widths.n_image,
        tie_word_embeddings=False,
    )
    return random_model(config, dtype, device=device)


def tiny_model(dtype: torch.dtype, *, device: str) -> Any:
    """Six layers of grouped-query attention, to compare with the masked Hugging Face model."""
    return _build(dtype, widths=TINY if device == "cpu" else SMALL, device=device)
