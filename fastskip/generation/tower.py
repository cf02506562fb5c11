"""The vision tower of a prompt as a CUDA graph.

A tower is some three hundred launches of a few microseconds each, so for an image or two the device
waits for the host. A graph is captured when images of a shape arrive for the second time, and only
inside ``generate``, where nothing keeps the tower's outputs: the next run overwrites them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastskip.decoder.anatomy import hooks_of, is_transformers_own
from fastskip.decoder.fused.kept_graphs import Graphs
from fastskip.decoder.module_state import ModuleState
from fastskip.ops.graphs import capture

KEPT = 4
"""Graphs kept; they share the memory of their activations."""
SEEN = 64
"""Shapes remembered without a graph."""
MOST_IMAGES = 8
"""With more, the host finishes before the device anyway."""

_KNOWN = ("torch.", "transformers.")
"""Packages whose modules depend on nothing but weights, hooks and training mode."""

Forward = Callable[..., Any]


class TowerGraphs:
    """The graphs of one tower.

    ``captures`` may be set at any time; ``None``: on CUDA. On an H200 this cuts the time to first
    token of a 7B model by a fifth (cell ``graphs.tower.b1`` of the GPU protocol).
    """

    def __init__(self) -> None:
        self.captures: bool | None = None
        self._state: ModuleState | None = None
        self._is_capturable = False
        self._graphs: Graphs[Hashable, TowerGraph] = Graphs(KEPT, SEEN)

    def __len__(self) -> int:
        return len(self._graphs)

    def __getstate__(self) -> dict[str, Any]:
        # Graphs hold addresses, so a copy starts without any.
        return {**type(self)().__dict__, "captures": self.captures}

    def run(self, tower: nn.Module, forward: Forward, inputs: Mapping[str, Any]) -> Any:
        """``forward(tower, **inputs)``, by a graph if there is one or it pays to capture one."""
        pixels = inputs.get("pixel_values")
        options = {name: value for name, value in inputs.items() if name != "pixel_values"}
        call = self._call(pixels, options)
        if call is None or pixels is None:
            return forward(tower, **inputs)
        if self._state is None or not self._state.is_current():
            self._graphs.clear()
        graph = self._graphs.get(call)
        if graph is None and self._graphs.pays(call) and self._is_capturable:
            held = weakref.ref(tower)  # weak: the tower holds what keeps this
            work = lambda own: forward(held(), own, **options)  # noqa: E731
            build = lambda pool: TowerGraph(work, pixels.clone(), pool)  # noqa: E731
            graph = self._graphs.make_if_room(call, pixels.device, build)
        if graph is not None:
            return graph.run(pixels)
        output = forward(tower, **inputs)
        self._look_at(tower)  # only now: a first forward may add transformers' own hooks
        return output

    def _call(self, pixels: Any, options: Mapping[str, Any]) -> Hashable:
        """What the graph of a call bakes in; ``None`` if the call cannot be captured."""
        if torch.is_grad_enabled():
            return None
        if not isinstance(pixels, Tensor) or not 0 < len(pixels) <= MOST_IMAGES:
            return None
        if torch.is_autocast_enabled(pixels.device.type):
            return None  # it frees the weights that it has cast
        if not (pixels.is_cuda if self.captures is None else self.captures):
            return None
        plain = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in options.items()
        }
        if any(isinstance(x, Tensor) or not _is_hashable(x) for x in plain.values()):
            return None
        return tuple(pixels.shape), pixels.dtype, pixels.device, tuple(sorted(plain.items()))

    def _look_at(self, tower: nn.Module) -> None:
        """Records the state that graphs of the tower depend on, unless it is current."""
        if self._state is not None and self._state.is_current():
            return
        self._state = ModuleState(tower)
        modules = list(tower.modules())
        hooks = [hook for module in modules for hook in hooks_of(module)]
        # Others, such as adapters, may behave differently next time without a weight changing.
        are_known = all(type(module).__module__.startswith(_KNOWN) for module in modules)
        is_fixed = are_known and all(map(is_transformers_own, hooks))
        self._is_capturable = is_fixed and not tower.training


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:  # a list, perhaps inside a tuple
        return False
    return True


class TowerGraph:
    """One forward of a tower on ``pixels``, whose address is fixed."""

    def __init__(self, forward: Forward, pixels: Tensor, pool: Any) -> None:
        self._forward, self._pixels = forward, pixels
        self._output: Any = None
        self._replay = capture(self._work, pixels.device, pool)

    def run(self, pixels: Tensor) -> Any:
        """The forward on new pixels; its outputs are valid until the next run."""
        self._pixels.copy_(pixels)
        self._replay()
        output = self._output
        # A new object, since callers add to it.
        return output if isinstance(output, tuple) else type(output)(**output)

    def _work(self) -> None:
        self._output = self._forward(self._pixels)
