"""The rules of a policy: skips, arrangements and masks; routers and removals have separate files.

Each accepts strings, lists or enums, checks what needs no model, and stores one immutable form.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from fastskip.policy.fields import (
    Layers,
    Pairs,
    TokenSet,
    layer_selection,
    member,
    pair_selection,
    plain,
    set_fields,
    sublayer_set,
    token_set,
)
from fastskip.policy.removals import RemovalRule
from fastskip.policy.routers import RouterRule
from fastskip.policy.vocabulary import (
    Arrangement,
    Combine,
    Mask,
    Norm,
    PolicyError,
    SkippedKV,
    Sublayer,
    TokenClass,
)


@dataclass(frozen=True, slots=True, init=False)
class SkipRule:
    """Skip the sublayers `skip` for rows of `tokens` in `layers`; `kv` says what rows that skip
    attention store.

    `layers` stays as written; `kv=None` means that the rule names none, which defaults to PROJECT.
    """

    layers: Layers
    tokens: TokenSet
    skip: frozenset[Sublayer]
    kv: SkippedKV | None
    required: ClassVar[tuple[str, ...]] = ("layers", "skip")

    def __init__(
        self,
        layers: str | Iterable[int],
        tokens: str | Iterable[TokenClass | str] = "all",
        skip: str | Iterable[Sublayer | str] = (),
        kv: SkippedKV | str | None = None,
    ) -> None:
        sublayers = sublayer_set(skip)
        entry = None if kv is None else member(SkippedKV, kv, "kv")
        if entry is not None and Sublayer.ATTENTION not in sublayers:
            raise PolicyError("kv", entry.value, 'no kv, or "attention" in skip')
        set_fields(
            self, layers=layer_selection(layers), tokens=token_set(tokens), skip=sublayers, kv=entry
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data as in the policy file."""
        result = {"layers": plain(self.layers), "tokens": plain(self.tokens)}
        result["skip"] = plain(self.skip)
        return result if self.kv is None else result | {"kv": self.kv.value}


@dataclass(frozen=True, slots=True, init=False)
class ArrangementRule:
    """Run `layers` in parallel form, or two by two as pairs.

    `kind` PAIR takes a list of [l, l + 1], or a slice of step 1 that is split into such pairs. Rows
    of classes not in `tokens` run the sublayers of these layers sequentially.
    """

    layers: Layers | Pairs
    kind: Arrangement
    norm: Norm | None
    combine: Combine | None
    tokens: TokenSet
    required: ClassVar[tuple[str, ...]] = ("layers", "kind")

    def __init__(
        self,
        layers: str | Iterable[int] | Iterable[Iterable[int]],
        kind: Arrangement | str,
        norm: Norm | str | None = None,
        combine: Combine | str | None = None,
        tokens: str | Iterable[TokenClass | str] = "all",
    ) -> None:
        form = member(Arrangement, kind, "kind", but=Arrangement.SEQUENTIAL)
        if norm is not None and form is not Arrangement.PARALLEL:
            raise PolicyError("norm", norm, 'no norm, or kind "parallel"')
        if combine is not None and form is not Arrangement.PAIR:
            raise PolicyError("combine", combine, 'no combine, or kind "pair"')
        set_fields(
            self,
            layers=pair_selection(layers) if form is Arrangement.PAIR else layer_selection(layers),
            kind=form,
            norm=None if norm is None else member(Norm, norm, "norm"),
            combine=None if combine is None else member(Combine, combine, "combine"),
            tokens=token_set(tokens),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data as in the policy file."""
        result = {"layers": plain(self.layers), "kind": self.kind.value}
        if self.norm is not None:
            result["norm"] = self.norm.value
        if self.combine is not None:
            result["combine"] = self.combine.value
        return result if self.tokens == "all" else result | {"tokens": plain(self.tokens)}


@dataclass(frozen=True, slots=True, init=False)
class MaskRule:
    """Hide rows from each other in the attention of `layers`."""

    layers: Layers
    kind: Mask
    required: ClassVar[tuple[str, ...]] = ("layers", "kind")

    def __init__(self, layers: str | Iterable[int], kind: Mask | str) -> None:
        set_fields(self, layers=layer_selection(layers), kind=member(Mask, kind, "kind"))

    def to_dict(self) -> dict[str, Any]:
        """Plain data as in the policy file."""
        return {"layers": plain(self.layers), "kind": self.kind.value}


AnyRule = SkipRule | ArrangementRule | RouterRule | RemovalRule | MaskRule
