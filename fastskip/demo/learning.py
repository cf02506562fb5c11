"""What training steps consist of: losses, accuracies, optimisers."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from fastskip.demo.muon import Muon
from fastskip.demo.packing import IGNORED, IMAGE_COLUMNS, Batch
from fastskip.demo.scenes import COLOURS, GRID, IMAGE_SIZE, SHAPES, QuestionKind, Scene
from fastskip.demo.text import PATCH

ANSWERS = {"colour": len(COLOURS) + 1, "shape": len(SHAPES) + 1, "row": GRID, "column": GRID}
"""What the vision encoder must predict per patch, with the number of classes (colour and shape: 0
means an empty cell)."""


class PatchHeads(nn.ModuleDict):
    """One linear head for each of `ANSWERS`; used only in the first stage."""

    def __init__(self, width: int) -> None:
        super().__init__({name: nn.Linear(width, count) for name, count in ANSWERS.items()})


def patch_answers(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """[B, patches] for each of `ANSWERS`: what the patch's cell holds, and where it lies."""
    side, per_cell = IMAGE_SIZE // PATCH, IMAGE_SIZE // PATCH // GRID
    cells = torch.zeros(2, len(scenes), GRID, GRID, dtype=torch.long)
    for number, scene in enumerate(scenes):
        for figure in scene.figures:
            cells[0, number, figure.row, figure.column] = COLOURS.index(figure.colour) + 1
            cells[1, number, figure.row, figure.column] = SHAPES.index(figure.shape) + 1
    patches = cells.repeat_interleave(per_cell, 2).repeat_interleave(per_cell, 3).flatten(2)
    place = (torch.arange(side) // per_cell).expand(len(scenes), side, side)
    return {
        "colour": patches[0],
        "shape": patches[1],
        "row": place.transpose(1, 2).flatten(1),
        "column": place.flatten(1),
    }


def patch_features(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """[B, 3, 64, 64] -> [B, patches, D]: what `vision_feature_layer=-1`, "default" selects."""
    features: Tensor = model.model.vision_tower(pixels).last_hidden_state[:, 1:]
    return features


def patch_loss(
    model: LlavaForConditionalGeneration, heads: PatchHeads, pixels: Tensor, scenes: Sequence[Scene]
) -> tuple[Tensor, float]:
    """The loss, and the share of patches with all predictions right."""
    features = patch_features(model, pixels)
    loss, right = features.new_zeros(()), torch.ones(features.shape[:2], dtype=torch.bool)
    for name, answers in patch_answers(scenes).items():
        told = heads[name](features)
        loss = loss + functional.cross_entropy(told.flatten(0, 1).float(), answers.flatten())
        right &= told.argmax(-1) == answers
    return loss, right.float().mean().item()


def answer_loss(
    model: LlavaForConditionalGeneration, batch: Batch, train_vision: bool
) -> tuple[Tensor, Tensor]:
    """The loss over answer tokens, and [answer tokens] whether each is the most likely one."""
    inner = model.model
    with torch.set_grad_enabled(train_vision and torch.is_grad_enabled()):
        features = patch_features(model, batch.pixels)
    image = inner.multi_modal_projector(features)
    words = inner.language_model.embed_tokens(batch.ids)
    before, behind = words[:, : IMAGE_COLUMNS.start], words[:, IMAGE_COLUMNS.stop :]
    embeds = torch.cat([before, image.to(words.dtype), behind], 1)
    hidden = inner.language_model(
        inputs_embeds=embeds,
        attention_mask=batch.visible,
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state
    wanted = batch.labels != IGNORED
    logits = model.lm_head(hidden[wanted]).float()
    labels = batch.labels[wanted]
    return functional.cross_entropy(logits, labels), logits.argmax(-1) == labels


@torch.no_grad()
def exact_match(model: LlavaForConditionalGeneration, batch: Batch) -> dict[QuestionKind, float]:
    """Share of the questions whose every answer token is the most likely one, by kind.

    Each is judged given the true tokens before it; if all are right, so is greedy decoding.
    """
    _, right = answer_loss(model, batch, train_vision=False)
    rows = (batch.labels != IGNORED).nonzero()[:, 0].tolist()
    numbers = batch.questions[batch.labels != IGNORED].tolist()
    wrong = {
        (row, number)
        for row, number, ok in zip(rows, numbers, right.tolist(), strict=True)
        if not ok
    }
    asked: Counter[QuestionKind] = Counter()
    known: Counter[QuestionKind] = Counter()
    for row, kinds in enumerate(batch.kinds):
        for number, kind in enumerate(kinds, start=1):
            asked[kind] += 1
            known[kind] += (row, number) not in wrong
    return {kind: known[kind] / asked[kind] for kind in QuestionKind if asked[kind]}


class Optimiser:
    """Muon for the decoder's matrices, AdamW for all else, both under one learning rate.

    On this task Muon needs far fewer steps than AdamW alone. `share` scales the rate of the vision
    tower, which the last stage finds already trained.
    """

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], rate: float, share: float = 1.0
    ) -> None:
        matrices, others, vision = [], [], []
        for name, parameter in named:
            if "vision_tower" in name:
                vision.append(parameter)
            elif name.endswith("proj.weight") and parameter.ndim == 2:
                matrices.append(parameter)
            else:
                others.append(parameter)
        self.parameters = matrices + others + vision
        groups = [{"params": others, "scale": 0.5}, {"params": vision, "scale": share}]
        self._optimisers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [group for group in groups if group["params"]],
                lr=rate,
                betas=(0.9, 0.95),
                weight_decay=0.01,
            )
        ]
        if matrices:
            self._optimisers.append(Muon(matrices, lr=rate))
        self._rate = rate

    def step(self, factor: float) -> None:
        """One update at `factor` times the peak rate; clears the gradients."""
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimiser in self._optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self._rate * factor * group.get("scale", 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, object]]:
        return [optimiser.state_dict() for optimiser in self._optimisers]

    def load_state_dict(self, states: list[dict[str, object]]) -> None:
        for optimiser, state in zip(self._optimisers, states, strict=True):
            optimiser.load_state_dict(state)


def rate_factor(step: int, steps: int, warmup: int, decay: float) -> float:
    """Linear warm-up, a plateau, and a cosine to 2 % over the last `decay` share of the steps."""
    rising = min(1.0, (step + 1) / max(1, warmup))
    start = steps * (1 - decay)
    falling = max(0.0, (step - start) / max(1.0, steps - start))
    return rising * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * falling)))
