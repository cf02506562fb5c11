"""Graphs of recurring work: which of them are kept, and the memory that they share."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from fastskip.decoder.fused.lru import LeastRecentlyUsed, Sightings
from fastskip.ops.bodies import Bodies, bodies_on
from fastskip.ops.graphs import Pool

logger = logging.getLogger(__name__)

K = TypeVar("K")
V = TypeVar("V")


class Graphs(LeastRecentlyUsed[K, V]):
    """Up to ``most`` graphs by what they have baked in; the least recently used is evicted first.

    A capture takes as long as several runs: ``pays`` says when a key has occurred often enough. No
    two graphs run at the same time, so all share one pool.
    """

    def __init__(self, most: int, seen: int = 0) -> None:
        """``seen``: keys without a graph that are remembered."""
        super().__init__(most)
        self._sightings: Sightings[K] = Sightings(seen)
        self._version: object = None
        self._pool: Pool | None = None
        self._bodies: Bodies | None = None

    def clear(self) -> None:
        super().clear()
        self._sightings.clear()
        self._pool, self._bodies = self._pool and self._pool.renewed(), None

    def renew(self, version: object) -> None:
        """Drops all graphs if ``version``, which all of them have baked in, has changed."""
        if version != self._version:
            self._version = version
            self.clear()

    def pays(self, key: K) -> bool:
        """Whether to capture a graph for a key that is requested and has none."""
        return self._sightings.pays(key, has_room=self.has_room)

    def bodies(self, device: torch.device) -> Bodies:
        """The conditional bodies' implementation, which all graphs share."""
        if self._bodies is None:
            self._bodies = bodies_on(device)
        return self._bodies

    def make(self, key: K, device: torch.device, build: Callable[[Pool | None], V]) -> V:
        """Makes and keeps the graph of a key: ``build`` of the pool to use."""
        self.make_room(key)
        if self._pool is None or self._pool.device != device:
            self._pool = Pool.on(device)
        # Its buffers outlive a caller's inference mode, which would forbid writing to them later.
        with torch.inference_mode(False), torch.no_grad():
            try:
                return self.keep(key, build(self._pool))
            except BaseException:
                # To torch 2.11 a capture that ended in an error still goes on, and it refuses its
                # pool to every other one.
                self._pool = None
                raise

    def make_if_room(
        self, key: K, device: torch.device, build: Callable[[Pool | None], V]
    ) -> V | None:
        """``make``; ``None`` if there is no memory for the graph: what it would have done may still
        run without one, in memory that others leave."""
        try:
            return self.make(key, device, build)
        except torch.OutOfMemoryError as error:
            logger.warning("no memory for a CUDA graph, so work is launched without: %s", error)
        return None
