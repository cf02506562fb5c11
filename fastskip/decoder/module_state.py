"""Whether a module is as it was when something was made of its weights."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

from torch import nn

from fastskip.decoder.anatomy import NORM_NUMBERS

# Of a module's attributes, what may change: hooks, and which modules lie in it.
_mutable = itemgetter(
    "training",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_modules",
)


class ModuleState:
    """Which modules and parameters a module has, where they lie, and who hooks them.

    What is made of weights, merged storages or a graph, is right as long as nothing of it differs.
    A look at all of it is made before every prompt, so it has to be quick.
    """

    def __init__(self, module: nn.Module) -> None:
        # Attributes of a module are slow to look up. Whole dictionaries, since what is in them may
        # be replaced.
        self._owns = [vars(each) for each in module.modules()]
        self._numbers = [(own, name) for own in self._owns for name in NORM_NUMBERS if name in own]
        self._seen = [tuple(map(_copied, own)) for own in map(_mutable, self._owns)]
        # Held, so that no other tensor gets the identity of one.
        self._parameters = self._list_parameters()
        self._facts = self._look(self._parameters)

    def is_current(self) -> bool:
        """Whether nothing differs; modules and parameters are compared by identity."""
        if list(map(_mutable, self._owns)) != self._seen:
            return False
        return self._look(self._list_parameters()) == self._facts

    def _list_parameters(self) -> list[Any]:
        return [each for own in self._owns for each in own["_parameters"].values()]

    def _look(self, parameters: list[Any]) -> list[object]:
        """What matters of parameters, and of the modules that have them."""
        facts: list[object] = ["forward" in own for own in self._owns]  # as accelerate hooks one
        # Norms' numbers, which merged products hold.
        facts += [own.get(name) for own, name in self._numbers]
        facts += map(id, parameters)
        for each in parameters:
            if each is not None:
                facts += each.data_ptr(), each.dtype, each.requires_grad
        return facts


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, dict) else value
