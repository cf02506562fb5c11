"""Read and validate `bench.json`: contenders' times, memory and floors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastskip.intervals import SpeedVerdict, Spread
from fastskip.study.report.circumstances import Circumstances, read_circumstances
from fastskip.study.report.fields import Field, read_document

SOURCES = ("hf", "hf-compiled", "fastskip")


@dataclass(frozen=True, slots=True)
class PerPhase:
    """One number per phase."""

    prefill: float
    decode: float


@dataclass(frozen=True, slots=True)
class Timed:
    """A contender's measurements; times in seconds, with quartiles as `low` and `high`.

    `decode_s`: the median decode step. `floor_s`: of the prefill and of one decode step. `speedup`
    and `verdict`, by "ttft" and "tpot": over fastskip's dense model, paired by round.
    """

    prefill_s: Spread
    decode_s: Spread
    ttft_s: Spread
    tpot_s: Spread
    tokens_per_s: float
    peak_bytes: int | None
    kv_bytes: int | None
    flops: int | None
    floor_s: PerPhase | None
    ideal_share: PerPhase | None
    speedup: Mapping[str, Spread]
    verdict: Mapping[str, SpeedVerdict]


@dataclass(frozen=True, slots=True)
class Contender:
    """One contender: its measurements in `timed`, or why it was `left_out`."""

    label: str
    source: str
    policy: Mapping[str, Any] | None
    timed: Timed | None
    left_out: str | None


@dataclass(frozen=True, slots=True)
class BenchResult:
    """One run of `fastskip bench`.

    `workload`: by name. `texts`: text rows of each prompt, if they differ. `bandwidth` (bytes/s)
    and `flops_rate` (FLOP/s): measured ceilings, if known.
    """

    source: str
    circumstances: Circumstances
    workload: Mapping[str, int]
    texts: tuple[int, ...]
    bandwidth: float | None
    flops_rate: float | None
    contenders: tuple[Contender, ...]

    @property
    def timed(self) -> tuple[tuple[Contender, Timed], ...]:
        """The contenders that were measured."""
        return tuple((each, each.timed) for each in self.contenders if each.timed is not None)

    @property
    def left_out(self) -> tuple[Contender, ...]:
        """The contenders that were not measured."""
        return tuple(each for each in self.contenders if each.timed is None)


def read_bench(folder: Path) -> BenchResult:
    """Read the result in a folder.

    Raises:
        ReportError: `bench.json` cannot be used.
    """
    document = read_document(folder / "bench.json", "bench")
    workload, ceilings = document.get("workload"), document.may("ceilings")
    texts = workload.may("texts")  # missing from older files
    contenders = tuple(_contender(each) for each in document.get("contenders").each())
    if not any(each.timed for each in contenders):
        document.get("contenders").refuse("at least one that was measured")
    return BenchResult(
        source=str(folder),
        circumstances=read_circumstances(document),
        workload={
            name: workload.get(name).count()
            for name in ("batch", "n_image", "n_text", "new_tokens", "rounds")
        },
        texts=tuple(each.count() for each in texts.each()) if texts is not None else (),
        bandwidth=None if ceilings is None else ceilings.may_number("bandwidth_bytes_per_s", 0),
        flops_rate=None if ceilings is None else ceilings.may_number("flops_per_s", 0),
        contenders=contenders,
    )


def _contender(field: Field) -> Contender:
    policy, left_out = field.may("policy"), field.may("left_out")
    return Contender(
        label=field.get("label").text(),
        source=field.get("source").one_of(SOURCES),
        policy=None if policy is None else policy.object(),
        timed=_timed(field) if left_out is None else None,
        left_out=None if left_out is None else left_out.text(),
    )


def _timed(field: Field) -> Timed:
    speedup, verdict = field.may("speedup"), field.may("verdict")
    return Timed(
        prefill_s=_spread(field.get("prefill_s")),
        decode_s=_spread(field.get("decode_s")),
        ttft_s=_spread(field.get("ttft_s")),
        tpot_s=_spread(field.get("tpot_s")),
        tokens_per_s=field.get("tokens_per_s").number(0),
        peak_bytes=_whole(field, "peak_bytes"),
        kv_bytes=_whole(field, "kv_bytes"),
        flops=_whole(field, "flops"),
        floor_s=_per_phase(field.may("floor_s")),
        ideal_share=_per_phase(field.may("ideal_share")),
        speedup={} if speedup is None else {n: _spread(f) for n, f in _both(speedup)},
        verdict={} if verdict is None else {n: _verdict(f) for n, f in _both(verdict)},
    )


def _both(field: Field) -> list[tuple[str, Field]]:
    return [(name, field.get(name)) for name in ("ttft", "tpot")]


def _verdict(field: Field) -> SpeedVerdict:
    return SpeedVerdict(field.one_of(tuple(SpeedVerdict)))


def _spread(field: Field) -> Spread:
    low, middle, high = (field.get(name).number(0) for name in ("low", "median", "high"))
    if not low <= middle <= high:
        field.refuse("low <= median <= high")
    return Spread(middle, low, high)


def _per_phase(field: Field | None) -> PerPhase | None:
    if field is None or field.may("prefill") is None or field.may("decode") is None:
        return None
    return PerPhase(field.get("prefill").number(0), field.get("decode").number(0))


def _whole(field: Field, name: str) -> int | None:
    found = field.may_number(name, 0)
    return None if found is None else int(found)
