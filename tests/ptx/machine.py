"""Executes a program, all threads of some thread blocks in lockstep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from tests.ptx.blocks import Blocks, Threads
from tests.ptx.fragments import WARP
from tests.ptx.memory import GlobalMemory, MisalignedError, SharedMemory, Who
from tests.ptx.numbers import UNSIGNED, Array, decode, encode, width_of
from tests.ptx.program import Address, Immediate, Instruction, Operand, Program, Register, Symbol

SHARED_NAME = "global_smem"
IGNORED = {
    "prefetch",
    "prefetchu",
    "fence",
    "membar",
    "nanosleep",
    "discard",
    "applypriority",
}
"""What changes no value here: hints, and orders among blocks that run one after another."""
SPECIAL = ("%tid", "%ctaid", "%nctaid", "%ntid", "%laneid")


class EarlyError(AssertionError):
    """A launch that begins while writes of the one before are in flight does not wait for them."""


class DivergedError(AssertionError):
    """Threads that have to take part in an instruction together do not all get there."""


@dataclass(frozen=True)
class Copy:
    """An asynchronous copy that did not arrive: its group, threads, addresses and bytes."""

    groups: Array
    lanes: Array
    addresses: Array
    data: Array
    size: int

    def part(self, chosen: Array) -> Copy:
        return Copy(
            self.groups[chosen],
            self.lanes[chosen],
            self.addresses[chosen],
            self.data[chosen],
            self.size,
        )


@dataclass(frozen=True)
class Use:
    """What a matrix product that was not waited for reads."""

    group: int
    who: Who
    addresses: Array


@dataclass
class Machine:
    """Some thread blocks of a launch.

    ``handlers``: what executes an instruction, by name; ``arguments``: bits of parameters by name;
    ``blocks``: ``[n, 3]``, the blocks' numbers in the grid; ``size_of_shared``: bytes of shared
    memory of a block; ``watches``: whether races in it are looked for; ``between``: looks for
    races between the blocks of the launch; ``before``: the launch before, where this one begins
    while the writes of that one are in flight. ``conditions``: handles of conditional nodes, and
    what they were set to.
    """

    program: Program
    handlers: Mapping[str, Handler]
    arguments: Mapping[str, int]
    grid: tuple[int, int, int]
    blocks: Array
    size_of_shared: int
    watches: bool = True
    between: Blocks | None = None
    before: Blocks | None = None
    conditions: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        count, threads = len(self.blocks), self.program.threads
        self.size = count * threads
        self.block = np.repeat(np.arange(count), threads)
        self.thread = np.tile(np.arange(threads), count)
        self.warp = self.thread // WARP
        self.memory = GlobalMemory()
        self.shared = SharedMemory(count, self.size_of_shared, self.watches)
        self.registers: dict[str, Array] = {}
        self.passed: dict[str, Array] = {}
        self.copies: list[Copy] = []
        self.group_of_copies = np.zeros(self.size, np.int64)
        self.uses: list[Use] = []
        self.group_of_uses = 0
        self.active = np.ones(self.size, bool)
        self.left = np.zeros(self.size, bool)
        self.is_early = np.full(self.size, self.before is not None)
        self.mask: Array | None = None
        self._is_whole = True

    # Control flow

    def run(self) -> None:
        """Runs all threads to their end.

        Of threads that went apart those furthest behind go on, so that they meet again.
        """
        number = 0
        waiting: dict[int, Array] = {}
        with np.errstate(all="ignore"):
            while True:
                if not self.active.any():
                    if not waiting:
                        return
                    number = min(waiting)
                    self._activate(waiting.pop(number))
                if waiting and (first := min(waiting)) <= number:
                    if first < number:
                        _add(waiting, number, self.active)
                        self._activate(waiting.pop(first))
                        number = first
                    else:
                        self._activate(self.active | waiting.pop(first))
                instruction = self.program.instructions[number]
                try:
                    number = self._step(instruction, number, waiting)
                except Exception as error:
                    error.add_note(f"{instruction.text}  [{instruction.place}]")
                    raise

    def _activate(self, threads: Array) -> None:
        self.active, self._is_whole = threads, bool(threads.all())

    def _step(self, own: Instruction, number: int, waiting: dict[int, Array]) -> int:
        """The number of the next instruction."""
        self.mask = None if self._is_whole else self.active
        if own.guard is not None:
            guard = self.read(own.guard, "pred") != own.unless
            guard = guard if self.mask is None else guard & self.mask
            if not guard.any():
                return number + 1
            self.mask = None if guard.all() else guard
        if own.name == "bra":
            assert isinstance(own.operands[0], Symbol)
            target = self.program.labels[own.operands[0].name]
            if self.mask is None or (self.mask == self.active).all():
                return target
            _add(waiting, target, self.mask)
            self._activate(self.active & ~self.mask)
        elif own.name in ("ret", "exit"):
            leaving = self.active if self.mask is None else self.mask
            # The launch behind would overtake the one before.
            self.check_waited(np.flatnonzero(leaving))
            self.left |= leaving
            self._activate(self.active & ~leaving)
        elif own.name == "griddepcontrol":
            assert own.kinds == ("wait",), own.text
            self.is_early[self.lanes()] = False
        elif own.name not in IGNORED:
            if own.name not in self.handlers:
                raise NotImplementedError(own.name)
            self.handlers[own.name](self, own)
        return number + 1

    # Operands

    def words(self, operand: Operand, width: int) -> Array:
        """The bits of an operand, ``[threads]`` or a scalar."""
        if isinstance(operand, Immediate):
            return np.asarray(operand.bits & ((1 << width) - 1), UNSIGNED[width])
        if isinstance(operand, Symbol):
            assert operand.name == SHARED_NAME, operand.name
            return np.asarray(0, UNSIGNED[width])  # at the beginning of shared memory
        assert isinstance(operand, Register), operand
        if operand.name.startswith(SPECIAL):
            return self._special(operand.name).astype(UNSIGNED[width])
        return self._register(operand.name).astype(UNSIGNED[width], copy=False)

    def read(self, operand: Operand, kind: str) -> Array:
        """The operand's values as numbers of a type."""
        if kind != "pred":
            return decode(self.words(operand, width_of(kind)), kind)
        if isinstance(operand, Immediate):
            return np.asarray(operand.bits != 0)
        assert isinstance(operand, Register)
        return self._register(operand.name)

    def write(self, operand: Operand, values: Array, kind: str) -> None:
        """Writes values of a type, extended as it says, for the threads that take part."""
        assert isinstance(operand, Register), operand
        if operand.name == "_":
            return
        target = self._register(operand.name)
        words = np.asarray(values, bool) if kind == "pred" else encode(values, kind)
        if kind[0] == "s" and words.dtype != target.dtype:
            words = decode(words, kind)
        words = self.whole(words.astype(target.dtype, copy=False))
        made = words if self.mask is None else np.where(self.mask, words, target)
        self.registers[operand.name] = made

    def addresses(
        self, operand: Operand, lanes: Array, size: int, is_shared: bool = False
    ) -> Array:
        """The addresses, of these threads, of accesses of ``size`` bytes."""
        assert isinstance(operand, Address)
        base = self.whole(self.words(operand.base, 32 if is_shared else 64))[lanes]
        found = np.asarray(base.astype(np.int64) + operand.offset)
        if (found % size).any():
            raise MisalignedError(f"{found[found % size != 0][0]:#x}, {size} bytes")
        return found

    def lanes(self) -> Array:
        """The numbers of the threads that take part."""
        return np.arange(self.size) if self.mask is None else np.flatnonzero(self.mask)

    def who(self, lanes: Array) -> Who:
        return Who(self.block[lanes], self.warp[lanes])

    def threads(self, lanes: Array) -> Threads:
        """The same among all blocks of the launch."""
        x, y, z = self.blocks[self.block[lanes]].T
        number = x + self.grid[0] * (y + self.grid[1] * z)
        return Threads(number, self.thread[lanes], self.shared.barriers[self.block[lanes]])

    def whole(self, values: Array) -> Array:
        """``[threads]``, of a scalar too."""
        return np.broadcast_to(values, self.size)

    def spread(self, values: Array, lanes: Array) -> Array:
        """``[threads]``: the values of these, and 0."""
        made = np.zeros(self.size, values.dtype)
        made[lanes] = values
        return made

    def _register(self, name: str) -> Array:
        if name not in self.registers:
            width = self.program.width(name)
            kind = bool if width == 1 else UNSIGNED[width]
            # Poison, so that hardly any read of what nothing wrote goes unseen.
            self.registers[name] = np.full(self.size, np.array(-1).astype(kind))
        return self.registers[name]

    def _special(self, name: str) -> Array:
        what, _, axis = name.lstrip("%").partition(".")
        if what == "laneid":
            return np.asarray(self.thread % WARP)
        if what == "ctaid":
            return np.asarray(self.blocks[self.block, "xyz".index(axis)])
        if what == "nctaid":
            return np.full(self.size, self.grid["xyz".index(axis)])
        one = (self.thread, self.program.threads) if axis == "x" else (0, 1)
        return np.broadcast_to(one[what == "ntid"], self.size)

    # Global memory that others access, too

    def note_read(self, lanes: Array, addresses: Array, size: int) -> None:
        if self.before is not None:
            early = addresses[self.is_early[lanes]]
            if len(early) and self.before.has_written(early, size).any():
                raise EarlyError("reads ahead of its wait what the launch before writes")
        if self.between is not None:
            self.between.read(self.threads(lanes), addresses, size)

    def note_write(self, lanes: Array, addresses: Array, size: int, changes: Array) -> None:
        """``changes``: which of these writes write other values than before."""
        self.check_waited(lanes)
        if self.between is not None:
            self.between.write(self.threads(lanes), addresses, size, changes)

    def check_waited(self, lanes: Array) -> None:
        if self.is_early[lanes].any():
            raise EarlyError("writes or exits without a wait")

    # What goes on while threads do

    def wait_for_copies(self, kept: int) -> None:
        """Of copies of these threads all groups but the last ``kept`` arrive."""
        lanes = self.lanes()
        due = np.full(self.size, -1, np.int64)
        due[lanes] = self.group_of_copies[lanes] - kept
        rest = []
        for copy in self.copies:
            is_due = copy.groups < due[copy.lanes]
            ready = copy.part(is_due)
            self.shared.end_copy(self.who(ready.lanes), ready.addresses, ready.data, ready.size)
            if not is_due.all():
                rest.append(copy.part(~is_due))
        self.copies = rest

    def wait_for_uses(self, kept: int) -> None:
        """All but the last ``kept`` groups of matrix products have read what they multiply."""
        due = self.group_of_uses - kept
        for use in self.uses:
            if use.group < due:
                self.shared.end_use(use.who, use.addresses, 2)
        self.uses = [use for use in self.uses if use.group >= due]


Handler = Callable[[Machine, Instruction], None]


def _add(waiting: dict[int, Array], number: int, threads: Array) -> None:
    waiting[number] = waiting[number] | threads if number in waiting else threads
