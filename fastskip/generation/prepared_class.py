"""The class of a prepared module: that of the checkpoint, with a mixin in front."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from fastskip.generation.cache_name import takes_old_name
from fastskip.generation.runtime import Runtime


class Prepared:
    """What the prepared classes share.

    Until ``prepare`` sets the runtime (in an instance made from the class itself) they behave like
    their base.
    """

    extra_inputs: tuple[str, ...] = ("token_classes",)
    """Inputs that ``forward`` takes beyond those of the base."""
    _fastskip: Runtime | None = None
    _fastskip_origin: tuple[type, type]

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, self._fastskip_origin, self.__dict__

    @property
    def _runtime(self) -> Runtime:
        assert self._fastskip is not None
        return self._fastskip


def adopt(module: Any, mixin: Any, runtime: Runtime) -> None:
    """Makes a module prepared, in place: its class gets ``mixin`` in front."""
    base: Any = type(module)
    module.__class__ = prepared_class(base, mixin)
    module._fastskip = runtime


@functools.cache
def prepared_class(base: Any, mixin: Any) -> type:
    """``base`` with ``mixin`` in front: same name, same module, ``isinstance`` holds."""
    signature = inspect.signature(base.forward)

    # generate() reads the signature of forward to learn what a model accepts.
    @takes_old_name
    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._fastskip is None:
            return base.forward(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs).arguments
        del bound["self"]
        return self._run(bound | bound.pop("kwargs", {}))

    *named, rest = signature.parameters.values()
    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in mixin.extra_inputs
    ]
    forward.__signature__ = signature.replace(parameters=[*named, *extra, rest])  # type: ignore[attr-defined]
    members = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "forward": forward,
        "_fastskip_origin": (base, mixin),
    }
    return type(base.__name__, (mixin, base), members)


def _restore(base: type, mixin: Any) -> Any:
    made: Any = prepared_class(base, mixin)
    return made.__new__(made)
