"""Examples as the data sets of a trainer: encoded when they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import Dataset, IterableDataset

from fastskip.conversations import DataError, Example
from fastskip.study.training.encoding import Encoder, Features
from fastskip.study.training.settings import Settings, SettingsError


class Shelf(Dataset[Features]):
    """Examples with numbers. In the place of one that cannot be used stands the next that can."""

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
    """Examples one after the other; those that cannot be used are left out."""

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


def source_of(data: Any, encoder: Encoder, settings: Settings) -> Shelf | Stream:
    """A shelf of what has a length and items, else a stream.

    Raises:
        SettingsError: a stream without a number of steps.
    """
    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        if not len(data):
            raise DataError("data: no examples; allowed: one or more")
        return Shelf(data, encoder, skip_broken=settings.skip_broken)
    if settings.steps is None:
        raise SettingsError("steps", None, "a number of steps, since these data have no length")
    return Stream(data, encoder, skip_broken=settings.skip_broken)
