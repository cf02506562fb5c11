"""Random batches for the tiny models, with the class of every position known by construction."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from fastskip.verification.cells import IMAGE, TEXT
from tests.models import CROP, FINER, PAD_ID

IMAGE_SIZES = ((8, 8), (7, 13), (16, 16), (12, 30), (20, 9))
"""Heights and widths to draw from where images come in crops."""
BY_PROMPT = ("idefics2", "idefics3", "smolvlm")
"""Families that take `[batch, images, 3, height, width]`, blank images behind."""
UNCUT = "pixtral"
"""The vision tower that takes images as they are, in the corner of a square."""
UNCUT_SIZES = ((16, 16), (8, 16), (16, 8))
"""The same of these."""
BY_PATCHES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Families that take images as rows of patches, `[patches, pixels]`, and how many lie where; rows
turn by where they lie."""
PATCHED = (*BY_PATCHES, "video_llama_3")
"""All families that take images so."""
GRIDS = ((2, 2), (2, 4), (6, 2), (4, 4))
"""Patches of theirs along height and width."""
MERGE = 2
"""How many of these, each way, become one row."""
BY_TWO = "deepseek_vl_hybrid"
"""The family with two encoders, of which one takes the same images in more pixels."""


@dataclass(frozen=True)
class Batch:
    """Prompts for one model, padded to a common length."""

    input_ids: Tensor
    """[batch, columns]"""
    attention_mask: Tensor
    """[batch, columns], 1 on real rows"""
    token_classes: Tensor
    """[batch, columns]; TEXT on pads"""
    images: tuple[tuple[Tensor, tuple[int, int]], ...] = ()
    """All images in the order of their placeholders: pixels ([crops,] 3, height, width), size."""
    image_counts: tuple[int, ...] = ()
    """Number of images of each prompt."""
    sized: bool = False
    """Whether the model wants to know image sizes."""
    model_type: str = "llava"

    @property
    def size(self) -> int:
        return len(self.input_ids)

    @property
    def columns(self) -> int:
        return self.input_ids.shape[1]

    @property
    def real(self) -> Tensor:
        """[batch, columns] boolean: rows that are no pads."""
        return self.attention_mask.bool()

    def inputs(self, device: str = "cpu") -> dict[str, Any]:
        """What the model's `forward` and `generate` take."""
        inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        pixels = [pixels for pixels, _ in self.images]
        if self.model_type in BY_PATCHES:
            inputs["mm_token_type_ids"] = (self.token_classes == IMAGE).long()
        if self.images and self.model_type in PATCHED:
            inputs["pixel_values"] = torch.cat(pixels)
            inputs["image_grid_thw"] = torch.tensor([(1, *size) for _, size in self.images])
            if self.model_type not in BY_PATCHES:
                inputs["image_merge_sizes"] = torch.full((len(pixels),), MERGE)
        elif self.images and self.model_type in BY_PROMPT:
            of_prompts = torch.stack(pixels).split(self.image_counts)
            inputs["pixel_values"] = _padded(of_prompts)
        elif self.images:
            # Crops are padded to a common number; without crops there is nothing to pad.
            name = "pixel_values_images" if self.model_type == "video_llava" else "pixel_values"
            inputs[name] = _padded(pixels)
        if self.images and self.sized:
            inputs["image_sizes"] = torch.tensor([size for _, size in self.images])
        if self.images and self.model_type == BY_TWO:
            inputs["high_res_pixel_values"] = _finer(inputs["pixel_values"])
        return {name: value.to(device) for name, value in inputs.items()}

    def alone(self, index: int) -> "Batch":
        """One prompt of the batch by itself, without pads."""
        real, first = self.real[index], sum(self.image_counts[:index])
        count = self.image_counts[index]
        return replace(
            self,
            input_ids=self.input_ids[index, real][None],
            attention_mask=self.attention_mask[index, real][None],
            token_classes=self.token_classes[index, real][None],
            images=self.images[first : first + count],
            image_counts=(count,),
        )


def random_batch(
    model: PreTrainedModel,
    seed: int = 0,
    *,
    images: Sequence[int] = (1, 1),
    text: tuple[int, int] = (3, 8),
    padding: Literal["left", "right"] = "left",
    extra_columns: int = 0,
) -> Batch:
    """Draw one prompt for each entry of `images`, which gives its number of images.

    `text` bounds the number of text tokens of a prompt. Images lie anywhere in it: first, last,
    next to each other. Prompts are ragged and padded on one side, by `extra_columns` more than
    the longest needs. A text-only model takes `images=(0, 0)` and the like.
    """
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    image_id: int = getattr(config, "image_token_id", -1)
    if image_id < 0 and any(images):
        raise ValueError(f"images: got {tuple(images)}, allowed for a text-only model: zeros")
    vocab = config.get_text_config().vocab_size
    drawn: list[tuple[Tensor, tuple[int, int]]] = []
    prompts = []
    for count in images:
        length = _integer(generator, *text)
        # The two ids at the end are reserved for images and videos, the first is the pad.
        ids = torch.randint(PAD_ID + 1, vocab - 2, (length,), generator=generator).tolist()
        places = sorted(_integer(generator, 0, length) for _ in range(count))
        for place in reversed(places):
            ids[place:place] = [-1]
        prompt: list[int] = []
        for token in ids:
            if token >= 0:
                prompt.append(token)
                continue
            drawn.append(_random_image(config, generator))
            rows = [image_id] * _placeholders(model, drawn[-1])
            if config.model_type in BY_PATCHES:  # which tell images apart by what is between them
                rows = [config.vision_start_token_id, *rows, config.vision_end_token_id]
            prompt += rows
        prompts.append(prompt)
    columns = max(len(prompt) for prompt in prompts) + extra_columns
    input_ids = torch.full((len(prompts), columns), PAD_ID)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        start = columns - len(prompt) if padding == "left" else 0
        input_ids[row, start : start + len(prompt)] = torch.tensor(prompt)
        attention_mask[row, start : start + len(prompt)] = 1
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        token_classes=torch.where(input_ids == image_id, IMAGE, TEXT),
        images=tuple(drawn),
        image_counts=tuple(images),
        sized=_sized(config),
        model_type=config.model_type,
    )


def _padded(tensors: Sequence[Tensor]) -> Tensor:
    """`[n, ...]` each -> `[len(tensors), most, ...]`, zeros behind."""
    most = max(map(len, tensors))
    return torch.stack([torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])]) for x in tensors])


def _finer(pixels: Tensor) -> Tensor:
    """The same images, mirrored so that no encoder passes for the other."""
    return pixels.flip(-1).repeat_interleave(FINER, -1).repeat_interleave(FINER, -2)


def _integer(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def _sized(config: Any) -> bool:
    vision = getattr(config, "vision_config", None)
    return hasattr(config, "image_grid_pinpoints") or getattr(vision, "model_type", None) == UNCUT


def _random_image(config: Any, generator: torch.Generator) -> tuple[Tensor, tuple[int, int]]:
    if hasattr(config, "image_grid_pinpoints"):
        size = IMAGE_SIZES[_integer(generator, 0, len(IMAGE_SIZES) - 1)]
        crops = image_size_to_num_patches(size, config.image_grid_pinpoints, CROP)
        return torch.randn(crops, 3, CROP, CROP, generator=generator), size
    if config.model_type in PATCHED:
        grid = GRIDS[_integer(generator, 0, len(GRIDS) - 1)]
        vision = config.vision_config
        depth = 3 * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
        return torch.randn(grid[0] * grid[1], depth, generator=generator), grid
    side = config.vision_config.image_size
    side = side if isinstance(side, int) else side[0]
    pixels, size = torch.randn(3, side, side, generator=generator), (side, side)
    if config.model_type == "perception_lm":
        return pixels[None], size  # of as many tiles in every image of a batch
    if _sized(config):
        size = UNCUT_SIZES[_integer(generator, 0, len(UNCUT_SIZES) - 1)]
        pixels[:, size[0] :], pixels[:, :, size[1] :] = 0, 0
    return pixels, size


@torch.no_grad()
def _placeholders(model: Any, image: tuple[Tensor, tuple[int, int]]) -> int:
    """Ask the model how many features the image becomes."""
    pixels, size = image
    if model.config.model_type in PATCHED:
        return size[0] * size[1] // MERGE**2
    more = {"image_sizes": torch.tensor([size])} if _sized(model.config) else {}
    pixels = pixels[None, None] if model.config.model_type in BY_PROMPT else pixels[None]
    pixels = pixels.to(next(model.parameters()).dtype)
    if model.config.model_type == BY_TWO:
        more["high_res_pixel_values"] = _finer(pixels)
    features = model.model.get_image_features(pixels, **more).pooler_output
    return sum(own.numel() // own.shape[-1] for own in features)
