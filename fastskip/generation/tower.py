"""The vision tower of a prompt as a CUDA graph.

A tower is some three hundred launches of a few microseconds each, so that for an image or two the
device waits for the host. A graph is made when images of a shape come for the second time; and only
inside ``generate``, where nobody keeps what a tower returns: the next run writes to that memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastskip.decoder.anatomy import hooks_of, is_transformers_own
from fastskip.decoder.kept_graphs import Graphs
from fastskip.decoder.module_state import ModuleState
from fastskip.ops.graphs import capture

KEPT = 4
"""Graphs kept; they share their activations' memory."""
SEEN = 64
"""Shapes remembered that have no graph."""
MOST_IMAGES = 8
"""With more, the host is done before the device anyway."""

_KNOWN = ("torch.", "transformers.")
"""Whose modules do the same as long as weights, hooks and training mode stay."""

Forward = Callable[..., Any]


class TowerGraphs:
    """The graphs of one tower.

    ``captures`` may be set at any time; ``None``: on CUDA. On an H200 the first token of a 7B model
    comes a fifth sooner with it (cell ``graphs.tower.b1`` of the GPU protocol).
    """

    def __init__(self) -> None:
        self.captures: bool | None = None
        self._state: ModuleState | None = None
        self._is_capturable = False
        self._graphs: Graphs[Hashable, TowerGraph] = Graphs(KEPT, SEEN)

    def __len__(self) -> int:
        return len(self._graphs)

    def __getstate__(self) -> dict[str, Any]:
        # Graphs hold addresses; a copy starts without.
        return {**type(self)().__dict__, "captures": self.captures}

    def run(self, tower: nn.Module, forward: Forward, inputs: Mapping[str, Any]) -> Any:
        """``forward(tower, **inputs)``, by a graph if there is one or it is time to make one."""
        pixels = inputs.get("pixel_values")
        options = {name: value for name, value in inputs.items() if name != "pixel_values"}
        call = self._call(pixels, options)
        if call is None or pixels is None:
            return forward(tower, **inputs)
        if self._state is None or not self._state.is_current():
            self._graphs.clear()
        graph = self._graphs.get(call)
        if graph is not None:
            return graph.run(pixels)
        if self._graphs.pays(call) and self._is_capturable:
            held = weakref.ref(tower)  # which has what keeps this
            work = lambda own: forward(held(), own, **options)  # noqa: E731
            build = lambda pool: TowerGraph(work, pixels.clone(), pool)  # noqa: E731
            return self._graphs.make(call, pixels.device, build).run(pixels)
        output = forward(tower, **inputs)
        self._look_at(tower)  # now: a first forward may leave transformers' own hooks
        return output

    def _call(self, pixels: Any, options: Mapping[str, Any]) -> Hashable:
        """What a graph has baked in of a call; ``None`` where it cannot be captured."""
        if torch.is_grad_enabled():
            return None
        if not isinstance(pixels, Tensor) or not 0 < len(pixels) <= MOST_IMAGES:
            return None
        if torch.is_autocast_enabled(pixels.device.type):
            return None  # weights that it has cast are freed with it
        if not (pixels.is_cuda if self.captures is None else self.captures):
            return None
        plain = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in options.items()
        }
        if any(isinstance(x, Tensor) or not isinstance(x, Hashable) for x in plain.values()):
            return None
        return tuple(pixels.shape), pixels.dtype, pixels.device, tuple(sorted(plain.items()))

    def _look_at(self, tower: nn.Module) -> None:
        """Notes what graphs of the tower are made of, unless that is known."""
        if self._state is not None and self._state.is_current():
            return
        self._state = ModuleState(tower)
        modules = list(tower.modules())
        hooks = [hook for module in modules for hook in hooks_of(module)]
        # Others, such as adapters, may do something else the next time, and no weight shows it.
        are_known = all(type(module).__module__.startswith(_KNOWN) for module in modules)
        is_still = are_known and all(map(is_transformers_own, hooks))
        self._is_capturable = is_still and not tower.training


class TowerGraph:
    """One forward of a tower on ``pixels``, which stay where they are."""

    def __init__(self, forward: Forward, pixels: Tensor, pool: Any) -> None:
        self._forward, self._pixels = forward, pixels
        self._output: Any = None
        self._replay = capture(self._work, pixels.device, pool)

    def run(self, pixels: Tensor) -> Any:
        """The forward on other pixels; its tensors are right until the next run."""
        self._pixels.copy_(pixels)
        self._replay()
        output = self._output
        # Callers add to it.
        return output if isinstance(output, tuple) else type(output)(**output)

    def _work(self) -> None:
        self._output = self._forward(self._pixels)
