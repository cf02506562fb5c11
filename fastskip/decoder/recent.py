"""What was used last: a map of bounded size, and what is worth a place in it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import ItemsView, ValuesView
from typing import Generic, TypeVar

OFTEN = 8
"""Times that a key has to come before another one loses its place to it."""

K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """Up to ``most`` values by key; the least recently used one goes first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

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

    @property
    def has_room(self) -> bool:
        """Whether one more value costs no other one its place."""
        return len(self._values) < self._most

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


class Sightings(Generic[K]):
    """Which keys come often enough for a value that takes as long to make as several uses.

    While there is room that is the second time. Then a new value costs another one its place, and
    where more keys go round than there are places, nearly every one would be made again and again.
    """

    def __init__(self, most: int) -> None:
        """``most``: keys remembered."""
        self._counts: Recent[K, int] = Recent(most)

    def pays(self, key: K, *, has_room: bool) -> bool:
        """Whether a key that has come is to get a value now; then it begins anew."""
        count = 1 + (self._counts.get(key) or 0)
        does_pay = count >= (2 if has_room else OFTEN)
        self._counts.keep(key, 0 if does_pay else count)
        return does_pay

    def clear(self) -> None:
        self._counts.clear()
