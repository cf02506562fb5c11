"""Tiny random-weight Hugging Face models: every supported family in a few thousand parameters."""

import functools
import math
from typing import Any, Literal, cast, get_args

import torch
from transformers import (
    CLIPVisionConfig,
    ConvNextConfig,
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    DeepseekVLHybridConfig,
    DeepseekVLHybridForConditionalGeneration,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    GotOcr2Config,
    GotOcr2ForConditionalGeneration,
    GraniteConfig,
    GraniteForCausalLM,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LightOnOcrConfig,
    LightOnOcrForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Ovis2Config,
    Ovis2ForConditionalGeneration,
    PerceptionLMConfig,
    PerceptionLMForConditionalGeneration,
    PixtralVisionConfig,
    PreTrainedModel,
    QianfanOCRConfig,
    QianfanOCRForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SamVisionConfig,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    VideoLlama3Config,
    VideoLlama3ForConditionalGeneration,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)
from transformers.models.got_ocr2.configuration_got_ocr2 import GotOcr2VisionConfig
from transformers.models.idefics2.configuration_idefics2 import (
    Idefics2PerceiverConfig,
    Idefics2VisionConfig,
)
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.ovis2.configuration_ovis2 import Ovis2VisionConfig
from transformers.models.qianfan_ocr.configuration_qianfan_ocr import QianfanOCRVisionConfig
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.video_llama_3.configuration_video_llama_3 import VideoLlama3VisionConfig

LlavaKind = Literal[
    "llava", "llava_opt", "llava_next_vicuna", "llava_next_mistral", "llava_onevision"
]
Relative = Literal[
    "llava_pixtral",
    "vipllava",
    "llava_next_granite",
    "llava_next_video",
    "video_llava",
    "internvl",
    "internvl_qwen3",
    "qianfan_ocr",
    "mistral3",
    "idefics2",
    "idefics3",
    "smolvlm",
    "lighton_ocr",
    "got_ocr2",
    "deepseek_vl",
    "deepseek_vl_hybrid",
    "janus",
    "ovis2",
    "fast_vlm",
    "perception_lm",
    "video_llama_3",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
]
Kind = LlavaKind | Relative
LLAVA_KINDS: tuple[Kind, ...] = get_args(LlavaKind)
RELATIVES: tuple[Kind, ...] = get_args(Relative)
"""Other families of the same build, tested for what differs in them (`test_relatives.py`)."""
_TEXT = {
    "llava_opt": "opt",
    "llava_pixtral": "mistral",
    "llava_next_mistral": "mistral",
    "llava_next_granite": "granite",
    "llava_onevision": "qwen2",
    "internvl": "qwen2",
    "internvl_qwen3": "qwen3",
    "qianfan_ocr": "qwen3",
    "mistral3": "mistral",
    "idefics2": "mistral",
    "lighton_ocr": "qwen3",
    "got_ocr2": "qwen2",
    "ovis2": "qwen2",
    "fast_vlm": "qwen2",
    "video_llama_3": "qwen2",
    "qwen2_vl": "qwen2_vl_text",
    "qwen2_5_vl": "qwen2_5_vl_text",
    "qwen3_vl": "qwen3_vl_text",
}
PAD_ID = 0
PATCH = 4
CROP = 8
"""Patches and crops are squares of so many pixels where images come in several crops."""
PINPOINTS = [[8, 8], [8, 16], [16, 8], [16, 16]]
FINER = 2
"""How many times as many pixels a side a second encoder's images have."""


MULTIPLIERS = {
    "embedding_multiplier": 1.5,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.6,
    "logits_scaling": 3.0,
}
"""Granite's numbers. Other models have none, and scale scores by the width of heads."""


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
        _TEXT.get(kind, "llama"),
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
    common = {"text_config": text, "image_token_id": vocab - 1, "tie_word_embeddings": tied}
    model_class, config = _multimodal(kind, side, vocab - 2, common)
    return build_model(model_class, config, seed, dtype)


def _multimodal(kind: Kind, side: int, video_id: int, common: dict[str, Any]) -> tuple[Any, Any]:
    """The class of a kind, and a config of it; `side`: of an image in rows, where it is free."""
    square, crops = PATCH * side, {"image_grid_pinpoints": PINPOINTS}
    clip = functools.partial(_vision_config, CLIPVisionConfig)
    # Of these, rows are made of squares of two patches a side.
    merged: dict[str, Any] = {"image_size": 2 * square, "patch_size": PATCH}
    match kind:
        case "llava" | "llava_opt":
            return LlavaForConditionalGeneration, LlavaConfig(vision_config=clip(square), **common)
        case "llava_pixtral":
            vision = _encoder(PixtralVisionConfig, **merged)
            config: Any = LlavaConfig(
                vision_config=vision,
                vision_feature_layer=-1,
                vision_feature_select_strategy="full",
                **common,
            )
            return LlavaForConditionalGeneration, config
        case "vipllava":
            config = VipLlavaConfig(
                vision_config=clip(square), vision_feature_layers=[-1, -2], **common
            )
            return VipLlavaForConditionalGeneration, config
        case "llava_next_vicuna" | "llava_next_mistral" | "llava_next_granite":
            config = LlavaNextConfig(vision_config=clip(CROP), **crops, **common)
            return LlavaNextForConditionalGeneration, config
        case "llava_next_video":
            config = LlavaNextVideoConfig(
                vision_config=clip(CROP), video_token_id=video_id, **crops, **common
            )
            return LlavaNextVideoForConditionalGeneration, config
        case "llava_onevision":
            vision = _vision_config(SiglipVisionConfig, CROP, vision_use_head=False)
            config = LlavaOnevisionConfig(
                vision_config=vision, video_token_id=video_id, **crops, **common
            )
            return LlavaOnevisionForConditionalGeneration, config
        case "video_llava":
            config = VideoLlavaConfig(vision_config=clip(square), video_token_id=video_id, **common)
            return VideoLlavaForConditionalGeneration, config
        case "internvl" | "internvl_qwen3":
            merged = {name: [size, size] for name, size in merged.items()}
            config = InternVLConfig(
                vision_config=_encoder(InternVLVisionConfig, **merged), **common
            )
            return InternVLForConditionalGeneration, config
        case "qianfan_ocr":
            vision = _encoder(QianfanOCRVisionConfig, drop_path_rate=0.0, **merged)
            config = QianfanOCRConfig(vision_config=vision, **common)
            return QianfanOCRForConditionalGeneration, config
        case "mistral3":
            vision = _encoder(PixtralVisionConfig, **merged)
            config = Mistral3Config(vision_config=vision, spatial_merge_size=2, **common)
            return Mistral3ForConditionalGeneration, config
        case "lighton_ocr":
            vision = _encoder(PixtralVisionConfig, **merged)
            config = LightOnOcrConfig(vision_config=vision, spatial_merge_size=2, **common)
            return LightOnOcrForConditionalGeneration, config
        case "idefics2":
            resampler = Idefics2PerceiverConfig(
                hidden_size=common["text_config"].hidden_size,
                resampler_n_latents=side**2,
                resampler_depth=1,
                resampler_n_heads=2,
                resampler_head_dim=8,
                num_key_value_heads=1,
            )
            vision = _encoder(Idefics2VisionConfig, **merged)
            config = Idefics2Config(vision_config=vision, perceiver_config=resampler, **common)
            return Idefics2ForConditionalGeneration, config
        case "idefics3":
            vision = _encoder(Idefics3VisionConfig, **merged)
            config = Idefics3Config(
                vision_config=vision, scale_factor=2, pad_token_id=PAD_ID, **common
            )
            return Idefics3ForConditionalGeneration, config
        case "smolvlm":
            vision = _encoder(SmolVLMVisionConfig, **merged)
            config = SmolVLMConfig(
                vision_config=vision, scale_factor=2, pad_token_id=PAD_ID, **common
            )
            return SmolVLMForConditionalGeneration, config
        case "got_ocr2":
            vision = _encoder(
                GotOcr2VisionConfig,
                image_size=4 * square,
                patch_size=PATCH,
                mlp_dim=24,
                output_channels=8,
                window_size=2,
                global_attn_indexes=[1],
            )
            config = GotOcr2Config(vision_config=vision, **common)
            return GotOcr2ForConditionalGeneration, config
        case "deepseek_vl":
            vision = _vision_config(SiglipVisionConfig, square, vision_use_head=False)
            config = DeepseekVLConfig(vision_config=vision, **common)
            return DeepseekVLForConditionalGeneration, config
        case "deepseek_vl_hybrid":
            vision = _vision_config(SiglipVisionConfig, square, vision_use_head=False)
            finer = _encoder(
                SamVisionConfig,
                image_size=FINER * square,
                patch_size=PATCH,
                mlp_dim=24,
                output_channels=8,
                window_size=2,
                global_attn_indexes=[0],
            )
            config = DeepseekVLHybridConfig(
                vision_config=vision, high_res_vision_config=finer, **common
            )
            return DeepseekVLHybridForConditionalGeneration, config
        case "janus":
            return JanusForConditionalGeneration, _janus(square, common)
        case "ovis2":
            words = common["text_config"]
            vision = _encoder(Ovis2VisionConfig, hidden_stride=2, vocab_size=24, **merged)
            config = Ovis2Config(
                vision_config=vision,
                hidden_size=words.hidden_size,
                vocab_size=words.vocab_size,
                # of tokens around images, which have embeddings of their own; before others' own
                visual_indicator_token_ids=list(range(video_id - 8, video_id - 3)),
                **common,
            )
            return Ovis2ForConditionalGeneration, config
        case "fast_vlm":
            # A stand-in for timm's, which leaves rows and columns of patches apart as well.
            vision = ConvNextConfig(
                num_stages=1,
                depths=[2],
                hidden_sizes=[16],
                hidden_size=16,
                image_size=square,
                patch_size=PATCH,
            )
            config = FastVlmConfig(vision_config=vision, image_seq_length=side**2, **common)
            return FastVlmForConditionalGeneration, config
        case "perception_lm":
            # Another one: whatever gives a row for each patch, behind one for them all.
            vision = clip(
                2 * square, model_args={"embed_dim": 16, "ref_feat_shape": [2 * side] * 2}
            )
            config = PerceptionLMConfig(
                vision_config=vision, projector_pooling_ratio=2, video_token_id=video_id, **common
            )
            return PerceptionLMForConditionalGeneration, config
        case "video_llama_3":
            vision = _encoder(VideoLlama3VisionConfig, patch_size=PATCH)
            config = VideoLlama3Config(vision_config=vision, video_token_id=video_id, **common)
            return VideoLlama3ForConditionalGeneration, config
        case "qwen2_vl" | "qwen2_5_vl" | "qwen3_vl":
            return _qwen_vl(kind, video_id, common)


def _janus(square: int, common: dict[str, Any]) -> JanusConfig:
    """With what makes images as well, as small as it can be."""
    width = common["text_config"].hidden_size
    rows = (square // PATCH) ** 2
    vision = _vision_config(
        JanusVisionConfig, square, projection_dim=width, depth=1, num_image_tokens=rows
    )
    makes = JanusVQVAEConfig(
        embed_dim=4,
        num_embeddings=8,
        latent_channels=32,
        base_channels=32,
        channel_multiplier=[1],
        num_res_blocks=1,
        projection_dim=width,
        image_token_embed_dim=width,
    )
    return JanusConfig(vision_config=vision, vq_config=makes, **common)


def _qwen_vl(kind: str, video_id: int, common: dict[str, Any]) -> tuple[Any, Any]:
    """Images of any size; two frames of a video, or an image twice, are one."""
    sees = {"depth": 2, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": 2}
    width = common["text_config"]["hidden_size"]
    if kind == "qwen2_vl":
        vision: Any = {**sees, "embed_dim": 16, "mlp_ratio": 2, "hidden_size": width}
        model_class, config_class = Qwen2VLForConditionalGeneration, Qwen2VLConfig
    elif kind == "qwen3_vl":  # features of both encoder layers enter the decoder, at its first two
        vision = {**sees, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": width}
        vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
        model_class, config_class = Qwen3VLForConditionalGeneration, Qwen3VLConfig  # type: ignore[assignment]
    else:
        vision = {**sees, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": width}
        vision |= {"window_size": 4 * PATCH, "fullatt_block_indexes": [1], "tokens_per_second": 2}
        model_class, config_class = Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig  # type: ignore[assignment]
    ends = {"vision_start_token_id": video_id - 1, "vision_end_token_id": video_id - 2}
    return model_class, config_class(
        vision_config=vision, video_token_id=video_id, **ends, **common
    )


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
    return build_model(LlamaForCausalLM, config, seed, dtype)


def tiny_text_only(
    family: Literal["mistral", "qwen2", "qwen3", "granite"], seed: int = 0
) -> PreTrainedModel:
    """A text-only model of another family in evaluation mode."""
    model_class = {
        "mistral": MistralForCausalLM,
        "qwen2": Qwen2ForCausalLM,
        "qwen3": Qwen3ForCausalLM,
        "granite": GraniteForCausalLM,
    }[family]
    config = _text_config(
        family, heads=4, kv_heads=2, depth=4, hidden=32, ffn=48, vocab=64, tied=False
    )
    return build_model(model_class, config, seed, torch.float32)


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
    return build_model(OPTForCausalLM, config, seed, dtype)


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
    if family == "granite":
        common |= {"attention_bias": attention_bias, "mlp_bias": mlp_bias}
        return GraniteConfig(head_dim=head_dim, **MULTIPLIERS, **common)
    if family == "qwen3":
        return Qwen3Config(head_dim=head_dim, attention_bias=attention_bias, **common)
    if family == "qwen3_vl_text":
        turns = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
        turns |= {"mrope_interleaved": True}
        common |= {"head_dim": head_dim, "attention_bias": attention_bias}
        return {"model_type": family, "rope_parameters": turns, **common}
    if family in ("qwen2_vl_text", "qwen2_5_vl_text"):
        eighth = hidden // heads // 8
        sections = [2 * eighth, eighth, eighth]
        turns = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
        return {"model_type": family, "rope_parameters": turns, **common}
    return Qwen2Config(use_sliding_window=False, **common)


def _vision_config(config_class: Any, image_size: int, **options: Any) -> Any:
    return _encoder(config_class, image_size=image_size, patch_size=PATCH, **options)


def _encoder(config_class: Any, **options: Any) -> Any:
    return config_class(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        **options,
    )


def build_model(model_class: Any, config: Any, seed: int, dtype: torch.dtype) -> PreTrainedModel:
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
