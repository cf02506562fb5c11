"""Policy documents on disk: JSON or YAML to plain data and back, strict and bounded in size.

Knows nothing about policies. Reading executes no code: YAML goes through a safe loader that also
refuses aliases (a few can expand to gigabytes). Duplicate keys are errors in both formats.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fastskip.atomic_files import atomic_write

MAX_BYTES = 1 << 20
SUFFIXES = (".json", ".yaml", ".yml")

_EXPONENT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+\Z")


def read_document(path: Path) -> object:
    """Parse a file by its suffix; `ValueError` says what is wrong, `OSError` passes through."""
    _check_suffix(path)
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"a policy file may have at most {MAX_BYTES} bytes")
    try:
        text = data.decode("utf-8-sig")  # some editors write a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error})") from error
    try:
        return _parse_json(text) if path.suffix.lower() == ".json" else _parse_yaml(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def write_document(path: Path, document: dict[str, Any]) -> None:
    """Write plain data atomically, in the format of the suffix.

    Raises `ValueError` for another suffix or text that UTF-8 cannot encode; `OSError` passes
    through.
    """
    _check_suffix(path)
    if path.suffix.lower() == ".json":
        text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    else:
        import yaml

        class Dumper(yaml.SafeDumper):
            pass

        _take_exponents(Dumper)  # so that strings that look like such numbers are quoted
        text = yaml.dump(document, Dumper=Dumper, sort_keys=False, allow_unicode=True)
    data = text.encode("utf-8")
    with atomic_write(path) as part:
        part.write_bytes(data)


def _check_suffix(path: Path) -> None:
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"the suffix must be one of {', '.join(SUFFIXES)}")


def _parse_json(text: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from error


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(k for k in keys if keys.count(k) > 1)!r}")
    return result


def _parse_yaml(text: str) -> object:
    import yaml

    class StrictLoader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError("YAML aliases are not accepted")
            return super().compose_node(parent, index)  # type: ignore[no-untyped-call]

    def construct_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
        pairs = [(loader.construct_object(k, deep=True), v) for k, v in node.value]  # type: ignore[no-untyped-call]
        for key, _ in pairs:
            if not isinstance(key, str):
                raise ValueError(f"keys must be strings, not {key!r}")
        return _unique([(k, loader.construct_object(v, deep=True)) for k, v in pairs])  # type: ignore[no-untyped-call]

    def construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> object:
        # YAML 1.1 reads an unquoted 4:20:2 as a base-60 number; policies mean a slice.
        if ":" in node.value:
            return node.value
        return loader.construct_yaml_int(node)  # type: ignore[no-untyped-call]

    _take_exponents(StrictLoader)
    StrictLoader.add_constructor("tag:yaml.org,2002:map", construct_mapping)
    StrictLoader.add_constructor("tag:yaml.org,2002:int", construct_int)
    try:
        return yaml.load(text, Loader=StrictLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML ({error})") from error


def _take_exponents(kind: Any) -> None:
    """Resolves numbers as in YAML 1.2; in 1.1, those without a point, such as 1e-3, are strings."""
    kind.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))
