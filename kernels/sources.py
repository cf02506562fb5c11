"""What the source of a kernel says, apart from how it is written down.

Triton's own key of a kernel changes with every comment and every line that moves. Compile findings
are kept in the repository, so they need a key that changes only with what is compiled.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from types import FunctionType, ModuleType
from typing import Any

from triton.language import constexpr, dtype
from triton.runtime.jit import JITCallable

Constant = bool | int | float | str | constexpr | dtype


@cache
def meaning_of(kernel: JITCallable) -> str:
    """The syntax trees of a kernel and of all functions and classes that it may use, without
    docstrings, comments and positions, and the constants that these name. What Triton brings is
    left out: its version belongs in every key."""
    found: dict[int, str] = {}
    _collect(kernel, found)
    return "\n".join(sorted(found.values()))


def _collect(part: Any, found: dict[int, str]) -> None:
    """Adds a function or class, and what it uses, to ``found`` by identity."""
    if id(part) in found:
        return
    found[id(part)] = ""  # it may call itself
    constants = []
    for name, value in _used(part):
        if isinstance(value, JITCallable | FunctionType | type):
            if not value.__module__.startswith("triton."):
                _collect(value, found)
        elif isinstance(value, Constant):
            constants.append(f"{name} = {value!r}")
    inlined = getattr(part, "noinline", False)
    found[id(part)] = f"{_tree(part)} noinline={inlined} {sorted(constants)}"


def _used(part: Any) -> Iterator[tuple[str, Any]]:
    """What a function's names may mean: globals, and members of modules among them."""
    function = getattr(part, "fn", part)
    if not isinstance(function, FunctionType):
        return  # a class: what it holds are annotations
    names = set(function.__code__.co_names)
    for name in names & function.__globals__.keys():
        value = function.__globals__[name]
        if isinstance(value, ModuleType):
            members = names & vars(value).keys()
            yield from ((f"{name}.{member}", getattr(value, member)) for member in members)
        else:
            yield name, value


def _tree(part: Any) -> str:
    tree = ast.parse(textwrap.dedent(inspect.getsource(getattr(part, "fn", part))))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.dump(tree)
