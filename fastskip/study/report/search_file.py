"""Reads `search.json`: how sensitive cells are, candidates, and what the search concludes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastskip.intervals import Estimate
from fastskip.study.report.circumstances import Circumstances, read_circumstances
from fastskip.study.report.fields import Field, read_document

SOURCES = ("dense", "search", "uniform", "random", "peer", "router")


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What one change alone does: `kl` in nats, `similarity` a cosine, `saved` a share of dense.

    `kind` says what is changed, whatever the layer.
    """

    layer: int
    kind: str
    kl: float
    similarity: float | None
    saved: float | None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A policy that the search looked at; `cost` and `flops` are shares of dense, times seconds."""

    name: str
    source: str
    policy: Mapping[str, Any]
    cost: float | None
    flops: float | None
    ttft_s: float | None
    tpot_s: float | None
    calibration_kl: float | None
    score: Estimate | None
    change: Estimate | None
    tokens: float | None
    is_on_front: bool
    is_recommended: bool
    file: str | None


@dataclass(frozen=True, slots=True)
class SearchResult:
    """One run of `fastskip search`."""

    source: str
    circumstances: Circumstances
    budget: str
    quantity: str
    sensitivity: tuple[Sensitivity, ...]
    candidates: tuple[Candidate, ...]
    recommended: str | None
    conclusion: str


def read_search(folder: Path) -> SearchResult:
    """The result in a folder.

    Raises:
        ReportError: `search.json` cannot be used.
    """
    document = read_document(folder / "search.json", "search")
    budget, conclusion = document.get("budget"), document.get("conclusion")
    candidates = tuple(_candidate(each) for each in document.get("candidates").each())
    recommended = conclusion.may("recommended")
    if recommended is not None:
        recommended.one_of(tuple(each.name for each in candidates))
    return SearchResult(
        source=str(folder),
        circumstances=read_circumstances(document),
        budget=budget.get("text").text(),
        quantity=budget.get("quantity").text(),
        sensitivity=tuple(_sensitivity(each) for each in document.get("sensitivity").each()),
        candidates=candidates,
        recommended=None if recommended is None else recommended.text(),
        conclusion=conclusion.get("text").text(),
    )


def _sensitivity(field: Field) -> Sensitivity:
    return Sensitivity(
        layer=field.get("layer").count(),
        kind=_kind(field),
        kl=field.get("kl").number(0),
        similarity=_number(field, "similarity"),
        saved=_number(field, "saved"),
    )


def _kind(field: Field) -> str:
    """What is changed: tokens and what they skip, or how the layer is wired."""
    arrangement, kv, tokens = field.may("arrangement"), field.may("kv"), field.may("tokens")
    rows = "all" if tokens is None else _joined(tokens, ", ")
    if arrangement is not None:
        return f"{rows}: {arrangement.text()}"
    skipped = _joined(field.get("skip"), " + ").replace("ffn", "FFN")
    return f"{rows}: no {skipped}" + ("" if kv is None else f", K/V {kv.text()}")


def _joined(field: Field, mark: str) -> str:
    if isinstance(field.value, str):
        return field.text()
    return mark.join(each.text() for each in field.each())


def _candidate(field: Field) -> Candidate:
    agreement, file = field.may("agreement"), field.may("file")
    return Candidate(
        name=field.get("name").text(),
        source=field.get("source").one_of(SOURCES),
        policy=field.get("policy").object(),
        cost=_number(field, "cost"),
        flops=_number(field, "flops"),
        ttft_s=_number(field, "ttft_s"),
        tpot_s=_number(field, "tpot_s"),
        calibration_kl=_number(field, "calibration_kl"),
        score=_estimate(field.may("score")),
        change=_estimate(field.may("change")),
        tokens=None if agreement is None else _number(agreement, "tokens"),
        is_on_front=field.get("is_on_front").truth(),
        is_recommended=field.get("is_recommended").truth(),
        file=None if file is None else file.text(),
    )


def _estimate(field: Field | None) -> Estimate | None:
    if field is None:
        return None
    mean, low, high = (field.get(name).number(-1, 1) for name in ("mean", "low", "high"))
    if not low <= high:
        field.refuse("low <= high")
    return Estimate(mean, low, high)


def _number(field: Field, name: str) -> float | None:
    found = field.may(name)
    return None if found is None else found.number()
