"""Memory that threads read and write: the process's own as global memory, and each thread block's
shared memory, whose accesses are checked for races."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from tests.ptx.numbers import Array

FIRST = 4096
"""The lowest address that an array may begin at."""
MANY = -2
"""In place of the number of a warp or block: several."""


class RaceError(AssertionError):
    """Warps access the same shared memory, or blocks the same global memory, with nothing that puts
    them in order, and one of them writes."""


class MisalignedError(AssertionError):
    """An address that is no multiple of the size of the access."""


class _Everything:
    """The whole address space as one array, by NumPy's array interface."""

    def __init__(self, size: int) -> None:
        self.__array_interface__ = {
            "shape": ((1 << 47) // size,),
            "typestr": f"<u{size}",
            "data": (FIRST, False),
            "version": 3,
        }


class Who(NamedTuple):
    """The threads that access memory: their blocks and their warps in these."""

    blocks: Array
    warps: Array

    def by_many(self) -> Who:
        """An access by several warps at once."""
        return Who(self.blocks, np.full(len(self.warps), MANY))


class GlobalMemory:
    """Reads and writes at addresses of this process: those of tensors on the CPU."""

    def __init__(self) -> None:
        self._words = {size: np.asarray(_Everything(size)) for size in (1, 2, 4, 8)}

    def place(self, addresses: Array, size: int) -> tuple[Array, Array]:
        """An array of all words of ``size`` bytes, and where in it the (aligned) addresses are."""
        places = (addresses.astype(np.int64) - FIRST) // size
        return self._words[size], places


class SharedMemory:
    """The shared memory of some thread blocks, poisoned, and who accessed what since when.

    Accesses are recorded for every two bytes, if ``watches``: the last warp to write and the last
    to read them, and between which barriers that was.
    """

    def __init__(self, blocks: int, size: int, watches: bool = True) -> None:
        self._watches = watches
        self.size = -(-max(size, 16) // 16) * 16
        self.bytes = np.full(blocks * self.size, 0xFF, np.uint8)
        self.barriers = np.ones(blocks, np.int64)
        halves = len(self.bytes) // 2 if watches else 0
        self._writer, self._reader = (np.full(halves, -1, np.int32) for _ in range(2))
        self._written, self._read = (np.zeros(halves, np.int64) for _ in range(2))
        self._in_flight, self._in_use = (np.zeros(halves, np.int32) for _ in range(2))

    def _places(self, who: Who, addresses: Array, size: int) -> Array:
        if (addresses + size > self.size).any():
            raise IndexError(f"shared {addresses.max():#x} of {self.size:#x} bytes")
        return np.asarray(who.blocks * self.size + addresses.astype(np.int64))

    def load(self, who: Who, addresses: Array, size: int) -> Array:
        """Words of ``size`` bytes, for one thread each."""
        places = self._places(who, addresses, size)
        self._note_read(who, places, size)
        return np.asarray(self.bytes.view(f"<u{size}")[places // size])

    def store(self, who: Who, addresses: Array, words: Array, size: int) -> None:
        places = self._places(who, addresses, size)
        view = self.bytes.view(f"<u{size}")
        before = view[places // size]
        view[places // size] = words
        if (view[places // size] != words).any():
            raise RaceError("threads write different values to one place")
        # Writing again what is there does no harm.
        self._note_write(who, places, size, before != words)

    def begin_copy(self, who: Who, addresses: Array, size: int) -> None:
        """From here on these bytes may change, until ``end_copy``."""
        places = self._places(who, addresses, size)
        self._note_write(who, places, size, np.ones(len(places), bool))
        for half in self._halves(places, size):
            self._in_flight[half] += 1

    def end_copy(self, who: Who, addresses: Array, words: Array, size: int) -> None:
        """``words``: ``[threads, size]`` bytes."""
        places = self._places(who, addresses, size)
        self.bytes[places[:, None] + np.arange(size)] = words
        for half in self._halves(places, size):
            self._in_flight[half] -= 1
            self._writer[half], self._written[half] = who.warps, self.barriers[who.blocks]

    def begin_use(self, who: Who, addresses: Array, size: int) -> None:
        """From here on these bytes may be read, until ``end_use``."""
        places = self._places(who, addresses, size)
        self._note_read(who, places, size)
        for half in self._halves(places, size):
            np.add.at(self._in_use, half, 1)

    def end_use(self, who: Who, addresses: Array, size: int) -> None:
        for half in self._halves(self._places(who, addresses, size), size):
            np.subtract.at(self._in_use, half, 1)

    def _note_read(self, who: Who, places: Array, size: int) -> None:
        now = self.barriers[who.blocks]
        for half in self._halves(places, size):
            if self._in_flight[half].any():
                raise RaceError("reads what is still being copied")
            others = (self._written[half] == now) & (self._writer[half] != who.warps)
            if others.any():
                raise RaceError(f"reads what warp {self._writer[half][others][0]} wrote")
            is_shared = (self._read[half] == now) & (self._reader[half] != who.warps)
            self._reader[half], self._read[half] = np.where(is_shared, MANY, who.warps), now
            # Of several warps in this instruction one was recorded.
            many = self._reader[half] != who.warps
            self._reader[half[many]] = MANY

    def _note_write(self, who: Who, places: Array, size: int, changes: Array) -> None:
        now = self.barriers[who.blocks]
        for half in self._halves(places, size):
            if self._in_flight[half].any():
                raise RaceError("writes where something is still being copied to")
            if (self._in_use[half][changes] > 0).any():
                raise RaceError("overwrites what a matrix product still reads")
            written = (self._written[half] == now) & (self._writer[half] != who.warps) & changes
            read = (self._read[half] == now) & (self._reader[half] != who.warps) & changes
            if written.any():
                raise RaceError(f"overwrites what warp {self._writer[half][written][0]} wrote")
            if read.any():
                raise RaceError(f"overwrites what warp {self._reader[half][read][0]} read")
            self._writer[half], self._written[half] = who.warps, now

    def _halves(self, places: Array, size: int) -> Iterator[Array]:
        """The recorded places of accesses, one array for each two of their bytes."""
        for number in range(max(size // 2, 1) if self._watches else 0):
            yield places // 2 + number
