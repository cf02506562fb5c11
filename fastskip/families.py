"""The model families that fastskip supports, and what it must refuse in each.

Everything here reads Hugging Face configs; no weights are needed.
"""

from __future__ import annotations

import inspect
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fastskip.plan import ModelShape

MULTIMODAL = {
    "llava": "LlavaForConditionalGeneration",
    "vipllava": "VipLlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_next_video": "LlavaNextVideoForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
    "video_llava": "VideoLlavaForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
    "qianfan_ocr": "QianfanOCRForConditionalGeneration",
    "mistral3": "Mistral3ForConditionalGeneration",
    "idefics2": "Idefics2ForConditionalGeneration",
    "idefics3": "Idefics3ForConditionalGeneration",
    "smolvlm": "SmolVLMForConditionalGeneration",
    "lighton_ocr": "LightOnOcrForConditionalGeneration",
    "got_ocr2": "GotOcr2ForConditionalGeneration",
    "deepseek_vl": "DeepseekVLForConditionalGeneration",
    "deepseek_vl_hybrid": "DeepseekVLHybridForConditionalGeneration",
    "janus": "JanusForConditionalGeneration",
    "ovis2": "Ovis2ForConditionalGeneration",
    "fast_vlm": "FastVlmForConditionalGeneration",
    "perception_lm": "PerceptionLMForConditionalGeneration",
    "video_llama_3": "VideoLlama3ForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}
TEXT_ONLY = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "opt": "OPTForCausalLM",
}
ENCODERS = (
    "vision_tower",
    "vision_model",
    "vision_encoder",
    "image_tower",
    "video_tower",
    "visual",
    "high_res_vision",
)
"""The names of vision encoder modules across families; the last begins those of DeepSeek-VL 7B's
second encoder."""
DRAWING = ("vqmodel", "generation_embeddings", "generation_aligner", "generation_head")
"""The names of modules that only draw images (Janus), on which no answer in text depends."""
DEEP_INPUTS = ("visual_pos_masks", "deepstack_visual_embeds")
"""The text model's arguments for DeepStack features, which are added after its first layers: their
columns ``[B, T]``, and the features, ``[n, D]`` per layer."""
_QWEN2 = ("qwen2", "qwen2_vl_text", "qwen2_5_vl_text")
_QWEN3 = ("qwen3", "qwen3_vl_text")
_WINDOWLESS = ("llama", "granite", "opt")
DECODERS = ("llama", "mistral", *_QWEN2, *_QWEN3, "granite", "opt")
CUTTING = (
    *("llava_next", "llava_next_video", "llava_onevision"),
    *("internvl", "qianfan_ocr", "idefics3", "smolvlm"),
)
"""Families that cut images into crops; larger images yield more crops."""
KEEPING_SIZES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "video_llama_3")
"""Families that keep image sizes, so that larger images have more rows; Pixtral encoders do too."""
UNCUT_SIDE = 448
"""Side in pixels of the image that is assumed where images keep their sizes."""
# This RoPE type's frequencies depend on the sequence length, so they cannot be tabulated.
LONG_ROPE = "longrope"
# Families whose encoders copy from the host in every forward, which a CUDA graph cannot capture.
_UNCAPTURABLE = ("got_ocr2",)
# Encoders from a package that transformers wraps but does not require.
_TIMM = "timm_wrapper"
# OPT config options of which the runtime supports one value.
OPT_FORM = {
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "layer_norm_elementwise_affine": True,
}


class UnsupportedModelError(ValueError):
    """A model, or a model option, that fastskip cannot prepare; says what it can."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        self.field, self.value, self.allowed = field, value, allowed
        super().__init__(f"{field}: {value!r} is not supported; supported: {allowed}")


def model_class_name(config: Any) -> str:
    """The Hugging Face class of a config, e.g. ``LlavaForConditionalGeneration``."""
    known = MULTIMODAL | TEXT_ONLY
    name = known.get(config.model_type)
    if name is None:
        allowed = ", ".join(f"{kind} ({cls})" for kind, cls in known.items())
        raise UnsupportedModelError("model_type", config.model_type, allowed)
    return name


def check_config(config: Any) -> None:
    """Raises ``UnsupportedModelError`` for a config that would run incorrectly or not at all."""
    model_class_name(config)
    text = config.get_text_config(decoder=True)
    if isinstance(text, dict):  # of a part that the config's own type does not have
        allowed = "a multimodal type where the config has a text_config"
        raise UnsupportedModelError("model_type", config.model_type, allowed)
    if text.model_type not in DECODERS:
        raise UnsupportedModelError("text_config.model_type", text.model_type, ", ".join(DECODERS))
    if text.model_type == "opt":
        _check_opt(config, text)
    if logits_scaling(config) <= 0:
        raise UnsupportedModelError("logits_scaling", config.logits_scaling, "more than 0")
    if getattr(text, "is_causal", True) is False:
        raise UnsupportedModelError("is_causal", False, "True: a causal decoder")
    for name in ("num_hidden_layers", "hidden_size", "num_attention_heads"):
        if getattr(text, name) < 1:
            raise UnsupportedModelError(name, getattr(text, name), "1 or more")
    if _deep_layers(config) >= text.num_hidden_layers:
        raise UnsupportedModelError(
            "vision_config.deepstack_visual_indexes",
            config.vision_config.deepstack_visual_indexes,
            f"fewer than num_hidden_layers ({text.num_hidden_layers})",
        )
    _check_layer_overrides(text)
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") == LONG_ROPE:
        raise UnsupportedModelError(
            "rope_parameters.rope_type",
            rope["rope_type"],
            "types whose frequencies do not depend on the sequence length",
        )


def is_quantised(config: Any) -> bool:
    """Whether a config is that of a checkpoint with quantised weights."""
    return getattr(config, "quantization_config", None) is not None


def _check_opt(config: Any, text: Any) -> None:
    for name, needed in OPT_FORM.items():
        value = getattr(text, name, needed)
        if value != needed:
            raise UnsupportedModelError(name, value, str(needed))
    if text.word_embed_proj_dim != text.hidden_size:
        allowed = f"hidden_size ({text.hidden_size})"
        raise UnsupportedModelError("word_embed_proj_dim", text.word_embed_proj_dim, allowed)
    if config.model_type in MULTIMODAL:
        for field, part in (("", config), ("text_config.", text)):
            # Hugging Face would tie the head to an embedding at a path that OPT does not have.
            if getattr(part, "tie_word_embeddings", False):
                allowed = "False, in the config and in its text_config"
                raise UnsupportedModelError(f"{field}tie_word_embeddings", True, allowed)


def check_installed(config: Any) -> None:
    """Raises ``UnsupportedModelError`` if the vision encoder needs a package that is missing."""
    vision = getattr(config, "vision_config", None)
    if getattr(vision, "model_type", None) == _TIMM and find_spec("timm") is None:
        allowed = "other encoders, or this one with timm installed (pip install timm)"
        raise UnsupportedModelError("vision_config.model_type", _TIMM, allowed)


def has_custom_forward(kind: type) -> bool:
    """Whether a class's ``forward`` is not defined by transformers."""
    forward = inspect.getattr_static(kind, "forward")
    home = getattr(forward, "__globals__", {}).get("__name__", "")
    return not home.startswith("transformers.")


def check_mode(text_model: Any) -> None:
    """Raises ``UnsupportedModelError`` if training would drop layers at random (LayerDrop)."""
    layerdrop = getattr(text_model, "layerdrop", 0.0)
    if text_model.training and layerdrop > 0:
        raise UnsupportedModelError("layerdrop", layerdrop, "0 in training, or model.eval()")


def _check_layer_overrides(text: Any) -> None:
    overrides = text.to_dict().get("per_layer_config") or {}
    names = {name for layer in overrides.values() for name in layer} - {"skip"}
    if names:
        raise UnsupportedModelError("per_layer_config", sorted(names), "skip: layers of one shape")


def shape_of(config: Any, dtype: torch.dtype = torch.float32) -> ModelShape:
    """The sizes that plans and costs depend on; ``dtype`` is that of the weights and the cache."""
    text = config.get_text_config(decoder=True)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    is_opt = text.model_type == "opt"
    return ModelShape(
        depth=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        ffn_size=text.ffn_dim if is_opt else text.intermediate_size,
        num_heads=text.num_attention_heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_dim=head_dim,
        vocab_size=text.vocab_size,
        has_images=config.model_type in MULTIMODAL,
        **_biases(text),
        gated_ffn=not is_opt,
        head_norms=text.model_type in _QWEN3,
        window=_window_of(text),
        deep_layers=_deep_layers(config),
        dtype_bytes=dtype.itemsize,
        max_positions=text.max_position_embeddings,
    )


def _deep_layers(config: Any) -> int:
    vision = getattr(config, "vision_config", None)
    return len(getattr(vision, "deepstack_visual_indexes", None) or ())


def _window_of(text: Any) -> int | None:
    """The sliding window of this decoder in columns; ``None``: full attention.

    Some have no windows, whatever their configs say.
    """
    window: int | None = getattr(text, "sliding_window", None)
    types = getattr(text, "layer_types", None)
    if types is not None:
        slides = "sliding_attention" in types
    else:
        slides = getattr(text, "use_sliding_window", True)
    return window if slides and text.model_type not in _WINDOWLESS else None


def _biases(text: Any) -> dict[str, bool]:
    """Which linears have biases."""
    if text.model_type == "opt":
        names = "attention_bias", "attention_output_bias", "ffn_bias"
        return dict.fromkeys(names, bool(text.enable_bias))
    is_qwen = text.model_type in _QWEN2
    has_bias = is_qwen or bool(getattr(text, "attention_bias", False))
    return {
        "attention_bias": has_bias,
        "attention_output_bias": has_bias and not is_qwen,
        "ffn_bias": bool(getattr(text, "mlp_bias", False)),
    }


def text_model_of(model: Any) -> Any:
    """The decoder stack of a model: the module that has ``layers`` and ``embed_tokens``."""
    # The outer call yields a LLaVA's language model; OPT wraps the decoder once more.
    return model.get_decoder().get_decoder()


def tower_of(model: Any) -> Any | None:
    """The vision encoder of a multimodal model if a CUDA graph can capture it, else ``None``; also
    ``None`` if images and videos have separate encoders. Of DeepSeek-VL 7B's two it is SigLIP:
    the other one copies from the host."""
    if model.config.model_type in _UNCAPTURABLE:
        return None
    own = [module for name, module in model.model.named_children() if name in ENCODERS]
    return own[0] if len(own) == 1 else None


def logits_scaling(config: Any) -> float:
    """What a model divides its head's products by: Granite by itself. Inside LLaVA-NeXT Hugging
    Face divides by nothing."""
    return float(config.logits_scaling) if config.model_type == "granite" else 1.0


def logits_of(model: Any, rows: Tensor) -> Tensor:
    """The model's logits ``[.., V]`` of normalised rows ``[.., D]``."""
    return scaled(model.get_output_embeddings()(rows), logits_scaling(model.config))


def scaled(products: Tensor, scaling: float) -> Tensor:
    """Logits, from what a head gives; see ``logits_scaling``."""
    return products if scaling == 1.0 else products / scaling


def final_norm_of(text_model: Any) -> Any:
    """The norm between the last layer of a decoder stack and the head."""
    return text_model.final_layer_norm if text_model.config.model_type == "opt" else text_model.norm


def image_token_ids(config: Any) -> tuple[int, ...]:
    """Placeholder ids that features replace: the image's, and the video's if there is one."""
    ids = (getattr(config, name, None) for name in ("image_token_id", "video_token_id"))
    return tuple(token for token in ids if token is not None)


def placeholders(config: Any, ids: Tensor) -> Tensor:
    """Which of ``ids`` are placeholders that features may replace: bool, on the device of ids."""
    reserved = torch.tensor(image_token_ids(config), dtype=ids.dtype, device=ids.device)
    return torch.isin(ids, reserved)


def rows_of_crop(config: Any) -> int:
    """Positions that an image of a single crop fills; 0 in a text-only model. Where images keep
    their sizes: those of a square image with a side of ``UNCUT_SIDE`` pixels."""
    vision = getattr(config, "vision_config", None)
    if vision is None:
        return 0
    if config.model_type == "idefics2":
        return int(config.perceiver_config.resampler_n_latents)  # whatever the image's size
    if config.model_type == "fast_vlm":
        return int(config.image_seq_length)  # its timm encoder has no size in the config
    if config.model_type == "perception_lm":
        patches = side_of(vision.model_args["ref_feat_shape"])
    else:
        side = getattr(vision, "image_size", UNCUT_SIDE)
        patches = side_of(side) // side_of(vision.patch_size)
    return round((patches / _patches_of_row(config)) ** 2)


def assumed_of_images(config: Any) -> str | None:
    """The image that `rows_of_crop` assumes, if the number of rows depends on the image size."""
    if config.model_type in CUTTING:
        return "one image of a single crop; this model cuts larger images into several"
    vision = getattr(config, "vision_config", None)
    if config.model_type in KEEPING_SIZES or getattr(vision, "model_type", None) == "pixtral":
        side = side_of(getattr(vision, "image_size", UNCUT_SIDE))
        return f"one image of {side} x {side} pixels; this model keeps image sizes"
    return None


def side_of(size: Any) -> int:
    """The side of a square, whose size a config gives as one number or two."""
    side: int = size if isinstance(size, int) else size[0]
    return side


def _patches_of_row(config: Any) -> float:
    """How many patches of the vision encoder are merged into one row, along each side."""
    match config.model_type:
        case "idefics3" | "smolvlm":
            return float(config.scale_factor)
        case "mistral3" | "lighton_ocr":
            return float(config.spatial_merge_size)
        case "got_ocr2":
            return 4.0  # two convolutions of stride 2
        case "ovis2":
            return float(config.vision_config.hidden_stride)
        case "perception_lm":
            return float(config.projector_pooling_ratio)
        case "qwen2_vl" | "qwen2_5_vl" | "qwen3_vl":
            return float(config.vision_config.spatial_merge_size)
        case "internvl" | "qianfan_ocr":
            return float(1 / config.downsample_ratio)
    return 1.0
