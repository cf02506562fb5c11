"""Facts about the CPU on which the fastest form of an operation depends.

The same torch build is fast or slow at the same product by who made the CPU: MKL has its own code
for Intel's and a plain one for others.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch


@cache
def has_avx512() -> bool:
    """Whether torch uses AVX-512 here."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


@cache
def has_amx(dtype: torch.dtype) -> bool:
    """Whether the CPU has AMX (Intel, from Sapphire Rapids on), for fp16 that of Granite Rapids;
    fp64 has none."""
    if dtype is torch.float64:
        return False
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_fp16" if dtype is torch.float16 else "amx_tile", False))


@cache
def has_mkl_for_others() -> bool:
    """Whether torch multiplies by MKL on a CPU that is not Intel's."""
    return torch.backends.mkl.is_available() and "intel" not in described("vendor_id").lower()


def described(field: str) -> str:
    """A field of Linux's ``/proc/cpuinfo``, such as ``vendor_id``: ``GenuineIntel``. Where there is
    none, what the platform calls the processor, which contains the vendor; empty if nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith(field))
    return next(names, "") or platform.processor()
