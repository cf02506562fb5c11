"""Calibrated routers at a budget: the rate that they need, and the shares that they then skip."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastskip.loading import plan_of, set_policy
from fastskip.policy import PolicyError, RouterRule, SkipPolicy, Sublayer, TokenClass
from fastskip.study.calibration import CalibrationError, calibrate
from fastskip.study.calibration.shares import by_router, pooled
from fastskip.study.search.matching import Entrant, LeftOut, over_budget
from fastskip.study.search.refine import SLACK

ShareOf = Callable[[SkipPolicy, Mapping[int, float] | None], float]
"""The share of the dense cost of a policy, given its routers' skip rates by number."""

_STEPS = 20
_ATTEMPTS = 5


def families(depth: int, has_images: bool) -> dict[str, SkipPolicy]:
    """Uncalibrated routers in all layers but the first and the last (in shallow models, all)."""
    layers = f"1:{depth - 1}" if depth > 2 else ":"
    scopes: dict[str, Any] = {"all": "all"}
    if has_images:
        scopes["image"] = {TokenClass.IMAGE}
    found = {}
    for scope, tokens in scopes.items():
        for kind, options in (("similarity", {"threshold": 1.0}), ("random", {"rate": 0.0})):
            for name, skip in (("block", tuple(Sublayer)), ("ffn", (Sublayer.FFN,))):
                rule = RouterRule(layers, tokens, skip, kind, **options)  # type: ignore[arg-type]
                label = f"{kind} router, {scope} {name}"
                found[label] = SkipPolicy(routers=(rule,), name=label)
    return found


def rate_for(share: Callable[[float], float], limit: float) -> float | None:
    """The lowest skip rate at which the expected share keeps to `limit`; `None` if none does."""
    low, high = 0.0, 1.0
    if share(high) > limit + SLACK:
        return None
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if share(middle) > limit:
            low = middle
        else:
            high = middle
    return high


def routed(
    model: Any,
    samples: Sequence[Mapping[str, Any]],
    share: ShareOf,
    limit: float,
    new_tokens: int,
) -> Iterator[Entrant | LeftOut]:
    """Every family, calibrated so that its expected cost meets the budget.

    Args:
        model: a prepared one on plain torch.
        samples: inputs of `generate`, to calibrate on.
        share: of the dense cost, for a policy and its routers' skip rates.
        limit: on that share.
        new_tokens: how many tokens each sample generates.
    """
    shape = plan_of(model).shape
    for name, policy in families(shape.depth, shape.has_images).items():
        yield _one(model, samples, share, limit, name, policy, new_tokens)


def _one(
    model: Any,
    samples: Sequence[Mapping[str, Any]],
    share: ShareOf,
    limit: float,
    name: str,
    policy: SkipPolicy,
    new_tokens: int,
) -> Entrant | LeftOut:
    wanted, missing = limit, 0.0
    for _ in range(_ATTEMPTS):
        rate = rate_for(lambda r: share(policy, {0: r}), wanted)
        if rate is None and wanted < limit:
            break
        if rate is None:
            return over_budget(name, share(policy, {0: 1.0}), limit)
        try:
            set_policy(model, policy)
            found = calibrate(model, samples, rate, new_tokens=new_tokens, sweeps=3)
        except (CalibrationError, PolicyError) as error:
            return LeftOut(name, str(error))
        rates = {number: pooled(own) for number, own in by_router(found.shares).items()}
        missing = share(found.policy, rates) - limit
        if missing <= SLACK:
            named = replace(found.policy, name=name)
            return Entrant(name, "router", named, tuple(rates[n] for n in sorted(rates)))
        wanted -= max(1.5 * missing, 0.002)
    return LeftOut(name, f"skips too little: {missing:.3g} of dense over the budget")
