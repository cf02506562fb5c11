"""Instructions that compute: each thread for itself, from registers to registers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from tests.ptx.machine import Handler, Machine
from tests.ptx.numbers import UNSIGNED, Array, high_half, is_float, wider, width_of
from tests.ptx.program import Instruction, Pair, Vector


def _unary(compute: Callable[[Array], Array], machine: Machine, own: Instruction) -> None:
    kind = own.kinds[-1]
    out, a = own.operands
    machine.write(out, compute(machine.read(a, kind)), kind)


def _binary(compute: Callable[[Array, Array], Array], machine: Machine, own: Instruction) -> None:
    kind = own.kinds[-1]
    out, a, b = own.operands
    machine.write(out, compute(machine.read(a, kind), machine.read(b, kind)), kind)


def _least(machine: Machine, own: Instruction) -> None:
    _binary(np.minimum if "NaN" in own.kinds else np.fmin, machine, own)


def _most(machine: Machine, own: Instruction) -> None:
    _binary(np.maximum if "NaN" in own.kinds else np.fmax, machine, own)


def _multiply(machine: Machine, own: Instruction) -> None:
    how, kind = own.kinds[0], own.kinds[-1]
    out, a, b = own.operands
    x, y = machine.read(a, kind), machine.read(b, kind)
    if how == "wide":
        machine.write(out, wider(x) * wider(y), f"{kind[0]}{2 * width_of(kind)}")
    elif how == "hi":
        machine.write(out, high_half(x, y), kind)
    else:
        machine.write(out, x * y, kind)


def _multiply_add(machine: Machine, own: Instruction) -> None:
    how, kind = own.kinds[0], own.kinds[-1]
    out, a, b, c = own.operands
    x, y = machine.read(a, kind), machine.read(b, kind)
    if how == "wide":
        kind = f"{kind[0]}{2 * width_of(kind)}"
        x, y = wider(x), wider(y)
    else:
        assert how == "lo", own.text
    machine.write(out, x * y + machine.read(c, kind), kind)


def _fused(machine: Machine, own: Instruction) -> None:
    kind = own.kinds[-1]
    out, *operands = own.operands
    # Products of fp32 numbers are exact in fp64.
    a, b, c = (machine.read(each, kind).astype(np.float64) for each in operands)
    sums = np.asarray(a * b + c)
    machine.write(out, sums if kind == "f64" else sums.astype(np.float32), kind)


def _divide(machine: Machine, own: Instruction) -> None:
    if is_float(own.kinds[-1]):
        _binary(np.divide, machine, own)
    else:
        _binary(_quotient, machine, own)


def _quotient(x: Array, y: Array) -> Array:
    """Rounded towards 0; by 0 in lanes whose result nothing uses."""
    y = np.where(y == 0, y.dtype.type(1), y)
    return np.asarray((np.abs(x) // np.abs(y)) * np.sign(x) * np.sign(y))


def _rest(x: Array, y: Array) -> Array:
    return np.asarray(np.fmod(x, np.where(y == 0, y.dtype.type(1), y)))


def _inverse_root(x: Array) -> Array:
    return np.asarray(1 / np.sqrt(x))


# Bits


def _shift(compute: Callable[[Array, Array], Array], machine: Machine, own: Instruction) -> None:
    """Beyond the width all bits are 0, or the sign."""
    kind = own.kinds[-1]
    out, a, b = own.operands
    values, by = machine.read(a, kind), machine.read(b, "u32")
    width = width_of(kind)
    last = values >> values.dtype.type(width - 1) if kind[0] == "s" else np.zeros_like(values)
    moved = compute(values, np.minimum(by, width - 1).astype(values.dtype))
    machine.write(out, np.where(by < width, moved, last), kind)


def _extract(machine: Machine, own: Instruction) -> None:
    kind = own.kinds[-1]
    out, a, *where = own.operands
    width = width_of(kind)
    at, size = (machine.read(each, "u32").astype(np.int64) & 0xFF for each in where)
    assert (size > 0).all() and (at + size <= width).all(), own.text
    unused = 64 - size
    values = machine.read(a, f"u{width}").astype(np.uint64) >> at.astype(np.uint64)
    values = np.asarray(values << unused.astype(np.uint64))
    if kind[0] == "s":
        machine.write(out, values.view(np.int64) >> unused, kind)
    else:
        machine.write(out, values >> unused.astype(np.uint64), kind)


def _count(machine: Machine, own: Instruction) -> None:
    out, a = own.operands
    machine.write(out, np.bitwise_count(machine.read(a, own.kinds[-1])), "u32")


def _permute(machine: Machine, own: Instruction) -> None:
    """Picks four of eight bytes, or their signs."""
    assert own.kinds == ("b32",), own.text
    out, *operands = own.operands
    low, high, chosen = (machine.read(each, "b32").astype(np.uint64) for each in operands)
    both = low | (high << np.uint64(32))
    made = np.zeros(np.broadcast_shapes(both.shape, chosen.shape), np.uint64)
    for number in range(4):
        pick = (chosen >> np.uint64(4 * number)) & np.uint64(15)
        byte = (both >> ((pick & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        sign = np.where(byte >= 128, np.uint64(255), np.uint64(0))
        made |= np.where(pick & np.uint64(8), sign, byte) << np.uint64(8 * number)
    machine.write(out, made, "b32")


# Choices and conversions

COMPARISONS: Mapping[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
LOGIC: Mapping[str, Callable[[Array, Array], Array]] = {
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
}
ROUNDINGS: Mapping[str, Callable[[Array], Array]] = {
    "rni": np.rint,
    "rzi": np.trunc,
    "rmi": np.floor,
    "rpi": np.ceil,
}


def _compare(machine: Machine, own: Instruction) -> None:
    how, *more = (each for each in own.kinds[:-1] if each != "ftz")
    kind = own.kinds[-1]
    out, a, b, *other = own.operands
    found = _compared(how, machine.read(a, kind), machine.read(b, kind), is_float(kind))
    if more:
        found = LOGIC[more[0]](found, machine.read(other[0], "pred"))
    if isinstance(out, Pair):
        assert kind.endswith("x2"), own.text
        machine.write(out.first, found[0], "pred")
        machine.write(out.second, found[1], "pred")
    else:
        machine.write(out, found, "pred")


def _compared(how: str, x: Array, y: Array, floats: bool) -> Array:
    if not floats:
        return COMPARISONS[how](x, y)
    is_none = np.isnan(x) | np.isnan(y)
    if how in ("num", "nan"):
        return np.asarray(is_none if how == "nan" else ~is_none)
    if how in COMPARISONS:  # no comparison with what is not a number is true
        return np.asarray(COMPARISONS[how](x, y) & ~is_none)
    return np.asarray(COMPARISONS[how.removesuffix("u")](x, y) | is_none)


def _select(machine: Machine, own: Instruction) -> None:
    out, a, b, by = own.operands
    width = width_of(own.kinds[-1])
    chosen = np.where(machine.read(by, "pred"), machine.words(a, width), machine.words(b, width))
    machine.write(out, chosen, f"b{width}")


def _move(machine: Machine, own: Instruction) -> None:
    """Copies, splits a register into parts, or joins them."""
    kind = own.kinds[-1]
    out, a = own.operands
    if kind == "pred":
        machine.write(out, machine.read(a, "pred"), "pred")
        return
    width = width_of(kind)
    if isinstance(out, Vector):
        words, part = machine.words(a, width), width // len(out.parts)
        for number, each in enumerate(out.parts):
            machine.write(each, words >> words.dtype.type(number * part), f"b{part}")
    elif isinstance(a, Vector):
        part = width // len(a.parts)
        words = np.zeros((), UNSIGNED[width])
        for number, each in enumerate(a.parts):
            piece = machine.words(each, part).astype(UNSIGNED[width])
            words = words | (piece << piece.dtype.type(number * part))
        machine.write(out, words, f"b{width}")
    else:
        machine.write(out, machine.words(a, width), f"b{width}")


def _convert(machine: Machine, own: Instruction) -> None:
    to, kind = own.kinds[-2:]
    if to.endswith("x2"):
        out, high, low = own.operands
        both = np.broadcast_arrays(machine.read(low, kind), machine.read(high, kind))
        machine.write(out, np.stack(both), to)
        return
    out, a = own.operands
    values = machine.read(a, kind)
    rounding = next((each for each in own.kinds if each in ROUNDINGS), None)
    if rounding is not None:
        values = ROUNDINGS[rounding](values)
    if is_float(kind) and not is_float(to):  # what is too large becomes the nearest, no number 0
        assert rounding is not None, own.text
        limits = np.iinfo(f"{'i' if to[0] == 's' else 'u'}{width_of(to) // 8}")
        values = np.clip(np.nan_to_num(values.astype(np.float64)), limits.min, limits.max)
    elif is_float(to) and to != "f64":
        values = values.astype(np.float32)
    machine.write(out, values, to)


UNARY: Mapping[str, Callable[[Array], Array]] = {
    "neg": np.negative,
    "abs": np.abs,
    "not": np.invert,
    "ex2": np.exp2,
    "lg2": np.log2,
    "sqrt": np.sqrt,
    "rsqrt": _inverse_root,
    "rcp": np.reciprocal,
}
BINARY: Mapping[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "rem": _rest,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}
INSTRUCTIONS: Mapping[str, Handler] = {
    **{name: partial(_unary, compute) for name, compute in UNARY.items()},
    **{name: partial(_binary, compute) for name, compute in BINARY.items()},
    "min": _least,
    "max": _most,
    "mul": _multiply,
    "mad": _multiply_add,
    "fma": _fused,
    "div": _divide,
    "shl": partial(_shift, np.left_shift),
    "shr": partial(_shift, np.right_shift),
    "bfe": _extract,
    "popc": _count,
    "prmt": _permute,
    "setp": _compare,
    "selp": _select,
    "mov": _move,
    "cvt": _convert,
}
