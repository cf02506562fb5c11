"""A prepared model on disk: an ordinary checkpoint, with its policy and router weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastskip.plan import SkipPlan
from fastskip.policy import PolicyError, Semantics, SkipPolicy, Sublayer

POLICY_FILE = "fastskip_policy.json"
ROUTER_FILE = "fastskip_router_{}.safetensors"
# transformers' names for what a layer skips (heterogeneous configurations).
_SKIP_NAMES = {Sublayer.ATTENTION: "attention", Sublayer.FFN: "mlp"}


def save(
    config: Any, plan: SkipPlan, folder: Any, write: Callable[[], Any], *, export: bool
) -> Any:
    """Writes the checkpoint with ``write``, and beside it the policy and its routers' weights.

    With ``export`` the text config also gets ``per_layer_config``; that can express only all-token
    skips, so any other policy raises ``PolicyError``.
    """
    policy, weights = portable(plan.policy)  # before writing anything: a file may be missing
    text = config.get_text_config(decoder=True)
    before = _overrides_of(text)
    text.per_layer_config = per_layer_config(plan) if export else None
    try:
        result = write()
    finally:
        text.per_layer_config = before
    _write(policy, weights, folder)
    return result


def write_policy(policy: SkipPolicy, folder: Any) -> None:
    """Writes a policy as checkpoints hold it, and its routers' weights."""
    _write(*portable(policy), folder)


def _write(policy: SkipPolicy, weights: dict[str, bytes], folder: Any) -> None:
    home = Path(folder)
    home.mkdir(parents=True, exist_ok=True)
    for name, data in weights.items():
        (home / name).write_bytes(data)
    replace(policy, folder=str(home)).save(home / POLICY_FILE)


def portable(policy: SkipPolicy) -> tuple[SkipPolicy, dict[str, bytes]]:
    """The policy with router weights in its own folder, and those files by name.

    Rules that share a file still do. Raises ``PolicyError`` if a file cannot be read.
    """
    routers, names, files = [], dict[Path, str](), dict[str, bytes]()
    for number, rule in enumerate(policy.routers):
        if rule.weights is not None:
            path = policy.path_of(rule.weights).resolve()
            if path not in names:
                # A fresh name, which cannot clash with a file of the checkpoint.
                names[path] = ROUTER_FILE.format(len(names))
                files[names[path]] = _read(path, f"routers[{number}].weights")
            rule = replace(rule, weights=names[path])
        routers.append(rule)
    return replace(policy, routers=tuple(routers)), files


def _read(path: Path, field: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PolicyError(field, str(path), "a readable file", str(error)) from error


def per_layer_config(plan: SkipPlan) -> dict[int, dict[str, list[str]]]:
    """The plan's all-token skips in transformers' form; raises for a plan that has no such form."""
    policy = plan.policy
    others = policy.arrangements or policy.routers or policy.removals or policy.masks
    if others or policy.semantics is not Semantics.CLEAN:
        raise PolicyError(
            "export_per_layer_config",
            policy.to_dict(),
            "rules only: no arrangements, routers, removals or masks, clean semantics",
        )
    layers: dict[int, dict[str, list[str]]] = {}
    for layer in plan.layers:
        cells = {(cell.attention, cell.ffn) for cell in layer.cells.values()}
        if len(cells) > 1:
            raise PolicyError(
                "export_per_layer_config",
                f"layer {layer.index}",
                "skips that are the same for all token classes",
            )
        attention, ffn = next(iter(cells))
        skip = [
            _SKIP_NAMES[sublayer]
            for sublayer, runs in ((Sublayer.ATTENTION, attention), (Sublayer.FFN, ffn))
            if not runs
        ]
        if skip:
            layers[layer.index] = {"skip": skip}
    return layers


def policy_of_config(config: Any) -> SkipPolicy | None:
    """The policy that transformers' ``per_layer_config`` expresses, if any."""
    layers = _overrides_of(config.get_text_config(decoder=True)) or {}
    names = {name: sublayer for sublayer, name in _SKIP_NAMES.items()}
    rules = []
    for index, overrides in layers.items():
        skip = overrides.get("skip")
        if not skip:
            continue
        unknown = [name for name in skip if name not in names]
        if unknown:
            raise PolicyError(f"per_layer_config[{index}].skip", unknown, ", ".join(names))
        rules.append(
            {"layers": [int(index)], "tokens": "all", "skip": [names[name].value for name in skip]}
        )
    if not rules:
        return None
    return SkipPolicy.from_dict({"schema_version": 1, "name": "per_layer_config", "rules": rules})


def _overrides_of(text_config: Any) -> dict[str, dict[str, Any]] | None:
    # The attribute is a view with a full config per layer; the serialised form is what was set.
    overrides: dict[str, dict[str, Any]] | None = text_config.to_dict().get("per_layer_config")
    return overrides
