"""Validation and normalisation of a policy's fields, and of the objects that they make up.

Most functions take a user's value and the name of the field, and raise `PolicyError`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from enum import StrEnum
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from fastskip.policy.vocabulary import PolicyError, Sublayer, TokenClass

Layers = str | tuple[int, ...]
Pairs = tuple[tuple[int, int], ...]
TokenSet = Literal["all"] | frozenset[TokenClass]
E = TypeVar("E", bound=StrEnum)
T = TypeVar("T")

SEEDS = 1 << 32
MAX_DEPTH = 10_000
"""More layers than any model has: a larger depth is a mistake and would exhaust memory."""

_SLICE = re.compile(r"(-?[0-9]{1,9})?:(-?[0-9]{1,9})?(?::([0-9]{1,9})?)?")
_INTEGERS = re.compile(r"\s*[0-9]{1,9}\s*(,\s*[0-9]{1,9}\s*)*")
# an unpaired surrogate is not a character
_SURROGATE = re.compile("[\ud800-\udfff]")
_LAYERS_ALLOWED = 'a slice string such as "4:31:2" or ":" (step >= 1), or a list of layer indices'


def member(enum: type[E], value: object, field: str, *, but: E | None = None) -> E:
    """A member of an enum, given as itself or as its string; `but` is not allowed."""
    valid = [option for option in enum if option is not but]
    if isinstance(value, str) and value in valid:
        return enum(value)
    raise PolicyError(field, value, names(valid))


def sequence(value: object, field: str) -> tuple[Any, ...]:
    """A list as a tuple; strings and mappings are not lists."""
    if isinstance(value, (list, tuple)):
        return tuple(value)
    raise PolicyError(field, value, "a list")


def integer(value: object, field: str, least: int | None = None) -> int:
    """An integer, at least `least` if given."""
    if type(value) is not int or (least is not None and value < least):
        raise PolicyError(field, value, "an integer" + ("" if least is None else f" >= {least}"))
    return value


def integers(value: object, field: str, least: int, example: str) -> tuple[int, ...]:
    """Integers that are at least `least`: one, a list of them, or a string such as "4,3,2,2"."""
    items: Any = (value,) if type(value) is int else value
    if isinstance(value, str) and _INTEGERS.fullmatch(value):
        items = [int(part) for part in value.split(",")]
    is_list = isinstance(items, (list, tuple)) and bool(items)
    if not is_list or any(type(item) is not int or item < least for item in items):
        raise PolicyError(field, value, f'an integer >= {least}, or several such as "{example}"')
    return tuple(items)


def finite(value: object) -> float | None:
    """A number as a float; `None` if it is not a finite number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def text(value: object, field: str, allowed: str) -> str:
    """A string that UTF-8 can encode."""
    if not isinstance(value, str) or _SURROGATE.search(value):
        raise PolicyError(field, value, allowed)
    return value


def instances(kind: type[T], value: object, field: str) -> tuple[T, ...]:
    """A list of `kind` as a tuple."""
    items = sequence(value, field)
    for index, item in enumerate(items):
        if not isinstance(item, kind):
            raise PolicyError(f"{field}[{index}]", item, f"a {kind.__name__}")
    return items


class Statement(Protocol):
    """A dataclass built from an object of a policy file; `required` lists mandatory fields."""

    required: ClassVar[tuple[str, ...]]
    __dataclass_fields__: ClassVar[dict[str, Any]]


S = TypeVar("S", bound=Statement)


def check_fields(
    document: Mapping[str, Any], known: Iterable[str], required: Iterable[str], path: str = ""
) -> None:
    for key in document:
        if key not in known:
            raise PolicyError(f"{path}{key}", document[key], names(known), "unknown field")
    for key in required:
        if key not in document:
            allowed = "1" if key == "schema_version" else "a value"
            raise PolicyError(f"{path}{key}", None, allowed, "is missing")


def build(kind: type[S], item: object, path: str) -> S:
    """Builds `kind` from an object of a policy file; errors name `path`."""
    known = [f.name for f in fields(kind)]
    if not isinstance(item, Mapping):
        raise PolicyError(path, item, f"an object with {names(known)}")
    check_fields(item, known, kind.required, f"{path}.")
    try:
        return kind(**item)
    except PolicyError as error:
        raise error.under(path) from None


def token_set(value: object) -> TokenSet:
    """`tokens`: "all" as written, else a set of classes."""
    if value == "all":
        return "all"
    return frozenset(_members(TokenClass, value, "tokens", '"all" or '))


def sublayer_set(value: object) -> frozenset[Sublayer]:
    """`skip`: a set of sublayers; "block" is both."""
    items = (value,) if isinstance(value, str) else value
    if isinstance(items, (list, tuple, set, frozenset)) and "block" in items:
        items = [item for item in items if item != "block"] + list(Sublayer)
    return frozenset(_members(Sublayer, items, "skip", '"block" or '))


def _members(enum: type[E], value: object, field: str, others: str) -> tuple[E, ...]:
    allowed = f"{others}a non-empty list of {names(enum)}"
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, (list, tuple, set, frozenset)) or not items:
        raise PolicyError(field, value, allowed)
    for item in items:
        if not isinstance(item, str) or item not in tuple(enum):
            raise PolicyError(field, value, allowed)
    return tuple(enum(item) for item in items)


def layer_selection(value: object) -> Layers:
    """`layers` as written, with the checks that need no depth."""
    if isinstance(value, str):
        slice_parts(value, "layers")
        return value
    if not isinstance(value, (list, tuple, range)) or not value:
        raise PolicyError("layers", value, _LAYERS_ALLOWED)
    for layer in value:
        if type(layer) is not int or layer < 0:  # a bool is an int too
            raise PolicyError("layers", value, f"{_LAYERS_ALLOWED} (integers from 0)")
    if len(set(value)) < len(value):
        raise PolicyError("layers", value, "each layer once")
    return tuple(value)


def pair_selection(value: object) -> str | Pairs:
    """`layers` of a pair arrangement: [l, l + 1] lists, or a slice of step 1."""
    if isinstance(value, str):
        if slice_parts(value, "layers")[2] != 1:
            raise PolicyError("layers", value, "a slice of step 1 for pairs")
        return value
    allowed = "a non-empty list of pairs [l, l + 1], or a slice of step 1"
    if not isinstance(value, (list, tuple)) or not value:
        raise PolicyError("layers", value, allowed)
    for pair in value:
        whole = isinstance(pair, (list, tuple)) and all(type(layer) is int for layer in pair)
        if not whole or len(pair) != 2 or pair[0] < 0 or pair[1] != pair[0] + 1:
            raise PolicyError("layers", value, allowed)
    layers = [layer for pair in value for layer in pair]
    if len(set(layers)) < len(layers):
        raise PolicyError("layers", value, "each layer in one pair only")
    return tuple((first, second) for first, second in value)


def slice_parts(text: str, field: str) -> tuple[int | None, int | None, int]:
    """Start, stop and step of a slice string."""
    match = _SLICE.fullmatch(text)
    if match is None:
        raise PolicyError(field, text, _LAYERS_ALLOWED)
    start, stop, step = (int(part) if part else None for part in match.groups())
    if step == 0:
        raise PolicyError(field, text, _LAYERS_ALLOWED)
    return start, stop, 1 if step is None else step


def select_layers(selection: Layers, depth: int, field: str) -> tuple[int, ...]:
    """The layer indices that a slice string or index list names in a model of `depth` layers."""
    if not isinstance(selection, str):
        for layer in selection:
            if not 0 <= layer < depth:
                raise PolicyError(field, selection, f"layer indices in [0, {depth})")
        return selection
    start, stop, step = slice_parts(selection, field)
    for bound in (start, stop):
        if bound is not None and not -depth <= bound <= depth:
            raise PolicyError(field, selection, f"slice bounds in [-{depth}, {depth}]")
    layers = tuple(range(depth)[start:stop:step])
    if not layers:
        raise PolicyError(field, selection, f"a slice that selects at least one of {depth} layers")
    return layers


def select_pairs(selection: str | Pairs, depth: int, field: str) -> Pairs:
    """The pairs that a pair arrangement names in a model of `depth` layers."""
    if not isinstance(selection, str):
        for pair in selection:
            select_layers(pair, depth, field)
        return selection
    layers = select_layers(selection, depth, field)
    if len(layers) % 2:
        allowed = f"an even number of layers for pairs, not {len(layers)}"
        raise PolicyError(field, selection, allowed)
    return tuple(zip(layers[::2], layers[1::2], strict=True))


def json_object(value: object, field: str) -> dict[str, Any]:
    """A deep copy of a mapping that JSON can hold."""
    try:
        document = json.dumps(value, allow_nan=False, ensure_ascii=False)
        document.encode()  # UTF-8 cannot encode unpaired surrogates
        copy = json.loads(document)
    except (TypeError, ValueError, RecursionError) as error:
        raise PolicyError(field, value, "an object that JSON can hold", str(error)) from error
    if not isinstance(copy, dict):
        raise PolicyError(field, value, "an object")
    return copy


def plain(value: object) -> Any:
    """Enums, sets and tuples as the strings and lists of a policy file, in a fixed order."""
    if isinstance(value, frozenset):
        return [
            option.value for enum in (TokenClass, Sublayer) for option in enum if option in value
        ]
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return value.value if isinstance(value, StrEnum) else value


def names(values: Iterable[str]) -> str:
    """Values in quotes, for messages."""
    return ", ".join(f'"{value}"' for value in values)


def check_seed(value: object) -> None:
    """Checks a seed, if there is one."""
    if value is not None and (type(value) is not int or not 0 <= value < SEEDS):
        raise PolicyError("seed", value, f"an integer in [0, {SEEDS})")


def set_fields(instance: object, **values: object) -> None:
    """Set the fields of a frozen instance during its construction."""
    for name, value in values.items():
        object.__setattr__(instance, name, value)
