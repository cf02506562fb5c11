"""The routers of the papers' code: entropy, token index, random intervals, and exit.

Shukor & Cord, arXiv 2410.09454 and 2405.16700. There the first sequence of a batch decides for all;
here each sequence decides for itself, by its last candidate. Random intervals are drawn once per
layer and forward. Except with `Exit`, the candidates of one forward decide together, so a kept
cache and a recomputed history may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastskip.ops.routes import mixed
from fastskip.policy import PolicyError, TokenClass
from fastskip.routing.protocol import Decision, Router, RoutingContext, Scope

_GENERATED = list(TokenClass).index(TokenClass.GENERATED)


class Entropy:
    """A sequence skips a layer if the logit lens on its last candidate is confident.

    That is, if the entropy of the softmax over the vocabulary, in nats, is below ``threshold``. It
    also skips layers that are multiples of ``interval``, if given. Costs one lm_head evaluation per
    layer and sequence.
    """

    needs_trace = False

    def __init__(self, threshold: float, interval: int | None = None, normed: bool = True) -> None:
        """``normed``: whether the final norm is applied before the head."""
        self.threshold, self.interval, self.normed = threshold, interval, normed

    def decide(self, context: RoutingContext) -> Decision:
        if self.interval is not None and context.layer % self.interval == 0:
            return Decision(torch.ones(len(context.sequences), dtype=torch.bool))
        last, owner = _last_of_each(context)
        logits = context.logits(last, normed=self.normed)
        chances = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        entropy = -(chances.exp() * chances).sum(-1)
        return Decision((entropy < self.threshold).cpu()[owner])


class TokenIndex:
    """A sequence skips multiples of an interval, which is shorter where the logit lens is stable.

    The interval is ``interval``, or one less (at least 2) in a layer where the logit lens on the
    sequence's last candidate predicts the same token as in the layer before.
    """

    needs_trace = False

    def __init__(self, interval: int, start: int = 0, normed: bool = True) -> None:
        """Layers up to ``start`` are read by the lens but never skipped."""
        self.interval, self.start, self.normed = interval, start, normed

    def decide(self, context: RoutingContext) -> Decision:
        last, owner = _last_of_each(context)
        here = context.sequences[last]
        tokens = context.logits(last, normed=self.normed).argmax(-1).cpu()
        known: dict[int, tuple[int, int]] = context.forward_state.setdefault("tokens", {})
        skips = []
        for sequence, token in zip(here.tolist(), tokens.tolist(), strict=True):
            layer, before = known.get(sequence, (-2, -1))
            stands_still = layer == context.layer - 1 and before == token
            interval = max(2, self.interval - 1) if stands_still else self.interval
            skips.append(context.layer > self.start and context.layer % interval == 0)
            known[sequence] = context.layer, token
        return Decision(torch.tensor(skips)[owner])


class RandomInterval:
    """All candidates skip a layer if it is a multiple of an interval drawn per layer and forward.

    Draws are uniform from 2 to ``interval`` and depend on ``seed``, the layer and the number of
    forwards since the policy was set.
    """

    needs_trace = False

    def __init__(self, interval: int, seed: int = 0) -> None:
        self.interval, self._salt, self._forwards = interval, mixed(seed), 0

    def decide(self, context: RoutingContext) -> Decision:
        if "number" not in context.forward_state:
            context.forward_state["number"] = self._forwards
            self._forwards += 1
        drawn = self.draw(context.forward_state["number"], context.layer)
        skips = context.layer % drawn == 0
        return Decision(torch.full((len(context.sequences),), skips))

    def draw(self, forward: int, layer: int) -> int:
        """The interval of a layer in a forward."""
        draw = mixed(self._salt ^ mixed(forward) ^ mixed(layer + 1 << 16))
        return 2 + draw % (self.interval - 1)


class Exit:
    """Rows of a prompt exit from all later layers, except each sequence's last prompt row;
    generated rows stay."""

    needs_trace = False

    def decide(self, context: RoutingContext) -> Decision:
        is_prompt = context.codes != _GENERATED
        skip = is_prompt.clone()
        for sequence in set(context.sequences[is_prompt].tolist()):
            mine = (is_prompt & (context.sequences == sequence)).nonzero().squeeze(1)
            skip[mine[context.columns[mine].argmax()]] = False
        return Decision(skip, Scope.REST)


@dataclass(frozen=True, slots=True)
class _Option:
    """One option of a router: its type, its minimum, and whether it is required."""

    kind: type
    least: int | None = None
    is_needed: bool = False


_KINDS: Mapping[str, tuple[Callable[..., Router], Mapping[str, _Option]]] = {
    "paper.entropy": (
        Entropy,
        {
            "threshold": _Option(float, is_needed=True),
            "interval": _Option(int, 1),
            "normed": _Option(bool),
        },
    ),
    "paper.token-index": (
        TokenIndex,
        {
            "interval": _Option(int, 2, is_needed=True),
            "start": _Option(int, 0),
            "normed": _Option(bool),
        },
    ),
    "paper.random": (
        RandomInterval,
        {"interval": _Option(int, 2, is_needed=True), "seed": _Option(int, 0)},
    ),
    "paper.exit": (Exit, {}),
}
PAPER_KINDS = tuple(_KINDS)


def build_paper_router(kind: str, options: Mapping[str, Any], field: str) -> Router:
    """The router of one of ``PAPER_KINDS``.

    Raises:
        PolicyError: an option is unknown, missing, of the wrong type or too small.
    """
    factory, known = _KINDS[kind]
    for name, value in options.items():
        if name not in known:
            allowed = ", ".join(known) or "none"
            raise PolicyError(f"{field}.options.{name}", value, allowed, "unknown option")
        option = known[name]
        fits = type(value) is option.kind or (option.kind is float and type(value) is int)
        if not fits or (option.least is not None and value < option.least):
            bound = "" if option.least is None else f" >= {option.least}"
            allowed = f"of type {option.kind.__name__}{bound}"
            raise PolicyError(f"{field}.options.{name}", value, allowed)
    for name, option in known.items():
        if option.is_needed and name not in options:
            raise PolicyError(f"{field}.options.{name}", None, "a value", "is missing")
    return factory(**options)


def _last_of_each(context: RoutingContext) -> tuple[Tensor, Tensor]:
    """The last candidate of each sequence that has any, and each candidate's index into these."""
    sequences, owner = context.sequences.unique(return_inverse=True)
    last = [
        mine[context.columns[mine].argmax()]
        for mine in ((owner == number).nonzero().squeeze(1) for number in range(len(sequences)))
    ]
    return torch.stack(last), owner
