"""The private Hugging Face names that the prepared classes override or call."""

import inspect

import pytest
import transformers
from transformers import GenerationMixin

PINNED = {
    "_sample": (
        "self input_ids logits_processor stopping_criteria generation_config synced_gpus=False "
        "streamer=None **model_kwargs"
    ),
    "_prefill": "self input_ids generation_config model_kwargs is_first_iteration=True",
    "_prepare_cache_for_generation": (
        "self generation_config model_kwargs generation_mode batch_size max_cache_length"
    ),
    "_maybe_prepare_encoder_kwargs_for_generation": (
        "self inputs_tensor model_kwargs model_input_name generation_config"
    ),
}
LATER = ("_maybe_prepare_encoder_kwargs_for_generation",)
"""What the oldest supported transformers does not have."""


@pytest.mark.parametrize("name", PINNED)
def test_signature(name: str) -> None:
    advice = (
        f"transformers {transformers.__version__} has another GenerationMixin.{name}: compare its "
        "body with fastskip/generation/loop.py and prepared.py, run tests/generation, then "
        "pin the new signature here"
    )
    method = getattr(GenerationMixin, name, None)
    if method is None and name in LATER:
        assert transformers.__version__.startswith("5.17."), advice
        return
    assert method is not None, advice
    written = []
    for parameter in inspect.signature(method).parameters.values():
        default = "" if parameter.default is parameter.empty else f"={parameter.default}"
        mark = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        written.append(f"{mark}{parameter.name}{default}")
    assert " ".join(written) == PINNED[name], advice


def test_private_attributes_of_a_generation_config() -> None:
    """`_sample` gets pad and stop tokens as tensors that `generate` has put there."""
    source = inspect.getsource(GenerationMixin._sample)
    assert "generation_config._pad_token_tensor" in source
    assert 'hasattr(criteria, "eos_token_id")' in source
    source = inspect.getsource(GenerationMixin._prepare_special_tokens)
    assert "generation_config._eos_token_tensor" in source
    assert "pad_token_tensor = eos_token_tensor[0]" in source  # where there is none of its own
