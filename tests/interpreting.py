"""Triton's interpreter, without what it does again and again to the same end: most of its time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import triton
import triton.language as tl
from triton.language.semantic import TritonSemantic


@contextmanager
def interpreting_quickly() -> Iterator[None]:
    """What kernels compute stays as it is, and so do the errors that they meet. Where they are
    compiled, this does nothing."""
    from triton.runtime import interpreter

    if not triton.knobs.runtime.interpret:
        yield
        return
    builder, core = interpreter.interpreter_builder, tl.core
    with pytest.MonkeyPatch.context() as patched:
        # Sums and products are computed once more in 64 bits, and nobody looks at the result.
        assert not builder.options.debug
        patched.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
        patched.setattr(interpreter, "_patch_lang", _patching_once(interpreter))
        patched.setattr(interpreter, "_patch_lang_tensor", _indexing(interpreter))
        patched.setattr(interpreter, "_get_np_dtype", _numpy_types(interpreter._get_np_dtype))
        patched.setattr(core.block_type, "__init__", _block_types(core.block_type.__init__))
        patched.setattr(core.tensor, "__init__", _make_tensor)
        patched.setattr(core.dtype, "__eq__", _same_or(core.dtype.__eq__))
        patched.setattr(interpreter, "_patch_attr", _patch_attribute)
        splat = _splatting(interpreter.InterpreterBuilder.create_splat)
        patched.setattr(interpreter.InterpreterBuilder, "create_splat", splat)
        for name, quickly in (
            ("broadcast_impl_value", _broadcasting),
            ("cast", _casting),
            ("scalar_constant", _constants),
            ("computation_type_impl", cache),
        ):
            patched.setattr(TritonSemantic, name, quickly(getattr(TritonSemantic, name)))
        yield


def _patching_once(interpreter: Any) -> Callable[[Any], Any]:
    """The interpreter patches Triton's language when a kernel begins, and again at every call of a
    device function, milliseconds each. Here the patches of a first kernel are kept for others, and
    a language that is patched stays so: where a module's ``load`` has been, so has all of it."""
    patch, kept = interpreter._patch_lang, dict[tuple[bool, ...], list[tuple[Any, str, Any]]]()

    @cache
    def languages(function: Any) -> list[Any]:
        modules = [m for m in function.__globals__.values() if inspect.ismodule(m)]
        return [m for m in modules if m in (tl, tl.core)]

    def once(function: Any) -> Any:
        found = languages(function)
        if not any(tl.core.is_builtin(module.load) for module in found):
            return interpreter._LangPatchScope()
        which = tl in found, tl.core in found
        if which not in kept:
            scope = patch(function)
            places = {(id(owner), name): owner for owner, name, _ in scope._changes}
            kept[which] = [(o, name, getattr(o, name)) for (_, name), o in places.items()]
            return scope
        scope = interpreter._LangPatchScope()
        for change in kept[which]:
            scope.set_attr(*change)
        return scope

    return once


def _indexing(interpreter: Any) -> Callable[[Any, Any], None]:
    """A number that bounds a loop is an array of one element, of which NumPy warns each time."""
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patch_tensor


def _numpy_types(get: Callable[[Any], Any]) -> Callable[[Any], Any]:
    of_scalar = cache(get)

    def numpy_type(type: Any) -> Any:
        scalar = type.scalar
        return get(scalar) if scalar.is_ptr() else of_scalar(scalar)

    return numpy_type


def _block_types(make: Callable[[Any, Any, Any], None]) -> Callable[[Any, Any, Any], None]:
    """One tuple of sizes for all types of a shape, which has been found to be a valid one."""
    known = dict[str, tuple[Any, Any, str]]()

    def quickly(self: Any, element_ty: Any, shape: Any) -> None:
        # As text, in which 4.0, which is no size, differs from 4.
        sizes = str([size.value if isinstance(size, tl.constexpr) else size for size in shape])
        if sizes not in known:
            make(self, element_ty, shape)
            known[sizes] = self.shape, self.numel, str(self.shape)
            return
        self.element_ty = element_ty
        self.shape, self.numel, text = known[sizes]
        self.name = f"<{text}, {element_ty}>"

    return quickly


def _make_tensor(self: Any, handle: Any, type: Any) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _shape(tuple(type.shape.values) if type.is_block() else ())


@cache
def _shape(sizes: tuple[int, ...]) -> tuple[Any, Any]:
    """What a tensor says of its shape."""
    numel = 1
    for size in sizes:
        numel *= size
    return tl.core.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(numel)


def _same_or(equal: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    return lambda self, other: self is other or equal(self, other)


def _patch_attribute(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
    """Calls a builtin at once; that it is called from a kernel, as it would make sure, is known."""
    call, semantic = getattr(member, "__wrapped__", member), TritonSemantic(builder)

    def patched(*args: Any, _semantic: Any = None, **kwargs: Any) -> Any:
        return call(*args, _semantic=semantic, **kwargs)

    scope.set_attr(owner, name, patched)


def _splatting(splat: Callable[..., Any]) -> Callable[..., Any]:
    """What comparisons of numbers find is said to be of the numbers' type, and splatted becomes it:
    no mask for Triton 3.9."""

    def with_bits(*args: Any) -> Any:
        made = splat(*args)
        if args[-1].data.dtype == bool:
            made.data = made.data.astype(bool)
        return made

    return with_bits


def _broadcasting(broadcast: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any, Any], Any]:
    """Types of one shape share its tuple, so by two tuples it is known what they come to."""
    known = dict[tuple[int, int], tuple[Any, Any, Any]]()

    def quickly(self: Any, lhs: Any, rhs: Any) -> Any:
        mine, other = (getattr(each.type, "shape", None) for each in (lhs, rhs))
        if mine is other:
            return lhs, rhs
        key = id(mine), id(other)
        if key in known:
            return tuple(_broadcast(self, each, known[key][-1]) for each in (lhs, rhs))
        found = broadcast(self, lhs, rhs)
        if mine is not None and other is not None and len(mine) == len(other):
            known[key] = mine, other, found[0].type.shape
        return found

    return quickly


def _broadcast(semantic: Any, tensor: Any, shape: Any) -> Any:
    if tensor.type.shape is shape:
        return tensor
    type = tl.block_type(tensor.dtype, shape)
    return semantic.tensor(semantic.builder.create_broadcast(tensor.handle, shape.values), type)


def _casting(cast: Callable[..., Any]) -> Callable[..., Any]:
    def quickly(self: Any, input: Any, dst_ty: Any, fp_downcast_rounding: Any = None) -> Any:
        is_done = input.dtype is dst_ty.scalar
        return input if is_done else cast(self, input, dst_ty, fp_downcast_rounding)

    return quickly


def _constants(make: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any, Any], Any]:
    known = dict[tuple[Any, type, str], Any]()

    def quickly(self: Any, value: Any, dtype: Any) -> Any:
        key = value, type(value), dtype.name
        if key not in known:
            known[key] = make(self, value, dtype)
            known[key].handle.data.setflags(write=False)
        return known[key]

    return quickly
