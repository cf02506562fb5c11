"""CUDA graphs of the pretended device: operations recorded, and done again on the same memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves, tree_map

from fastskip.ops import bodies as real
from fastskip.ops.bodies import Body, Choose, CountedBody, Turn, bounds_of
from fastskip.ops.conditions import set_condition
from fastskip.ops.routes import Switch
from tests.device.pretended.log import LOG, stack


class DanglingError(RuntimeError):
    """A graph reads memory that nobody has kept."""


@dataclass(frozen=True, slots=True)
class _Outside:
    """A tensor that was there before a capture: a graph knows its address, and keeps nothing."""

    storage: StorageWeakRef
    layout: tuple[Any, ...]
    dtype: torch.dtype
    origin: str

    @classmethod
    def of(cls, tensor: Tensor) -> _Outside:
        layout = tensor.storage_offset(), tensor.size(), tensor.stride()
        return cls(StorageWeakRef(tensor.untyped_storage()), layout, tensor.dtype, stack())

    def tensor(self) -> Tensor:
        if self.storage.expired():
            LOG.fault(f"a graph reads memory that is gone, recorded by {self.origin}, replayed")
            raise DanglingError(self.origin)
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)  # type: ignore[attr-defined]
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.layout)


class Graph:
    """Stands for ``torch.cuda.CUDAGraph``; its tensors are those of the host.

    What an operation makes in a capture stays where it is, as in a graph's pool; other graphs of
    the pool leave it alone, which is more than CUDA promises.
    """

    current: ClassVar[Graph | None] = None
    """The one that is being captured."""
    replays: ClassVar[int] = 0
    """Of all graphs."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] = []
        self._made: dict[int, Tensor] = {}
        self._numbers: list[Tensor] = []

    def replay(self) -> None:
        Graph.replays += 1
        for step in self._steps:
            step()

    def note(self, step: Callable[[], None]) -> None:
        """``step`` is done again in a replay."""
        self._steps.append(step)

    def apart(self, work: Callable[[], object]) -> list[Callable[[], None]]:
        """What ``work`` launches, as the body of a node."""
        outer, self._steps = self._steps, []
        try:
            work()
            return self._steps
        finally:
            self._steps = outer

    def keep(self, numbers: list[Tensor]) -> None:
        """A launch is told single numbers of the host by value."""
        self._numbers += numbers

    def note_kernel(self, run: Callable[..., Any], arguments: Any) -> None:
        """``run(**arguments)`` is a launch."""
        known = self._known(arguments)
        self._steps.append(lambda: run(**_tensors(known)))

    def note_operation(self, operation: Any, args: Any, kwargs: Any, output: Any) -> None:
        """``operation`` has returned ``output``, which it will write to the same memory again."""
        made = _made((args, kwargs), output)
        known = self._known((args, kwargs))
        self._made |= {_storage(tensor): tensor for tensor in made}
        if not made and not operation._schema.is_mutable:
            return  # a view
        is_empty = "empty" in operation.__name__

        def step() -> None:
            given, named = _tensors(known)
            again = _made((given, named), operation(*given, **named))
            for old, new in () if is_empty else zip(made, again, strict=True):
                old.copy_(new)

        self._steps.append(step)

    def forget(self) -> None:
        """The capture is over; it has computed nothing."""
        for tensor in self._made.values():
            if tensor.is_floating_point():
                tensor.fill_(math.nan)

    def _known(self, tree: Any) -> Any:
        """Tensors made in the capture as they are, others as what a graph knows of them."""

        def known(leaf: Any) -> Any:
            is_outside = isinstance(leaf, Tensor) and _storage(leaf) not in self._made
            return _Outside.of(leaf) if is_outside else leaf

        return tree_map(known, tree)


class Capture:
    """Stands for ``torch.cuda.graph``."""

    def __init__(self, graph: Graph, **options: Any) -> None:
        self._graph = graph

    def __enter__(self) -> None:
        assert Graph.current is None, "a capture in a capture"
        Graph.current, LOG.is_capturing = self._graph, True

    def __exit__(self, *_: object) -> None:
        Graph.current, LOG.is_capturing = None, False
        self._graph.forget()


class NodeBodies:
    """Stands for ``GraphBodies``: nodes of the graph that is being captured, which look at flags
    when they are replayed."""

    def __init__(self, device: torch.device) -> None: ...

    def run_if(self, runs: Tensor, body: Body) -> None:
        set_condition(runs, 0)
        if Graph.current is None:
            body()
            return
        steps, count = Graph.current.apart(body), _counting(runs)
        Graph.current.note(lambda: _do(steps) if count() else None)

    def run_while(self, runs: Tensor, begin: Turn, body: Turn, most: int) -> None:
        begin(0)
        if Graph.current is None:
            for _ in range(most):
                body(0)
            return
        steps, count = Graph.current.apart(partial(body, 0)), _counting(runs)

        def loop() -> None:
            turns = 0
            while count():
                turns += 1
                assert turns <= most, "a loop that does not end"
                _do(steps)

        Graph.current.note(loop)

    def run_counted(self, runs: Tensor, choose: Choose, body: CountedBody) -> None:
        if len(runs) <= real.BOUNDS:
            body(choose(runs, None))
            return
        step, bounds = bounds_of(len(runs))
        chosen = choose(runs, Switch(0, step))
        own = [partial(body, chosen.at_most(bound)) for bound in bounds]
        if Graph.current is None:
            _do(own)
            return
        bodies, count = [Graph.current.apart(each) for each in own], _counting(runs)

        def switch() -> None:
            running = count()
            if running:
                _do(bodies[(running - 1) // step])

        Graph.current.note(switch)


def _do(steps: Iterable[Callable[[], object]]) -> None:
    for step in steps:
        step()


def _counting(runs: Any) -> Callable[[], int]:
    """How many flags are set, on memory of the device, whenever it is asked."""
    assert Graph.current is not None
    known = Graph.current._known(runs.memory)
    return lambda: int(_tensors(known).count_nonzero())


def _storage(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


def _made(given: Any, output: Any) -> list[Tensor]:
    """The tensors of an output whose memory is new."""
    before = {_storage(leaf) for leaf in tree_leaves(given) if isinstance(leaf, Tensor)}
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    return [tensor for tensor in tensors if _storage(tensor) not in before]


def _tensors(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.tensor() if isinstance(leaf, _Outside) else leaf, tree)
