"""Triton's interpreter, without the half of its time in which it does nothing."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import triton.language as tl


@contextmanager
def patching_once() -> Iterator[None]:
    """The interpreter patches Triton's language when a kernel begins, and looks for what is left to
    patch at every call of a device function, a millisecond each. Here the looks are left out: where
    a module's ``load`` has been patched, so has all of it."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def once(function: Any) -> Any:
        modules = [m for m in function.__globals__.values() if inspect.ismodule(m)]
        if any(tl.core.is_builtin(m.load) for m in modules if m in (tl, tl.core)):
            return patch(function)
        return interpreter._LangPatchScope()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(interpreter, "_patch_lang", once)
        yield
