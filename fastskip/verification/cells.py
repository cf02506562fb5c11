"""What a policy means for every decoder layer, read from the policy's plain data alone.

The runtime resolves policies separately. This second reading shares no code with it on purpose, so
that a mistake in either shows up as a difference.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor


class UncheckedPolicyError(ValueError):
    """A policy that cannot be checked: it has no form as a masked dense computation, or the input
    has no rows that it affects."""


IMAGE, TEXT, GENERATED = 0, 1, 2
"""The values of a `token_classes` tensor."""

CLASS_NAMES = ("image", "text", "generated")

FEATURES = ("pixel_values", "pixel_values_images", "pixel_values_videos", "mm_encoder_outputs")
"""Model inputs that fill placeholders."""

Norm = Literal["own", "shared"]
Combine = Literal["sum", "mean"]


@dataclass(frozen=True, slots=True)
class LayerCells:
    """One decoder layer's row of the policy."""

    without_attention: frozenset[int]
    without_ffn: frozenset[int]
    sources: tuple[int | None, ...]
    """By class: the layer whose key and value a row exposes here; None if it exposes none."""
    parallel: Norm | None = None
    pair_first: bool = False
    pair_second: Combine | None = None
    arranged: frozenset[int] = frozenset()
    """The classes that run in parallel or as a pair."""
    hidden: frozenset[int] = frozenset()
    """Classes that expose hidden states as key and value."""
    unimodal: bool = False


def classes_of(config: Any) -> frozenset[int]:
    """The token classes that occur in a model with this configuration."""
    text_only = getattr(config, "image_token_id", None) is None
    return frozenset({TEXT, GENERATED} if text_only else {IMAGE, TEXT, GENERATED})


def classify(
    input_ids: Tensor,
    config: Any,
    *,
    labels: Tensor | None = None,
    prompt_length: int | None = None,
    image_features: bool = True,
) -> Tensor:
    """Return the class of every position, [batch, columns].

    Columns at or past `prompt_length` are GENERATED, placeholders that image (or video) features
    fill are IMAGE, rows with a label are GENERATED, all others TEXT. `image_features=False` means
    that no features are given, so nothing fills the placeholders.
    """
    classes = torch.full_like(input_ids, TEXT)
    if labels is not None:
        classes[labels != -100] = GENERATED
    for name in ("image_token_id", "video_token_id"):
        placeholder = getattr(config, name, None)
        if image_features and placeholder is not None:
            classes[input_ids == placeholder] = IMAGE
    if prompt_length is not None:
        classes[:, prompt_length:] = GENERATED
    return classes


def classify_prompt(input_ids: Tensor, config: Any, inputs: Mapping[str, Any]) -> Tensor:
    """`classify` for a prompt; placeholders are filled if `inputs` has any features."""
    filled = any(inputs.get(name) is not None for name in FEATURES)
    return classify(input_ids, config, image_features=filled)


def is_member(classes: Tensor, wanted: Iterable[int]) -> Tensor:
    """Return a boolean tensor that is true where the class is one of `wanted`."""
    found = torch.zeros_like(classes, dtype=torch.bool)
    for token_class in wanted:
        found |= classes == token_class
    return found


def read_policy(
    policy: Mapping[str, Any], depth: int, classes: frozenset[int]
) -> tuple[LayerCells, ...]:
    """Resolve the rules and arrangements of a policy, given as plain data, for `depth` layers.

    The policy is assumed to be valid. Decisions of routers and removals are not covered: see
    `read_routed_kv`. Pairs under semantics "reference" (whose cache does not hold what ran) have no
    form as a masked computation and are refused.
    """
    arrangements = policy.get("arrangements", ())
    refers = policy.get("semantics") == "reference"
    if refers and any(rule["kind"] == "pair" for rule in arrangements):
        raise UncheckedPolicyError(
            'arrangements: pairs under semantics "reference" have no form as a masked dense '
            'computation; allowed: policies without pairs, or "semantics": "clean"'
        )
    attention, ffn, kept = _skips(policy.get("rules", ()), depth, refers)
    sources = _sources(attention, kept, classes)
    forms = _arrangements(arrangements, depth, "shared" if refers else "own")
    if refers:
        for form, without_attention, without_ffn in zip(forms, attention, ffn, strict=True):
            if alone := (without_attention - without_ffn) & classes:
                form["parallel"] = "shared"
                form["arranged"] = form.get("arranged", frozenset()) | alone
    for rule in policy.get("masks", ()):
        for layer in _indices(rule["layers"], depth):
            forms[layer]["unimodal"] = True
    return tuple(
        LayerCells(
            frozenset(attention[layer]),
            frozenset(ffn[layer]),
            sources[layer],
            hidden=frozenset(c for c, kv in kept[layer].items() if kv == "hidden"),
            **forms[layer],
        )
        for layer in range(depth)
    )


def read_routed_kv(policy: Mapping[str, Any], depth: int) -> tuple[tuple[str, ...], ...]:
    """What a row that skips attention by a decision leaves in the cache, by layer and class.

    In layers that no router guards, the only rows to skip are those that a plug-in sent past them:
    its rule applies. Removed rows leave nothing.
    """
    kept = [["project"] * len(CLASS_NAMES) for _ in range(depth)]
    for rule in sorted(policy.get("routers", ()), key=lambda rule: "." not in rule["kind"]):
        guards_attention = bool({"attention", "block"} & set(rule["skip"]))
        layers = _indices(rule["layers"], depth)
        if "." in rule["kind"]:
            layers = list(range(min(layers), depth))
        for layer in layers if guards_attention else ():
            for token_class in _classes(rule["tokens"]):
                kept[layer][token_class] = rule.get("kv") or "project"
    for removal in policy.get("removals", ()):
        for layer in range(removal["after_layer"] + 1, depth):
            for token_class in _classes(removal.get("tokens", ["image"])):
                kept[layer][token_class] = "omit"
    return tuple(map(tuple, kept))


def read_decidable(
    policy: Mapping[str, Any], depth: int
) -> Mapping[tuple[int, str], frozenset[int]]:
    """The classes whose rows a decision may let skip, by layer and sublayer.

    A plug-in may also send its rows past all later layers, as a removal does.
    """
    found: dict[tuple[int, str], frozenset[int]] = {}

    def allow(layers: Iterable[int], sublayers: Iterable[str], tokens: Any) -> None:
        for key in product(layers, sublayers):
            found[key] = found.get(key, frozenset()) | _classes(tokens)

    both = ("attention", "ffn")
    for rule in policy.get("routers", ()):
        layers = _indices(rule["layers"], depth)
        allow(layers, both if "block" in rule["skip"] else rule["skip"], rule["tokens"])
        if "." in rule["kind"]:
            allow(range(min(layers) + 1, depth), both, rule["tokens"])
    for removal in policy.get("removals", ()):
        allow(range(removal["after_layer"] + 1, depth), both, removal.get("tokens", ["image"]))
    return found


def read_joint(policy: Mapping[str, Any], depth: int) -> tuple[frozenset[int], ...]:
    """By layer, the classes whose rows skip both sublayers by a decision, or neither: those that a
    single rule decides on, about whole blocks."""
    about: dict[tuple[int, int], list[bool]] = {}
    for rule in policy.get("routers", ()):
        is_whole = "block" in rule["skip"] or {"attention", "ffn"} <= set(rule["skip"])
        for key in product(_indices(rule["layers"], depth), _classes(rule["tokens"])):
            about.setdefault(key, []).append(is_whole)
    return tuple(
        frozenset(c for (at, c), own in about.items() if at == layer and own == [True])
        for layer in range(depth)
    )


def _indices(layers: str | Sequence[int], depth: int) -> list[int]:
    if not isinstance(layers, str):
        return list(layers)
    bounds = [int(bound) if bound else None for bound in layers.split(":")]
    return list(range(depth)[slice(*bounds)])


def _classes(tokens: str | Sequence[str]) -> set[int]:
    names = CLASS_NAMES if tokens == "all" else tokens
    return {CLASS_NAMES.index(name) for name in names}


def _skips(
    rules: Iterable[Mapping[str, Any]], depth: int, refers: bool
) -> tuple[list[set[int]], list[set[int]], list[dict[int, str]]]:
    """By layer: the classes that skip attention and those that skip the FFN; and of the former,
    what they leave as key and value."""
    attention: list[set[int]] = [set() for _ in range(depth)]
    ffn: list[set[int]] = [set() for _ in range(depth)]
    named: list[dict[int, str | None]] = [{} for _ in range(depth)]
    for rule in rules:
        skipped, classes = set(rule["skip"]), _classes(rule["tokens"])
        for layer in _indices(rule["layers"], depth):
            if skipped & {"attention", "block"}:
                attention[layer] |= classes
                named[layer] |= dict.fromkeys(classes, rule.get("kv"))
            if skipped & {"ffn", "block"}:
                ffn[layer] |= classes

    def unnamed(layer: int, token_class: int) -> str:
        if not refers:
            return "project"
        return "reuse" if token_class in ffn[layer] else "hidden"

    kept = [
        {token_class: kv or unnamed(layer, token_class) for token_class, kv in own.items()}
        for layer, own in enumerate(named)
    ]
    return attention, ffn, kept


def _sources(
    without_attention: Sequence[set[int]],
    kept: Sequence[Mapping[int, str]],
    classes: frozenset[int],
) -> list[tuple[int | None, ...]]:
    """Which layer's entry each class exposes in each layer."""
    sources: list[tuple[int | None, ...]] = []
    for layer, (skipping, kv) in enumerate(zip(without_attention, kept, strict=True)):
        if classes <= skipping:
            # No row attends here, so the layer holds nothing, whatever the rule says.
            sources.append((None, None, None))
            continue
        row: list[int | None] = []
        for token_class in (IMAGE, TEXT, GENERATED):
            rule = kv.get(token_class, "project")
            below = [s[token_class] for s in reversed(sources) if s[token_class] is not None]
            reused = below[0] if below else None
            own = {"project": layer, "hidden": layer, "reuse": reused, "omit": None}
            row.append(own[rule])
        sources.append(tuple(row))
    return sources


def _arrangements(
    rules: Iterable[Mapping[str, Any]], depth: int, unnamed: str
) -> list[dict[str, Any]]:
    """By layer, the fields of `LayerCells` that arrangements set; `unnamed`: the norm of rules that
    name none."""
    forms: list[dict[str, Any]] = [{} for _ in range(depth)]
    for rule in rules:
        layers, arranged = rule["layers"], frozenset(_classes(rule.get("tokens", "all")))
        if rule["kind"] == "parallel":
            for layer in _indices(layers, depth):
                forms[layer] = {"parallel": rule.get("norm") or unnamed, "arranged": arranged}
            continue
        if isinstance(layers, str):
            flat = _indices(layers, depth)
            layers = list(zip(flat[::2], flat[1::2], strict=True))
        for first, second in layers:
            forms[first] = {"pair_first": True, "arranged": arranged}
            combine = rule.get("combine") or "sum"
            forms[second] = {"pair_second": combine, "arranged": arranged}
    return forms
