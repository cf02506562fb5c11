"""Examples as data sets for the trainer, encoded on access."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import Dataset, IterableDataset

from fastskip.prompts.conversations import DataError, Example
from fastskip.study.training.encoding import Encoder, Features
from fastskip.study.training.settings import Settings, SettingsError


class IndexedExamples(Dataset[Features]):
    """Examples by index. With ``skip_broken``, the next usable one replaces an unusable one."""

    def __init__(self, examples: Any, encoder: Encoder, *, skip_broken: bool) -> None:
        self._examples, self._encoder, self._skips = examples, encoder, skip_broken
        self.broken: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Features:
        count = len(self)
        for number in (*range(index, count), *range(index)):
            try:
                return self._encoder(self._examples[number])
            except DataError as error:
                if not self._skips:
                    raise
                self.broken[number] = str(error)
        raise DataError(f"data: none of {count} examples can be used; {self.broken[index]}")


class Stream(IterableDataset[Features]):
    """Examples in order. With ``skip_broken``, unusable ones are left out."""

    def __init__(self, examples: Iterable[Example], encoder: Encoder, *, skip_broken: bool) -> None:
        self._examples, self._encoder, self._skips = examples, encoder, skip_broken
        self.broken: dict[int, str] = {}

    def __iter__(self) -> Iterator[Features]:
        for number, example in enumerate(self._examples):
            try:
                features = self._encoder(example)
            except DataError as error:
                if not self._skips:
                    raise
                self.broken[number] = str(error)
                continue
            yield features


def source_of(data: Any, encoder: Encoder, settings: Settings) -> IndexedExamples | Stream:
    """A `IndexedExamples` for data with a length and items, else a `Stream`.

    Raises:
        SettingsError: a stream without a number of steps.
        DataError: there are no examples.
    """
    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        if not len(data):
            raise DataError("data: no examples; allowed: one or more")
        return IndexedExamples(data, encoder, skip_broken=settings.skip_broken)
    if settings.steps is None:
        raise SettingsError("steps", None, "a number of steps, as the data have no length")
    return Stream(data, encoder, skip_broken=settings.skip_broken)
