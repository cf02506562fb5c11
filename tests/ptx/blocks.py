"""Races between the thread blocks of a launch, in global memory.

Blocks may run in any order or at the same time. So what one writes another may read or overwrite
only if atomic operations on one place have put them in order: the first released what it wrote
(itself, or before a barrier), and the other acquired it (in the same thread, or before a barrier).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tests.ptx.memory import MANY, RaceError
from tests.ptx.numbers import Array

BYTES = 12
"""Bits of an address within a page."""
NOBODY = -1


class Thread(NamedTuple):
    """A thread of a block, after some of the block's barriers."""

    block: int
    number: int
    barriers: int


class Order(NamedTuple):
    """What a block knows of another: up to where that one released, and where it acquired that."""

    released: Thread
    acquired: Thread


class Threads(NamedTuple):
    """The threads of an access, an entry for each."""

    blocks: Array
    numbers: Array
    barriers: Array


class Page:
    """The last writer and the last reader of every two bytes."""

    def __init__(self) -> None:
        halves = 1 << (BYTES - 1)
        self.writer, self.reader = (np.full(halves, NOBODY, np.int64) for _ in range(2))
        self.thread, self.barriers = (np.zeros(halves, np.int64) for _ in range(2))
        self.read_by, self.read_at = (np.zeros(halves, np.int64) for _ in range(2))

    def last_writer(self, half: int) -> Thread:
        return Thread(self.writer[half], self.thread[half], self.barriers[half])

    def last_reader(self, half: int) -> Thread:
        return Thread(self.reader[half], self.read_by[half], self.read_at[half])


class Blocks:
    """Who wrote and read what, in one launch."""

    def __init__(self) -> None:
        self._pages: dict[int, Page] = {}
        self._orders: dict[int, dict[int, Order]] = {}
        self._released: dict[int, dict[int, Thread]] = {}

    def read(self, who: Threads, addresses: Array, size: int) -> None:
        for page, halves, chosen in self._by_page(addresses, size):
            blocks, numbers, barriers = (each[chosen] for each in who)
            foreign = (page.writer[halves] != NOBODY) & (page.writer[halves] != blocks)
            for place in np.flatnonzero(foreign):
                half = halves[place]
                reader = Thread(blocks[place], numbers[place], barriers[place])
                self._check(page.last_writer(half), reader, "reads what block {} writes")
            others = (page.reader[halves] != NOBODY) & (page.reader[halves] != blocks)
            page.reader[halves] = np.where(others, MANY, blocks)
            # Of several blocks in this instruction one was recorded.
            several = (page.reader[halves] != blocks) & ~others
            page.reader[halves[several]] = MANY
            page.read_by[halves], page.read_at[halves] = numbers, barriers

    def write(self, who: Threads, addresses: Array, size: int, changes: Array) -> None:
        for page, halves, chosen in self._by_page(addresses, size):
            blocks, numbers, barriers = (each[chosen] for each in who)
            written = (page.writer[halves] != NOBODY) & (page.writer[halves] != blocks)
            read = (page.reader[halves] != NOBODY) & (page.reader[halves] != blocks)
            for place in np.flatnonzero((written | read) & changes[chosen]):
                half = halves[place]
                own = Thread(blocks[place], numbers[place], barriers[place])
                if written[place]:
                    self._check(page.last_writer(half), own, "overwrites what block {} writes")
                elif page.reader[half] == MANY:
                    if not self._orders.get(own.block):
                        raise RaceError("overwrites what several blocks read")
                else:
                    self._check(page.last_reader(half), own, "overwrites what block {} reads")
            page.writer[halves] = blocks
            page.thread[halves], page.barriers[halves] = numbers, barriers

    def has_written(self, addresses: Array, size: int) -> Array:
        """At which of the addresses a block wrote some of the bytes, with a store or atomically."""
        found = np.zeros(len(addresses), bool)
        for page, halves, chosen in self._by_page(addresses, size):
            found[chosen] |= page.writer[halves] != NOBODY
        if self._released:
            updated = np.array([*self._released])[:, None]
            found |= (np.abs(addresses - updated) < max(size, 4)).any(0)
        return found

    def synchronize(self, thread: Thread, address: int, kinds: tuple[str, ...]) -> None:
        """An atomic operation of a thread."""
        orders = self._orders.setdefault(thread.block, {})
        released = self._released.setdefault(address, {})
        if "acq_rel" in kinds or "acquire" in kinds:
            for block, earlier in released.items():
                if block != thread.block:
                    orders[block] = Order(earlier, thread)
        if "acq_rel" in kinds or "release" in kinds:
            released[thread.block] = thread
            # What it knows of others it passes on.
            for block, order in orders.items():
                released.setdefault(block, order.released)

    def _check(self, first: Thread, second: Thread, fault: str) -> None:
        order = self._orders.get(second.block, {}).get(first.block)
        is_ordered = order is not None and (
            _precedes(first, order.released) and _precedes(order.acquired, second)
        )
        if not is_ordered:
            raise RaceError(f"block {second.block} {fault.format(first.block)}")

    def _by_page(self, addresses: Array, size: int) -> list[tuple[Page, Array, Array]]:
        """For each page: it, the places in it, and the threads that access these."""
        made = []
        numbers = np.arange(len(addresses))
        for offset in range(0, max(size, 2), 2):
            own = addresses + offset
            pages = own >> BYTES
            for page in np.unique(pages):
                chosen = numbers[pages == page]
                halves = (own[chosen] & ((1 << BYTES) - 1)) >> 1
                made.append((self._pages.setdefault(int(page), Page()), halves, chosen))
        return made


def _precedes(first: Thread, second: Thread) -> bool:
    """Whether a thread of a block comes after another of the same block, or is it."""
    return first.barriers < second.barriers or first.number == second.number
