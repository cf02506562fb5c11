"""Instructions that access memory, and calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from tests.ptx.blocks import Thread
from tests.ptx.machine import Copy, Handler, Machine
from tests.ptx.numbers import UNSIGNED, decode, encode, width_of
from tests.ptx.program import Address, Immediate, Instruction, Register, Symbol, Vector


def _load(machine: Machine, own: Instruction) -> None:
    kind = own.kinds[-1]
    target, at = own.operands
    if "param" in own.kinds:
        assert isinstance(at, Address) and isinstance(at.base, Symbol)
        bits = machine.arguments.get(at.base.name, 0)  # 0: what a function returned
        machine.write(target, decode(np.asarray(bits, UNSIGNED[width_of(kind)]), kind), kind)
        return
    parts = target.parts if isinstance(target, Vector) else (target,)
    size, lanes, is_shared = width_of(kind) // 8, machine.lanes(), "shared" in own.kinds
    addresses = machine.addresses(at, lanes, size * len(parts), is_shared)
    if not is_shared:
        machine.note_read(lanes, addresses, size * len(parts))
    for number, part in enumerate(parts):
        if is_shared:
            words = machine.shared.load(machine.who(lanes), addresses + number * size, size)
        else:
            everything, places = machine.memory.place(addresses + number * size, size)
            words = everything[places]
        machine.write(part, decode(machine.spread(words, lanes), kind), kind)


def _store(machine: Machine, own: Instruction) -> None:
    at, source = own.operands
    width = width_of(own.kinds[-1])
    if "param" in own.kinds:
        assert isinstance(at, Address) and isinstance(at.base, Symbol)
        machine.passed[at.base.name] = machine.words(source, width)
        return
    parts = source.parts if isinstance(source, Vector) else (source,)
    size, lanes, is_shared = width // 8, machine.lanes(), "shared" in own.kinds
    addresses = machine.addresses(at, lanes, size * len(parts), is_shared)
    for number, part in enumerate(parts):
        words = machine.whole(machine.words(part, width))[lanes]
        if is_shared:
            machine.shared.store(machine.who(lanes), addresses + number * size, words, size)
        else:
            own_addresses = addresses + number * size
            everything, places = machine.memory.place(own_addresses, size)
            machine.note_write(lanes, own_addresses, size, everything[places] != words)
            everything[places] = words


ATOMIC: Mapping[str, Callable[..., Any]] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "exch": lambda old, new: new,
    "cas": lambda old, expected, new: new if old == expected else old,
}


def _update(machine: Machine, own: Instruction) -> None:
    """Thread after thread."""
    kind = own.kinds[-1]
    compute = next(ATOMIC[each] for each in own.kinds if each in ATOMIC)
    out, at, *values = own.operands
    lanes, size = machine.lanes(), width_of(kind) // 8
    addresses = machine.addresses(at, lanes, size)
    everything, places = machine.memory.place(addresses, size)
    given = [machine.whole(machine.read(each, kind))[lanes] for each in values]
    before = everything[places]
    who = machine.threads(lanes)
    machine.check_waited(lanes)
    for number, place in enumerate(places):
        if machine.between is not None:
            thread = Thread(*(int(each[number]) for each in who))
            machine.between.synchronize(thread, int(addresses[number]), own.kinds)
        before[number] = everything[place]
        old = decode(np.asarray(before[number]), kind)
        new = compute(old, *(each[number] for each in given))
        everything[place] = encode(np.asarray(new), kind)
    machine.write(out, decode(machine.spread(before, lanes), kind), kind)


def _reduce(machine: Machine, own: Instruction) -> None:
    _update(machine, replace(own, operands=(Register("_"), *own.operands)))


def _copy(machine: Machine, own: Instruction) -> None:
    """Asynchronous copies from global to shared memory, which arrive when they are waited for."""
    assert own.kinds[0] == "async", own.text
    if own.kinds[1] == "commit_group":
        machine.group_of_copies[machine.lanes()] += 1
    elif own.kinds[1] in ("wait_group", "wait_all"):
        kept = 0
        if own.operands:
            assert isinstance(own.operands[0], Immediate)
            kept = own.operands[0].bits
        machine.wait_for_copies(kept)
    else:
        _begin_copy(machine, own)


def _begin_copy(machine: Machine, own: Instruction) -> None:
    to, source, count, *read = own.operands
    assert isinstance(count, Immediate)
    size, lanes = count.bits, machine.lanes()
    length = np.full(len(lanes), size)
    if read:  # the rest is 0
        length = machine.whole(machine.read(read[0], "u32"))[lanes].astype(np.int64)
    there = machine.addresses(to, lanes, size, is_shared=True)
    is_read = np.arange(size) < length[:, None]
    data = np.zeros(is_read.shape, np.uint8)
    reading = length > 0
    if reading.any():
        here = machine.addresses(source, lanes[reading], size)
        offsets = np.minimum(np.arange(size), length[reading, None] - 1)
        machine.note_read(lanes[reading], here, size)
        everything, places = machine.memory.place(here[:, None] + offsets, 1)
        data[reading] = np.where(is_read[reading], everything[places], 0)
    machine.shared.begin_copy(machine.who(lanes), there, size)
    groups = machine.group_of_copies[lanes].copy()
    machine.copies.append(Copy(groups, lanes, there, data, size))


def _call(machine: Machine, own: Instruction) -> None:
    """Kernels call one function only: it sets the condition of a graph's node."""
    assert "cudaGraphSetConditional" in own.text, own.text
    lane = machine.lanes()[0]
    handle, value = (machine.whole(each)[lane] for each in machine.passed.values())
    machine.conditions.append((int(handle), int(value)))


INSTRUCTIONS: Mapping[str, Handler] = {
    "ld": _load,
    "st": _store,
    "atom": _update,
    "red": _reduce,
    "cp": _copy,
    "call": _call,
}
