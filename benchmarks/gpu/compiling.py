"""Compiles kernels ahead, in parallel on all cores, so that no cell spends its minutes waiting."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch

from fastskip.kernels.launch import recording


def compile_ahead(calls: Iterable[Callable[[], object]], device: torch.device) -> None:
    """Compiles what the calls launch, without running it.

    Compilation errors are ignored here; the launch raises them.
    """
    if device.type != "cuda":
        return
    from triton import AsyncCompileMode

    with ThreadPoolExecutor(os.cpu_count()) as pool, AsyncCompileMode(pool, ignore_errors=True):
        for call in calls:
            with recording(is_dry=True) as account, suppress(Exception):
                call()
            for launch in account.launches:
                if launch.kernel is not None:
                    launch.kernel.warmup(
                        **launch.arguments, **launch.compiler_options, grid=launch.grid
                    )
