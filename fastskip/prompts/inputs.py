"""Turns text and images into model inputs with the checkpoint's own chat template and processor.

Checks what Hugging Face's processors accept silently and fail on deep inside the model:
placeholders that do not match the images, empty prompts, more tokens than positions.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from os import PathLike, fspath
from typing import Any

from PIL.Image import Image

from fastskip.prompts.conversations import PLACEHOLDER

_IMAGE_ONLY = {
    "llava_next_video": "LlavaNextProcessor",
    "llava_onevision": "LlavaOnevisionProcessor",
    "internvl": "InternVLProcessor",
    "smolvlm": "Idefics3Processor",
    "video_llama_3": "VideoLlama3Processor",
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
}
"""By model type: a processor that handles images as the model's own does, without torchvision."""


_BETWEEN_ENDS = ("Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor")
"""Processors of families that enclose images in two tokens."""
_OWN_PROMPTS = ("GotOcr2Processor",)
"""Processors that write the whole prompt themselves, from what to read and how."""


class PromptError(ValueError):
    """A prompt that the model cannot take; says what is wrong and what is allowed."""


def processor_for(model: str | PathLike[str]) -> Any:
    """The processor of a local folder or hub checkpoint; of a text-only model, its tokenizer."""
    from transformers import AutoConfig, AutoProcessor

    name = fspath(model)
    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type in _IMAGE_ONLY and find_spec("torchvision") is None:
            processor = image_only(config.model_type).from_pretrained(name)
        else:
            processor = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        allowed = "a folder or hub checkpoint with config, tokenizer and image processor"
        raise PromptError(f"processor of {name!r}: {reason}; allowed: {allowed}") from error
    if getattr(processor, "patch_size", 0) is None:
        # saved before processors expanded image tokens; the model's config has what that takes
        processor.patch_size = config.vision_config.patch_size
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        has_class_token = config.vision_config.model_type == "clip_vision_model"
        processor.num_additional_image_tokens = int(has_class_token)
    return processor


def build_inputs(
    processor: Any,
    text: str,
    images: Sequence[Image] = (),
    *,
    config: Any = None,
    max_new_tokens: int = 0,
) -> Any:
    """The inputs of one user turn: token ids, attention mask and pixels, as a `BatchFeature`.

    Put one `<image>` per image into `text` to place them, or none: images then come first. Without
    a chat template the turn is "USER: <image>\\n{text} ASSISTANT:", as LLaVA-1.5 was trained; a
    text-only model gets the bare text. If the model's `config` is given, prompt and
    `max_new_tokens` must fit into its positions.
    """
    return build_batch(processor, [text], [images], config=config, max_new_tokens=max_new_tokens)


def build_batch(
    processor: Any,
    texts: Sequence[str],
    images: Sequence[Sequence[Image]],
    *,
    config: Any = None,
    max_new_tokens: int = 0,
) -> Any:
    """The inputs of several prompts of one user turn each, as `build_inputs` makes one.

    Shorter prompts are padded on the left, so that `generate` continues from the last column.
    Either all prompts have images or none does.
    """
    check_writable(processor)
    prompts = [_render(processor, *each) for each in zip(texts, map(len, images), strict=True)]
    return encode_prompts(processor, prompts, images, config=config, max_new_tokens=max_new_tokens)


def encode_prompts(
    processor: Any,
    prompts: Sequence[str],
    images: Sequence[Sequence[Image]],
    *,
    config: Any = None,
    max_new_tokens: int = 0,
) -> Any:
    """As `build_batch`, from fully rendered prompts that hold a placeholder for each image."""
    if len({bool(own) for own in images}) > 1:
        raise PromptError("images: some prompts have none; allowed: images in all or in none")
    tokenizer = getattr(processor, "tokenizer", processor)
    if len(prompts) > 1 and tokenizer.pad_token is None:
        raise PromptError(f"prompts: {len(prompts)}; allowed: 1, as the tokenizer has no pad token")
    begin = tokenizer.bos_token
    inputs = processor(
        text=prompts,
        # nested: which images share a prompt decides how anyres models crop them
        **({"images": [list(own) for own in images]} if any(images) else {}),
        **({"padding": True, "padding_side": "left"} if len(prompts) > 1 else {}),
        add_special_tokens=not (begin and prompts[0].startswith(begin)),
        return_tensors="pt",
    )
    if config is not None:
        _check_length(inputs, config, max_new_tokens)
    return inputs


def image_only(model_type: str) -> Any:
    """An image-only processor class for a family that also takes videos: its video processor needs
    torchvision, which images do not."""
    import transformers

    base: Any = getattr(transformers, _IMAGE_ONLY[model_type])

    class ImageOnly(base):  # type: ignore[misc]
        @classmethod
        def get_attributes(cls) -> list[str]:
            return ["image_processor", "tokenizer"]

    ImageOnly.__name__ = base.__name__  # saved with the processor, which is loaded by this name
    return ImageOnly


def _render(processor: Any, text: str, images: int) -> str:
    """The whole prompt, with one placeholder for each image."""
    check_text(text)
    if not hasattr(processor, "image_processor"):
        if images:
            raise PromptError(f"images: got {images}; allowed: none, this is a text-only model")
        return _apply_template(processor, text) if processor.chat_template else text
    token = placeholder_of(processor)
    if not text.replace(PLACEHOLDER, "").replace(token, "").strip():
        raise PromptError(f"prompt: got {text!r}; allowed: words besides the placeholders")
    text = text.replace(PLACEHOLDER, image_in_text(processor))
    placed = text.count(token)
    if placed not in (0, images):
        raise PromptError(
            f"prompt: {placed} {token} for {images} images; allowed: one {token} per image, or "
            "none (images then come first)"
        )
    if (video := getattr(processor, "video_token", None)) and video in text:
        raise PromptError(f"prompt: contains {video}; allowed: text and images only")
    ahead = 0 if placed else images
    if not processor.chat_template:
        return "USER: " + f"{image_in_text(processor)}\n" * ahead + f"{text} ASSISTANT:"
    prompt = _apply_template(
        processor, [{"type": "image"}] * ahead + [{"type": "text", "text": text}]
    )
    if prompt.count(token) != images:
        raise PromptError(
            f"chat template: writes {prompt.count(token)} {token} for {images} images; allowed: "
            f"one each (place every {token} in the text yourself)"
        )
    return prompt


def placeholder_of(processor: Any) -> str:
    """What stands for an image in a text: its token, or a word that the processor replaces."""
    return str(getattr(processor, "image_placeholder_token", processor.image_token))


def lead_of(processor: Any) -> str:
    """What a processor writes ahead of every text that it is given: Janus's, its system prompt."""
    if not getattr(processor, "use_default_system_prompt", False):
        return ""
    from transformers.models.janus.processing_janus import DEFAULT_SYSTEM_PROMPT

    return str(DEFAULT_SYSTEM_PROMPT)


def image_in_text(processor: Any) -> str:
    """The placeholder of an image within a text, in some families with the two tokens that their
    chat templates write around it."""
    token = placeholder_of(processor)
    has_ends = type(processor).__name__ in _BETWEEN_ENDS
    return f"<|vision_start|>{token}<|vision_end|>" if has_ends else token


def _apply_template(processor: Any, content: Any) -> str:
    turn = [{"role": "user", "content": content}]
    try:
        return str(processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))
    # a template is code by the checkpoint's author: it can fail in any way
    except Exception as error:
        allowed = "one that accepts a user turn (processor.chat_template = None for LLaVA-1.5's)"
        raise PromptError(f"chat template: {error}; allowed: {allowed}") from error


def check_writable(processor: Any) -> None:
    """Raises `PromptError` if the processor writes whole prompts itself."""
    name = type(processor).__name__
    if name in _OWN_PROMPTS:
        allowed = "calling it yourself and passing its output to model.generate"
        raise PromptError(f"processor: {name} writes its own prompts; allowed: {allowed}")


def check_text(text: str) -> None:
    """Raises `PromptError` for a text that is empty or not valid Unicode."""
    if not text.strip():
        raise PromptError(f"prompt: got {text!r}; allowed: non-empty text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"prompt: {error}; allowed: Unicode text") from error


def _check_length(inputs: Any, config: Any, max_new_tokens: int) -> None:
    limit = config.get_text_config().max_position_embeddings
    ids = inputs["input_ids"]
    wanted = ids.shape[-1] + max_new_tokens
    if wanted > limit:
        visual = int((ids == getattr(config, "image_token_id", -1)).sum(-1).max())
        raise PromptError(
            f"prompt: {ids.shape[-1]} tokens ({visual} of images) + {max_new_tokens} new = "
            f"{wanted}; allowed: at most {limit} positions (shorten the text, or use fewer images "
            "or new tokens)"
        )
