"""What a prepared model carries: its policy, plan and decoder, and the state of one call."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import RLock, get_ident, main_thread
from typing import Any

import torch
from torch import Tensor

from fastskip.decoder.cache import SkipCache
from fastskip.decoder.fused.paged_cache import PagedCache
from fastskip.decoder.fused.stack import FusedDecoder
from fastskip.decoder.stack import Decoder
from fastskip.families import UnsupportedModelError, final_norm_of
from fastskip.generation.cache_name import CACHE_NAME
from fastskip.generation.device_step import DeviceSteps
from fastskip.generation.tower import TowerGraphs
from fastskip.ops import Operations, resolve
from fastskip.ops.allocate import current
from fastskip.ops.flash import load_flash
from fastskip.plan import SkipPlan
from fastskip.policy import Sublayer
from fastskip.routing import Router, RoutingRecord


@dataclass(slots=True)
class Session:
    """One ``generate`` call.

    Attributes:
        prompt_columns: where its prompt ends.
        gives_positions: whether the caller gives the positions of prompt columns.
        thread: the calling thread.
        is_refreshed: the decoder was just refreshed, so the first forward need not do it.
    """

    prompt_columns: int
    gives_positions: bool = False
    thread: int = field(default_factory=get_ident)
    is_refreshed: bool = False


class Runtime:
    """The state that the prepared classes share; one per model."""

    def __init__(
        self,
        text_model: Any,
        plan: SkipPlan,
        impl: str | None,
        routers: Sequence[Router],
    ) -> None:
        """``impl`` as in ``load_model``.

        Raises:
            ValueError: it is unknown, or cannot run on the model's device.
        """
        self.plan, self._impl = plan, impl
        self._device = final_norm_of(text_model).weight.device
        self.decoder = _decoder_of(text_model, plan, resolve(impl, self._device), routers)
        self.steps = DeviceSteps()
        self.tower = TowerGraphs()
        self.session: Session | None = None
        # The running forward's ids, as given and on the host.
        self.ids: tuple[Tensor, Tensor] | None = None
        self._lock, self._process = RLock(), os.getpid()
        # The thread whose calls run, how deeply they are nested, and the event that ends the
        # previous outermost call.
        self._thread: int | None = None
        self._depth = 0
        self._left: torch.cuda.Event | None = None
        self._records: list[RoutingRecord] = []

    def follow(self, text_model: Any) -> None:
        """Chooses the implementation again if the model was moved to another device.

        Raises:
            ValueError: the requested implementation cannot run there.
            UnsupportedModelError: the one for that device cannot run the model or its policy.
        """
        device = self.device
        if device == self._device:
            return
        with self.lock:
            ops = resolve(self._impl, device)
            if ops.implementation is not self.decoder.ops.implementation:
                own = _decoder_of(text_model, self.plan, ops, self.decoder.routers)
                own.refresh(wants_gradient=False)
                check_decoder(own)
                own.record, self.decoder = self.decoder.record, own
            self._device = device

    @property
    def lock(self) -> RLock:
        """Held by the thread that uses the decoder.

        A forked process has no thread of its parent but the one that forked, its main thread, so a
        call of another one will never end there: it is forgotten.
        """
        if self._process != os.getpid():
            self._process = os.getpid()
            # Not this thread, which may have got the number of the one whose call ran.
            if self._thread != main_thread().ident:
                self._lock, self._thread, self._depth, self.session = RLock(), None, 0, None
        return self._lock

    @property
    def is_generating(self) -> bool:
        """Whether this thread is inside ``generate``."""
        return self.session is not None and self.session.thread == get_ident()

    @property
    def device(self) -> torch.device:
        """The device of the decoder's weights."""
        return self.decoder.like.device

    @property
    def fused_decoder(self) -> FusedDecoder:
        """The decoder, which must be the device executor's."""
        assert isinstance(self.decoder, FusedDecoder)
        return self.decoder

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_lock"} | {
            "session": None,
            "_thread": None,
            "_depth": 0,
            "_left": None,
            "_records": [],
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock, self._process = RLock(), os.getpid()

    def use_flash(self) -> None:
        """Computes prompt attention with flash-attn from now on.

        Raises:
            ValueError: it is not installed, or does not support the plan, dtype or device; the
                message says what does.
        """
        decoder = self.decoder
        if not isinstance(decoder, FusedDecoder):
            raise ValueError("attention: 'flash' needs impl='triton'; allowed here: None")
        _require_causal(self.plan)
        decoder.flash = load_flash(decoder.like.dtype, decoder.like.device)

    @property
    def uses_flash(self) -> bool:
        """Whether prompts use flash-attn."""
        return isinstance(self.decoder, FusedDecoder) and self.decoder.flash is not None

    def refresh(self, *, wants_gradient: bool) -> None:
        """Refreshes the decoder before a forward, unless that was just done."""
        session = self.session
        if session is not None and session.is_refreshed and not wants_gradient:
            session.is_refreshed = False
            return
        self.decoder.refresh(wants_gradient=wants_gradient)

    def set_plan(self, plan: SkipPlan, routers: Sequence[Router]) -> None:
        """Swaps the plan; weights stay where they are."""
        if self.uses_flash:
            _require_causal(plan)
        with self.lock:
            if self.session is not None:
                raise RuntimeError("policy: set while generate runs; allowed: before or after")
            self.plan = self.decoder.plan = plan
            self.decoder.routers = routers

    def unsupported_plan(self, plan: SkipPlan) -> str | None:
        """What this implementation cannot run of a plan; ``None`` if it can run all of it."""
        decoder = self.decoder
        return decoder.unsupported_plan(plan) if isinstance(decoder, FusedDecoder) else None

    @contextmanager
    def recording(self) -> Iterator[RoutingRecord]:
        """Records what routers decide within this block, up to a block inside it or of another
        thread that records, too."""
        record = RoutingRecord()
        self._records.append(record)
        self.decoder.record = record
        try:
            yield record
        finally:
            # Blocks of several threads need not end in reverse order.
            self._records = [each for each in self._records if each is not record]
            self.decoder.record = self._records[-1] if self._records else None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within this block only this thread's calls run, on the model's device.

        Graphs own their memory, so the device, too, must run one call after another, whatever
        streams the callers use.
        """
        with self.lock, current(self.device):
            if self._left is not None:
                self._left.wait()
            self._thread = get_ident()
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if not self._depth:
                    self._thread = None
                if not self._depth and self.device.type == "cuda":
                    self._left = torch.cuda.Event()
                    self._left.record()

    @contextmanager
    def generating(self, prompt_columns: int, *, gives_positions: bool = False) -> Iterator[None]:
        """Within this block columns at or past ``prompt_columns`` are ``GENERATED``.

        ``gives_positions``: the caller gives the positions of earlier ones, even after a cache.
        A second thread waits here until the first is done.
        """
        with self.running():
            before, self.session = self.session, Session(prompt_columns, gives_positions)
            try:
                with self.steps.call():
                    yield
            finally:
                self.session = before

    def prompt_end(self, cache: SkipCache | None, new_columns: int) -> int | None:
        """Where the prompt ends for a forward of ``new_columns``; ``None`` outside ``generate``.

        A cache that ``generate`` did not make (a guidance processor's own) takes its first forward
        as its prompt.
        """
        if self.session is None:
            return None
        if cache is None:
            return self.session.prompt_columns
        if cache.prompt_columns is None:
            cache.prompt_columns = cache.columns + new_columns
        return cache.prompt_columns

    def check_cache(self, cache: object) -> None:
        """Raises for a cache that was not filled under this model's plan."""
        if not isinstance(cache, SkipCache):
            raise TypeError(
                f"{CACHE_NAME}: got {type(cache).__name__}; a prepared model needs a cache that it "
                "returned itself, or None to make one"
            )
        if cache.plan.fingerprint != self.plan.fingerprint:
            raise ValueError(
                f"{CACHE_NAME}: this cache was filled under another policy; "
                "start from the whole prompt after set_policy"
            )
        if isinstance(cache, PagedCache) and not isinstance(self.decoder, FusedDecoder):
            raise ValueError(
                f"{CACHE_NAME}: this cache was filled by impl='triton' or 'torch', but this model "
                "runs impl='reference'; start from the whole prompt"
            )


def _decoder_of(
    text_model: Any, plan: SkipPlan, ops: Operations, routers: Sequence[Router]
) -> Decoder:
    decoder = (Decoder if ops.fused is None else FusedDecoder)(text_model, plan, ops)
    decoder.routers = routers
    return decoder


def check_decoder(decoder: Decoder, reason: str | None = None) -> None:
    """Raises ``UnsupportedModelError`` if a decoder cannot run its model or, with a ``reason``, a
    policy that it is about to get."""
    reason = decoder.unsupported() if reason is None else reason
    if reason is not None:
        allowed = f"impl='reference' for this model: it has {reason}"
        raise UnsupportedModelError("impl", decoder.ops.implementation.value, allowed)


def _require_causal(plan: SkipPlan) -> None:
    """Raises unless each layer has plain causal attention over exactly the rows that attend."""
    others = [layer.index for layer in plan.layers if layer.attending != layer.holding]
    layers = [index for index in others if plan.layers[index].attending]
    if layers:
        raise ValueError(
            f"attention: 'flash' cannot run layers {layers}, where rows that skip attention leave "
            "cache entries; allowed under this policy: None (fastskip's own kernels), or kv='omit'"
        )
    routed = sorted({cell.layer for cell in plan.routed if Sublayer.ATTENTION in cell.skip})
    if routed:
        raise ValueError(
            f"attention: 'flash' cannot run layers {routed}, where a router decides on attention; "
            "allowed under this policy: None (fastskip's own kernels)"
        )
