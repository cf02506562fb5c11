"""Launches kernels and records what was launched.

Every launch of the project goes through ``launch``. ``recording()`` records launches as they run;
``recording(is_dry=True)`` records them without running them, so launches can be counted, or
compiled ahead of time, for tensors that hold no data (``device="meta"``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from math import prod
from typing import Any

from fastskip.kernels import overlap

FUSION = {"enable_fp_fusion": True}
"""Products and sums become one instruction; from Triton 3.10 on this is not the default."""

_account: ContextVar[Account | None] = ContextVar("account", default=None)


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch: the kernel, its grid, its arguments, and the compiler's options besides
    ``FUSION``.

    ``kernel`` is ``None`` for a product that the vendor's library computes; its number of programs
    is unknown. ``is_guarded``: programs check on the device whether they have anything to do, so
    some may exit at once.
    """

    name: str
    grid: tuple[int, ...]
    kernel: Any = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, int] = field(default_factory=dict)
    is_guarded: bool = False

    @property
    def programs(self) -> int:
        """Program instances (thread blocks)."""
        return prod(self.grid)

    @property
    def compiler_options(self) -> dict[str, Any]:
        return {**FUSION, **self.options}


@dataclass(slots=True)
class Account:
    """The launches of one ``recording()``, in order."""

    is_dry: bool
    launches: list[Launch] = field(default_factory=list)

    @property
    def programs(self) -> int:
        return sum(launch.programs for launch in self.launches)

    @property
    def guarded_programs(self) -> int:
        """Programs of guarded launches, which may exit at once."""
        return sum(launch.programs for launch in self.launches if launch.is_guarded)

    def by_kernel(self) -> dict[str, tuple[int, int]]:
        """Name -> (launches, programs)."""
        found: dict[str, tuple[int, int]] = {}
        for launch in self.launches:
            launches, programs = found.get(launch.name, (0, 0))
            found[launch.name] = launches + 1, programs + launch.programs
        return found


@contextmanager
def recording(*, is_dry: bool = False) -> Iterator[Account]:
    """Records the launches of this block; ``is_dry``: without running them."""
    account = Account(is_dry)
    token = _account.set(account)
    try:
        yield account
    finally:
        _account.reset(token)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    options: Mapping[str, int],
    *,
    is_guarded: int = False,
    **arguments: Any,
) -> None:
    """``kernel[grid](**arguments)``, overlapping within ``overlap.overlapping``; an empty grid
    launches nothing.

    ``options``: ``num_warps``, ``num_stages`` and the like; ``is_guarded``: as in ``Launch``;
    ``arguments``: the kernel's whole signature except ``OVERLAP`` and ``READS_AHEAD``.
    """
    if not prod(grid):
        return
    arguments |= overlap.arguments_of(kernel)
    if arguments.get("OVERLAP"):
        options = {**options, "launch_pdl": True}
    account = _account.get()
    if account is not None:
        name = kernel.__name__.strip("_").removesuffix("_kernel")
        account.launches.append(Launch(name, grid, kernel, arguments, options, bool(is_guarded)))
        if account.is_dry:
            return
    kernel[grid](**arguments, **FUSION, **options)


def note(name: str) -> None:
    """Records a launch that the vendor's library makes itself."""
    account = _account.get()
    if account is not None:
        account.launches.append(Launch(name, (1,)))
