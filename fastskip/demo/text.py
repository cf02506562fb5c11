"""The demo's text: a word-level tokenizer, the chat template, the processor.

The prompt is that of LLaVA-1.5: "USER: <image>\\nis there a circle? ASSISTANT: yes</s>".
"""

from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fastskip.demo.scenes import COLOURS, IMAGE_SIZE, SHAPES
from fastskip.demo.scenes.questions import NUMBERS

PATCH = 8
IMAGE_TOKENS = (IMAGE_SIZE // PATCH) ** 2
IMAGE_MEAN = (0.25, 0.25, 0.25)
IMAGE_STD = (0.25, 0.25, 0.25)

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
USER, ASSISTANT = "USER:", "ASSISTANT:"
WORDS = (
    *COLOURS,
    *SHAPES,
    *(f"{shape}s" for shape in SHAPES if shape != "cross"),
    "crosses",
    "object",
    "objects",
    *NUMBERS,
    *("yes", "no", "what", "colour", "shape", "is", "the", "a", "how", "many", "are", "there"),
    *("left", "right", "of", "above", "below", "where", "row", "column", "and", "describe"),
    *("image", "?", "."),
)

# without the bos token, which the tokenizer adds
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}ASSISTANT: {% else %}USER: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; case does not matter, "color" is "colour", other words are `<unk>`."""
    words = dict.fromkeys((*SPECIAL, USER, ASSISTANT, *WORDS))
    tokenizer = Tokenizer(
        WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace("color", "colour")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    # matched before the normaliser, which would lowercase the speakers
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in (USER, ASSISTANT)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def build_processor() -> LlavaProcessor:
    """Tokenizer and image processor, the variant that needs no torchvision."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size=size,
            crop_size=size,
            do_center_crop=False,
            image_mean=list(IMAGE_MEAN),
            image_std=list(IMAGE_STD),
        ),
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )
