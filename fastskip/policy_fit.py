"""The model a policy was made for: recorded in its provenance and compared when it is loaded.

A policy that was found on one model may be used on any other. But its cost in quality was measured
on that one, so loading it onto a different model warns.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from typing import Any

from fastskip.families import shape_of
from fastskip.fingerprints import model_fingerprint
from fastskip.policy import PolicyError, PolicyFitWarning, SkipPolicy
from fastskip.sparse.matrices import matrices
from fastskip.wording import dtype_name

FIELD = "made_for"
_KINDS: Mapping[str, type] = {
    "model": str,
    "fingerprint": str,
    "depth": int,
    "hidden_size": int,
    "dtype": str,
}
_LABELS = {
    "model": "model",
    "depth": "depth",
    "hidden_size": "hidden size",
    "fingerprint": "weights' fingerprint",
    "dtype": "dtype (which alone would not matter)",
}


def made_for(model: Any) -> dict[str, Any]:
    """The `provenance["made_for"]` of a policy that was found on this model."""
    return {
        "model": _name(model),
        "fingerprint": model_fingerprint(model),
        **_sizes(model),
        "dtype": dtype_name(model.dtype),
    }


def origin_of(policy: SkipPolicy) -> Mapping[str, Any]:
    """The `made_for` record of a policy; empty if there is none. Unknown fields are allowed.

    Raises:
        PolicyError: a field is malformed.
    """
    field = f"provenance.{FIELD}"
    recorded = policy.provenance.get(FIELD, {})
    if not isinstance(recorded, dict):
        raise PolicyError(field, recorded, f"an object with {', '.join(_KINDS)}, or none")
    for key, kind in _KINDS.items():
        if key in recorded and type(recorded[key]) is not kind:
            allowed = "a string" if kind is str else "an integer"
            raise PolicyError(f"{field}.{key}", recorded[key], allowed)
    return recorded


def check_fit(model: Any, policy: SkipPolicy) -> None:
    """Warn if the policy was made for a different model, and list the differences.

    The model's name and dtype are listed, but do not count as differences if weights can be
    compared, which takes plain weights (neither sparse nor quantised in memory). No weight is read
    if the policy records no model.

    Args:
        model: a Hugging Face model, prepared or not.
        policy: the policy that is loaded onto it.
    Raises:
        PolicyError: the policy's record is malformed.
    """
    recorded = origin_of(policy)
    if not recorded:
        return
    own: dict[str, Any] = _sizes(model) | {"dtype": dtype_name(model.dtype)}
    differs = {key for key in ("depth", "hidden_size") if recorded.get(key, own[key]) != own[key]}
    can_compare = "fingerprint" in recorded and all(matrix.is_plain for matrix in matrices(model))
    if can_compare and not differs:
        own["fingerprint"] = model_fingerprint(model)
        differs |= {"fingerprint"} if own["fingerprint"] != recorded["fingerprint"] else set()
    own["model"] = _name(model)
    is_renamed = _short(recorded.get("model", own["model"])) != _short(own["model"])
    if not differs and (can_compare or not is_renamed):
        return
    differs |= {"model"} if is_renamed else set()
    differs |= {"dtype"} if recorded.get("dtype", own["dtype"]) != own["dtype"] else set()
    parts = [
        f"{_LABELS[key]}: {recorded[key]}, here {own[key]}" for key in _LABELS if key in differs
    ]
    warnings.warn(
        f"policy {policy.name!r} was made for a different model, so its cost in quality on this "
        f"one is unknown; {'; '.join(parts)}",
        PolicyFitWarning,
        stacklevel=_callers_level(),
    )


def _callers_level() -> int:
    """The `stacklevel`, for the calling function, of the first frame outside fastskip."""
    level = 1
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals["__name__"].partition(".")[0] == "fastskip":
        frame, level = frame.f_back, level + 1
    return level


def _sizes(model: Any) -> dict[str, int]:
    shape = shape_of(model.config)
    return {"depth": shape.depth, "hidden_size": shape.hidden_size}


def _name(model: Any) -> str:
    return str(getattr(model, "name_or_path", ""))


def _short(name: str) -> str:
    """The name without folder or owner, since checkpoint paths differ between machines."""
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2]
