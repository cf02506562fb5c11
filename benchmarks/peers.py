"""Who is compared: Hugging Face's own `generate`, our dense model, and policies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fastskip import SkipPolicy


@dataclass(frozen=True)
class Peer:
    """One way to run the model.

    `policy` makes our policy for a model of some depth; without one the peer is Hugging Face's
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


dense = _preset("dense")
HF = Peer("hf", "Hugging Face")
DENSE = Peer("dense", "dense", dense)
DEFAULT = (
    HF,
    DENSE,
    # Layers 0, 2, ...: exactly half, and the last one stays.
    Peer("half_blocks", "every 2nd block skipped", _preset("every_nth_block", start=0)),
    Peer("image_ffn", "no FFN for image rows", _preset("image_ffn")),
    Peer("frozen_visual", "image rows frozen in 60 %", _frozen_visual),
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
)
