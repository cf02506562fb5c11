"""Ask a model items.

Models are used through `generate` only: Hugging Face's own, a prepared one under any policy, a
smaller one and a pruned one are all measured the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastskip.study.calls import placed
from fastskip.study.counts import check_counts
from fastskip.study.evaluation.answers import Evaluation, Judged
from fastskip.study.evaluation.captions import check as check_captions
from fastskip.study.evaluation.item_inputs import MAX_CACHE_BYTES, ItemInputs
from fastskip.study.evaluation.items import Item, ItemError
from fastskip.study.evaluation.metrics import Metric, score_all
from fastskip.study.fingerprints import items_fingerprint

Watch = Callable[[Sequence[int], Tensor, Tensor], object]


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
            max_cache_bytes: bytes of inputs to keep for the next model; the rest are rebuilt.
        Raises:
            ItemError: there are no items, or a number is too small.
            CaptionError: too few items are under CIDEr, or its scorers are not installed.
        """
        if not items:
            raise ItemError("items: none; allowed: one or more")
        check_counts(
            ItemError,
            batch_size=(batch_size, 1),
            new_tokens=(new_tokens, 1),
            max_cache_bytes=(max_cache_bytes, 0),
        )
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
