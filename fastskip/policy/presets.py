"""Named sets of rules: published skipping methods as functions of a few options.

The modes of the paper that this project implements are in `paper_presets`.

`SkipPolicy.preset` turns them into policies. Every preset that takes a range leaves the last layer
dense by default (`end=-1`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from itertools import pairwise
from typing import Any

from fastskip.policy.fields import integer, integers
from fastskip.policy.paper_presets import BLOCK, PAPER_PRESETS, Made
from fastskip.policy.removals import Keep, RemovalRule
from fastskip.policy.rules import AnyRule, ArrangementRule, SkipRule
from fastskip.policy.vocabulary import (
    Arrangement,
    PolicyError,
    Ranking,
    SkippedKV,
    Sublayer,
    TokenClass,
    shown,
)

Rule = SkipRule | ArrangementRule | RemovalRule


def dense() -> tuple[Rule, ...]:
    """Skip nothing."""
    return ()


def every_nth_block(
    interval: int = 2,
    start: int | None = None,
    end: int = -1,
    scope: str = "all",
    kv: str | None = None,
) -> tuple[Rule, ...]:
    """Skip the whole block in every `interval`-th layer from `start` (default: `interval`)."""
    return _every_nth(BLOCK, interval, start, end, scope, kv)


def every_nth_ffn(
    interval: int = 2, start: int | None = None, end: int = -1, scope: str = "all"
) -> tuple[Rule, ...]:
    """Skip the FFN in every `interval`-th layer from `start` (default: `interval`)."""
    return _every_nth((Sublayer.FFN,), interval, start, end, scope, None)


def every_nth_attention(
    interval: int = 2,
    start: int | None = None,
    end: int = -1,
    scope: str = "all",
    kv: str | None = None,
) -> tuple[Rule, ...]:
    """Skip attention in every `interval`-th layer from `start` (default: `interval`)."""
    skip = (Sublayer.ATTENTION,)
    return _every_nth(skip, interval, start, end, scope, kv)


def frozen_visual(start: int = 2, end: int = -1) -> tuple[Rule, ...]:
    """Image rows only contribute K and V in a range of layers (ShortV, arXiv 2504.00502)."""
    rule = SkipRule(_range(start, end), TokenClass.IMAGE, BLOCK, SkippedKV.PROJECT)
    return (rule,)


def visual_withdrawal(after: int = 15) -> tuple[Rule, ...]:
    """Drop image rows from all layers after layer `after` (VTW, arXiv 2405.05803)."""
    rule = SkipRule(f"{integer(after, 'after', 0) + 1}:", TokenClass.IMAGE, BLOCK, SkippedKV.OMIT)
    return (rule,)


def fastv(after: int = 1, ratio: float = 0.5) -> tuple[Rule, ...]:
    """After layer `after`, keep the share `ratio` of image rows that the prompt's last row attended
    to most (FastV, arXiv 2403.06764, whose K is `after` + 1 and R is 1 - `ratio`)."""
    return (_removal(after, Ranking.ATTENTION, ratio),)


def pyramid_drop(
    stages: int | str | Sequence[int] = (7, 15, 23), ratio: float = 0.5
) -> tuple[Rule, ...]:
    """After each layer of `stages`, keep a share `ratio` of the remaining image rows, ranked by the
    attention of the next layer (PyramidDrop, arXiv 2410.17247)."""
    layers = integers(stages, "stages", 0, "7,15,23")
    if any(later <= layer for layer, later in pairwise(layers)):
        raise PolicyError("stages", stages, 'layers in ascending order, such as "7,15,23"')
    return tuple(_removal(after, Ranking.NEXT_ATTENTION, ratio) for after in layers)


def random_removal(after: int = 1, ratio: float = 0.5, seed: int = 0) -> tuple[Rule, ...]:
    """After layer `after`, keep a share `ratio` of the image rows, drawn at random."""
    return (_removal(after, Ranking.RANDOM, ratio, seed=seed),)


def even_removal(after: int = 1, ratio: float = 0.5) -> tuple[Rule, ...]:
    """After layer `after`, keep a share `ratio` of the image rows, evenly spaced."""
    return (_removal(after, Ranking.SPACING, ratio),)


def image_ffn(start: int = 2, end: int = -1) -> tuple[Rule, ...]:
    """Skip the FFN for image rows in a range of layers."""
    rule = SkipRule(_range(start, end), TokenClass.IMAGE, Sublayer.FFN)
    return (rule,)


def parallel_blocks(start: int = 2, end: int = -1, norm: str = "own") -> tuple[Rule, ...]:
    """Run attention and FFN of each layer in a range from the same input."""
    rule = ArrangementRule(_range(start, end), Arrangement.PARALLEL, norm=norm)
    return (rule,)


def block_pairs(start: int = 2, end: int = -2, combine: str = "sum") -> tuple[Rule, ...]:
    """Run the layers of a range in pairs from the same input; the range must have even length."""
    rule = ArrangementRule(_range(start, end), Arrangement.PAIR, combine=combine)
    return (rule,)


_BUILT_IN: tuple[Callable[..., tuple[Rule, ...]], ...] = (
    dense,
    every_nth_block,
    every_nth_ffn,
    every_nth_attention,
    frozen_visual,
    visual_withdrawal,
    fastv,
    pyramid_drop,
    random_removal,
    even_removal,
    image_ffn,
    parallel_blocks,
    block_pairs,
)


def _line(function: Callable[..., Any]) -> str:
    """The first paragraph of a preset's docstring as one line."""
    return " ".join((function.__doc__ or "").split("\n\n")[0].split())


PRESETS: Mapping[str, tuple[Callable[..., Any], str]] = {
    **{preset.__name__: (preset, _line(preset)) for preset in _BUILT_IN},
    **{name: (preset, _line(preset)) for name, preset in PAPER_PRESETS.items()},
}
"""Name -> (function, one-line description)."""


def hint_for(name: object) -> str:
    """` (did you mean PRESET?)` for a name that is much like a preset's, with or without options;
    else nothing."""
    near = get_close_matches(str(name).partition(":")[0], PRESETS, n=1, cutoff=0.75)
    return f" (did you mean {near[0]}?)" if near else ""


def split_preset(text: str) -> tuple[str, dict[str, Any]] | None:
    """Name and options of `PRESET:KEY=VALUE:KEY=VALUE`; `None` if no preset has that name."""
    name, *options = text.split(":")
    if name not in PRESETS:
        return None
    return name, options_of(options, name)


def defaults_of(name: str) -> dict[str, Any]:
    """The options of preset `name` and their defaults."""
    parameters = inspect.signature(PRESETS[name][0]).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters}


def options_of(texts: Sequence[str], name: str) -> dict[str, Any]:
    """Options of preset `name`, each written `KEY=VALUE`; numeric values become numbers."""
    found = [_option(text, name) for text in texts]
    options = dict(found)
    if len(options) < len(found):
        keys = [key for key, _ in found]
        twice = next(key for key in keys if keys.count(key) > 1)
        values = [value for key, value in found if key == twice]
        raise PolicyError(f"{name}.{twice}", values, "each option once")
    return options


def _option(text: str, name: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        known = ", ".join(defaults_of(name))
        allowed = f"KEY=VALUE, where KEY is one of {known}" if known else "no options"
        raise PolicyError(name, text, allowed, f"{text!r} is not KEY=VALUE")
    for number in (int, float):
        with suppress(ValueError):
            return key, number(value)
    return key, value


def build_preset(name: str, options: Mapping[str, Any]) -> Made:
    """Expands the preset `name`; for an unknown name or option, `PolicyError` lists those known."""
    if not isinstance(name, str) or name not in PRESETS:
        problem = f"got {shown(name)}{hint_for(name)}"
        raise PolicyError("preset", name, ", ".join(PRESETS), problem)
    function, known = PRESETS[name][0], defaults_of(name)
    for option, value in options.items():
        if option not in known:
            allowed = ", ".join(known) or "no options"
            raise PolicyError(f"{name}.{option}", value, allowed, "unknown option")
    try:
        made: Made | tuple[AnyRule, ...] = function(**options)
    except PolicyError as error:
        raise error.under(name) from None
    return made if isinstance(made, Made) else Made(made)


def _removal(after: int, by: Ranking, ratio: float, seed: int | None = None) -> RemovalRule:
    try:
        return RemovalRule(integer(after, "after", 0), keep=Keep(by, ratio), seed=seed)
    except PolicyError as error:
        raise PolicyError(
            error.field.rpartition(".")[2], error.value, error.allowed, error.problem
        ) from None


def _every_nth(
    skip: tuple[Sublayer, ...],
    interval: int,
    start: int | None,
    end: int,
    scope: str,
    kv: str | None,
) -> tuple[Rule, ...]:
    step = integer(interval, "interval", 1)
    first = step if start is None else integer(start, "start")
    if not isinstance(scope, str) or scope not in ("all", *TokenClass):
        raise PolicyError("scope", scope, ", ".join(("all", *TokenClass)))
    rule = SkipRule(f"{_range(first, end)}:{step}", scope, skip, kv)
    return (rule,)


def _range(start: int, end: int) -> str:
    return f"{integer(start, 'start')}:{integer(end, 'end')}"
