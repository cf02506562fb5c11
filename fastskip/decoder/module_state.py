"""Whether a module is as it was when something was made of its weights."""

from __future__ import annotations

from torch import nn

from fastskip.decoder.anatomy import NORM_NUMBERS


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
        self._children, self._parameters, self._facts = self._look()

    def is_current(self) -> bool:
        """Whether nothing differs; modules and parameters are compared by identity."""
        children, parameters, facts = self._look()
        return (
            facts == self._facts
            and list(map(id, children)) == list(map(id, self._children))
            and list(map(id, parameters)) == list(map(id, self._parameters))
        )

    def _look(self) -> tuple[list[object], list[object], list[object]]:
        """Modules that lie in others, parameters, and what matters of both."""
        owns = self._owns
        children: list[object] = [child for own in owns for child in own["_modules"].values()]
        parameters = [each for own in owns for each in own["_parameters"].values()]
        facts: list[object] = [own["training"] for own in owns]
        # How many hooks there are; ``forward``, where accelerate puts one of its kind.
        facts += [
            len(own["_forward_hooks"])
            + len(own["_forward_pre_hooks"])
            + len(own["_backward_hooks"])
            + len(own["_backward_pre_hooks"])
            + ("forward" in own)
            for own in owns
        ]
        # Norms' numbers, which merged products hold.
        facts += [own.get(name) for own, name in self._numbers]
        for each in parameters:
            if each is not None:
                facts += each.data_ptr(), each.dtype, each.requires_grad
        return children, parameters, facts
