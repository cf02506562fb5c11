"""Tiny random-weight Hugging Face models: every supported family in a few thousand parameters."""

import math
from typing import Any, Literal, cast

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    SiglipVisionConfig,
)

Kind = Literal["llava", "llava_opt", "llava_next_vicuna", "llava_next_mistral", "llava_onevision"]
LLAVA_KINDS: tuple[Kind, ...] = (
    "llava",
    "llava_opt",
    "llava_next_vicuna",
    "llava_next_mistral",
    "llava_onevision",
)
PAD_ID = 0
PATCH = 4
CROP = 8
"""Patches and crops are squares of so many pixels where images come in several crops."""
PINPOINTS = [[8, 8], [8, 16], [16, 8], [16, 16]]


def tiny_llava(
    kind: Kind = "llava",
    *,
    heads: int = 4,
    kv_heads: int = 2,
    depth: int = 4,
    hidden: int = 32,
    head_dim: int = 8,
    ffn: int = 48,
    vocab: int = 64,
    image_tokens: int = 4,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    tied: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """A LLaVA-style model in evaluation mode.

    `image_tokens` (a square) is the number of placeholders of an image of `llava` and `llava_opt`;
    the others take crops of 2 x 2 patches, so that the number depends on the image's size. The
    last token ids are reserved: vocab - 1 for images, vocab - 2 for videos. Not every text model
    knows every option: Qwen2 always has biases on q, k and v; OPT is multi-head and has biases.
    """
    text = _text_config(
        {
            "llava": "llama",
            "llava_opt": "opt",
            "llava_next_vicuna": "llama",
            "llava_next_mistral": "mistral",
            "llava_onevision": "qwen2",
        }[kind],
        heads=heads,
        kv_heads=kv_heads,
        depth=depth,
        hidden=hidden,
        head_dim=head_dim,
        ffn=ffn,
        vocab=vocab,
        attention_bias=attention_bias,
        mlp_bias=mlp_bias,
        tied=tied,
    )
    side = math.isqrt(image_tokens)
    if side * side != image_tokens:
        raise ValueError(f"image_tokens: got {image_tokens}, allowed: a square number")
    crops = kind.startswith("llava_next") or kind == "llava_onevision"
    common: dict[str, Any] = {
        "text_config": text,
        "image_token_index": vocab - 1,
        "tie_word_embeddings": tied,
    }
    config: Any
    model_class: Any
    if kind == "llava_onevision":
        config = LlavaOnevisionConfig(
            vision_config=_vision_config(SiglipVisionConfig, CROP, vision_use_head=False),
            video_token_index=vocab - 2,
            image_grid_pinpoints=PINPOINTS,
            **common,
        )
        model_class = LlavaOnevisionForConditionalGeneration
    elif crops:
        config = LlavaNextConfig(
            vision_config=_vision_config(CLIPVisionConfig, CROP),
            image_grid_pinpoints=PINPOINTS,
            **common,
        )
        model_class = LlavaNextForConditionalGeneration
    else:
        config = LlavaConfig(vision_config=_vision_config(CLIPVisionConfig, PATCH * side), **common)
        model_class = LlavaForConditionalGeneration
    return _build(model_class, config, seed, dtype)


def tiny_llama(
    *,
    heads: int = 4,
    kv_heads: int = 2,
    depth: int = 4,
    hidden: int = 32,
    head_dim: int = 8,
    ffn: int = 48,
    vocab: int = 64,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    tied: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """A text-only Llama in evaluation mode."""
    config = _text_config(
        "llama",
        heads=heads,
        kv_heads=kv_heads,
        depth=depth,
        hidden=hidden,
        head_dim=head_dim,
        ffn=ffn,
        vocab=vocab,
        attention_bias=attention_bias,
        mlp_bias=mlp_bias,
        tied=tied,
    )
    return _build(LlamaForCausalLM, config, seed, dtype)


def tiny_opt(
    *,
    heads: int = 4,
    depth: int = 4,
    hidden: int = 32,
    ffn: int = 48,
    vocab: int = 64,
    tied: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **fields: Any,
) -> PreTrainedModel:
    """A text-only OPT in evaluation mode; `fields` are those of its `OPTConfig`."""
    config = _text_config(
        "opt", heads=heads, depth=depth, hidden=hidden, ffn=ffn, vocab=vocab, tied=tied
    )
    for name, value in fields.items():
        setattr(config, name, value)
    return _build(OPTForCausalLM, config, seed, dtype)


def _text_config(
    family: str,
    *,
    heads: int,
    depth: int,
    hidden: int,
    ffn: int,
    vocab: int,
    tied: bool,
    kv_heads: int = 1,
    head_dim: int = 8,
    attention_bias: bool = False,
    mlp_bias: bool = False,
) -> Any:
    common: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "pad_token_id": PAD_ID,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    if family == "opt":
        return OPTConfig(
            ffn_dim=ffn, word_embed_proj_dim=hidden, dropout=0.0, attention_dropout=0.0, **common
        )
    common |= {"intermediate_size": ffn, "num_key_value_heads": kv_heads}
    if family == "llama":
        return LlamaConfig(
            head_dim=head_dim, attention_bias=attention_bias, mlp_bias=mlp_bias, **common
        )
    if family == "mistral":
        return MistralConfig(head_dim=head_dim, sliding_window=None, **common)
    return Qwen2Config(use_sliding_window=False, **common)


def _vision_config(config_class: Any, image_size: int, **options: Any) -> Any:
    return config_class(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=PATCH,
        **options,
    )


def _build(model_class: Any, config: Any, seed: int, dtype: torch.dtype) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).eval()
        _draw_weights(model)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD_ID
    return cast(PreTrainedModel, model.to(dtype))


@torch.no_grad()
def _draw_weights(model: torch.nn.Module) -> None:
    """Draw weights so large that whatever is left out visibly changes the logits."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(centre, 0.3)
        elif "embed" in name:
            parameter.normal_(0.0, 1.0)
        else:
            parameter.normal_(0.0, 1.5 / math.sqrt(parameter[0].numel()))
