"""What the user wants to skip: typed, pure data that knows no model, and its file format.

A `SkipPolicy` holds rules (layers x token classes x sublayers to skip), arrangements (how a layer's
sublayers are wired), routers (cells decided from data at run time), removals (rows of a prompt that
leave all later layers) and masks. It accepts strings and turns them into enums; `plan.make_plan`
checks everything that depends on a model's depth.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from fastskip.policy.fields import (
    build,
    check_fields,
    instances,
    json_object,
    member,
    names,
    sequence,
    set_fields,
    text,
)
from fastskip.policy.file import SUFFIXES, read_document, write_document
from fastskip.policy.presets import PRESETS, build_preset, hint_for, split_preset
from fastskip.policy.removals import RemovalRule
from fastskip.policy.routers import RouterRule
from fastskip.policy.rules import (
    AnyRule,
    ArrangementRule,
    MaskRule,
    SkipRule,
)
from fastskip.policy.vocabulary import (
    PolicyError,
    Semantics,
    shown,
)

SCHEMA_VERSION = 1
_SHOWN_RULES = 10
"""How many rules a policy's ``repr`` shows."""


@dataclass(frozen=True, slots=True)
class SkipPolicy:
    """Rules, arrangements, routers, removals and masks; the empty policy is the dense model.

    Equality compares what is skipped, as written; it ignores `name`, `provenance` and `folder` (the
    base of relative paths of router weights: the policy file's folder). Every malformed field
    raises `PolicyError`.
    """

    rules: tuple[SkipRule, ...] = ()
    arrangements: tuple[ArrangementRule, ...] = ()
    routers: tuple[RouterRule, ...] = ()
    removals: tuple[RemovalRule, ...] = ()
    masks: tuple[MaskRule, ...] = ()
    semantics: Semantics = Semantics.CLEAN
    name: str = field(default="", compare=False)
    provenance: dict[str, Any] = field(default_factory=dict, compare=False)
    folder: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        set_fields(
            self,
            rules=instances(SkipRule, self.rules, "rules"),
            arrangements=instances(ArrangementRule, self.arrangements, "arrangements"),
            routers=instances(RouterRule, self.routers, "routers"),
            removals=instances(RemovalRule, self.removals, "removals"),
            masks=instances(MaskRule, self.masks, "masks"),
            semantics=member(Semantics, self.semantics, "semantics"),
            provenance=json_object(self.provenance, "provenance"),
        )
        self._check_removals()
        text(self.name, "name", "a string of Unicode text")

    def __repr__(self) -> str:
        """What a notebook shows: the name, and the rules as a policy file has them."""
        found = [(key, rule.to_dict()) for key in _RULES for rule in getattr(self, key)]
        lines = [f"{key}: {_cut(json.dumps(rule))}" for key, rule in found[:_SHOWN_RULES]]
        if self.semantics is not Semantics.CLEAN:
            lines.append(f"semantics: {self.semantics}")
        if len(found) > _SHOWN_RULES:
            lines.append(f"and {len(found) - _SHOWN_RULES} more; to_dict() has all")
        head = f"SkipPolicy {shown(self.name)}" if self.name else "SkipPolicy"
        return "\n  ".join([f"{head}:", *lines]) if lines else f"{head}: dense"

    def _check_removals(self) -> None:
        last = -1
        for number, rule in enumerate(self.removals):
            if rule.after_layer <= last:
                allowed = f"layers in ascending order, so more than {last}"
                raise PolicyError(f"removals[{number}].after_layer", rule.after_layer, allowed)
            last = rule.after_layer
        others = {"routers": self.routers, "semantics": self.semantics is Semantics.REFERENCE}
        for name, is_there in others.items() if self.removals else ():
            if is_there:
                raise PolicyError("removals", len(self.removals), f"none together with {name}")

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> SkipPolicy:
        """Build a policy from the plain data of a policy file (schema version 1)."""
        if not isinstance(document, Mapping):
            raise PolicyError("policy", document, "an object with schema_version and rules")
        known = ("schema_version", *(f.name for f in fields(cls) if f.name != "folder"))
        check_fields(document, known, ("schema_version",))
        version = document["schema_version"]
        if type(version) is not int or version != SCHEMA_VERSION:
            newer = type(version) is int and version > SCHEMA_VERSION
            problem = f"got {version!r}, written for a newer fastskip" if newer else None
            raise PolicyError("schema_version", version, str(SCHEMA_VERSION), problem)
        values = {key: value for key, value in document.items() if key != "schema_version"}
        for key, rule in _RULES.items():
            items = sequence(document.get(key, ()), key)
            values[key] = tuple(build(rule, x, f"{key}[{i}]") for i, x in enumerate(items))
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads back to an equal policy."""
        rules = {key: [rule.to_dict() for rule in getattr(self, key)] for key in _RULES}
        for key in ("removals", "masks"):
            if not rules[key]:
                del rules[key]
        head = {"schema_version": SCHEMA_VERSION, "name": self.name}
        if self.semantics is not Semantics.CLEAN:
            head["semantics"] = self.semantics.value
        return head | rules | {"provenance": deepcopy(self.provenance)}

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> SkipPolicy:
        """Read a JSON or YAML policy file. A missing or unreadable file raises `OSError`."""
        with _naming(path):
            document = read_document(Path(path))
        if not isinstance(document, dict):
            raise PolicyError(os.fspath(path), document, "an object with schema_version and rules")
        return replace(cls.from_dict(document), folder=str(Path(path).resolve().parent))

    def path_of(self, weights: str) -> Path:
        """The path of a router's weights; relative paths start at the policy file's folder."""
        return Path(self.folder or ".") / weights

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the policy as JSON or YAML, by the suffix of `path`, replacing an existing file
        atomically. Raises `OSError` if it cannot be written.

        Router weights stay where they are; relative paths are rewritten for the new folder.
        """
        document = self.to_dict()
        for router in document["routers"]:
            if "weights" in router and not os.path.isabs(router["weights"]):
                here = self.path_of(router["weights"]).resolve()
                router["weights"] = os.path.relpath(here, Path(path).resolve().parent)
        with _naming(path):
            write_document(Path(path), document)

    @classmethod
    def preset(cls, name: str, **options: Any) -> SkipPolicy:
        """A named policy of `policy.presets`; an unknown name or option lists what exists."""
        made = build_preset(name, options)
        rules = {
            key: tuple(rule for rule in made.rules if isinstance(rule, kind))
            for key, kind in _RULES.items()
        }
        return cls(**rules, semantics=made.semantics, name=name)  # type: ignore[arg-type]

    @classmethod
    def coerce(cls, value: PolicyLike) -> SkipPolicy:
        """What `load_model(policy=...)` accepts: a policy, its dict, a preset's name or a path.

        Options may follow the name, as in `every_nth_ffn:interval=3:scope=image`. A preset's name
        takes precedence over a file of the same name.
        """
        if isinstance(value, SkipPolicy):
            return value
        if isinstance(value, Mapping):
            return cls.from_dict(value)
        if isinstance(value, str) and (named := split_preset(value)) is not None:
            return replace(cls.preset(named[0], **named[1]), name=value)
        if isinstance(value, (str, os.PathLike)) and os.path.isfile(value):
            return cls.from_file(value)
        what = f"a SkipPolicy, a dict, the path of a policy file, or a preset ({names(PRESETS)})"
        problem = None
        if isinstance(value, (str, os.PathLike)):
            problem = f"got {shown(value)}, no such file or preset{hint_for(value)}"
        raise PolicyError("policy", value, what, problem)


PolicyLike = SkipPolicy | Mapping[str, Any] | str | os.PathLike[str]
"""What `SkipPolicy.coerce` takes."""


def _cut(line: str) -> str:
    """A line as short as a notebook has room for."""
    return line if len(line) <= 140 else f"{line[:137]}..."


@contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns a `ValueError` into a `PolicyError` that names the file."""
    try:
        yield
    except ValueError as error:
        allowed = f"a policy file ({', '.join(SUFFIXES)})"
        raise PolicyError(os.fspath(path), None, allowed, str(error)) from error


_RULES: dict[str, type[AnyRule]] = {
    "rules": SkipRule,
    "arrangements": ArrangementRule,
    "routers": RouterRule,
    "removals": RemovalRule,
    "masks": MaskRule,
}
