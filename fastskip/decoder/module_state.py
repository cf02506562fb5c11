"""Whether modules have changed since something was built from their weights."""

from __future__ import annotations

import weakref
from itertools import chain, repeat
from operator import attrgetter, contains, is_, itemgetter
from typing import Any

from torch import Tensor, nn

from fastskip.decoder.anatomy import NORM_NUMBERS

# A module's attributes that may change: its mode, its hooks and its children.
_mutable = itemgetter(
    "training",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_modules",
)
_own_parameters = itemgetter("_parameters")
_kind = attrgetter("dtype", "requires_grad")
# Scalars of norms, attentions and layers that may be baked into what is built from them.
_NUMBERS = (*NORM_NUMBERS, "scaling", "residual_multiplier")
_Attributes = list[dict[str, Any]]


class ModuleState:
    """A snapshot of modules: their children, parameters, addresses and hooks.

    What is built from weights (merged storages, graphs) is valid as long as none of these differ.
    They are checked before every prompt, so that has to be quick: a model of 32 layers has some
    400 modules and 300 parameters.
    """

    def __init__(self, *modules: nn.Module) -> None:
        # Weakly, since they may own what holds this.
        self._outer = [weakref.ref(module) for module in modules]
        # Module attributes are slow to look up, so their dictionaries are kept; whole ones, since
        # the values in them may be replaced.
        inner = (each for module in modules for each in module.modules() if each is not module)
        self._inner = [vars(each) for each in inner]
        owns = [*map(vars, modules), *self._inner]
        self._seen = [tuple(map(_copied, own)) for own in map(_mutable, owns)]
        # Kept alive, so that no other tensor reuses an identity.
        self._parameters = _list_parameters(owns)
        self._real = [each for each in self._parameters if each is not None]
        self._numbered = [
            (index, name) for index, own in enumerate(owns) for name in _NUMBERS if name in own
        ]
        self._facts = self._look(owns)

    def is_current(self) -> bool:
        """Whether nothing differs; modules and parameters are compared by identity."""
        outer = [ref() for ref in self._outer]
        if any(module is None for module in outer):
            return False
        owns = [*map(vars, outer), *self._inner]
        if list(map(_mutable, owns)) != self._seen:
            return False
        parameters = _list_parameters(owns)
        return (
            len(parameters) == len(self._parameters)
            and all(map(is_, parameters, self._parameters))
            and self._look(owns) == self._facts
        )

    def _look(self, owns: _Attributes) -> tuple[list[object], ...]:
        """The facts that matter about parameters and the modules that own them."""
        return (
            # How accelerate hooks a module.
            [*map(contains, owns, repeat("forward"))],
            [owns[index].get(name) for index, name in self._numbered],
            [*map(Tensor.data_ptr, self._real)],
            [*map(_kind, self._real)],
        )


def _list_parameters(owns: _Attributes) -> list[Any]:
    return [*chain.from_iterable(map(dict.values, map(_own_parameters, owns)))]


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, dict) else value
