"""The model `fastskip` for lmms-eval, which finds it through the package's entry point.

lmms-eval --model fastskip --model_args pretrained=llava-hf/llava-1.5-7b-hf,policy=image_ffn ...
"""

from typing import Any


def manifest() -> Any:
    """The model's name and class path, for lmms-eval's model registry."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="fastskip", chat_class_path="fastskip.integrations.lmms_eval.model.FastSkip"
    )
