"""Policy rules that leave the decision to a router, row by row, at run time.

A router's fields depend on its kind; everything that needs no model is checked here. A kind with a
dot in its name is a plug-in: it is resolved when a model is prepared, and reading a policy never
imports it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from fastskip.policy.fields import (
    Layers,
    TokenSet,
    check_seed,
    finite,
    json_object,
    layer_selection,
    member,
    names,
    plain,
    set_fields,
    sublayer_set,
    text,
    token_set,
)
from fastskip.policy.vocabulary import (
    Agreement,
    Group,
    Measure,
    PolicyError,
    SkippedKV,
    Sublayer,
    TokenClass,
)

ROUTER_KINDS = ("similarity", "linear", "random")
_PLUG_IN = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)+")
_FIELDS = {
    "similarity": ("threshold", "measure", "group", "agree"),
    "linear": ("weights", "threshold", "capacity", "group", "agree"),
    "random": ("rate", "seed", "group", "agree"),
}
_WEIGHTS_ALLOWED = "the path of a safetensors file, as Unicode text"
_OPTIONAL = ("threshold", "measure", "weights", "capacity", "rate", "seed", "group", "agree")


@dataclass(frozen=True, slots=True, init=False)
class RouterRule:
    """Let a router decide, row by row, whether `tokens` skip `skip` in `layers`.

    `None` means that the field is not written; its default is then the one in parentheses.

    Attributes:
        kind: "similarity" | "linear" | "random", or the name of a plug-in, which contains a dot.
        threshold: for similarity: a row skips if its cosine, in [-1, 1], is at least this, or its
            relative change (>= 0) is at most this; for linear: if its score is at most this.
        measure: for similarity: COSINE (default) or CHANGE.
        weights: for linear: a safetensors file, relative to the policy file.
        capacity: for linear, instead of a threshold: the share in (0, 1] of a sequence's candidates
            in one forward that runs, rounded up (0.56 of 50 rows is 28); for prompt rows only.
        rate, seed: for random: the share in [0, 1] that skips, and the seed of the draws (0).
        group, agree: which rows decide together (each row alone), and how (by the mean).
        kv: what a row that skips attention leaves, as in a `SkipRule` (PROJECT).
        options: for a plug-in: the options that it is built with.
    """

    layers: Layers
    tokens: TokenSet
    skip: frozenset[Sublayer]
    kind: str
    threshold: float | None
    measure: Measure | None
    weights: str | None
    capacity: float | None
    rate: float | None
    seed: int | None
    group: Group | None
    agree: Agreement | None
    kv: SkippedKV | None
    options: Mapping[str, Any] | None = field(hash=False)
    required: ClassVar[tuple[str, ...]] = ("layers", "skip", "kind")

    def __init__(
        self,
        layers: str | Iterable[int],
        tokens: str | Iterable[TokenClass | str] = "all",
        skip: str | Iterable[Sublayer | str] = (),
        kind: str = "similarity",
        threshold: float | None = None,
        *,
        measure: Measure | str | None = None,
        weights: str | None = None,
        capacity: float | None = None,
        rate: float | None = None,
        seed: int | None = None,
        group: Group | str | None = None,
        agree: Agreement | str | None = None,
        kv: SkippedKV | str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        set_fields(
            self,
            layers=layer_selection(layers),
            tokens=token_set(tokens),
            skip=sublayer_set(skip),
            kind=_kind(kind),
            threshold=threshold,
            measure=None if measure is None else member(Measure, measure, "measure"),
            weights=weights,
            capacity=capacity,
            rate=rate,
            seed=seed,
            group=None if group is None else member(Group, group, "group"),
            agree=None if agree is None else member(Agreement, agree, "agree"),
            kv=None if kv is None else member(SkippedKV, kv, "kv"),
            options=None if options is None else json_object(options, "options"),
        )
        if self.kv is not None and Sublayer.ATTENTION not in self.skip:
            raise PolicyError("kv", self.kv.value, 'no kv, or "attention" in skip')
        self._refuse_foreign_fields()
        if not self.is_plug_in:
            _CHECKS[self.kind](self)
        if self.agree is not None and self.group in (None, Group.ROW):
            others = names(group for group in Group if group is not Group.ROW)
            raise PolicyError("agree", self.agree.value, f"no agree, or group {others}")

    @property
    def is_plug_in(self) -> bool:
        """Whether the router is a plug-in rather than a built-in kind."""
        return self.kind not in ROUTER_KINDS

    @property
    def leaves(self) -> SkippedKV:
        """What a row that skips attention leaves."""
        return self.kv or SkippedKV.PROJECT

    @property
    def is_by_row(self) -> bool:
        """Whether it certainly decides on each row alone, whatever others there are."""
        in_groups = self.group not in (None, Group.ROW) or self.capacity is not None
        return not (in_groups or self.is_plug_in)

    def to_dict(self) -> dict[str, Any]:
        """Plain data as in the policy file."""
        written = {f.name: plain(getattr(self, f.name)) for f in fields(self)}
        if self.options is not None:
            written["options"] = json_object(self.options, "options")
        return {name: value for name, value in written.items() if value is not None}

    def _refuse_foreign_fields(self) -> None:
        known = () if self.is_plug_in else _FIELDS[self.kind]
        for name in _OPTIONAL:
            value = getattr(self, name)
            if value is not None and name not in known:
                own = names((*known, "kv", *(("options",) if self.is_plug_in else ())))
                raise PolicyError(name, plain(value), f'for kind "{self.kind}": {own}')
        if self.options is not None and not self.is_plug_in:
            raise PolicyError("options", self.options, "options for plug-ins only")


def _kind(kind: object) -> str:
    if isinstance(kind, str) and (kind in ROUTER_KINDS or _PLUG_IN.fullmatch(kind)):
        return kind
    raise PolicyError("kind", kind, f'{names(ROUTER_KINDS)}, or a plug-in such as "acme.router"')


def _number(value: object, field: str, low: float, high: float, *, open_low: bool = False) -> float:
    found = finite(value)
    if found is not None and low <= found <= high and not (open_low and found == low):
        return found
    if math.isinf(low):
        raise PolicyError(field, value, "a finite number")
    bounds = f"{'(' if open_low else '['}{low:g}, {'inf)' if math.isinf(high) else f'{high:g}]'}"
    raise PolicyError(field, value, f"a number in {bounds}")


def _check_similarity(rule: RouterRule) -> None:
    low, high = (0.0, math.inf) if rule.measure is Measure.CHANGE else (-1.0, 1.0)
    set_fields(rule, threshold=_number(rule.threshold, "threshold", low, high))


def _check_linear(rule: RouterRule) -> None:
    if not text(rule.weights, "weights", _WEIGHTS_ALLOWED):
        raise PolicyError("weights", rule.weights, _WEIGHTS_ALLOWED)
    if (rule.threshold is None) == (rule.capacity is None):
        both = {"threshold": rule.threshold, "capacity": rule.capacity}
        raise PolicyError("threshold", both, "either a threshold or a capacity")
    if rule.threshold is not None:
        found = _number(rule.threshold, "threshold", -math.inf, math.inf)
        set_fields(rule, threshold=found)
        return
    set_fields(rule, capacity=_number(rule.capacity, "capacity", 0, 1, open_low=True))
    if rule.group not in (None, Group.ROW):
        raise PolicyError("group", rule.group, f'"{Group.ROW}" or no group with a capacity')
    if rule.tokens == "all" or TokenClass.GENERATED in rule.tokens:
        prompt = names(c for c in TokenClass if c is not TokenClass.GENERATED)
        problem = "a decode step has one row per sequence, so a capacity would let every row run"
        raise PolicyError("tokens", plain(rule.tokens), f"{prompt} with a capacity", problem)


def _check_random(rule: RouterRule) -> None:
    set_fields(rule, rate=_number(rule.rate, "rate", 0, 1))
    check_seed(rule.seed)


_CHECKS = {"similarity": _check_similarity, "linear": _check_linear, "random": _check_random}
