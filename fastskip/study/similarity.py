"""How little each layer changes a row: the cosine between its input and output, by token class.

High similarity makes a layer a candidate for skipping; "Implicit Multimodal Alignment" (arXiv
2405.16700) finds that image rows change slowly from layer to layer, text rows faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, pad

from fastskip.families import image_token_ids, placeholders, text_model_of
from fastskip.policy import TokenClass
from fastskip.study.calls import end_tokens, in_answers, placed
from fastskip.tokens import CODES, PAD


class SimilarityError(ValueError):
    """Hidden states cannot be compared."""


@dataclass(frozen=True, slots=True)
class LayerSimilarity:
    """Mean cosines over the rows of one class in one layer.

    `block`: between the layer's input and output; `attention`: between its input and the residual
    stream after attention; `ffn`: between that and the output. `rows`: the number of rows averaged.
    """

    layer: int
    token_class: TokenClass
    rows: int
    block: float
    attention: float
    ffn: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "token_class": self.token_class.value}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> LayerSimilarity:
        """What `to_dict` gave."""
        return cls(**{**document, "token_class": TokenClass(document["token_class"])})


def similarities(
    model: Any,
    samples: Sequence[Mapping[str, Any]],
    *,
    new_tokens: int = 16,
    on_sample: Callable[[], object] = lambda: None,
) -> tuple[LayerSimilarity, ...]:
    """Similarities by layer and class, over the samples' prompts and the model's own answers.

    Args:
        model: an unmodified Hugging Face model, since hooks must see its layers run one by one.
        samples: inputs of `generate`, each as returned by `processor(...)`.
        new_tokens: how many tokens each sample generates; with 0 there are no generated rows.
        on_sample: called after each sample.
    Raises:
        TypeError: the model was prepared by fastskip.
        ValueError: there are no samples, or `new_tokens` is negative.
        SimilarityError: the model overflows.
    """
    if getattr(model, "_fastskip", None) is not None:
        raise TypeError("model: is prepared by fastskip; allowed: a plain Hugging Face model")
    if not samples or new_tokens < 0:
        raise ValueError(
            f"samples: {len(samples)}, new_tokens: {new_tokens}; allowed: 1 or more samples, and "
            "new_tokens of 0 or more"
        )
    layers = list(text_model_of(model).layers)
    # sums of cosines [layers, classes, (block, attention, ffn)], and row counts per class
    sums = torch.zeros(len(layers), len(TokenClass), 3, dtype=torch.float64)
    counts = torch.zeros(len(TokenClass), dtype=torch.int64)
    for inputs in samples:
        codes, given = _with_answer(model, placed(inputs, model), new_tokens)
        real = codes != PAD
        counts += torch.bincount(codes[real], minlength=len(TokenClass))
        with torch.inference_mode(), _seen(layers) as seen:
            model(**given)
        for index, cosines in seen.items():
            sums[index].index_add_(0, codes[real], cosines.cpu().double()[real])
        on_sample()
    for index, own in enumerate(sums):
        if not own.isfinite().all():
            allowed = "a dtype in which the model does not overflow, such as float32"
            raise SimilarityError(
                f"layer {index}: hidden states are not finite in {model.dtype}; allowed: {allowed}"
            )
    return tuple(
        LayerSimilarity(index, token_class, int(counts[code]), *means.tolist())
        for token_class, code in CODES.items()
        if counts[code]
        for index, means in enumerate(sums[:, code] / counts[code])
    )


def _with_answer(
    model: Any, inputs: dict[str, Any], new_tokens: int
) -> tuple[Tensor, dict[str, Any]]:
    """The class codes of prompt and answer together, `[B, T]` on the host, and their inputs."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    images = placeholders(model.config, ids)
    codes = torch.where(images, CODES[TokenClass.IMAGE], CODES[TokenClass.TEXT])
    codes = codes.masked_fill(mask == 0, PAD)
    if new_tokens:
        # An answer that contains a placeholder could not be fed back: no image would fill it.
        known = model.generation_config.suppress_tokens or ()
        never = [*known, *image_token_ids(model.config)] or None
        out = model.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            max_new_tokens=new_tokens,
            suppress_tokens=never,
        )
        new = out[:, ids.shape[1] :]
        alive = in_answers(new, end_tokens(model))
        own = torch.where(alive, CODES[TokenClass.GENERATED], PAD)
        ids, mask = out, torch.cat([mask, alive.to(mask.dtype)], 1)
        codes = torch.cat([codes, own], 1)
    # Per-token inputs, such as token types, are padded over the answer.
    per_token = {
        name: pad(value, (0, ids.shape[1] - value.shape[1]))
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.shape == inputs["input_ids"].shape
    }
    return codes.cpu(), {**inputs, **per_token, "input_ids": ids, "attention_mask": mask}


@contextmanager
def _seen(layers: Sequence[Any]) -> Iterator[dict[int, Tensor]]:
    """Within the block, collect the cosines `[B, T, (block, attention, ffn)]` of each layer run."""
    added: dict[int, Tensor] = {}
    found: dict[int, Tensor] = {}

    def attended(index: int, output: Any) -> None:
        added[index] = output[0] if isinstance(output, tuple) else output

    def left(index: int, h: Tensor, output: Any) -> None:
        out = (output[0] if isinstance(output, tuple) else output).float()
        h, middle = h.float(), h.float() + added.pop(index).float()
        pairs = ((h, out), (h, middle), (middle, out))
        found[index] = torch.stack([cosine_similarity(a, b, dim=-1) for a, b in pairs], -1)

    hooks: list[Any] = []
    for index, layer in enumerate(layers):
        hooks += (
            layer.self_attn.register_forward_hook(
                lambda _, __, output, index=index: attended(index, output)
            ),
            layer.register_forward_hook(
                lambda _, args, kwargs, output, index=index: left(
                    index, args[0] if args else kwargs["hidden_states"], output
                ),
                with_kwargs=True,
            ),
        )
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
