"""The peers that are compared: Hugging Face's own `generate`, our dense model, and policies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fastskip import SkipPolicy


@dataclass(frozen=True)
class Peer:
    """One way to run the model.

    `policy` makes our policy for a model of the given depth; without it the peer is Hugging Face's
    model, with the cache that `hf_cache` names.
    """

    name: str
    label: str
    policy: Callable[[int], SkipPolicy] | None = None
    hf_cache: str | None = None


def _preset(name: str, **options: int) -> Callable[[int], SkipPolicy]:
    return lambda depth: SkipPolicy.preset(name, **options)


def _frozen_visual(depth: int) -> SkipPolicy:
    return SkipPolicy.preset("frozen_visual", start=depth - 1 - round(0.6 * depth))


def _pyramid_drop(depth: int) -> SkipPolicy:
    return SkipPolicy.preset("pyramid_drop", stages=[depth * n // 4 - 1 for n in (1, 2, 3)])


dense = _preset("dense")
HF = Peer("hf", "Hugging Face")
DENSE = Peer("dense", "dense", dense)
DEFAULT = (
    HF,
    DENSE,
    # Layers 0, 2, ...: exactly half, and never the last one.
    Peer("half_blocks", "every 2nd block skipped", _preset("every_nth_block", start=0)),
    Peer("image_ffn", "no FFN for image rows", _preset("image_ffn")),
    Peer("frozen_visual", "image rows frozen in 60 %", _frozen_visual),
    Peer("fastv", "half of the image rows gone after layer 1", _preset("fastv")),
    Peer("parallel_blocks", "parallel blocks", _preset("parallel_blocks")),
    Peer("block_pairs", "pairs of blocks", _preset("block_pairs")),
)
MORE = (
    Peer("hf_static", "Hugging Face, static cache", hf_cache="static"),
    Peer("half_ffns", "every 2nd FFN skipped", _preset("every_nth_ffn", start=0)),
    Peer("half_attentions", "every 2nd attention skipped", _preset("every_nth_attention", start=0)),
    Peer(
        "visual_withdrawal",
        "image rows gone after half",
        lambda depth: SkipPolicy.preset("visual_withdrawal", after=depth // 2 - 1),
    ),
    Peer("pyramid_drop", "half of the image rows gone after every quarter", _pyramid_drop),
)


def evenly(share: float, layers: int) -> list[int]:
    """As many of the layers as come nearest to this share, evenly spread."""
    count = round(share * layers)
    return [int((number + 0.5) * layers / count) for number in range(count)]


def _static(share: float) -> Callable[[int], SkipPolicy]:
    """Skips whole blocks for every row: this share of all layers but the last, evenly spread."""

    def make(depth: int) -> SkipPolicy:
        rule = {"layers": evenly(share, depth - 1), "skip": ["block"], "kv": "omit"}
        return SkipPolicy.from_dict({"schema_version": 1, "rules": [rule]})

    return make


def _drawn(share: float, group: str) -> Callable[[int], SkipPolicy]:
    """Skips whole blocks at random at this rate, per `group`, in all layers but the last."""
    router = {"layers": ":-1", "skip": ["block"], "kind": "random", "rate": share, "kv": "omit"}
    document = {"schema_version": 1, "routers": [router | {"group": group}]}
    return lambda depth: SkipPolicy.from_dict(document)


ROUTED = (
    HF,
    DENSE,
    *(
        peer
        for percent in (25, 50, 75)
        for peer in (
            Peer(f"static_{percent}", f"static, {percent} % of blocks", _static(percent / 100)),
            Peer(f"row_{percent}", f"routed by row, {percent} %", _drawn(percent / 100, "row")),
        )
    ),
)
"""Routed against static at the same rate. Random draws stand in for a learned router, which adds
one dot product per row and layer."""
ROUTED_BATCH = (
    *ROUTED,
    Peer("sequence_50", "routed by sequence, 50 %", _drawn(0.5, "sequence")),
    Peer("batch_50", "routed by batch, 50 %", _drawn(0.5, "batch")),
)
