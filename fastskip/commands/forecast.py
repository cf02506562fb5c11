"""What `fastskip plan` prints: the costs of a policy beside those of the dense model."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastskip.commands.common import CommandError
from fastskip.costs import Ceilings, Speedup, floor_seconds, ideal_speedup
from fastskip.families import shape_of
from fastskip.launches import Account, decode_launches, prefill_launches
from fastskip.plan import SkipPlan, make_plan
from fastskip.policy import SkipPolicy


@dataclass(frozen=True, slots=True)
class Workload:
    """One `generate` call: positions and new tokens are those of each prompt."""

    image_tokens: int
    text_tokens: int
    new_tokens: int
    batch: int


@dataclass(frozen=True, slots=True)
class Totals:
    """Costs of a workload under one plan; decode is one step, the mean over all steps.

    `kv_bytes` is the cache when the last token has been made.
    """

    prefill_flops: int
    prefill_bytes: int
    prefill_floor_s: float
    decode_flops: float
    decode_bytes: float
    decode_floor_s: float
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class Launches:
    """What the kernels of one plan take on a GPU: launches, and the programs in them."""

    prefill: Account
    decode: Account

    def to_dict(self) -> dict[str, Any]:
        return {"prefill": self.prefill.to_dict(), "decode_step": self.decode.to_dict()}


@dataclass(frozen=True, slots=True)
class Forecast:
    """A plan, its totals beside those of the dense model, and the ideal gain."""

    plan: SkipPlan
    workload: Workload
    ceilings: Ceilings
    dense: Totals
    skipping: Totals
    ideal: Speedup

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        columns = [str(each) for each in self.plan.classes]
        return {
            "policy": self.plan.policy.to_dict(),
            "workload": asdict(self.workload),
            "ceilings": asdict(self.ceilings),
            "layers": [
                {
                    "layers": row.layers,
                    "arrangement": row.arrangement,
                    "cells": dict(zip(columns, row.cells, strict=True)),
                }
                for row in self.plan.rows()
            ],
            "dense": asdict(self.dense),
            "with_policy": asdict(self.skipping),
            "ideal_speedup": asdict(self.ideal),
        }


def forecast(
    config: Any, policy: SkipPolicy, load: Workload, dtype: torch.dtype, ceilings: Ceilings
) -> Forecast:
    """Plan `policy` for the model of `config` and count what `load` costs."""
    shape = shape_of(config, dtype)
    if load.image_tokens and not shape.has_images:
        raise CommandError(
            f"--image-tokens {load.image_tokens}: allowed: 0, this model reads text only"
        )
    positions = load.image_tokens + load.text_tokens + load.new_tokens
    if positions > shape.max_positions:
        raise CommandError(
            f"--image-tokens, --text-tokens and --new-tokens make {positions} positions; allowed: "
            f"at most {shape.max_positions}"
        )
    dense, skipping = make_plan(SkipPolicy(), shape), make_plan(policy, shape)
    ideal = ideal_speedup(
        dense,
        skipping,
        ceilings,
        n_image=load.image_tokens,
        n_text=load.text_tokens,
        n_new=load.new_tokens,
        batch=load.batch,
    )
    return Forecast(
        skipping,
        load,
        ceilings,
        _totals(dense, load, ceilings),
        _totals(skipping, load, ceilings),
        ideal,
    )


def _totals(plan: SkipPlan, load: Workload, ceilings: Ceilings) -> Totals:
    cost = plan.cost(load.image_tokens, load.text_tokens, load.new_tokens, load.batch)
    steps = max(1, load.new_tokens - 1)
    return Totals(
        prefill_flops=cost.prefill.flops,
        prefill_bytes=cost.prefill.bytes,
        prefill_floor_s=floor_seconds(cost.prefill, ceilings),
        decode_flops=cost.decode.flops / steps,
        decode_bytes=cost.decode.bytes / steps,
        decode_floor_s=floor_seconds(cost.decode, ceilings) / steps,
        # the last token is returned, not fed back
        kv_bytes=plan.kv_bytes(
            load.image_tokens, load.text_tokens, load.new_tokens - 1, load.batch
        ),
    )


def launches(plan: SkipPlan, load: Workload, table: str) -> Launches:
    """Launches on the GPU of this tuning table; decode is one step in the middle of the answer."""
    prompt = load.image_tokens + load.text_tokens
    return Launches(
        prefill_launches(plan, load.image_tokens, load.text_tokens, load.batch, table),
        decode_launches(plan, load.batch, prompt + load.new_tokens // 2, table),
    )


def image_tokens(config: Any) -> int:
    """Positions that one image of a single crop fills; 0 in a text-only model."""
    vision = getattr(config, "vision_config", None)
    return (vision.image_size // vision.patch_size) ** 2 if vision is not None else 0


def dtype_of(config: Any, name: str) -> torch.dtype:
    """The dtype asked for; "auto" is that of the checkpoint."""
    saved = config.dtype or getattr(config.get_text_config(), "dtype", None) or torch.float32
    chosen = saved if name == "auto" else getattr(torch, name)
    return chosen if isinstance(chosen, torch.dtype) else getattr(torch, chosen)
