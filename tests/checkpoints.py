"""Tiny checkpoints on disk, laid out as those of the hub: weights, config, tokenizer, processor."""

import json
import string
from pathlib import Path
from typing import Any, Literal

import transformers
from tokenizers import Tokenizer, decoders, models, processors
from transformers import (
    DeepseekVLHybridProcessor,
    DeepseekVLProcessor,
    GotOcr2Processor,
    Idefics2Processor,
    Idefics3Processor,
    JanusProcessor,
    LightOnOcrProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    Ovis2Processor,
    PreTrainedTokenizerFast,
    QianfanOCRProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import (
    DeepseekVLImageProcessorPil,
)
from transformers.models.deepseek_vl_hybrid.image_processing_pil_deepseek_vl_hybrid import (
    DeepseekVLHybridImageProcessorPil,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.video_llama_3.image_processing_pil_video_llama_3 import (
    VideoLlama3ImageProcessorPil,
)

from fastskip.prompts import image_only
from tests.batches import random_batch
from tests.models import (
    CROP,
    FINER,
    LLAVA_KINDS,
    PATCH,
    PINPOINTS,
    RELATIVES,
    Kind,
    tiny_llama,
    tiny_llava,
    tiny_opt,
)

VOCAB = 128
IMAGE_ID, VIDEO_ID = VOCAB - 1, VOCAB - 2
VIDEO_PROCESSORS = {
    "llava_onevision": "LlavaOnevisionVideoProcessor",
    "internvl": "InternVLVideoProcessor",
    "internvl_qwen3": "InternVLVideoProcessor",
    "video_llama_3": "VideoLlama3VideoProcessor",
    "qwen2_vl": "Qwen2VLVideoProcessor",
    "qwen2_5_vl": "Qwen2VLVideoProcessor",
    "qwen3_vl": "Qwen3VLVideoProcessor",
}
NEEDING_TORCHVISION = ("llava_pixtral", "mistral3", "video_llava", "perception_lm")
"""Kinds whose processors do; their checkpoints are saved without."""
OWN_PROMPTS: tuple[Kind, ...] = ("got_ocr2",)
"""Kinds whose processors do not write what they are asked."""
PROCESSED: tuple[Kind, ...] = tuple(
    kind for kind in RELATIVES if kind not in NEEDING_TORCHVISION + OWN_PROMPTS
)
_FROM_PILLOW: dict[Kind, str] = {
    "idefics2": "Idefics2ImageProcessorPil",
    "idefics3": "Idefics3ImageProcessorPil",
    "smolvlm": "SmolVLMImageProcessorPil",
    "ovis2": "Ovis2ImageProcessorPil",
}
"""What the oldest transformers loads with torchvision alone, and has a name for."""
LOADABLE: tuple[Kind, ...] = tuple(
    kind
    for kind in PROCESSED
    if not hasattr(getattr(transformers, _FROM_PILLOW.get(kind, ""), None), "_backends")
)
"""Kinds whose processors can be loaded here."""
AROUND_IMAGES = ("<fake_token_around_image>", "<end_of_utterance>", "<global-img>")
"""Tokens that Idefics 3's processor writes."""
OF_OVIS = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
"""And Ovis 2's, beside one for each row of an image."""
IMAGE_SIZE = 2 * PATCH
"""Images of the tiny `llava` are squares of so many pixels and fill four positions."""

CHAT_TEMPLATE = (
    "{% for message in messages %}USER: "
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def build_tokenizer(video: str = "<video>", image: str = "<image>") -> PreTrainedTokenizerFast:
    """One token a character; the last two ids are `video` and `image`, as `tiny_llava` has."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    tokens = special + list(string.printable[:-2])
    tokens += [f"<{i}>" for i in range(len(tokens), VIDEO_ID - len(OF_OVIS + AROUND_IMAGES))]
    tokens += [*OF_OVIS, *AROUND_IMAGES, video, image]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={
            "video_token": video,
            "image_token": image,
            # the names that InternVL's processor asks for
            "context_image_token": image,
            "start_image_token": AROUND_IMAGES[0],
            "end_image_token": AROUND_IMAGES[0],
            # Janus's
            "boi_token": AROUND_IMAGES[0],
            "eoi_token": AROUND_IMAGES[0],
            # Idefics 2's
            "image_boundary_token": AROUND_IMAGES[0],
            # and LightOnOCR's
            "image_break_token": AROUND_IMAGES[1],
            "image_end_token": AROUND_IMAGES[2],
            **{token.strip("<>").lower(): token for token in OF_OVIS},
        },
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_processor(kind: Kind = "llava", chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """The processor that goes with `tiny_llava(kind, vocab=VOCAB)`."""
    if kind in NEEDING_TORCHVISION:
        raise ValueError(f"kind: got {kind}, allowed: one whose processor needs no torchvision")
    tokenizer = build_tokenizer()
    crop = {"height": CROP, "width": CROP}
    own = {"chat_template": chat_template}
    merged = 2 * IMAGE_SIZE
    match kind:
        case "llava_onevision":
            return image_only(kind)(
                LlavaOnevisionImageProcessorPil(size=crop, image_grid_pinpoints=PINPOINTS),
                tokenizer,
                num_image_tokens=(CROP // PATCH) ** 2,
                vision_feature_select_strategy="full",
                **own,
            )
        case "internvl" | "internvl_qwen3":
            images: Any = GotOcr2ImageProcessorPil(
                size={"height": merged, "width": merged}, max_patches=3
            )
            return image_only("internvl")(images, tokenizer, image_seq_length=4, **own)
        case "qianfan_ocr":
            # In texts an image is a word that is no token.
            tokenizer = build_tokenizer(image="<IMG_CONTEXT>")
            images = GotOcr2ImageProcessorPil(
                size={"height": merged, "width": merged}, max_patches=3
            )
            return QianfanOCRProcessor(images, tokenizer, image_seq_length=4, **own)
        case "lighton_ocr":
            squares = {"patch_size": 2 * PATCH, "size": {"longest_edge": merged}}
            images = PixtralImageProcessorPil(**squares)
            return LightOnOcrProcessor(images, tokenizer, patch_size=PATCH, **own)
        case "got_ocr2":
            tokenizer = build_tokenizer(image="<imgpad>")
            images = GotOcr2ImageProcessorPil(size={"height": 2 * merged, "width": 2 * merged})
            return GotOcr2Processor(images, tokenizer, **own)
        case "ovis2":
            # Of its two placeholders one stands for an image in texts, the other for each row.
            tokenizer = build_tokenizer("<image>", "<IMG_ATOM>")
            crops = {"crop_to_patches": True, "max_patches": 3}
            images = Ovis2ImageProcessorPil(size={"height": merged, "width": merged}, **crops)
            return Ovis2Processor(images, tokenizer, image_seq_length=4, **own)
        case "deepseek_vl":
            images = DeepseekVLImageProcessorPil(
                size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, min_size=PATCH
            )
            return DeepseekVLProcessor(images, tokenizer, num_image_tokens=4, **own)
        case "deepseek_vl_hybrid":
            side, finer = IMAGE_SIZE, FINER * IMAGE_SIZE
            images = DeepseekVLHybridImageProcessorPil(
                size={"height": side, "width": side},
                high_res_size={"height": finer, "width": finer},
                min_size=PATCH,
            )
            return DeepseekVLHybridProcessor(images, tokenizer, num_image_tokens=4, **own)
        case "janus":
            images = JanusImageProcessorPil(
                size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, min_size=PATCH
            )
            return JanusProcessor(images, tokenizer, num_image_tokens=4, **own)
        case "video_llama_3":
            sides = {"shortest_edge": IMAGE_SIZE**2, "longest_edge": merged**2}
            images = VideoLlama3ImageProcessorPil(patch_size=PATCH, size=sides)
            return image_only(kind)(images, tokenizer, **own)
        case "qwen2_vl" | "qwen2_5_vl" | "qwen3_vl":
            sides = {"shortest_edge": merged**2, "longest_edge": 4 * merged**2}
            images = Qwen2VLImageProcessorPil(
                patch_size=PATCH, merge_size=2, temporal_patch_size=2, size=sides
            )
            return image_only(kind)(images, tokenizer, **own)
        case "idefics2":
            edges = {"shortest_edge": IMAGE_SIZE, "longest_edge": merged}
            images = Idefics2ImageProcessorPil(size=edges)
            return Idefics2Processor(images, tokenizer, image_seq_len=4, **own)
        case "idefics3" | "smolvlm":
            edge = {"longest_edge": merged}
            pieces = {"size": {"longest_edge": 2 * merged}, "max_image_size": edge}
            own_class = SmolVLMImageProcessorPil if kind == "smolvlm" else Idefics3ImageProcessorPil
            return Idefics3Processor(own_class(**pieces), tokenizer, image_seq_len=4, **own)
    options = own | {
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    if kind.startswith("llava_next"):
        images = LlavaNextImageProcessorPil(
            size={"shortest_edge": CROP}, crop_size=crop, image_grid_pinpoints=PINPOINTS
        )
        return LlavaNextProcessor(images, tokenizer, **options)
    if kind == "fast_vlm":
        options |= {"vision_feature_select_strategy": "full", "num_additional_image_tokens": 0}
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)
    return LlavaProcessor(images, tokenizer, **options)


def save_checkpoint(
    folder: Path,
    kind: Kind | Literal["llama", "opt"] = "llava",
    *,
    max_shard_size: str = "1GB",
    chat_template: str | None = CHAT_TEMPLATE,
    **options: Any,
) -> Path:
    """Save a tiny model and its processor (its tokenizer if it is text-only) to `folder`.

    A small `max_shard_size` ("20KB") gives several safetensors files and their index; `options` go
    to the model's maker in `tests.models`.
    """
    if kind in LLAVA_KINDS + RELATIVES:
        model = tiny_llava(kind, vocab=VOCAB, **options)
        if kind not in NEEDING_TORCHVISION:
            build_processor(kind, chat_template).save_pretrained(folder)
    else:
        model = (tiny_llama if kind == "llama" else tiny_opt)(vocab=VOCAB, **options)
        build_tokenizer().save_pretrained(folder)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if kind in VIDEO_PROCESSORS:
        # the hub's checkpoints also describe a video processor
        video = {"video_processor_type": VIDEO_PROCESSORS[kind], "size": crop_size()}
        (folder / "video_preprocessor_config.json").write_text(json.dumps(video))
    return folder


def crop_size() -> dict[str, int]:
    return {"height": CROP, "width": CROP}


def answer(model: Any) -> list[list[int]]:
    """The tokens of a greedy answer to a batch of two prompts with images."""
    inputs = random_batch(model, images=(1, 2)).inputs()
    tokens: list[list[int]] = model.generate(**inputs, max_new_tokens=6).tolist()
    return tokens
