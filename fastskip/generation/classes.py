"""The token class of every column that enters a forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastskip.families import placeholders
from fastskip.plan import SkipPlan
from fastskip.policy import TokenClass
from fastskip.tokens import CODES

_FEATURES = ("pixel_values", "pixel_values_images", "pixel_values_videos", "mm_encoder_outputs")


def given_shape(inputs: Mapping[str, Any]) -> tuple[int, int] | None:
    """``B, T`` of the ids or embeddings passed to a forward; ``None`` without either."""
    present = inputs.get("input_ids")
    present = present if present is not None else inputs.get("inputs_embeds")
    return None if present is None else (present.shape[0], present.shape[1])


def host_ids(inputs: Mapping[str, Any]) -> Tensor | None:
    """``input_ids [B, T]`` on the host; ``None`` if no features fill placeholders."""
    ids = inputs.get("input_ids")
    return ids.cpu() if isinstance(ids, Tensor) and _has_features(inputs) else None


def classify(
    plan: SkipPlan,
    config: Any,
    inputs: Mapping[str, Any],
    *,
    first_column: int,
    prompt_columns: int | None,
) -> Tensor | None:
    """Codes ``[B, T]`` (host) of a forward's columns, pads not yet marked; ``None`` without any.

    Image-filled positions are IMAGE. Inside ``generate``, columns at or past ``prompt_columns`` are
    GENERATED whatever their id; outside, rows with ``labels != -100`` are. All others are TEXT.
    ``inputs["token_classes"]`` overrides this.

    Raises:
        TypeError: only embeddings are given, and the plan treats image and text rows differently.
    """
    shape = given_shape(inputs)
    if shape is None:
        return None
    ids, (batch, width) = inputs.get("input_ids"), shape
    generated = torch.zeros(batch, width, dtype=torch.bool)
    if prompt_columns is not None:
        generated[:, max(0, prompt_columns - first_column) :] = True
    given = inputs.get("token_classes")
    if given is not None:
        codes = _given(given, plan.classes, batch, width, first_column, prompt_columns)
    elif ids is None and _tells_images_apart(plan) and not bool(generated.all()):
        raise TypeError(
            "token_classes: needed with inputs_embeds, because the policy treats image and text "
            f"rows differently; pass a tensor [{batch}, {width}] of {_named(plan.classes)}"
        )
    else:
        codes = torch.full((batch, width), CODES[TokenClass.TEXT])
        is_image = torch.zeros(batch, width, dtype=torch.bool)
        if ids is not None and _has_features(inputs):
            is_image = placeholders(config, ids.cpu())
        labels = inputs.get("labels")
        if labels is not None and prompt_columns is None:
            last = codes[:, -labels.shape[1] :]  # a view; labels may cover only the last columns
            last[labels.cpu() != -100] = CODES[TokenClass.GENERATED]
        codes[is_image] = CODES[TokenClass.IMAGE]
    codes[generated] = CODES[TokenClass.GENERATED]
    return codes


def _has_features(inputs: Mapping[str, Any]) -> bool:
    """Whether anything fills the placeholders; an empty dictionary (from ``generate``) does not."""
    given = [inputs.get(name) for name in _FEATURES]
    parts = (list(each.values()) if isinstance(each, dict) else [each] for each in given)
    return any(part is not None for each in parts for part in each)


def _tells_images_apart(plan: SkipPlan) -> bool:
    """Whether the plan removes image rows, or puts them and text rows in different groups."""
    both = {TokenClass.IMAGE, TokenClass.TEXT}
    are_alike = any(both <= group for group in plan.groups)
    return both <= set(plan.classes) and (bool(plan.removals) or not are_alike)


def _named(classes: Sequence[TokenClass]) -> dict[str, int]:
    return {token_class.value: CODES[token_class] for token_class in classes}


def _given(
    given: Any,
    classes: Sequence[TokenClass],
    batch: int,
    width: int,
    first_column: int,
    prompt_columns: int | None,
) -> Tensor:
    """``token_classes`` as codes of this forward's columns."""
    allowed = _named(classes)
    # Inside generate they are the classes of the prompt; later columns are GENERATED.
    columns = width if prompt_columns is None else prompt_columns
    if isinstance(given, Tensor):
        codes = given.detach().cpu().to(torch.int64)
    else:
        unknown = sorted({name for row in given for name in row} - allowed.keys())
        if unknown:
            raise ValueError(f"token_classes: {unknown}; allowed: {list(allowed)}")
        lengths = sorted({len(row) for row in given})
        if len(lengths) > 1:
            raise ValueError(
                f"token_classes: rows of {lengths} names; needed: [{batch}, {columns}]"
            )
        codes = torch.tensor([[allowed[name] for name in row] for row in given])
    if codes.shape != (batch, columns):
        added = ", one per prompt column, including those already in the cache"
        raise ValueError(
            f"token_classes: shape {tuple(codes.shape)}; needed: [{batch}, {columns}]"
            f"{'' if prompt_columns is None else added}"
        )
    if not bool(torch.isin(codes, torch.tensor(list(allowed.values()))).all()):
        raise ValueError(
            f"token_classes: {sorted(set(codes.flatten().tolist()))}; allowed: {allowed}"
        )
    if prompt_columns is None:
        return codes.clone()
    text = torch.full((batch, width), CODES[TokenClass.TEXT])
    known = codes[:, first_column : first_column + width]
    text[:, : known.shape[1]] = known
    return text
