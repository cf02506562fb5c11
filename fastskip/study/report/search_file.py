"""Read and validate `search.json`: sensitivities, candidates, and the search's conclusion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastskip.intervals import Estimate
from fastskip.policy import Sublayer, TokenClass
from fastskip.study.report.accuracy_chart import Quantity
from fastskip.study.report.circumstances import Circumstances, read_circumstances
from fastskip.study.report.fields import Field, read_document, read_object
from fastskip.wording import Scale

SOURCES = ("dense", "search", "uniform", "random", "peer", "router")


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """The effect of changing one cell alone.

    `kind`: what is changed, regardless of the layer. `kl` in nats, `similarity` a cosine, `saved` a
    share of dense.
    """

    layer: int
    kind: str
    kl: float
    similarity: float | None
    saved: float | None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A policy that the search considered; `cost`, `flops`: shares of dense; times in seconds."""

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
    keeps_budget: bool


@dataclass(frozen=True, slots=True)
class Rival:
    """How much better the search's best policy scores than another candidate, item by item."""

    name: str
    source: str
    difference: Estimate


@dataclass(frozen=True, slots=True)
class SearchResult:
    """One run of `fastskip search`; its scores are on `scale`.

    `left_out`: names and reasons. `depth`: the model's, if a policy file in the folder records it.
    `settings`: whatever the run records about how it searched.
    """

    source: str
    circumstances: Circumstances
    budget: str
    quantity: Quantity
    sensitivity: tuple[Sensitivity, ...]
    candidates: tuple[Candidate, ...]
    rivals: tuple[Rival, ...]
    left_out: tuple[tuple[str, str], ...]
    recommended: str | None
    conclusion: str
    depth: int | None
    settings: Mapping[str, Any]
    scale: Scale


def read_search(folder: Path) -> SearchResult:
    """Read the result in a folder.

    Raises:
        ReportError: `search.json` cannot be used.
    """
    document = read_document(folder / "search.json", "search")
    budget, conclusion = document.get("budget"), document.get("conclusion")
    candidates = tuple(_candidate(each) for each in document.get("candidates").each())
    rivals, left_out = document.may("comparisons"), document.may("left_out")
    scale = document.may("scale")  # missing from older files
    quantities = {each.value.lower(): each for each in Quantity}
    recommended = conclusion.may("recommended")
    if recommended is not None:
        recommended.one_of(tuple(each.name for each in candidates))
    return SearchResult(
        source=str(folder),
        circumstances=read_circumstances(document),
        budget=budget.get("text").text(),
        quantity=quantities[budget.get("quantity").one_of(tuple(quantities))],
        sensitivity=tuple(_sensitivity(each) for each in document.get("sensitivity").each()),
        candidates=candidates,
        recommended=None if recommended is None else recommended.text(),
        conclusion=conclusion.get("text").text(),
        rivals=() if rivals is None else tuple(_rival(each) for each in rivals.each()),
        left_out=()
        if left_out is None
        else tuple((e.get("name").text(), e.get("reason").text()) for e in left_out.each()),
        depth=_depth(document.get("candidates"), folder),
        settings=_settings(document),
        scale=Scale.SHARE if scale is None else Scale(scale.one_of(tuple(Scale))),
    )


def _sensitivity(field: Field) -> Sensitivity:
    return Sensitivity(
        layer=field.get("layer").count(),
        kind=_kind(field),
        kl=field.get("kl").number(0),
        similarity=field.may_number("similarity"),
        saved=field.may_number("saved"),
    )


def _kind(field: Field) -> str:
    """What is changed: the tokens, and what they skip or the arrangement they get."""
    arrangement, kv = field.may("arrangement"), field.may("kv")
    classes = field.get("tokens").text().split("+")
    rows = "all" if set(classes) >= set(TokenClass) else " + ".join(classes)
    if arrangement is not None:
        return f"{rows}: {arrangement.text()}"
    skipped = {each.one_of(tuple(Sublayer)) for each in field.get("skip").each()}
    part = "block" if len(skipped) > 1 else "".join(skipped).replace("ffn", "FFN")
    return f"{rows}: no {part}" + ("" if kv is None else f", K/V {kv.text()}")


def _candidate(field: Field) -> Candidate:
    agreement, keeps_budget = field.may("agreement"), field.may("keeps_budget")
    return Candidate(
        name=field.get("name").text(),
        source=field.get("source").one_of(SOURCES),
        policy=field.get("policy").object(),
        cost=field.may_number("cost"),
        flops=field.may_number("flops"),
        ttft_s=field.may_number("ttft_s"),
        tpot_s=field.may_number("tpot_s"),
        calibration_kl=field.may_number("calibration_kl"),
        score=_estimate(field.may("score")),
        change=_estimate(field.may("change")),
        tokens=None if agreement is None else agreement.may_number("tokens"),
        is_on_front=field.get("is_on_front").truth(),
        is_recommended=field.get("is_recommended").truth(),
        keeps_budget=keeps_budget is None or keeps_budget.truth(),
    )


def _estimate(field: Field | None) -> Estimate | None:
    if field is None:
        return None
    mean, low, high = (field.get(name).number() for name in ("mean", "low", "high"))
    if not low <= high:
        field.refuse("low <= high")
    return Estimate(mean, low, high)


def _rival(field: Field) -> Rival:
    difference = _estimate(field)
    assert difference is not None
    return Rival(field.get("name").text(), field.get("source").one_of(SOURCES), difference)


def _settings(document: Field) -> Mapping[str, Any]:
    found = (document.may("settings"), document.may("workload"))
    return {
        name: value
        for each in found
        if each is not None
        for name, value in each.object().items()
        if isinstance(value, str | int | float)
    }


def _depth(candidates: Field, folder: Path) -> int | None:
    """The model's depth as recorded by the first candidate's policy file that exists."""
    for each in candidates.each():
        file = each.may("file")
        path = folder / ("" if file is None else file.text())
        if (
            file is None
            or not path.is_file()
            or not path.resolve().is_relative_to(folder.resolve())
        ):
            continue
        made_for = read_object(path).get("provenance").may("made_for")
        depth = None if made_for is None else made_for.may("depth")
        return None if depth is None else depth.count(1)
    return None
