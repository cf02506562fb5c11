"""fastskip's own files in a checkpoint, which may be a folder or lie on the hub."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import transformers

from fastskip.families import UnsupportedModelError
from fastskip.generation.saving import POLICY_FILE, policy_of_config
from fastskip.policy import PolicyError, PolicyLike, SkipPolicy
from fastskip.sparse.checkpoint import LAYOUT_FILE, SparseLayout, check_unmixed

logger = logging.getLogger(__name__)
_INDEX_FILE = "model.safetensors.index.json"


def choose_policy(
    policy: PolicyLike | None, path: str, config: Any, hub: dict[str, Any]
) -> SkipPolicy:
    """The explicit policy, else the checkpoint's policy file, else its config's, else dense."""
    if policy is not None:
        return SkipPolicy.coerce(policy)
    found = _file_of(path, POLICY_FILE, hub)
    if found is not None:
        logger.info("policy: %s", found)
        # Router weights lie beside the policy, which the hub's cache links to a blob elsewhere.
        chosen = replace(SkipPolicy.from_file(found), folder=str(found.parent.resolve()))
        if not Path(path).is_dir():
            _fetch_weights(chosen, path, hub)
        return chosen
    from_config = policy_of_config(config)
    if from_config is not None:
        logger.info("policy: per_layer_config of the checkpoint")
        return from_config
    if Path(path).is_dir() or _is_absent(path, POLICY_FILE, hub):
        logger.info("policy: none given and none in the checkpoint; using dense")
    else:
        logger.warning(
            "policy: none given, and the hub could not be reached to check whether %s has one; "
            "using dense",
            path,
        )
    return SkipPolicy()


def sparse_layout(path: str, hub: dict[str, Any]) -> SparseLayout | None:
    """The layout of a sparse checkpoint; ``None`` for an ordinary one."""
    found = _file_of(path, LAYOUT_FILE, hub)
    if found is None:
        return None
    check_unmixed(found.parent)
    return SparseLayout.read(found)


def check_index(folder: str) -> None:
    """Raises ``UnsupportedModelError`` if a folder's index of its weights' files is malformed.

    transformers takes its fields for granted.
    """
    index = Path(folder) / _INDEX_FILE
    if not index.is_file() or (index.parent / "model.safetensors").is_file():
        return  # transformers reads no index beside a file of all weights
    document = json.loads(index.read_text(encoding="utf-8"))
    for name in ("weight_map", "metadata"):
        value = document.get(name) if isinstance(document, dict) else document
        if not isinstance(value, dict):
            allowed = "an object, in an index as save_pretrained writes it"
            raise UnsupportedModelError(f"{index}: {name}", value, allowed)


def _file_of(path: str, name: str, hub: dict[str, Any]) -> Path | None:
    """The path of one of fastskip's own files in a checkpoint, if it exists."""
    if Path(path).is_dir():
        local = Path(path) / hub.get("subfolder", "") / name
        return local if local.is_file() else None
    found = transformers.utils.cached_file(
        path,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub,
    )
    return Path(found) if found else None


def _is_absent(path: str, name: str, hub: dict[str, Any]) -> bool:
    """Whether the hub cache records that a checkpoint has no such file."""
    inside = PurePosixPath(hub.get("subfolder", ""), name).as_posix()
    places = {key: hub[key] for key in ("revision", "cache_dir") if key in hub}
    found = transformers.utils.try_to_load_from_cache(path, inside, **places)
    return found is not None and not isinstance(found, str)


def _fetch_weights(policy: SkipPolicy, path: str, hub: dict[str, Any]) -> None:
    """Downloads router weights into the hub cache, where they lie next to the policy."""
    for number, rule in enumerate(policy.routers):
        if rule.weights is None:
            continue
        inside = PurePosixPath(rule.weights)
        if inside.is_absolute() or ".." in inside.parts:
            allowed = "a file in the policy's own folder"
            raise PolicyError(f"routers[{number}].weights", rule.weights, allowed)
        transformers.utils.cached_file(path, rule.weights, **hub)
