"""Text and images as model inputs: checked files, conversations, chat templates."""

from fastskip.prompts.inputs import (
    PromptError,
    build_batch,
    build_inputs,
    encode_prompts,
    image_only,
    processor_for,
)

__all__ = [
    "PromptError",
    "build_batch",
    "build_inputs",
    "encode_prompts",
    "image_only",
    "processor_for",
]
