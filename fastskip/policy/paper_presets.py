"""The modes of "Skipping Computations in Multimodal LLMs" (Shukor & Cord, arXiv 2410.09454) and its
companion paper (arXiv 2405.16700) as presets `paper/<mode>`.

A layer l is selected if start < l < end and l is a multiple of the interval, as in the papers'
code: both bounds are exclusive, so by default the first and the last layer stay dense, and
`start=-1` makes layer 0 eligible too. A negative `end` counts from the end of the model, as do a
negative `after` and the bounds of `drop`. `scope` selects rows: all, prompt (image and text),
image, text or generated. `semantics="reference"` reproduces what the papers' code computes where
that differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastskip.policy.fields import MAX_DEPTH, finite, integer, integers, member, names
from fastskip.policy.routers import RouterRule
from fastskip.policy.rules import AnyRule, ArrangementRule, MaskRule, SkipRule
from fastskip.policy.vocabulary import (
    Arrangement,
    Mask,
    PolicyError,
    Semantics,
    SkippedKV,
    Sublayer,
    TokenClass,
)

BLOCK = (Sublayer.ATTENTION, Sublayer.FFN)
SCOPES: Mapping[str, str | tuple[TokenClass, ...]] = {
    "all": "all",
    "prompt": (TokenClass.IMAGE, TokenClass.TEXT),
    **{token_class.value: (token_class,) for token_class in TokenClass},
}
SKIPS = {"block": BLOCK, "ffn": (Sublayer.FFN,), "attention": (Sublayer.ATTENTION,)}
Interval = int | str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Made:
    """What a preset expands to."""

    rules: tuple[AnyRule, ...]
    semantics: Semantics = Semantics.CLEAN


def skip_block(
    scope: str = "all",
    interval: Interval = 2,
    start: int = 0,
    end: int = -1,
    depth: int | None = None,
    kv: str | None = None,
    semantics: str = "clean",
) -> Made:
    """Skip whole blocks, by default every other one."""
    return _skip("block", scope, selected(interval, start, end, depth), kv, semantics)


def skip_ffn(
    scope: str = "all",
    interval: Interval = 2,
    start: int = 0,
    end: int = -1,
    depth: int | None = None,
    semantics: str = "clean",
) -> Made:
    """Skip FFNs."""
    return _skip("ffn", scope, selected(interval, start, end, depth), None, semantics)


def skip_attention(
    scope: str = "all",
    interval: Interval = 2,
    start: int = 0,
    end: int = -1,
    depth: int | None = None,
    kv: str | None = None,
    semantics: str = "clean",
) -> Made:
    """Skip self-attention."""
    return _skip("attention", scope, selected(interval, start, end, depth), kv, semantics)


def parallel_attention(
    scope: str = "all",
    interval: Interval = 1,
    start: int = 0,
    end: int = -1,
    depth: int | None = None,
    norm: str | None = None,
    semantics: str = "clean",
) -> Made:
    """Run attention and FFN of each selected block from the same input."""
    layers = selected(interval, start, end, depth)
    rule = ArrangementRule(layers, Arrangement.PARALLEL, norm=norm, tokens=_tokens(scope))
    return Made((rule,), _semantics(semantics))


def parallel_block(
    scope: str = "all",
    interval: int = 2,
    start: int = 0,
    end: int = -2,
    depth: int | None = None,
    combine: str | None = None,
    semantics: str = "clean",
) -> Made:
    """Run pairs of blocks (l, l + 1) from the same input, l as selected."""
    integer(interval, "interval", 2)
    pairs: Any
    if depth is None:
        if interval != 2:
            raise PolicyError("interval", interval, "2, or any integer >= 2 together with a depth")
        pairs = f"{_first(2, start)}:{integer(end, 'end')}"
    else:
        chosen = _listed((interval,), start, end, depth)
        last = _end(end, depth)
        pairs = [[layer, layer + 1] for layer in chosen if layer + 1 < last]
        if not pairs:
            problem = f"no pair lies between start and end in a model of {depth} layers"
            raise PolicyError("end", end, "bounds that leave room for a pair", problem)
    tokens = _tokens(scope)
    rule = ArrangementRule(pairs, Arrangement.PAIR, combine=combine, tokens=tokens)
    return Made((rule,), _semantics(semantics))


def drop(start: int = -4, end: int = -1) -> Made:
    """Skip the blocks of the late layers start to end - 1 for every row."""
    layers = f"{integer(start, 'start')}:{integer(end, 'end')}"
    return Made((SkipRule(layers, "all", BLOCK, SkippedKV.OMIT),))


def exit_(after: int = -5) -> Made:
    """After layer `after`, only the last row of a prompt continues; generated rows all continue."""
    first = _behind(after)
    layers = f"{first}:{first + 1 or ''}"
    rule = RouterRule(layers, "all", BLOCK, "paper.exit", kv=SkippedKV.OMIT)
    return Made((rule,))


def visual_withdrawal(after: int = -5) -> Made:
    """Drop image rows from all layers after layer `after`, and from their caches."""
    layers = f"{_behind(after)}:"
    return Made((SkipRule(layers, TokenClass.IMAGE, BLOCK, SkippedKV.OMIT),))


def random(
    scope: str = "all",
    interval: int = 4,
    start: int = 0,
    end: int = -1,
    skip: str = "block",
    seed: int = 0,
    semantics: str = "clean",
) -> Made:
    """Skip multiples of an interval that each layer of each forward draws from 2 to `interval`."""
    options = {"interval": integer(interval, "interval", 2), "seed": integer(seed, "seed", 0)}
    layers = f"{_first(1, start)}:{integer(end, 'end')}"
    return _route("paper.random", options, scope, layers, skip, semantics)


def token_ratio_ffn(
    ratio: float = 0.5, scope: str = "image", start: int = 0, end: int = -1, seed: int = 0
) -> Made:
    """Skip the FFN for a share of the rows, drawn for each layer (2405.16700, figure 11)."""
    share = finite(ratio)
    if share is None or not 0 <= share <= 1:
        raise PolicyError("ratio", ratio, "a number in [0, 1]")
    layers = f"{_first(1, start)}:{integer(end, 'end')}"
    rule = RouterRule(layers, _tokens(scope), Sublayer.FFN, "random", rate=ratio, seed=seed)
    return Made((rule,))


def unimodal_mask(layers: int = 1) -> Made:
    """In the first `layers` layers, image rows and all other rows do not see each other."""
    return Made((MaskRule(f":{integer(layers, 'layers', 1)}", Mask.UNIMODAL),))


def entropy(
    threshold: float = 1.0,
    scope: str = "all",
    interval: int | None = None,
    start: int = 0,
    end: int = -1,
    skip: str = "block",
    semantics: str = "clean",
) -> Made:
    """Skip where the logit lens on a sequence's last row has an entropy (nats) below `threshold`,
    and in layers that are multiples of `interval`, if given."""
    nats = finite(threshold)
    if nats is None:
        raise PolicyError("threshold", threshold, "a finite number, in nats")
    options: dict[str, Any] = {"threshold": nats}
    if interval is not None:
        options["interval"] = integer(interval, "interval", 1)
    if _semantics(semantics) is Semantics.REFERENCE:
        options["normed"] = False
    layers = f"{_first(1, start)}:{integer(end, 'end')}"
    return _route("paper.entropy", options, scope, layers, skip, semantics)


def token_index(
    interval: int = 3,
    scope: str = "all",
    start: int = 0,
    end: int = -1,
    skip: str = "block",
    semantics: str = "clean",
) -> Made:
    """Skip multiples of `interval`, which shrinks by one (to 2 at least) where the logit lens on a
    sequence's last row predicts the same token as one layer before."""
    first = integer(start, "start", 0)
    options: dict[str, Any] = {"interval": integer(interval, "interval", 2), "start": first}
    if _semantics(semantics) is Semantics.REFERENCE:
        options["normed"] = False
    # The router reads the layer at `start` for the sake of the next one, and never skips it.
    layers = f"{first}:{integer(end, 'end')}"
    return _route("paper.token-index", options, scope, layers, skip, semantics)


PAPER_PRESETS: Mapping[str, Callable[..., Made]] = {
    "paper/skip-block": skip_block,
    "paper/skip-ffn": skip_ffn,
    "paper/skip-attention": skip_attention,
    "paper/parallel-attention": parallel_attention,
    "paper/parallel-block": parallel_block,
    "paper/drop": drop,
    "paper/exit": exit_,
    "paper/visual-withdrawal": visual_withdrawal,
    "paper/random": random,
    "paper/token-ratio-ffn": token_ratio_ffn,
    "paper/unimodal-mask": unimodal_mask,
    "paper/entropy": entropy,
    "paper/token-index": token_index,
}


def selected(
    interval: Interval, start: int = 0, end: int = -1, depth: int | None = None
) -> str | list[int]:
    """The layers that an interval selects: a slice string, or a list of indices if depth is given.

    Several intervals, a list or "4,3,2,2", split the depth into n segments of depth // n layers
    (the last takes the remainder), one interval per segment. Multiples refer to the layer's index
    in the model, not in the segment.
    """
    intervals = integers(interval, "interval", 1, "4,3,2,2")
    if len(intervals) > 1 and depth is None:
        raise PolicyError("depth", None, "the model's number of layers, for several intervals")
    if depth is None:
        each = intervals[0]
        step = "" if each == 1 else f":{each}"
        return f"{_first(each, start)}:{integer(end, 'end')}{step}"
    found = _listed(intervals, start, end, depth)
    if not found:
        problem = f"selects none of the {depth} layers"
        raise PolicyError("interval", interval, "an interval with a multiple in range", problem)
    return found


def _listed(intervals: Sequence[int], start: int, end: int, depth: int) -> list[int]:
    if integer(depth, "depth", 1) > MAX_DEPTH:
        raise PolicyError("depth", depth, f"at most {MAX_DEPTH} layers")
    size = depth // len(intervals)
    if not size:
        raise PolicyError("interval", list(intervals), f"at most {depth} intervals")
    first, last = integer(start, "start", -1), _end(end, depth)
    segments = [min(layer // size, len(intervals) - 1) for layer in range(depth)]
    return [
        layer
        for layer, segment in enumerate(segments)
        if first < layer < last and layer % intervals[segment] == 0
    ]


def _first(interval: int, start: int) -> int:
    """The first multiple after `start`."""
    return (integer(start, "start", -1) // interval + 1) * interval


def _behind(after: int) -> int:
    """The first layer after `after`."""
    if integer(after, "after") == -1:
        allowed = "a layer index >= 0, or <= -2 if counted from the end"
        raise PolicyError("after", after, allowed, "got -1, the last layer; no layer follows it")
    return after + 1


def _end(value: int, depth: int) -> int:
    return value + depth if integer(value, "end") < 0 else value


def _skip(what: str, scope: str, layers: str | list[int], kv: str | None, semantics: str) -> Made:
    return Made((SkipRule(layers, _tokens(scope), SKIPS[what], kv),), _semantics(semantics))


def _route(
    kind: str, options: Mapping[str, Any], scope: str, layers: str, skip: str, semantics: str
) -> Made:
    if not isinstance(skip, str) or skip not in SKIPS:
        raise PolicyError("skip", skip, names(SKIPS))
    kv = None
    if _semantics(semantics) is Semantics.REFERENCE and skip != "ffn":
        if skip == "attention":
            allowed = '"block" or "ffn" under semantics "reference"'
            raise PolicyError("skip", skip, allowed)
        kv = SkippedKV.REUSE
    rule = RouterRule(layers, _tokens(scope), SKIPS[skip], kind, kv=kv, options=options)
    return Made((rule,), _semantics(semantics))


def _tokens(scope: Any) -> str | tuple[TokenClass, ...]:
    if not isinstance(scope, str) or scope not in SCOPES:
        raise PolicyError("scope", scope, names(SCOPES))
    return SCOPES[scope]


def _semantics(value: Any) -> Semantics:
    return member(Semantics, value, "semantics")
