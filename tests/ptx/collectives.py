"""Instructions in which threads work together: barriers, shuffles, reductions and matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tests.ptx import fragments
from tests.ptx.fragments import WARP
from tests.ptx.machine import DivergedError, Handler, Machine, Use
from tests.ptx.numbers import Array, decode
from tests.ptx.program import Immediate, Instruction, Operand, Pair, Vector

QUAD = 4 * WARP
"""Threads that multiply large matrices together."""


def _together(machine: Machine, count: int, what: str) -> None:
    """Checks that all or none of each ``count`` neighbouring threads take part."""
    if machine.mask is not None:
        inside = machine.mask.reshape(-1, count)
        if (inside.any(1) != inside.all(1)).any():
            raise DivergedError(f"{what} by a part of the threads that have to take part")


def _barrier(machine: Machine, own: Instruction) -> None:
    if "warp" in own.kinds:
        return
    assert own.kinds == ("sync",) and len(own.operands) == 1, own.text
    inside = machine.active if machine.mask is None else machine.mask
    expected = (~machine.left).reshape(len(machine.blocks), -1)
    there = inside.reshape(expected.shape)
    arrived = there.any(1)
    if (there != expected)[arrived].any():
        raise DivergedError("a barrier that not all threads of a block reach")
    machine.shared.barriers[arrived] += 1


def _shuffle(machine: Machine, own: Instruction) -> None:
    _together(machine, WARP, "a shuffle")
    out, a, *control, _ = own.operands
    values = machine.whole(machine.words(a, 32)).reshape(-1, WARP)
    by, clamp = (
        machine.whole(machine.words(each, 32)).reshape(-1, WARP).astype(np.int64)
        for each in control
    )
    source, is_inside = fragments.sources(own.kinds[1], by, clamp)
    first = out.first if isinstance(out, Pair) else out
    machine.write(first, np.take_along_axis(values, source, 1).ravel(), "b32")
    if isinstance(out, Pair):
        machine.write(out.second, is_inside.ravel(), "pred")


REDUCTIONS: Mapping[str, Callable[..., Array]] = {
    "add": np.add.reduce,
    "min": np.minimum.reduce,
    "max": np.maximum.reduce,
    "and": np.bitwise_and.reduce,
    "or": np.bitwise_or.reduce,
    "xor": np.bitwise_xor.reduce,
}


def _reduction(machine: Machine, own: Instruction) -> None:
    _together(machine, WARP, "a reduction")
    kind = own.kinds[-1]
    out, a, _ = own.operands
    values = machine.whole(machine.read(a, kind)).reshape(-1, WARP)
    found = REDUCTIONS[own.kinds[1]](values, 1, dtype=values.dtype)
    machine.write(out, np.repeat(found, WARP), kind)


def _vote(machine: Machine, own: Instruction) -> None:
    _together(machine, WARP, "a vote")
    out, a, _ = own.operands
    found = machine.whole(machine.read(a, "pred")).reshape(-1, WARP)
    if own.kinds[1] == "ballot":
        bits = (found.astype(np.uint64) << np.arange(WARP, dtype=np.uint64)).sum(1)
        machine.write(out, np.repeat(bits, WARP), "b32")
    else:
        chosen = {"all": found.all(1), "any": found.any(1)}[own.kinds[1]]
        machine.write(out, np.repeat(chosen, WARP), "pred")


# Matrices


def _parts(operand: Operand) -> tuple[Operand, ...]:
    return operand.parts if isinstance(operand, Vector) else (operand,)


def _elements(machine: Machine, parts: Sequence[Operand], kind: str) -> Array:
    """``[warps, 32, registers, 2]``: 16-bit elements of registers of 32 bits, as fp32."""
    words = np.stack([machine.whole(machine.words(each, 32)) for each in parts], 1)
    pairs = np.stack([words & np.uint32(0xFFFF), words >> np.uint32(16)], -1)
    values = decode(pairs.astype(np.uint16), kind).astype(np.float32)
    return values.reshape(-1, WARP, len(parts), 2)


def _sums(machine: Machine, parts: Sequence[Operand], columns: int) -> Array:
    """``[warps, 16, columns]``: fp32 sums that registers hold."""
    values = np.stack([machine.whole(machine.read(each, "f32")) for each in parts], 1)
    return fragments.rows_of(values.reshape(-1, WARP, len(parts) // 2, 2), columns)


def _write_sums(machine: Machine, parts: Sequence[Operand], rows: Array) -> None:
    flat = fragments.fragment_of(rows).reshape(machine.size, len(parts))
    for number, each in enumerate(parts):
        machine.write(each, flat[:, number], "f32")


def _multiply(machine: Machine, own: Instruction) -> None:
    _together(machine, WARP, "a matrix product")
    shape, kind = own.kinds[2], own.kinds[6]
    assert shape == "m16n8k16" and kind in ("bf16", "f16"), own.text
    out, a, b, c = map(_parts, own.operands)
    left = fragments.rows_of(_elements(machine, a, kind), 16)
    right = fragments.columns_of(_elements(machine, b, kind))
    _write_sums(machine, out, _sums(machine, c, 8) + left @ right)


def _matrices(machine: Machine, at: Operand, count: int) -> tuple[Array, Array]:
    """``[warps, matrix, row, 8]``: where elements lie; and the threads of these warps."""
    lanes = machine.lanes()
    rows = machine.addresses(at, lanes, 2, is_shared=True).reshape(-1, WARP)[:, : 8 * count]
    assert not (rows % 16).any(), "rows of a matrix are not aligned"
    return rows.reshape(-1, count, 8, 1) + 2 * np.arange(8), lanes.reshape(-1, WARP)


def _load_matrices(machine: Machine, own: Instruction) -> None:
    _together(machine, WARP, "a load of matrices")
    out, at = own.operands
    parts = _parts(out)
    where, lanes = _matrices(machine, at, len(parts))
    owner = np.broadcast_to(lanes[:, :1, None, None], where.shape).ravel()
    found = machine.shared.load(machine.who(owner), where.ravel(), 2).reshape(where.shape)
    elements = found.astype(np.uint32)
    if "trans" in own.kinds:
        elements = elements.swapaxes(-1, -2)
    low, high = (elements[..., fragments.GROUP, 2 * fragments.PLACE + half] for half in range(2))
    words = low | (high << np.uint32(16))
    for number, part in enumerate(parts):
        machine.write(part, machine.spread(words[:, number].ravel(), lanes.ravel()), "b32")


def _store_matrices(machine: Machine, own: Instruction) -> None:
    _together(machine, WARP, "a store of matrices")
    at, source = own.operands
    parts = _parts(source)
    where, lanes = _matrices(machine, at, len(parts))
    elements = np.empty(where.shape, np.uint16)
    for number, part in enumerate(parts):
        words = machine.whole(machine.words(part, 32))[lanes]
        for half in range(2):
            row, column = fragments.GROUP, 2 * fragments.PLACE + half
            if "trans" in own.kinds:
                row, column = column, row
            elements[:, number, row, column] = words >> np.uint32(16 * half)
    owner = np.broadcast_to(lanes[:, :1, None, None], where.shape).ravel()
    machine.shared.store(machine.who(owner), where.ravel(), elements.ravel(), 2)


def _quad(machine: Machine, own: Instruction) -> None:
    """Products of four warps, which read shared memory until they are waited for."""
    what = own.kinds[0]
    if what == "commit_group":
        machine.group_of_uses += 1
    elif what == "wait_group":
        assert isinstance(own.operands[0], Immediate)
        machine.wait_for_uses(own.operands[0].bits)
    elif what != "fence":
        assert what == "mma_async", own.text
        _multiply_quad(machine, own)


def _multiply_quad(machine: Machine, own: Instruction) -> None:
    _together(machine, QUAD, "a matrix product")
    shape, kind = own.kinds[3], own.kinds[5]
    assert shape.endswith("k16") and kind in ("bf16", "f16"), own.text
    columns = int(shape[shape.index("n") + 1 : shape.index("k")])
    out, a, b, keeps, _, _, *orders = own.operands
    parts = _parts(out)
    *left_order, right_order = (bool(each.bits) for each in orders if isinstance(each, Immediate))
    lanes = machine.lanes().reshape(-1, QUAD)
    quads = lanes[:, 0] // QUAD
    if isinstance(a, Vector):
        rows = fragments.rows_of(_elements(machine, a.parts, kind), 16)
        left = rows.reshape(-1, 64, 16)[quads]
    else:
        left = _tile(machine, a, 64, left_order[0], lanes, kind)
    right = _tile(machine, b, columns, right_order, lanes, kind)
    product = np.zeros((machine.size // QUAD, 64, columns), np.float32)
    product[quads] = left @ right.swapaxes(-1, -2)
    is_kept = machine.whole(machine.read(keeps, "pred")).reshape(-1, WARP)[:, :1, None]
    before = np.where(is_kept, _sums(machine, parts, columns), np.float32(0))
    _write_sums(machine, parts, before + product.reshape(-1, 16, columns))


def _tile(
    machine: Machine, descriptor: Operand, rows: int, order: bool, lanes: Array, kind: str
) -> Array:
    """``[quads, rows, 16]`` elements in shared memory, as fp32."""
    words = machine.whole(machine.words(descriptor, 64))[lanes[:, 0]]
    where = fragments.tile_addresses(words, rows, order)
    owner = np.broadcast_to(lanes[:, :1, None], where.shape).ravel()
    # All four warps read it.
    who = machine.who(owner).by_many()
    found = machine.shared.load(who, where.ravel(), 2)
    machine.shared.begin_use(who, where.ravel(), 2)
    machine.uses.append(Use(machine.group_of_uses, who, where.ravel()))
    return decode(found.reshape(where.shape), kind).astype(np.float32)


INSTRUCTIONS: Mapping[str, Handler] = {
    "bar": _barrier,
    "barrier": _barrier,
    "shfl": _shuffle,
    "redux": _reduction,
    "vote": _vote,
    "mma": _multiply,
    "ldmatrix": _load_matrices,
    "stmatrix": _store_matrices,
    "wgmma": _quad,
}
