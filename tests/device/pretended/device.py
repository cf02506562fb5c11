"""Tensors of the pretended device, and torch as it is where there is one."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import triton.language as tl
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary
from triton.runtime.interpreter import InterpretedFunction

from fastskip.decoder import anatomy
from fastskip.decoder.fused import captured_forward
from fastskip.ops import bodies, graphs
from fastskip.ops.allocate import outside_inference_mode
from tests.device.pretended.graphs import Capture, Graph, NodeBodies
from tests.device.pretended.log import LOG

DEVICE = torch.device("cuda:0")

_aten = torch.ops.aten
_INDEXING = (_aten.index, _aten.index_put, _aten.index_put_, _aten._unsafe_index)
_STRICT = (_aten.cat, _aten.stack, _aten.gather, _aten.index_select, _aten.embedding, _aten.scatter)
"""They take no numbers of the host, as arithmetic does."""
_ANSWERING = (
    *(_aten._local_scalar_dense, _aten.item, _aten.is_nonzero, _aten.equal, _aten.nonzero),
    *(_aten.masked_select, _aten.bincount, _aten._unique2, _aten.unique_dim),
    *(_aten.unique_consecutive, _aten.repeat_interleave),
)
"""What they return, or its shape, the host has to know."""
_PINNED: Any = WeakIdKeyDictionary()
"""Tensors of the host whose memory a device reads by itself."""


class DeviceTensor(Tensor):
    """``memory``, a tensor of the host, as if it lay on the device.

    To torch's own C++ it lies on the host, since a build without CUDA knows no other; so here is
    what is asked without a dispatch.
    """

    memory: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, memory: Tensor) -> DeviceTensor:
        with outside_inference_mode():  # the memory knows whether it was made in inference mode
            made: DeviceTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls,
                memory.size(),
                strides=memory.stride(),
                storage_offset=memory.storage_offset(),
                dtype=memory.dtype,
            )
        made.memory = memory
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(operation, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = self.detach().clone()
        if isinstance(self, nn.Parameter):
            copied = nn.Parameter(copied, self.requires_grad)
        return memo.setdefault(id(self), copied)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.memory!r})"

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, other: Any) -> None:
        Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.memory = other.memory

    def data_ptr(self) -> int:
        return self.memory.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.memory.untyped_storage()

    def tolist(self) -> Any:
        LOG.wait("tolist")
        return self.memory.tolist()

    def cpu(self, *_: Any) -> Tensor:
        there: Tensor = self.to("cpu")
        return there

    def to(self, *args: Any, copy: bool = False, **kwargs: Any) -> Any:
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is None or device.type == "cuda":
            return super().to(dtype or self.dtype, copy=copy)
        LOG.copy("to the host")
        if not non_blocking:
            LOG.wait("to the host")
        return self.memory.detach().to(dtype or self.dtype, copy=True)


class _Dispatch(TorchDispatchMode):
    """Also for what no tensor of the device takes part in yet."""

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(operation, args, kwargs or {})


def _run(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation of torch, as the device would do it."""
    kind = operation.overloadpacket
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    own = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
    goes_there = torch.device(kwargs.get("device") or "cpu").type == "cuda"
    if not own and not goes_there:
        return _on_host(kind, operation, args, kwargs)
    if kind is _aten._to_copy and not own:
        _send(args[0], is_blocking=not kwargs.get("non_blocking"))
        return DeviceTensor(operation(*args, **{**kwargs, "device": "cpu"}))
    if kind is _aten.copy_ and len(own) == 1:
        return _copy(*args, **kwargs)
    _check_devices(operation, args, tensors)
    _check_generator(kwargs.get("generator"))
    if kind in _ANSWERING:
        LOG.wait(str(operation))
    if goes_there:
        kwargs = {**kwargs, "device": "cpu", "pin_memory": False}
    inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
    output = operation(*inner_args, **inner_kwargs)
    if Graph.current is not None:
        Graph.current.keep([each for each in tensors if not isinstance(each, DeviceTensor)])
        Graph.current.note_operation(operation, inner_args, inner_kwargs, output)
    # What is written in place is returned as it was given.
    given = {id(tensor.memory): tensor for tensor in own}

    def outer(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        known = given.get(id(leaf))
        return DeviceTensor(leaf) if known is None else known

    return tree_map(outer, output)


def _on_host(kind: Any, operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if kind is _aten.is_pinned:
        return args[0] in _PINNED
    if kind is _aten._pin_memory:
        pinned = args[0].clone()
        _PINNED[pinned] = True
        return pinned
    return operation(*args, **kwargs)


def _send(source: Tensor, *, is_blocking: bool) -> None:
    """Numbers of the host go to the device."""
    what = f"{tuple(source.shape)} from the host"
    LOG.copy(what)
    if is_blocking or source not in _PINNED:
        LOG.wait(what)


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """From one device to the other."""
    if isinstance(target, DeviceTensor):
        _send(source, is_blocking=not non_blocking)
        target.memory.copy_(source)
        return target
    LOG.copy("to the host")
    if not (non_blocking and target in _PINNED):
        LOG.wait("to the host")
    return target.copy_(_inner(source))


def _check_devices(operation: Any, args: Any, tensors: list[Tensor]) -> None:
    """Raises where tensors of two devices meet."""
    kind = operation.overloadpacket
    others = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor)]
    if kind in _INDEXING:
        places = [place for place in args[1] if place is not None]
        if any(place.dtype in (torch.bool, torch.uint8) for place in places):
            LOG.wait("an index of flags")
        if isinstance(args[0], DeviceTensor):
            for place in places:
                if not isinstance(place, DeviceTensor):
                    _send(place, is_blocking=True)
            known = {id(place) for place in places}
            others = [other for other in others if id(other) not in known]
    if kind not in _STRICT:
        others = [other for other in others if other.dim()]
    if others:
        shapes = [tuple(other.shape) for other in others]
        LOG.fault(f"{operation}: two devices, {shapes} lie on the host")
        raise RuntimeError(f"Expected all tensors to be on the same device: {operation}, {shapes}")


def _check_generator(generator: Any) -> None:
    """Of an operation of the device."""
    if generator is not None and generator._cdata not in _Generator.on_device:
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")


def _inner(leaf: Any) -> Any:
    return leaf.memory if isinstance(leaf, DeviceTensor) else leaf


class _Order:
    """An event or a stream; all is done at once, so it is only noted that the host waits."""

    cuda_stream = 0

    def __init__(self, *_: Any, enable_timing: bool = False) -> None:
        self._has_time = enable_timing
        self._recorded = self._seen = math.nan

    def record(self) -> None:
        self._recorded = time.perf_counter()

    def wait(self) -> None: ...

    def wait_stream(self, other: _Order) -> None: ...

    def synchronize(self) -> None:
        LOG.wait("an event or a stream")
        self._seen = self._recorded

    def elapsed_time(self, end: _Order) -> float:
        if not (self._has_time and end._has_time):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if math.isnan(self._recorded) or end._seen != end._recorded:
            raise RuntimeError("CUDA error: device not ready")
        return max(1e3 * (end._recorded - self._recorded), 1e-3)


class _Generator(torch.Generator):
    """Of random numbers; those of the device are written down."""

    on_device: ClassVar[set[int]] = set()

    def __new__(cls, device: Any = "cpu") -> _Generator:
        made: Any = super().__new__(cls, "cpu")  # type: ignore[call-arg]
        if torch.device(device).type == "cuda":
            cls.on_device.add(made._cdata)
        return made  # type: ignore[no-any-return]


_PROPERTIES = SimpleNamespace(
    name="pretended", multi_processor_count=4, L2_cache_size=1 << 10, total_memory=1 << 34
)
_RUNTIME = SimpleNamespace(cudaProfilerStart=lambda: 0, cudaProfilerStop=lambda: 0)
_CUDA = {
    "CUDAGraph": Graph,
    "Event": _Order,
    "Stream": _Order,
    "_lazy_init": lambda: None,
    "current_device": lambda: 0,
    "current_stream": _Order,
    "device": lambda _: nullcontext(),
    "cudart": lambda: _RUNTIME,
    "device_count": lambda: 1,
    "empty_cache": lambda: None,
    "get_device_capability": lambda *_: (9, 0),
    "get_device_name": lambda *_: _PROPERTIES.name,
    "get_device_properties": lambda *_: _PROPERTIES,
    "graph": Capture,
    "graph_pool_handle": object,
    "is_available": lambda: True,
    "is_bf16_supported": lambda *_: True,
    "is_current_stream_capturing": lambda: Graph.current is not None,
    "max_memory_allocated": lambda *_: 0,
    "memory_allocated": lambda *_: 0,
    "nvtx": SimpleNamespace(range=lambda name: nullcontext()),
    "reset_peak_memory_stats": lambda *_: None,
    "set_stream": lambda _: None,
    "stream": lambda _: nullcontext(),
    "synchronize": lambda *_: LOG.wait("the device"),
}


@contextmanager
def pretending() -> Iterator[None]:
    """Within this block the device is there."""
    launch, tensor, move = InterpretedFunction.run, torch.tensor, Tensor.to

    def tensor_of(data: Any, **options: Any) -> Tensor:
        """Also of numbers of the device, which torch reads without a dispatch."""
        if any(isinstance(leaf, DeviceTensor) for leaf in tree_leaves(data)):
            LOG.wait("a tensor of numbers")
        return tensor(tree_map(_inner, data), **tree_map(_numbered, options))

    def to(sent: Tensor, *args: Any, **options: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        moved: Tensor = move(sent, *map(_numbered, args), **tree_map(_numbered, options))
        return moved

    def run(kernel: Any, *given: Any, grid: Any, warmup: bool, **arguments: Any) -> None:
        arguments |= dict(zip(kernel.arg_names, given, strict=False))
        on_host = [name for name, value in arguments.items() if _has_host_tensor(value)]
        if on_host:
            LOG.fault(f"{kernel.fn.__name__}: pointers to the host's memory, {on_host}")
            raise ValueError(f"Pointer argument cannot be accessed from Triton: {on_host}")
        inner = tree_map(_inner, arguments)
        if Graph.current is not None:
            Graph.current.note_kernel(partial(launch, kernel, grid=grid, warmup=False), inner)
        launch(kernel, grid=grid, warmup=warmup, **inner)

    with pytest.MonkeyPatch.context() as patched, _Dispatch():  # type: ignore[no-untyped-call]
        for name, stand_in in _CUDA.items():
            patched.setattr(torch.cuda, name, stand_in)
        patched.setattr(InterpretedFunction, "run", run)
        patched.setattr(torch, "tensor", tensor_of)
        patched.setattr(Tensor, "to", to)
        patched.setattr(torch, "Generator", _Generator)
        # One launch follows another here.
        patched.setattr(tl.extra.cuda, "gdc_wait", lambda: None)
        patched.setattr(graphs, "_WARM_UPS", 1)  # nothing has to be compiled
        # CUDA's own bindings, which torch for CUDA brings along, would look for a driver.
        patched.setattr(bodies, "GraphBodies", NodeBodies)
        patched.setattr(captured_forward, "can_switch", lambda device: True)
        # Weights there are of another type, which is what it asks for.
        patched.setitem(vars(anatomy), "type", _type_of)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        torch._C._set_only_lift_cpu_tensors(True)  # else numbers go there without a dispatch
        yield


def _numbered(option: Any) -> Any:
    """A device without a number would be the current one, which torch without CUDA cannot tell."""
    is_device = isinstance(option, (str, torch.device))
    return DEVICE if is_device and torch.device(option).type == "cuda" else option


def _type_of(thing: Any) -> type:
    return nn.Parameter if isinstance(thing, DeviceTensor) else type(thing)


def _has_host_tensor(tree: Any) -> bool:
    leaves = tree_leaves(tree)
    return any(isinstance(leaf, Tensor) and not isinstance(leaf, DeviceTensor) for leaf in leaves)
