"""Benchmark results as data, for tables, for the report and for JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastskip.intervals import SpeedVerdict, Spread
from fastskip.json_file import write_json
from fastskip.plan.costs import Ceilings
from fastskip.study.bench.contenders import DENSE, Source
from fastskip.study.bench.workload import Workload

SCHEMA_VERSION = 1
KIND = "bench"
FILE = "bench.json"


@dataclass(frozen=True, slots=True)
class Times:
    """Medians and quartiles over rounds, in seconds; `samples.Sample` defines the quantities."""

    ttft_s: Spread
    prefill_s: Spread
    tpot_s: Spread
    decode_s: Spread


@dataclass(frozen=True, slots=True)
class Phases:
    """One number for the prefill and one for a decode step."""

    prefill: float
    decode: float


@dataclass(frozen=True, slots=True)
class Speedup:
    """Speed-up over our dense model, paired by round, with 95 % intervals."""

    ttft: Spread
    tpot: Spread

    @property
    def verdicts(self) -> dict[str, SpeedVerdict]:
        """Verdicts by quantity."""
        return {"ttft": SpeedVerdict.of(self.ttft), "tpot": SpeedVerdict.of(self.tpot)}


@dataclass(frozen=True, slots=True)
class Agreement:
    """How many new tokens match Hugging Face's, counting each sequence up to its first mismatch."""

    equal: int
    of: int


@dataclass(frozen=True, slots=True)
class ContenderResult:
    """One contender's results.

    Attributes:
        label: its name.
        source: which `generate` ran.
        policy: as in a policy file; `None` for Hugging Face.
        times: `None` if it was left out.
        tokens_per_s: throughput of the whole batch over the whole call.
        peak_bytes: on a GPU, peak memory: the weights and everything allocated during a call.
        kv_bytes: live KV cache entries when the last token is generated.
        flops: of the decoder and lm_head in one call.
        floor_s: lower bound from bandwidth and arithmetic, for the prefill and a mean decode step.
        ideal_share: achieved speed-up over our dense model / the speed-up that the floors promise;
            `None` where floors do not apply, as for arrangements.
        speedup: `None` for our dense model itself.
        as_hf: token agreement, for contenders that should match Hugging Face.
        left_out: why it was not timed.
    """

    label: str
    source: Source
    policy: Mapping[str, Any] | None = None
    times: Times | None = None
    tokens_per_s: float | None = None
    peak_bytes: int | None = None
    kv_bytes: int | None = None
    flops: int | None = None
    floor_s: Phases | None = None
    ideal_share: Phases | None = None
    speedup: Speedup | None = None
    as_hf: Agreement | None = None
    left_out: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        document = asdict(self)
        times = document.pop("times")
        document |= times or dict.fromkeys(Times.__slots__)
        verdicts = None if self.speedup is None else self.speedup.verdicts
        document["verdict"] = verdicts and {key: each.value for key, each in verdicts.items()}
        return document | {"source": self.source.value}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> ContenderResult:
        """What `to_dict` gave."""
        values = {key: value for key, value in document.items() if key != "verdict"}
        times = {name: values.pop(name) for name in Times.__slots__}
        is_timed = times["ttft_s"] is not None
        for name, kind in (("floor_s", Phases), ("ideal_share", Phases), ("as_hf", Agreement)):
            values[name] = None if values[name] is None else kind(**values[name])
        if values["speedup"] is not None:
            spreads = {key: Spread(**each) for key, each in values["speedup"].items()}
            values["speedup"] = Speedup(**spreads)
        values["times"] = (
            Times(**{name: Spread(**each) for name, each in times.items()}) if is_timed else None
        )
        return cls(**values | {"source": Source(values["source"])})


@dataclass(frozen=True, slots=True)
class BenchResult:
    """All contenders: Hugging Face's variants, then our dense model, then the policies."""

    circumstances: Mapping[str, Any]
    workload: Workload
    rounds: int
    ceilings: Ceilings
    contenders: tuple[ContenderResult, ...]

    @property
    def dense(self) -> ContenderResult:
        """Our dense model, the baseline of all others."""
        return self.of(DENSE)

    def of(self, label: str) -> ContenderResult:
        """The contender with this label; `KeyError` if there is none."""
        for each in self.contenders:
            if each.label == label:
                return each
        raise KeyError(label)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "circumstances": dict(self.circumstances),
            "workload": asdict(self.workload)
            | {"rounds": self.rounds, "texts": list(self.workload.texts)},
            "ceilings": asdict(self.ceilings),
            "contenders": [each.to_dict() for each in self.contenders],
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> BenchResult:
        """What `to_dict` gave.

        Raises:
            ValueError: the document is of another kind or version.
        """
        found = document.get("kind"), document.get("schema_version")
        if found != (KIND, SCHEMA_VERSION):
            raise ValueError(f"kind, schema_version: {found}; allowed: {(KIND, SCHEMA_VERSION)}")
        load = dict(document["workload"])
        load["texts"] = tuple(load.get("texts", ()))  # missing from older files
        rounds = load.pop("rounds")
        return cls(
            circumstances=document["circumstances"],
            workload=Workload(**load),
            rounds=rounds,
            ceilings=Ceilings(**document["ceilings"]),
            contenders=tuple(ContenderResult.from_dict(each) for each in document["contenders"]),
        )

    def save(self, folder: Path) -> Path:
        """Write `bench.json` atomically; returns its path."""
        return write_json(folder / FILE, self.to_dict(), indent=1)
