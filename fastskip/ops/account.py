"""A record of the kernel launches behind the operations: see ``kernels.launch``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class Account:
    """What one ``counted()`` block launched.

    ``by_kernel``: name -> (launches, program instances). A library GEMM counts as one launch of one
    program, since its grid is unknown. ``guarded_programs``: how many of all instances may exit at
    once, as decided on the device. Filled in when the block ends.
    """

    by_kernel: dict[str, tuple[int, int]] = field(default_factory=dict)
    guarded_programs: int = 0

    @property
    def launches(self) -> int:
        return sum(launches for launches, _ in self.by_kernel.values())

    @property
    def programs(self) -> int:
        return sum(programs for _, programs in self.by_kernel.values())

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        kernels: Mapping[str, object] = {
            name: {"launches": launches, "programs": programs}
            for name, (launches, programs) in sorted(self.by_kernel.items())
        }
        return {
            "launches": self.launches,
            "programs": self.programs,
            "guarded_programs": self.guarded_programs,
            "kernels": kernels,
        }


@contextmanager
def counted(*, is_dry: bool = False, table: str | None = None) -> Iterator[Account]:
    """Counts the launches of this block.

    ``is_dry``: nothing runs, so tensors need no data (``device="meta"``). ``table``: the tuning
    table to use instead of the device's own.
    """
    from fastskip.kernels import launch, tuning

    account = Account()
    with ExitStack() as stack:
        if table is not None:
            stack.enter_context(tuning.table(table))
        recorded = stack.enter_context(launch.recording(is_dry=is_dry))
        yield account
        account.by_kernel.update(recorded.by_kernel())
        account.guarded_programs = recorded.guarded_programs


def tables() -> list[str]:
    """The names of all tuning tables."""
    from fastskip.kernels import tuning

    return tuning.slugs()
