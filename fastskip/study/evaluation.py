"""A model's answers to items, scored one by one, so that two models can be compared item by item.

Models are used through `generate` only: Hugging Face's own, a prepared one under any policy, a
smaller one and a pruned one are all measured the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastskip.intervals import Estimate, mean_difference, mean_score
from fastskip.study.captions import check as check_captions
from fastskip.study.fingerprints import items_fingerprint
from fastskip.study.item_inputs import MAX_CACHE_BYTES, ItemInputs
from fastskip.study.items import Item, ItemError
from fastskip.study.metrics import Metric, scale_of, score_all
from fastskip.study.samples import placed
from fastskip.wording import Scale

Watch = Callable[[Sequence[int], Tensor, Tensor], object]


@dataclass(frozen=True, slots=True)
class Judged:
    """One item, the model's answer, and its score: in [0, 1], or in [0, 10] under CIDEr."""

    kind: str
    question: str
    references: tuple[str, ...]
    metric: Metric
    answer: str
    score: float

    @property
    def item(self) -> tuple[str, str, tuple[str, ...]]:
        """The item itself, without the answer."""
        return self.kind, self.question, self.references


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One model's answers to all items of an exam, in its order."""

    judged: tuple[Judged, ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of items, in order of first appearance."""
        return tuple(dict.fromkeys(each.kind for each in self.judged))

    @property
    def parts(self) -> dict[Scale, Evaluation]:
        """The items grouped by scale: only scores on the same scale can be averaged."""
        present = {each.metric.scale for each in self.judged}
        return {
            scale: Evaluation(tuple(each for each in self.judged if each.metric.scale is scale))
            for scale in Scale
            if scale in present
        }

    def scores(self, *kinds: str) -> NDArray[np.float64]:
        """The scores of the items of these kinds; of all items if none is given.

        Raises:
            ValueError: no item is of one of the kinds.
            ScaleError: the scores are on different scales.
        """
        chosen = self._of(kinds)
        scale_of(each.metric for each in chosen)
        return np.array([each.score for each in chosen])

    def mean(self, *kinds: str) -> float:
        """The mean score of these kinds."""
        return float(self.scores(*kinds).mean())

    def estimate(self, *kinds: str, seed: int = 0) -> Estimate:
        """The mean score of these kinds with its interval (`intervals.mean_score`)."""
        return mean_score(self.scores(*kinds), is_share=self._is_share(kinds), seed=seed)

    def minus(self, other: Evaluation, *kinds: str, seed: int = 0) -> Estimate:
        """How much better this model does than another on the same items, with its interval
        (`intervals.mean_difference`); an evaluation minus itself is exactly 0.

        Raises:
            ValueError: the other model answered different items.
        """
        ours, theirs = ([each.item for each in one.judged] for one in (self, other))
        if ours != theirs:
            raise ValueError("evaluations: on different items; allowed: two of the same exam")
        before, after = other.scores(*kinds), self.scores(*kinds)
        if other is self:
            return Estimate(0.0, 0.0, 0.0)
        return mean_difference(before, after, is_share=self._is_share(kinds), seed=seed)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"judged": [asdict(each) for each in self.judged]}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Evaluation:
        """What `to_dict` gave."""
        return cls(
            tuple(
                Judged(
                    **{
                        **each,
                        "references": tuple(each["references"]),
                        "metric": Metric(each["metric"]),
                    }
                )
                for each in document["judged"]
            )
        )

    def _is_share(self, kinds: Sequence[str]) -> bool:
        return scale_of(each.metric for each in self._of(kinds)) is Scale.SHARE

    def _of(self, kinds: Sequence[str]) -> list[Judged]:
        for kind in kinds:
            if kind not in self.kinds:
                raise ValueError(f"kind: {kind!r}; allowed: {', '.join(self.kinds)}")
        return [each for each in self.judged if not kinds or each.kind in kinds]


class Exam:
    """Items with their model inputs: each batch is built once, however many models answer it."""

    def __init__(
        self,
        items: Sequence[Item],
        processor: Any,
        *,
        config: Any = None,
        batch_size: int = 32,
        new_tokens: int = 32,
        max_cache_bytes: int = MAX_CACHE_BYTES,
    ) -> None:
        """Build nothing yet: inputs are built for the first model, or by `problems`.

        Args:
            items: the questions, in the order in which results are wanted.
            processor: the checkpoint's own; all models that take the exam must share it.
            config: the model's; if given, prompts are checked against its maximum length.
            batch_size: prompts per batch, padded on the left.
            new_tokens: maximum number of tokens per answer.
            most_kept: bytes of inputs to keep for the next model; the rest are rebuilt.
        Raises:
            ItemError: there are no items, or a number is too small.
            CaptionError: too few items are under CIDEr, or its scorers are not installed.
        """
        if not items:
            raise ItemError("items: none; allowed: one or more")
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("new_tokens", new_tokens, 1),
            ("max_cache_bytes", max_cache_bytes, 0),
        ):
            if value < least:
                raise ItemError(f"{name}: {value}; allowed: {least} or more")
        if captions := sum(item.metric is Metric.CIDER for item in items):
            check_captions(captions)
        self.items = tuple(items)
        self.new_tokens = new_tokens
        self._batch_size = batch_size
        self._inputs = ItemInputs(processor, config, new_tokens, max_cache_bytes)
        self._processor = processor
        # no batch mixes prompts with and without images; answers of similar length finish together
        order = sorted(range(len(items)), key=lambda i: _like(self.items[i]))
        self._batches: list[list[int]] = []
        for index in order:
            last = self._batches[-1] if self._batches else []
            has_images = bool(self.items[index].images)
            if not last or len(last) == batch_size or bool(items[last[0]].images) != has_images:
                self._batches.append(last := [])
            last.append(index)

    def __len__(self) -> int:
        """The number of batches, which is how often `on_batch` is called."""
        return len(self._batches)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies these items; image files are read for it, once.

        Raises:
            OSError: an image file cannot be read.
        """
        return items_fingerprint(self.items)

    def problems(self, on_batch: Callable[[], object] = lambda: None) -> dict[int, str]:
        """What is wrong with the items that cannot be asked, by item number.

        Builds all inputs, so it needs no model.

        Raises:
            ItemError: items that can be asked one by one cannot be batched.
        """
        found: dict[int, str] = {}
        for number, batch in enumerate(self._batches):
            try:
                self.inputs(number)
            except ItemError:
                own = {index: self._problem(index) for index in batch}
                broken = {index: problem for index, problem in own.items() if problem is not None}
                if not broken:
                    raise  # only the batch as a whole fails, so no single item is to blame
                found |= broken
            on_batch()
        return dict(sorted(found.items()))

    def without(self, numbers: Collection[int]) -> Exam:
        """The exam without some items.

        Raises:
            ItemError: none are left.
        """
        return Exam(
            [item for number, item in enumerate(self.items) if number not in numbers],
            self._processor,
            config=self._inputs.config,
            batch_size=self._batch_size,
            new_tokens=self.new_tokens,
            max_cache_bytes=self._inputs.max_cache_bytes,
        )

    @torch.inference_mode()
    def take(
        self,
        model: Any,
        on_batch: Callable[[], object] = lambda: None,
        watch: Watch | None = None,
    ) -> Evaluation:
        """Have a model answer all items greedily, and score the answers.

        Args:
            model: any model with a `generate`.
            on_batch: called after each batch.
            watch: called after each batch with its item numbers, the answers' tokens `[B, n]`, and
                the logits of the first token `[B, V]` (fp32).
        Raises:
            ItemError: an item's image or prompt cannot be used.
        """
        tokenizer = getattr(self._processor, "tokenizer", self._processor)
        found: dict[int, str] = {}
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
            texts = tokenizer.batch_decode(new, skip_special_tokens=True)
            found.update(zip(batch, (text.strip() for text in texts), strict=True))
            on_batch()
        answers = [found[index] for index in range(len(self.items))]
        scores = score_all(
            [item.metric for item in self.items],
            answers,
            [item.references for item in self.items],
        )
        return Evaluation(
            tuple(
                Judged(item.kind, item.question, item.references, item.metric, answer, score)
                for item, answer, score in zip(self.items, answers, scores, strict=True)
            )
        )

    def single(self, index: int, new_tokens: int | None = None) -> Any:
        """The model inputs of a single item, on the host.

        Args:
            index: which item.
            new_tokens: how many must fit after the prompt; `None`: the exam's own limit.
        Raises:
            ItemError: its images or prompt cannot be used, or are too long.
        """
        return self._inputs.build([self.items[index]], new_tokens)

    def inputs(self, number: int) -> Any:
        """The model inputs of one batch, on the host.

        Raises:
            ItemError: an item's images or prompt cannot be used.
        """
        return self._inputs.of(number, [self.items[index] for index in self._batches[number]])

    def _problem(self, index: int) -> str | None:
        try:
            self.single(index)
        except ItemError as error:
            return str(error)
        return None


def _like(item: Item) -> tuple[bool, int]:
    return bool(item.images), max(len(reference.split()) for reference in item.references)
