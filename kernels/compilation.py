"""Compiles kernels ahead of time, for any NVIDIA architecture, on a machine without a GPU.

A recorded launch (``launch.recording(is_dry=True)``) holds a kernel, its arguments and its options.
``build_of`` specialises it as a launch on the device would: pointer element types and their
divisibility by 16, integer widths, an integer 1 as a constant. ``compile_all`` compiles such builds
on all cores and extracts what the machine code uses. Findings are cached in the user's cache
directory, keyed by everything that determines the machine code.

Compiled and interpreted kernels are different objects: this works only in a process started
without ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITCallable, create_function_from_signature

from fastskip.kernels.launch import Launch
from fastskip.kernels.sources import meaning_of

VERSION = 3
"""Of the findings; a new version invalidates the cached ones."""

SHARED_LIMITS = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes of shared memory available to a program, by architecture."""

WIDE = re.compile(r"\b(?:LDG(?:STS)?\.[A-Z0-9_.]*(?:128|256)\b|UTMALDG|UBLKCP)")
"""Loads of at least 16 bytes per thread, and bulk copies."""
MATRIX = re.compile(r"\b(HGMMA|HMMA|UTCHMMA)\b")
WAIT = re.compile(r"\bACQBULK\b")
"""Waits for earlier launches (``overlap``)."""
ACCESS = re.compile(
    r"\b(?:LD|LDG|LDGSTS|ST|STG|ATOM|ATOMG|RED|REDG|UTMALDG|UTMASTG|UBLKCP|UBLKRED|EXIT)\b"
)
"""Accesses to memory that other launches may write, and program exits."""
AHEAD = re.compile(r"\bLDG\.[A-Z0-9_.]*STRONG\.(?:GPU|SYS)\b")
"""Loads that bypass the L1 cache: allowed ahead of the wait (``overlap.read``)."""


@dataclass(frozen=True)
class Build:
    """One kernel specialisation to compile; every field can be pickled."""

    module: str
    kernel: str
    signature: Mapping[str, str]
    constants: Mapping[tuple[int, ...], Any]
    attributes: Mapping[tuple[int, ...], Any]
    options: Mapping[str, Any]
    arch: int

    @property
    def function(self) -> Any:
        """The kernel."""
        return getattr(importlib.import_module(self.module), self.kernel)

    @property
    def target(self) -> GPUTarget:
        return _target(self.arch)

    @property
    def source(self) -> ASTSource:
        """What Triton compiles."""
        return ASTSource(
            self.function, dict(self.signature), dict(self.constants), dict(self.attributes)
        )

    @property
    def key(self) -> str:
        """Equal for builds of the same machine code: what the sources say, specialisation, options,
        versions."""
        backend = make_backend(self.target)
        constants = {
            path: meaning_of(value) if isinstance(value, JITCallable) else value
            for path, value in self.constants.items()
        }
        parts = (
            meaning_of(self.function),
            sorted(self.signature.items()),
            sorted((path, str(value)) for path, value in constants.items()),
            sorted((path, str(value)) for path, value in self.attributes.items()),
            sorted((name, str(value)) for name, value in self.options.items()),
            triton.__version__,
            backend.hash(),
            VERSION,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Finding:
    """What the machine code of a build uses; ``error`` says why there is none.

    ``registers`` per thread, ``spills`` and ``stack`` in bytes per thread, ``shared`` in bytes per
    program, ``wide``: instructions that load at least 16 bytes per thread, ``matrix``: matrix
    instructions by name, ``waits``: waits for earlier launches, ``early``: memory accesses and
    exits ahead of the first wait, except loads that bypass the L1 cache.
    """

    registers: int = 0
    spills: int = 0
    stack: int = 0
    shared: int = 0
    wide: int = 0
    matrix: Mapping[str, int] | None = None
    waits: int = 0
    early: int = 0
    error: str | None = None


def build_of(launch: Launch, arch: int) -> Build:
    """What ``launch`` would compile on a device of architecture ``arch`` (10 * major + minor)."""
    kernel = launch.kernel
    if not hasattr(kernel, "cache_key"):
        raise RuntimeError("kernels are interpreted in this process: unset TRITON_INTERPRET")
    backend = make_backend(_target(arch))
    # The launcher's own binder, for a target other than this machine's.
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    asked = launch.compiler_options
    bound, specialisation, _ = bind(**launch.arguments, **asked)
    options, signature, constants, attributes = kernel._pack_args(
        backend, asked, bound, specialisation, None
    )
    return Build(
        kernel.fn.__module__,
        kernel.__name__,
        signature,
        constants,
        attributes,
        {name: value for name, value in vars(options).items() if name != "extern_libs"},
        arch,
    )


def compile_all(
    builds: Iterable[Build],
    workers: int | None = None,
    known: Mapping[str, Finding] | None = None,
) -> dict[str, Finding]:
    """Findings by ``Build.key``; builds that are neither ``known`` nor cached are compiled, in
    ``workers`` processes (default: one per core)."""
    wanted = {build.key: build for build in builds}
    found = {key: known[key] for key in wanted if known and key in known}
    found |= {
        key: kept for key in wanted if key not in found and (kept := _read_cached(key)) is not None
    }
    missing = [key for key in wanted if key not in found]
    if missing:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=context) as pool:
            for key, finding in zip(
                missing, pool.map(_compile, [wanted[key] for key in missing]), strict=True
            ):
                found[key] = finding
                if finding.error is None:
                    _write_cached(key, finding)
    return found


def compile_build(build: Build) -> Finding:
    """Compiles ``build`` and inspects its machine code."""
    log = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        triton.knobs.nvidia.scope(),
        triton.knobs.compilation.scope(),
        triton.knobs.cache.scope(),
        contextlib.redirect_stdout(log),
    ):
        triton.knobs.cache.dir = folder
        triton.knobs.compilation.always_compile = True
        triton.knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(build.source, target=build.target, options=dict(build.options))
    sass = disassemble(compiled.asm["cubin"])
    before, *after = WAIT.split(sass)
    return Finding(
        registers=_number(r"Used (\d+) registers", log.getvalue()),
        spills=_number(r"(\d+) bytes spill stores", log.getvalue())
        + _number(r"(\d+) bytes spill loads", log.getvalue()),
        stack=_number(r"(\d+) bytes stack frame", log.getvalue()),
        shared=compiled.metadata.shared,
        wide=len(WIDE.findall(sass)),
        matrix=dict(sorted(Counter(MATRIX.findall(sass)).items())),
        waits=len(after),
        early=len(ACCESS.findall(AHEAD.sub("", before))) if after else 0,
    )


def disassemble(cubin: bytes) -> str:
    """The machine code as text."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        # -ndf skips the dataflow analysis, which takes a third of the time.
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", "-ndf", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _compile(build: Build) -> Finding:
    try:
        return compile_build(build)
    except Exception as error:  # one kernel that does not compile must not hide the others
        return Finding(error=f"{type(error).__name__}: {error}".strip())


def _target(arch: int) -> GPUTarget:
    return GPUTarget("cuda", arch, 32)


def _number(pattern: str, text: str) -> int:
    """The largest number that ``pattern`` matches: a log also covers called functions."""
    return max((int(number) for number in re.findall(pattern, text)), default=0)


def cache_folder() -> Path:
    """Where findings are kept between runs."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "fastskip" / "compiled"


def _read_cached(key: str) -> Finding | None:
    path = cache_folder() / f"{key}.json"
    return Finding(**json.loads(path.read_text())) if path.is_file() else None


def _write_cached(key: str, finding: Finding) -> None:
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    # Another process may write the same finding: rename the file only once it is complete.
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".part", delete=False) as file:
        json.dump(asdict(finding), file)
    Path(file.name).replace(folder / f"{key}.json")
