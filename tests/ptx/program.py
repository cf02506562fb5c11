"""PTX text as instructions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple


class Register(NamedTuple):
    name: str


class Immediate(NamedTuple):
    """The bits of a constant, negative or not."""

    bits: int


class Address(NamedTuple):
    base: Operand
    offset: int


class Vector(NamedTuple):
    parts: tuple[Operand, ...]


class Pair(NamedTuple):
    """Two results of one instruction."""

    first: Register
    second: Register


class Symbol(NamedTuple):
    name: str


Operand = Register | Immediate | Address | Vector | Pair | Symbol


@dataclass(frozen=True)
class Instruction:
    """``kinds``: the opcode's parts behind its name; ``guard``: the predicate that a thread needs
    to have, or, if ``unless``, must not have; ``place``: the line of the kernel."""

    name: str
    kinds: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None
    unless: bool
    text: str
    place: str


@dataclass(frozen=True)
class Program:
    """``parameters``: names and types; ``widths``: bits of a register, by its name's prefix, 1 for
    predicates; ``labels``: the number of the instruction behind each."""

    parameters: Mapping[str, str]
    widths: Mapping[str, int]
    labels: Mapping[str, int]
    instructions: tuple[Instruction, ...]
    threads: int

    def without(self, number: int) -> Program:
        """The program without one instruction."""
        rest = (*self.instructions[:number], *self.instructions[number + 1 :])
        moved = {name: at - (at > number) for name, at in self.labels.items()}
        return replace(self, labels=moved, instructions=rest)

    def width(self, register: str) -> int:
        return self.widths[register] if register in self.widths else self.widths[_prefix(register)]


ENTRY = re.compile(r"\.visible \.entry (\S+?)\((.*?)\)(.*?)\{\n(.*?)^\}", re.DOTALL | re.MULTILINE)
PARAMETER = re.compile(r"\.param \.(\w+)[^,]*?(\w+)\s*(?:,|$)")
REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)")
PLACE = re.compile(r"\.loc\s.*//\s*(\S+)")
STATEMENT = re.compile(r"(?:@(!?)(%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)


def parse(text: str) -> Program:
    """The program of the only entry of ``text``."""
    entry = ENTRY.search(text)
    assert entry is not None, "no entry"
    _, parameters, limits, body = entry.groups()
    widths: dict[str, int] = {}
    labels: dict[str, int] = {}
    made: list[Instruction] = []
    for statement, place in _statements(body):
        registers = REGISTERS.fullmatch(statement)
        if registers is not None:
            width = 1 if registers[1] == "pred" else int(registers[1].lstrip("bfsu"))
            for name in registers[2].split(","):
                widths[re.sub(r"<\d+>", "", name.strip())] = width
        elif statement.endswith(":"):
            labels[statement[:-1]] = len(made)
        elif not statement.startswith("."):
            made.append(_instruction(statement, place))
    threads = re.search(r"\.reqntid\s+(\d+)", limits)
    assert threads is not None
    named = {name: kind for kind, name in PARAMETER.findall(parameters)}
    return Program(named, widths, labels, tuple(made), int(threads[1]))


def _statements(body: str) -> Iterator[tuple[str, str]]:
    """Statements, and labels with their colons, each with the line of the kernel."""
    place = ""
    rest = ""
    for line in body.splitlines():
        found = PLACE.search(line)
        if found is not None:
            place = found[1]
        line = line.split("//")[0].strip()
        if not line or re.match(r"\.(?:loc|pragma|file|section|b8)\b", line):
            continue
        rest += " " + line
        while True:
            rest = rest.lstrip()
            # A scope of its own, not a vector: vectors stand behind opcodes.
            if rest[:1] in ("{", "}"):
                rest = rest[1:]
                continue
            label = re.match(r"(\$\w+|\w+):", rest)
            if label is not None:
                yield label[0], place
                rest = rest[label.end() :]
                continue
            if ";" not in rest:
                break
            statement, rest = rest.split(";", 1)
            if statement.strip():
                yield statement.strip(), place


def _instruction(statement: str, place: str) -> Instruction:
    found = STATEMENT.fullmatch(statement)
    assert found is not None, statement
    unless, guard, opcode, rest = found.groups()
    name, *kinds = opcode.replace("::", "_").split(".")
    operands = tuple(_operand(part) for part in _split(rest))
    by = Register(guard) if guard else None
    return Instruction(name, tuple(kinds), operands, by, bool(unless), statement, place)


def _split(text: str) -> Iterator[str]:
    """What stands between the commas that are in no brackets."""
    depth, part = 0, ""
    for sign in text:
        depth += (sign in "{[(") - (sign in "}])")
        if sign == "," and not depth:
            yield part.strip()
            part = ""
        else:
            part += sign
    if part.strip():
        yield part.strip()


def _operand(text: str) -> Operand:
    if text[0] in "{(":
        return Vector(tuple(_operand(part) for part in _split(text[1:-1])))
    if text[0] == "[":
        base, _, offset = text[1:-1].partition("+")
        return Address(_operand(base.strip()), int(offset or 0))
    if "|" in text:
        first, second = text.split("|")
        return Pair(Register(first.strip()), Register(second.strip()))
    number = re.fullmatch(r"(-?)(0[fd])?(0x)?([0-9A-Fa-f]+)U?", text)
    if number is not None:
        sign, floating, hexadecimal, digits = number.groups()
        bits = int(digits, 16 if floating or hexadecimal else 10)
        return Immediate(-bits if sign else bits)
    if text[0] == "%" or text in ("_", "p", "q"):
        return Register(text)
    return Symbol(text)


def _prefix(register: str) -> str:
    return register.rstrip("0123456789")
