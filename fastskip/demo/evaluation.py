"""Exact match of a model's greedy answers, by kind of question.

The model is used only through `generate`, so dense models and those that skip computation are
evaluated alike. `python -m fastskip.demo.evaluation` evaluates a checkpoint, dense, in float32.
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from fastskip.demo import checkpoint_path
from fastskip.demo.scenes import (
    DETAIL_KINDS,
    Question,
    QuestionKind,
    Scene,
    Split,
    ask_detail,
    converse,
    draw,
    is_detailed,
    questions,
    scenes,
    split_of,
)
from fastskip.demo.scenes.world import MAX_FIGURES, endless_scenes, sample

Item = tuple[Scene, Question]


@dataclass(frozen=True)
class Accuracy:
    """How many questions of each kind were asked, and how many answered exactly right."""

    asked: dict[QuestionKind, int]
    right: dict[QuestionKind, int]

    def of(self, *kinds: QuestionKind) -> float:
        """Share of right answers over these kinds."""
        return sum(self.right[kind] for kind in kinds) / sum(self.asked[kind] for kind in kinds)

    @property
    def overall(self) -> float:
        """Over all questions, without captions."""
        return self.of(*(kind for kind in self.asked if kind is not QuestionKind.CAPTION))

    def table(self) -> str:
        lines = [
            f"{kind.value:<10} {self.of(kind):7.2%}  {self.right[kind]:>5} of {self.asked[kind]:>5}"
            for kind in self.asked
        ]
        if set(self.asked) != {QuestionKind.CAPTION}:
            lines.append(f"{'overall':<10} {self.overall:7.2%}  (without captions)")
        return "\n".join(lines)


def held_out(
    count: int,
    seed: int = 0,
    kinds: Sequence[QuestionKind] = tuple(QuestionKind),
    split: Split = Split.TEST,
) -> list[Item]:
    """At most `count` items: one question of each kind per scene, for as many scenes as needed."""
    found: list[Item] = []
    for scene in islice(endless_scenes(split, seed), count):
        found.extend((scene, question) for question in questions(scene, seed, kinds))
        if len(found) >= count:
            break
    return found[:count]


def held_out_details(count: int, seed: int) -> list[Item]:
    """`count` questions about small figures or about counts in full scenes, cycling over kinds."""
    rng = np.random.default_rng([seed, list(Split).index(Split.TEST), MAX_FIGURES])
    found: list[Item] = []
    while len(found) < count:
        scene = sample(rng, MAX_FIGURES)
        if is_detailed(scene) and split_of(scene) is Split.TEST:
            kind = DETAIL_KINDS[len(found) % len(DETAIL_KINDS)]
            question = ask_detail(scene, kind, seed)
            found += [] if question is None else [(scene, question)]
    return found


def held_out_conversations(count: int, seed: int) -> list[tuple[Scene, tuple[Question, Question]]]:
    """`count` pairs of questions of different kinds, each pair on one scene; no captions."""
    kinds = [kind for kind in QuestionKind if kind is not QuestionKind.CAPTION]
    found = []
    for scene in scenes(Split.TEST, count, seed):
        first, second = converse(scene, seed, kinds)  # every scene allows COUNT and LOCATION
        found.append((scene, (first, second)))
    return found


def prompt(processor: LlavaProcessor, text: str) -> str:
    """The chat prompt that asks `text` about one image."""
    content = [{"type": "image"}, {"type": "text", "text": text}]
    chat = [{"role": "user", "content": content}]
    rendered: str = processor.apply_chat_template(chat, add_generation_prompt=True)
    return rendered


@torch.inference_mode()
def answers(
    model: Any, processor: LlavaProcessor, items: Sequence[Item], batch_size: int = 32
) -> list[str]:
    """The greedy answer to each item, one question and one image per prompt."""
    found: list[str] = []
    # batch similar lengths: captions are five times as long as other answers
    order = sorted(range(len(items)), key=lambda index: len(items[index][1].answer))
    for chunk in _chunks(order, batch_size):
        inputs = processor(
            images=[draw(items[index][0]) for index in chunk],
            text=[prompt(processor, items[index][1].text) for index in chunk],
            padding=True,
            return_tensors="pt",
        ).to(model.device, model.dtype)
        out = model.generate(**inputs, do_sample=False, max_new_tokens=32)
        new = out[:, inputs["input_ids"].shape[1] :]
        found.extend(processor.batch_decode(new, skip_special_tokens=True))
    by_index = dict(zip(order, found, strict=True))
    return [by_index[index].strip() for index in range(len(items))]


def evaluate(
    model: Any, processor: LlavaProcessor, items: Sequence[Item], batch_size: int = 32
) -> Accuracy:
    """Ask every item and count the answers that are exactly right."""
    asked: Counter[QuestionKind] = Counter()
    right: Counter[QuestionKind] = Counter()
    for (_, question), answer in zip(
        items, answers(model, processor, items, batch_size), strict=True
    ):
        asked[question.kind] += 1
        right[question.kind] += answer == question.answer
    kinds = [kind for kind in QuestionKind if asked[kind]]
    return Accuracy({kind: asked[kind] for kind in kinds}, {kind: right[kind] for kind in kinds})


def _chunks(indices: Sequence[int], size: int) -> Iterable[Sequence[int]]:
    return (indices[start : start + size] for start in range(0, len(indices), size))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fastskip.demo.evaluation",
        description="Exact match of greedy answers to held-out questions, in float32.",
    )
    parser.add_argument("checkpoint", nargs="?", default=checkpoint_path(), help="its folder")
    parser.add_argument("--count", type=int, default=1000, help="questions (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="which questions (default: 0)")
    parser.add_argument("--batch", type=int, default=32, help="prompts per batch (default: 32)")
    options = parser.parse_args(arguments)
    model = LlavaForConditionalGeneration.from_pretrained(options.checkpoint, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(options.checkpoint)
    items = held_out(options.count, options.seed)
    print(evaluate(model.eval(), processor, items, options.batch).table())


if __name__ == "__main__":
    main()
