"""Data-parallel training on a CPU: each process takes its share of a batch, gradients are averaged.

One thread per process and one synchronisation per step: on a CPU with few cores, and all the more
on a busy one, that is far faster than one process whose threads synchronise at every operation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import spawn

CAPACITY = 8_000_000
"""Maximum number of trained parameters."""


@dataclass(frozen=True)
class Team:
    """One process's view of the team; by default it is alone."""

    rank: int = 0
    size: int = 1
    gradients: Tensor | None = None
    """[size, CAPACITY] in shared memory."""
    flag: Tensor | None = None
    """[1] in shared memory: the last decision of process 0."""
    barrier: Barrier | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def average_(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the team, summed in the same order by all."""
        if self.gradients is None or self.barrier is None:
            return
        flat = torch.cat([_gradient(parameter).flatten() for parameter in parameters])
        self.gradients[self.rank, : len(flat)] = flat
        self.barrier.wait()
        mean = self.gradients[:, : len(flat)].sum(0) / self.size
        self.barrier.wait()
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, part in zip(parameters, mean.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)

    def agree(self, decision: bool) -> bool:
        """The decision of process 0; that of the others is ignored."""
        if self.flag is None or self.barrier is None:
            return decision
        if self.is_first:
            self.flag[0] = decision
        self.barrier.wait()
        agreed = bool(self.flag[0])
        self.barrier.wait()
        return agreed


def work_together(size: int, work: Callable[..., None], *arguments: Any) -> None:
    """Call `work(team, *arguments)` in `size` processes, or here if one is enough."""
    if size == 1:
        work(Team(), *arguments)
        return
    context = get_context("spawn")
    shared = torch.zeros(size, CAPACITY).share_memory_(), torch.zeros(1).share_memory_()
    barrier = context.Barrier(size)
    spawn(_member, (size, *shared, barrier, work, arguments), nprocs=size)


def _member(
    rank: int,
    size: int,
    gradients: Tensor,
    flag: Tensor,
    barrier: Barrier,
    work: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    work(Team(rank, size, gradients, flag, barrier), *arguments)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
