"""What `fastskip plan` prints: the costs of a policy next to those of the dense model."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastskip.commands.common import CommandError
from fastskip.families import is_quantised, shape_of
from fastskip.launches import Account, decode_launches, prefill_launches
from fastskip.plan import SkipPlan, make_plan
from fastskip.plan.chances import rates_of
from fastskip.plan.costs import (
    Ceilings,
    Planned,
    Speedup,
    cache_bytes,
    floor_seconds,
    generation_cost,
    ideal_speedup,
    prompt_counts,
)
from fastskip.policy import PolicyError, SkipPolicy
from fastskip.wording import dtype_name


@dataclass(frozen=True, slots=True)
class AssumedCall:
    """The `generate` call that costs are counted for; positions and new tokens are per prompt."""

    image_tokens: int
    text_tokens: int
    new_tokens: int
    batch: int


@dataclass(frozen=True, slots=True)
class Totals:
    """Costs of a workload under one plan; decode values are means per step.

    `kv_bytes` is the size of the cache when the last token has been generated.
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
    """Kernel launches of one plan on a GPU, and the programs in them."""

    prefill: Account
    decode: Account

    def to_dict(self) -> dict[str, Any]:
        return {"prefill": self.prefill.to_dict(), "decode_step": self.decode.to_dict()}


@dataclass(frozen=True, slots=True)
class Outlook:
    """Totals under one plan, and its ideal gain over the dense one."""

    totals: Totals
    ideal: Speedup

    def to_dict(self) -> dict[str, Any]:
        return asdict(self.totals) | {"ideal_speedup": asdict(self.ideal)}


@dataclass(frozen=True, slots=True)
class Routed:
    """What routers can save: if all rows skip, and at `rates`, by router number.

    `rates` and `expected` are `None` if a router states no rate and none was given.
    """

    all_skip: Outlook
    rates: dict[int, float] | None = None
    expected: Outlook | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "rates": None if self.rates is None else list(self.rates.values()),
            "expected": None if self.expected is None else self.expected.to_dict(),
            "all_skip": self.all_skip.to_dict(),
        }


@dataclass(frozen=True, slots=True)
class Forecast:
    """A plan, its totals next to those of the dense model, and the ideal gain.

    Routed cells count as running, except in `routed`. Weights count in `dtype`, even those of a
    checkpoint that `is_quantised`.
    """

    plan: SkipPlan
    workload: AssumedCall
    dtype: torch.dtype
    ceilings: Ceilings
    dense: Totals
    skipping: Totals
    ideal: Speedup
    routed: Routed | None = None
    is_quantised: bool = False

    @property
    def dtype_name(self) -> str:
        """Number format of weights and cache."""
        return dtype_name(self.dtype)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        columns = [str(each) for each in self.plan.classes]
        found = {
            "policy": self.plan.policy.to_dict(),
            "workload": asdict(self.workload),
            "dtype": self.dtype_name,
            "is_quantised": self.is_quantised,
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
        return found if self.routed is None else found | {"routed": self.routed.to_dict()}


def forecast(
    config: Any,
    policy: SkipPolicy,
    load: AssumedCall,
    dtype: torch.dtype,
    ceilings: Ceilings,
    rate: float | None = None,
) -> Forecast:
    """Plan `policy` for the model of `config` and count what `load` costs.

    `rate`: the share of their candidates that routers skip; `None`: the rates that they state.
    """
    shape = shape_of(config, dtype)
    if load.image_tokens and not shape.has_images:
        raise CommandError(
            f"--image-tokens {load.image_tokens}: allowed: 0, the model reads text only"
        )
    positions = load.image_tokens + load.text_tokens + load.new_tokens
    if positions > shape.max_positions:
        raise CommandError(
            f"--image-tokens, --text-tokens and --new-tokens: {positions} positions; allowed: at "
            f"most {shape.max_positions} (set --image-tokens to what your prompts have)"
        )
    if rate is not None and not policy.routers:
        raise CommandError(f"--rate {rate}: allowed: none, the policy has no routers")
    dense, skipping = make_plan(SkipPolicy(), shape), make_plan(policy, shape)

    def outlook(plan: Planned) -> Outlook:
        ideal = ideal_speedup(
            dense,
            plan,
            ceilings,
            n_image=load.image_tokens,
            n_text=load.text_tokens,
            n_new=load.new_tokens,
            batch=load.batch,
        )
        return Outlook(_totals(plan, load, ceilings), ideal)

    routed = None
    if skipping.routed:
        routed = Routed(outlook(skipping.when_skipping))
        rates = _rates(policy, rate)
        if rates is not None:
            routed = Routed(routed.all_skip, rates, outlook(skipping.expected(rates)))
    found = outlook(skipping)
    return Forecast(
        skipping,
        load,
        dtype,
        ceilings,
        _totals(dense, load, ceilings),
        found.totals,
        found.ideal,
        routed,
        is_quantised(config),
    )


def _rates(policy: SkipPolicy, rate: float | None) -> dict[int, float] | None:
    """By router; `None` if one states no rate and none is given."""
    try:
        return rates_of(policy.routers, rate)
    except PolicyError:
        if rate is not None:
            raise
        return None


def _totals(plan: Planned, load: AssumedCall, ceilings: Ceilings) -> Totals:
    cost = generation_cost(plan, load.image_tokens, load.text_tokens, load.new_tokens, load.batch)
    steps = max(1, load.new_tokens - 1)
    # the last token is returned, not fed back
    context = prompt_counts(load.image_tokens, load.text_tokens, load.new_tokens - 1)
    return Totals(
        prefill_flops=cost.prefill.flops,
        prefill_bytes=cost.prefill.bytes,
        prefill_floor_s=floor_seconds(cost.prefill, ceilings),
        decode_flops=cost.decode.flops / steps,
        decode_bytes=cost.decode.bytes / steps,
        decode_floor_s=floor_seconds(cost.decode, ceilings) / steps,
        kv_bytes=cache_bytes(plan, context, load.batch),
    )


def launches(plan: SkipPlan, load: AssumedCall, table: str) -> Launches:
    """Launches on the GPU of this tuning table; decode is one step halfway through the answer."""
    prompt = load.image_tokens + load.text_tokens
    try:
        return Launches(
            prefill_launches(plan, load.image_tokens, load.text_tokens, load.batch, table),
            decode_launches(plan, load.batch, prompt + load.new_tokens // 2, table),
        )
    except ValueError as error:  # a policy that the kernels do not run
        raise CommandError(f"--{error}; allowed: no --launches for this policy") from error


def dtype_of(config: Any, name: str) -> torch.dtype:
    """The dtype of this name; "auto" is the checkpoint's."""
    saved = config.dtype or getattr(config.get_text_config(), "dtype", None) or torch.float32
    chosen = saved if name == "auto" else getattr(torch, name)
    return chosen if isinstance(chosen, torch.dtype) else getattr(torch, chosen)
