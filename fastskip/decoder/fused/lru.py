"""A least-recently-used map of bounded size, and which keys are worth a place in it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import ItemsView, ValuesView
from typing import Generic, TypeVar

OFTEN = 8
"""Times that a key has to occur before it may evict another."""

K = TypeVar("K")
V = TypeVar("V")


class LeastRecentlyUsed(Generic[K, V]):
    """Up to ``most`` values by key; the least recently used is evicted first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: K) -> V | None:
        """The value of a key, which now counts as just used; ``None`` if there is none."""
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def keep(self, key: K, value: V) -> V:
        """Adds a value; returns it."""
        self.make_room(key)
        self._values[key] = value
        self._values.move_to_end(key)
        return value

    @property
    def has_room(self) -> bool:
        """Whether one more value evicts no other."""
        return len(self._values) < self._most

    def make_room(self, key: K) -> None:
        """Evicts the least recently used value if a new one would be too many: to be called before
        the new one takes memory."""
        if key not in self._values and len(self._values) >= self._most:
            self._values.popitem(last=False)

    def items(self) -> ItemsView[K, V]:
        return self._values.items()

    def values(self) -> ValuesView[V]:
        return self._values.values()

    def clear(self) -> None:
        self._values.clear()


class Sightings(Generic[K]):
    """Which keys occur often enough for a value that costs as much to make as several uses.

    While there is room, twice is enough. After that a new value evicts another, and with more keys
    in rotation than places, nearly every value would be made again and again.
    """

    def __init__(self, most: int) -> None:
        """``most``: keys remembered."""
        self._counts: LeastRecentlyUsed[K, int] = LeastRecentlyUsed(most)

    def pays(self, key: K, *, has_room: bool) -> bool:
        """Counts an occurrence of a key; says whether to make its value now, which resets that."""
        count = 1 + (self._counts.get(key) or 0)
        does_pay = count >= (2 if has_room else OFTEN)
        self._counts.keep(key, 0 if does_pay else count)
        return does_pay

    def clear(self) -> None:
        self._counts.clear()
