"""A model's answers to items, judged one by one, so that two models can be compared item by item.

A model is used through `generate` alone: Hugging Face's own, a prepared one under any policy, a
smaller one and a pruned one are judged by the same yardstick.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastskip.images import ImageError, load_image
from fastskip.intervals import Estimate, bootstrap, paired_bootstrap
from fastskip.prompts import PromptError, build_batch
from fastskip.study.items import Item, ItemError
from fastskip.study.samples import placed

Watch = Callable[[Sequence[int], Tensor, Tensor], object]


@dataclass(frozen=True, slots=True)
class Judged:
    """One item, what the model answered, and the item's score in [0, 1]."""

    kind: str
    question: str
    references: tuple[str, ...]
    answer: str
    score: float

    @property
    def item(self) -> tuple[str, str, tuple[str, ...]]:
        """What was asked, without what was answered."""
        return self.kind, self.question, self.references


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All items of an exam, in its order, as one model answered them."""

    judged: tuple[Judged, ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of items, in the order in which they first come."""
        return tuple(dict.fromkeys(each.kind for each in self.judged))

    def scores(self, *kinds: str) -> NDArray[np.float64]:
        """The scores of the items of these kinds; of all items, if none is named.

        Raises:
            ValueError: there is no item of a kind.
        """
        for kind in kinds:
            if kind not in self.kinds:
                raise ValueError(f"kind: {kind!r}; allowed: {', '.join(self.kinds)}")
        return np.array([each.score for each in self.judged if not kinds or each.kind in kinds])

    def mean(self, *kinds: str) -> float:
        """The mean score of these kinds."""
        return float(self.scores(*kinds).mean())

    def estimate(self, *kinds: str, seed: int = 0) -> Estimate:
        """The mean score of these kinds with its bootstrap interval."""
        return bootstrap(self.scores(*kinds), seed=seed)

    def minus(self, other: Evaluation, *kinds: str, seed: int = 0) -> Estimate:
        """How much better this model does than another one on the same items (paired bootstrap).

        Raises:
            ValueError: the other one answered other items.
        """
        ours, theirs = ([each.item for each in one.judged] for one in (self, other))
        if ours != theirs:
            raise ValueError("evaluations: of different items; allowed: two of the same exam")
        return paired_bootstrap(other.scores(*kinds), self.scores(*kinds), seed=seed)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"judged": [asdict(each) for each in self.judged]}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Evaluation:
        """What `to_dict` gave."""
        return cls(
            tuple(
                Judged(**{**each, "references": tuple(each["references"])})
                for each in document["judged"]
            )
        )


class Exam:
    """Items with their model inputs: each batch is made once, however many models answer it."""

    def __init__(
        self,
        items: Sequence[Item],
        processor: Any,
        *,
        config: Any = None,
        batch_size: int = 32,
        new_tokens: int = 32,
        keeps_inputs: bool = True,
    ) -> None:
        """Takes items as they are; inputs are made when the first model comes.

        Args:
            items: what is asked, in the order in which results are wanted.
            processor: the checkpoint's own; one that models share, if several take the exam.
            config: the model's; prompts are then checked against its positions.
            batch_size: prompts at once, padded on the left.
            new_tokens: most tokens of an answer.
            keeps_inputs: whether to keep them for the next model, or to make them anew.
        """
        if not items:
            raise ItemError("items: none; allowed: one or more")
        for name, value in (("batch_size", batch_size), ("new_tokens", new_tokens)):
            if value < 1:
                raise ItemError(f"{name}: {value}; allowed: 1 or more")
        self.items = tuple(items)
        self.new_tokens = new_tokens
        self._processor, self._config = processor, config
        self._kept: dict[int, Any] | None = {} if keeps_inputs else None
        # prompts with images and without make no batch; like answers together end together
        order = sorted(range(len(items)), key=lambda i: _like(self.items[i]))
        self._batches: list[list[int]] = []
        for index in order:
            last = self._batches[-1] if self._batches else []
            has_image = self.items[index].image is not None
            if not last or len(last) == batch_size or _has_image(self.items[last[0]]) != has_image:
                self._batches.append(last := [])
            last.append(index)

    def __len__(self) -> int:
        """The number of batches: how often `on_batch` is called."""
        return len(self._batches)

    @torch.inference_mode()
    def take(
        self,
        model: Any,
        on_batch: Callable[[], object] = lambda: None,
        watch: Watch | None = None,
    ) -> Evaluation:
        """Let a model answer all items, greedily, and judge the answers.

        Args:
            model: any that has `generate`.
            on_batch: called after each batch.
            watch: called with each batch's answers: which items they are of, their tokens
                `[B, n]`, and the scores of the first one `[B, V]` (fp32).
        Raises:
            ItemError: an item's image or prompt cannot be used.
        """
        tokenizer = getattr(self._processor, "tokenizer", self._processor)
        answers: dict[int, str] = {}
        for number, batch in enumerate(self._batches):
            inputs = placed(self.inputs(number), model)
            out = model.generate(
                **inputs,
                do_sample=False,
                num_beams=1,
                max_new_tokens=self.new_tokens,
                return_dict_in_generate=True,
                output_logits=watch is not None,
            )
            new = out.sequences[:, inputs["input_ids"].shape[1] :]
            if watch is not None:
                watch(batch, new, out.logits[0].float())
            told = tokenizer.batch_decode(new, skip_special_tokens=True)
            answers.update(zip(batch, (text.strip() for text in told), strict=True))
            on_batch()
        return Evaluation(
            tuple(
                Judged(
                    item.kind,
                    item.question,
                    item.references,
                    answers[index],
                    item.metric.score(answers[index], item.references),
                )
                for index, item in enumerate(self.items)
            )
        )

    def single(self, index: int) -> Any:
        """The model inputs of one item alone, on the host.

        Raises:
            ItemError: its image or prompt cannot be used.
        """
        return self._build([self.items[index]])

    def inputs(self, number: int) -> Any:
        """The model inputs of one batch, on the host.

        Raises:
            ItemError: an item's image or prompt cannot be used.
        """
        if self._kept is not None and number in self._kept:
            return self._kept[number]
        inputs = self._build([self.items[index] for index in self._batches[number]])
        if self._kept is not None:
            self._kept[number] = inputs
        return inputs

    def _build(self, items: Sequence[Item]) -> Any:
        try:
            return build_batch(
                self._processor,
                [item.question for item in items],
                [_images(item) for item in items],
                config=self._config,
                max_new_tokens=self.new_tokens,
            )
        except (ImageError, PromptError) as error:
            raise ItemError(f"{items[0].where} to {items[-1].where}: {error}") from error


def usable(items: Sequence[Item]) -> tuple[list[Item], list[str]]:
    """The items whose images can be read, and of the others what is wrong with each."""
    found, broken = [], []
    for item in items:
        try:
            _images(item)
        except ImageError as error:
            broken.append(f"{item.where}: {error}")
        else:
            found.append(item)
    return found, broken


def _images(item: Item) -> list[Any]:
    if item.image is None:
        return []
    return [load_image(item.image) if isinstance(item.image, Path) else item.image]


def _has_image(item: Item) -> bool:
    return item.image is not None


def _like(item: Item) -> tuple[bool, int]:
    return _has_image(item), max(len(reference.split()) for reference in item.references)
