"""What the device executor cannot run of a plan; the plain runtime runs everything."""

from __future__ import annotations

from fastskip.decoder.trace import certain_below
from fastskip.plan import LayerPlan, SkipPlan
from fastskip.policy import ROUTER_KINDS, Arrangement, Norm, TokenClass


def unsupported_plan(plan: SkipPlan) -> str | None:
    """What the device executor cannot run of a plan; ``None`` if it can run all of it."""
    for layer in plan.layers:
        reason = _unsupported_layer(layer)
        if reason is not None:
            return f"{reason} in layer {layer.index}"
        for source in layer.reusing:
            if plan.layers[source].stage != layer.stage:
                return f"kv reuse in layer {layer.index} from layer {source}, across a removal"
    return _unsupported_routing(plan)


def _unsupported_layer(layer: LayerPlan) -> str | None:
    is_stacked = layer.arrangement is Arrangement.PARALLEL and layer.norm is Norm.STACKED
    reasons = {
        "kv hidden": layer.leaving_hidden,
        "an arrangement of only some token classes": not layer.is_arranged_whole,
        "a parallel FFN that reads stacked norms": is_stacked,
        "a residual stream replaced by its norm (semantics reference)": layer.replaced,
        "a pair that stores the mean of its K and V (semantics reference)": layer.merges_kv,
        "a unimodal mask": layer.unimodal,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _unsupported_routing(plan: SkipPlan) -> str | None:
    """What the device executor cannot run of a plan's routers; ``None`` if it can run them all."""
    plug_ins = sorted({cell.rule.kind for cell in plan.routed if cell.rule.is_plug_in})
    if plug_ins:
        return f"plug-in routers ({', '.join(plug_ins)}); supported: {', '.join(ROUTER_KINDS)}"
    for cell in plan.routed:
        # Decided right after the layer before, on its output without the features.
        if cell.token_class is not TokenClass.IMAGE or cell.rule.kind == "random":
            continue
        looks_back = cell.rule.kind == "similarity"
        first = certain_below(plan, cell.layer, cell.token_class) if looks_back else cell.layer - 1
        if 0 <= first < plan.shape.deep_layers:
            return (
                f"a router of image rows in layer {cell.layer}, which reads the output of layer "
                f"{first}, to which features are added; supported: routers that read the output of "
                f"layer {plan.shape.deep_layers} or later ones"
            )
    for layer in plan.layers:
        for left in plan.skipping_cells(layer.index).values():
            if left.kv_source is not None and plan.layers[left.kv_source].hollow:
                return (
                    f"kv reuse in layer {layer.index} from layer {left.kv_source}, where a router "
                    "may leave rows without an entry; supported: kv project or omit there"
                )
    return None
