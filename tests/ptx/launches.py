"""Launches kernels by compiling them to PTX and executing that."""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
from triton._C.libtriton import ir
from triton.compiler import make_backend

from fastskip import ops
from fastskip.json_file import write_json
from fastskip.kernels.compilation import Build, build_of, cache_folder
from fastskip.kernels.launch import Launch
from fastskip.ops import compiled
from tests.ptx.blocks import Blocks
from tests.ptx.instructions import HANDLERS
from tests.ptx.machine import Machine
from tests.ptx.program import Program, parse

THREADS = 1 << 14
"""That are executed at once: more take more memory, fewer more of the host's time each."""


@dataclass(frozen=True)
class Compiled:
    """A build's program, and the bytes of shared memory of a thread block."""

    build: Build
    program: Program
    shared: int


class Compiler:
    """Compiles for one architecture, every specialisation once.

    ``programs``: what was compiled, by ``Build.key``; ``watches_blocks``: whether races between
    the blocks of a launch are looked for, too, which takes long where they read much.
    """

    def __init__(self, arch: int, watches_blocks: bool = True) -> None:
        self.arch = arch
        self._watches_blocks = watches_blocks
        self.programs: dict[str, Compiled] = {}
        self._last = Blocks()

    def compiled(self, launch: Launch) -> Compiled:
        build = build_of(launch, self.arch)
        key = build.key
        if key not in self.programs:
            text, shared = _kept(key) or _keep(key, *ptx_of(build))
            self.programs[key] = Compiled(build, parse(text), shared)
        return self.programs[key]

    def launch(self, kernel: Any, grid: Sequence[int], arguments: Mapping[str, Any]) -> None:
        """Runs a kernel on tensors of the CPU; the last thread blocks first."""
        names = {parameter.name for parameter in kernel.params}
        own = {name: value for name, value in arguments.items() if name in names}
        options = {name: value for name, value in arguments.items() if name not in names}
        launched = Launch(kernel.__name__, tuple(grid), kernel, own, options)
        made = self.compiled(launched)
        program = made.program
        bits = _bits(made.build, own, kernel, program)
        values = dict(zip(program.parameters, bits, strict=True))
        x, y, z = (*grid, 1, 1)[:3]
        blocks = np.array([*np.ndindex(z, y, x)], np.int64)[::-1, ::-1]
        at_once = max(THREADS // program.threads, 1)
        between = Blocks() if self._watches_blocks else None
        before = self._last if options.get("launch_pdl") else None
        for first in range(0, len(blocks), at_once):
            part = blocks[first : first + at_once]
            # Races are the same in all blocks, and looking for them takes most of the time.
            watches = first == 0
            Machine(
                program, HANDLERS, values, (x, y, z), part, made.shared, watches, between, before
            ).run()
        self._last = between or Blocks()


def ptx_of(build: Build) -> tuple[str, int]:
    """The PTX of a build, and the bytes of shared memory that it needs."""
    target, source = build.target, build.source
    backend = make_backend(target)
    options = backend.parse_options(dict(build.options))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    made = source.make_ir(
        target,
        options,
        backend.get_codegen_implementation(options),
        backend.get_module_map(),
        context,
    )
    metadata: dict[str, Any] = {"target": target, **vars(options)}
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    for name, stage in stages.items():
        if name == "cubin":
            break
        made = stage(made, metadata)
    return str(made), metadata["shared"]


def _path(key: str) -> Path:
    return cache_folder() / f"{key}.ptx.json"


def _kept(key: str) -> tuple[str, int] | None:
    path = _path(key)
    if not path.is_file():
        return None
    text, shared = json.loads(path.read_text())
    return text, shared


def _keep(key: str, text: str, shared: int) -> tuple[str, int]:
    write_json(_path(key), [text, shared])
    return text, shared


def _bits(
    build: Build, arguments: Mapping[str, Any], kernel: Any, program: Program
) -> Iterator[int]:
    """The bits of the parameters that are no constants, in order; scratch memory is none."""
    kinds = iter(program.parameters.values())
    for number, parameter in enumerate(kernel.params):
        yield from _flat(arguments[parameter.name], (number,), build, kinds)
    yield from itertools.repeat(0, sum(1 for _ in kinds))


def _flat(value: Any, path: tuple[int, ...], build: Build, kinds: Iterator[str]) -> Iterator[int]:
    if path in build.constants:
        return
    if isinstance(value, tuple):
        for number, each in enumerate(value):
            yield from _flat(each, (*path, number), build, kinds)
        return
    kind = next(kinds)
    if isinstance(value, torch.Tensor):
        yield value.data_ptr()
    elif kind in ("f32", "b32") and isinstance(value, float):
        yield struct.unpack("<I", struct.pack("<f", value))[0]
    elif kind == "f64":
        yield struct.unpack("<Q", struct.pack("<d", value))[0]
    else:
        yield int(value) & ((1 << int(kind[1:])) - 1)


@contextmanager
def executing(arch: int, watches_blocks: bool = True) -> Iterator[Compiler]:
    """Within it, launches run as PTX for an architecture, 10 * major + minor."""
    compiler = Compiler(arch, watches_blocks)

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        assert not warmup
        positional = dict(zip(kernel.arg_names, arguments, strict=False))
        compiler.launch(kernel, grid, positional | named)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(triton.runtime.jit.JITFunction, "run", run)
        # Elsewhere compiled kernels are refused on a CPU.
        patched.setattr(compiled, "_runnable", lambda x: x)
        patched.setattr(ops, "_require_triton", lambda device: None)
        yield compiler
