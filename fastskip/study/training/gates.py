"""Training of linear routers, by the straight-through estimator.

In the forward pass, a candidate's change is multiplied by 1 if it would run and by 0 if it would
skip, so the model computes what it will compute with the trained router. In the backward pass, the
sigmoid of the score minus the threshold replaces that step (Bengio, Leonard & Courville 2013,
arXiv:1308.3432), so a router learns from what each row's change is worth to the loss; for this
every candidate is computed. A penalty pulls the share that skips, over all layers together, towards
its target: layers whose changes are worth less skip more. The model's own weights are frozen, as in
the router tuning of SkipGPT (arXiv:2506.04179).

Similarity and random routers of the same policy decide as they always do, so linear ones learn
beside them. For the former, a row that a gate multiplies by 0 has not run the layer.

At inference, by contrast, nothing is computed for rows that skip, and there is no gate.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastskip.loading import plan_of
from fastskip.ops.fused_routes import linear_score, settle
from fastskip.ops.routes import Terms
from fastskip.policy import PolicyError, RouterRule, SkippedKV, SkipPolicy, select_layers
from fastskip.routing import Decision, Router, RoutingContext, ScoreRouter, build_routers
from fastskip.routing.weights import LayerScore, write_weights


class Gates(nn.Module):
    """The linear routers of a model as parameters: one weight and bias per rule and layer."""

    def __init__(self, model: Any, rate: float | None) -> None:
        """Starts from the model's current routers; ``rate``: the share that should skip.

        Raises:
            PolicyError: the policy has no linear router, one that does not project K and V, or a
                plug-in; or ``rate`` is needed and missing.
        """
        super().__init__()
        plan = plan_of(model)
        self.policy, self._rate = plan.policy, rate
        _check(self.policy, rate)
        self._linear = _linear(self.policy)
        self._depth = plan.shape.depth
        self.weights, self.biases = nn.ParameterDict(), nn.ParameterDict()
        self._shares: list[Tensor] = []
        routers = build_routers(self.policy, self._depth, plan.shape.hidden_size)
        for number in self._linear:
            router = routers[number]
            assert isinstance(router, ScoreRouter)
            for layer in self._layers(number):
                terms, name = router.terms(layer), _name(number, layer)
                assert terms.weight is not None
                weight = terms.weight.clone().to(model.device)
                self.weights[name] = nn.Parameter(weight)
                self.biases[name] = nn.Parameter(weight.new_tensor([terms.bias]))

    def gate(self, number: int, router: Router) -> Router:
        """The trainable stand-in for a linear router, as ``watching_routers`` takes it."""
        if number not in self._linear:
            return router
        assert isinstance(router, ScoreRouter)
        return _Gate(router, number, self)

    def decide(self, number: int, terms: Terms, context: RoutingContext) -> Decision:
        """Skips no row; each candidate's factor says whether it would have run."""
        name = _name(number, context.layer)
        scores = linear_score(context.hidden, self.weights[name], self.biases[name])
        sequences, positions = (
            rows.to(scores.device) for rows in (context.sequences, context.positions)
        )
        runs = ~settle(-scores.detach(), sequences, positions, terms)
        soft = torch.sigmoid(scores + terms.bar)  # the bar is minus the threshold
        factor = runs.to(soft.dtype) + soft - soft.detach()
        if terms.capacity is None:
            self._shares.append(factor)
        return Decision(torch.zeros_like(runs), factor=factor)

    def penalty(self) -> Tensor | None:
        """The squared difference between the share of candidates that ran since the last call and
        the target; ``None`` if there is no target or no such candidate."""
        shares, self._shares = self._shares, []
        if self._rate is None or not shares:
            return None
        return (torch.cat(shares).mean() - (1 - self._rate)).square()

    def save(self, folder: Path, about: dict[str, Any]) -> SkipPolicy:
        """Writes ``policy.json`` and the weights beside it; returns the policy."""
        folder.mkdir(parents=True, exist_ok=True)
        rules = list(self.policy.routers)
        for number in self._linear:
            scores = {
                layer: LayerScore(
                    self.weights[_name(number, layer)].detach().cpu(),
                    self.biases[_name(number, layer)].item(),
                )
                for layer in self._layers(number)
            }
            write_weights(folder / weights_file(number), scores, about)
            rules[number] = replace(rules[number], weights=weights_file(number))
        provenance = {**self.policy.provenance, "training": about}
        policy = replace(
            self.policy, routers=tuple(rules), provenance=provenance, folder=str(folder)
        )
        policy.save(folder / "policy.json")
        return policy

    def _layers(self, number: int) -> tuple[int, ...]:
        layers = self.policy.routers[number].layers
        return select_layers(layers, self._depth, f"routers[{number}].layers")


class _Gate(ScoreRouter):
    """One router in training."""

    def __init__(self, router: ScoreRouter, number: int, gates: Gates) -> None:
        super().__init__(router.rule)
        self._router, self._number, self._gates = router, number, gates

    def terms(self, layer: int) -> Terms:
        return self._router.terms(layer)

    def decide(self, context: RoutingContext) -> Decision:
        return self._gates.decide(self._number, self.terms(context.layer), context)


def fresh_routers(
    policy: SkipPolicy, depth: int, hidden_size: int, folder: Path, seed: int = 0
) -> SkipPolicy:
    """The policy with untrained weights for its linear routers, written to ``folder``.

    Scores start about 1 above the threshold, with a spread of about 1: most rows run, but not all.
    """
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rules: list[RouterRule] = []
    for number, rule in enumerate(policy.routers):
        if rule.kind == "linear":
            layers = select_layers(rule.layers, depth, f"routers[{number}].layers")
            start = 1.0 + (rule.threshold or 0.0)
            scores = {
                layer: LayerScore(
                    torch.randn(hidden_size, generator=generator) / hidden_size**0.5, start
                )
                for layer in layers
            }
            write_weights(folder / weights_file(number), scores)
            rule = replace(rule, weights=weights_file(number))
        rules.append(rule)
    return replace(policy, routers=tuple(rules), folder=str(folder))


def weights_file(number: int) -> str:
    """The file name of a router's weights."""
    return f"router_{number}.safetensors"


def _name(number: int, layer: int) -> str:
    return f"{number}_{layer}"


def _linear(policy: SkipPolicy) -> tuple[int, ...]:
    """The numbers of the linear routers."""
    return tuple(n for n, rule in enumerate(policy.routers) if rule.kind == "linear")


def _check(policy: SkipPolicy, rate: float | None) -> None:
    if not policy.routers:
        raise PolicyError("routers", [], "a policy with linear routers", "no routers to train")
    learning = {number: policy.routers[number] for number in _linear(policy)}
    for number, rule in enumerate(policy.routers):
        if rule.is_plug_in:  # which may look at what only training computes
            allowed = "linear, beside which similarity and random stay as they are"
            raise PolicyError(f"routers[{number}].kind", rule.kind, allowed)
    if not learning:
        kind = policy.routers[0].kind
        raise PolicyError("routers[0].kind", kind, "linear for some router: others cannot learn")
    for number, rule in learning.items():
        if rule.kv not in (None, SkippedKV.PROJECT):
            # Training computes K and V of every candidate.
            raise PolicyError(f"routers[{number}].kv", rule.kv.value, "project, during training")
    if rate is None and all(rule.capacity is None for rule in learning.values()):
        raise PolicyError("rate", None, "a share in [0, 1] for routers with a threshold")
