"""Builds the router objects that a policy names.

In a policy, a plug-in's name contains a dot. It is an object passed in under this name, or a
factory that an installed package registers as an entry point: called with the rule's ``options``,
it returns a ``Router``.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from fastskip.policy import PolicyError, RouterRule, SkipPolicy, select_layers
from fastskip.routing.paper import PAPER_KINDS, build_paper_router
from fastskip.routing.protocol import Router
from fastskip.routing.routers import ScoreRouter
from fastskip.routing.weights import read_weights

ENTRY_POINTS = "fastskip.routers"
"""The entry point group of plug-ins."""


def build_routers(
    policy: SkipPolicy, depth: int, hidden_size: int, given: Mapping[str, Any] | None = None
) -> tuple[Router, ...]:
    """One router for each of the policy's router rules, in their order.

    Args:
        policy: names the routers; relative paths of weights start at its folder.
        depth, hidden_size: those of the model, which learned weights must fit.
        given: plug-in routers by name; they take precedence over installed ones.
    Raises:
        PolicyError: a plug-in is unknown, fails or is not a router, or weights do not fit.
    """
    if given is not None and not isinstance(given, Mapping):
        raise PolicyError("routers", given, "a dict of routers by name")
    plug_ins = dict(given or {})
    names = {rule.kind for rule in policy.routers if rule.is_plug_in}
    if unused := sorted(plug_ins.keys() - names):
        raise PolicyError("routers", unused, f"the plug-ins that the policy names: {sorted(names)}")
    return tuple(
        _build(policy, rule, f"routers[{number}]", depth, hidden_size, plug_ins)
        for number, rule in enumerate(policy.routers)
    )


def _build(
    policy: SkipPolicy,
    rule: RouterRule,
    field: str,
    depth: int,
    hidden_size: int,
    given: Mapping[str, Any],
) -> Router:
    if rule.is_plug_in:
        return _plug_in(rule, field, given)
    if rule.kind != "linear":
        return ScoreRouter(rule)
    assert rule.weights is not None
    layers = select_layers(rule.layers, depth, f"{field}.layers")
    path = policy.path_of(rule.weights)
    return ScoreRouter(rule, read_weights(path, layers, hidden_size, f"{field}.weights"))


def _plug_in(rule: RouterRule, field: str, given: Mapping[str, Any]) -> Router:
    if rule.kind in given:
        if rule.options is not None:
            problem = "a router passed in by the caller takes no options"
            raise PolicyError(f"{field}.options", dict(rule.options), "none", problem)
        return _checked(given[rule.kind], rule, field)
    if rule.kind in PAPER_KINDS:
        return build_paper_router(rule.kind, rule.options or {}, field)
    installed = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if rule.kind not in installed:
        names = sorted({*given, *installed, *PAPER_KINDS})
        problem = f"no plug-in {rule.kind!r} is given or installed"
        allowed = f"one of {names}, or routers={{{rule.kind!r}: ...}}"
        raise PolicyError(f"{field}.kind", rule.kind, allowed, problem)
    return _checked(_made(installed[rule.kind], rule, field), rule, field)


def _made(point: EntryPoint, rule: RouterRule, field: str) -> Any:
    """What an installed plug-in's factory makes of a rule's options."""
    try:
        factory = point.load()
    except Exception as error:
        problem = f"the plug-in {rule.kind!r} cannot be loaded ({type(error).__name__}: {error})"
        raise PolicyError(f"{field}.kind", rule.kind, "one that imports", problem) from error
    options = dict(rule.options or {})
    try:
        return factory(options)
    except Exception as error:
        problem = f"the factory of {rule.kind!r} failed ({type(error).__name__}: {error})"
        raise PolicyError(f"{field}.options", options, "those it takes", problem) from error


def _checked(router: Any, rule: RouterRule, field: str) -> Router:
    if isinstance(router, type):
        problem = f"{rule.kind!r} is the class {router.__name__}"
        raise PolicyError(f"{field}.kind", rule.kind, "an instance of it", problem)
    if not callable(getattr(router, "decide", None)):
        problem = f"{rule.kind!r} is a {type(router).__name__} without decide(context)"
        raise PolicyError(f"{field}.kind", rule.kind, "a fastskip.Router", problem)
    found: Router = router
    return found
