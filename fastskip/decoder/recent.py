"""What was used last: a map of bounded size."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import ItemsView, ValuesView
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """Up to ``most`` values by key; the least recently used one goes first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: K) -> bool:
        return key in self._values

    def get(self, key: K) -> V | None:
        """The value of a key, which counts as used."""
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def keep(self, key: K, value: V) -> V:
        """Adds a value; returns it."""
        self.make_room(key)
        self._values[key] = value
        self._values.move_to_end(key)
        return value

    def make_room(self, key: K) -> None:
        """Lets the least recently used value go if one more would be too many: before the new one
        takes memory."""
        if key not in self._values and len(self._values) >= self._most:
            self._values.popitem(last=False)

    def items(self) -> ItemsView[K, V]:
        return self._values.items()

    def values(self) -> ValuesView[V]:
        return self._values.values()

    def clear(self) -> None:
        self._values.clear()
