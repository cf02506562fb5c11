"""A decode step as a loop over the layers that some row runs: see ``ops.hops``.

The loop replaces all layers from the first that a router decides on to the last. Layers before and
after it run as usual, and so does the decision on its first layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from fastskip.decoder.fused.guarded_layer import is_one_decision, leaves_entries
from fastskip.decoder.fused.layer import FusedBlock
from fastskip.decoder.fused.parts import FusedRows
from fastskip.decoder.fused.step_state import StepState
from fastskip.decoder.fused.steps import run_steps
from fastskip.ops.bodies import Bodies
from fastskip.ops.contracts import StepReach
from fastskip.ops.hops import HopLayer, Hops, can_hop
from fastskip.plan import SkipPlan
from fastskip.policy import Arrangement

TURNS = 4
"""Layers per iteration of the loop: they share its overhead, and at the end up to one less than
that may be launched for nothing."""


@dataclass(frozen=True, slots=True)
class Hopping:
    """The loop over ``layers`` of a plan, ``turns`` of them per iteration."""

    layers: range
    hops: Hops
    bodies: Bodies
    turns: int

    @classmethod
    def of(
        cls,
        blocks: Sequence[FusedBlock],
        state: StepState,
        bodies: Bodies,
        turns: int | None = None,
    ) -> Hopping | None:
        """The loop of a state's steps; ``None`` if its plan allows none."""
        routes = state.routes
        decided = [] if routes is None else [guard.layer for guard in routes.guards]
        if routes is None or not decided:
            return None
        inside = range(decided[0], decided[-1] + 1)
        found = [_layer_of(blocks[index], state) for index in inside]
        layers = [layer for layer in found if layer is not None]
        scales = {blocks[index].scale for index in inside}
        if len(layers) < len(found) or not can_hop(layers) or len(scales) > 1:
            return None
        hops = Hops.over(
            layers,
            live=state.live,
            positions=state.choice.positions,
            sequences=state.sequences,
            trace=routes.trace,
            arrivals=routes.arrivals,
            scale=scales.pop(),
        )
        return cls(inside, hops, bodies, turns or TURNS)

    def run(
        self, plan: SkipPlan, blocks: Sequence[FusedBlock], h: Tensor, state: StepState
    ) -> Tensor:
        """Runs all layers of ``plan`` on ``h [n, D]``, in place."""
        first, last = self.layers[0], self.layers[-1]
        before = [step for step in plan.steps if step[-1] < first]
        behind = [step for step in plan.steps if step[0] > last]
        ops, hops = blocks[first].ops, self.hops
        run_steps(plan, blocks, h, state.rows_of, state.store, steps=before)
        blocks[first].decide(h, state.rows_of(blocks[first].plan, False).before)

        def take_turn(condition: int) -> None:
            for number in range(self.turns):
                ops.hop(h, hops, condition if number == self.turns - 1 else 0)

        self.bodies.run_while(
            hops.runs,
            lambda condition: ops.begin_hops(h, hops, condition),
            take_turn,
            -(-len(self.layers) // self.turns),
        )
        return run_steps(plan, blocks, h, state.rows_of, state.store, steps=behind).h


def _layer_of(block: FusedBlock, state: StepState) -> HopLayer | None:
    """A layer as the loop runs it; ``None`` if it cannot."""
    plan, weights = block.plan, block.weights
    rows = state.rows_of(plan, False)
    if not _is_whole(rows) or plan.arrangement is not Arrangement.SEQUENTIAL:
        return None
    if weights.head_norms is not None or weights.multiplier != 1.0:
        return None
    if not isinstance(rows.reach, StepReach):
        return None
    terms, home = None, None
    if rows.attention is not None or rows.ffn is not None:
        assert state.routes is not None
        decision = state.routes.decision_on(plan.index)
        is_bare = rows.attention is not None and not leaves_entries(rows.attention)
        if decision is None or not is_bare or not is_one_decision(rows):
            return None
        terms, home = decision
    projection = block.projection(rows.joint_targets, state.store)
    return HopLayer(
        projection=replace(projection, leaves_all=False),
        reach=rows.reach,
        output=weights.output,
        feed=block.part(),
        down=weights.down,
        terms=terms,
        home=home,
    )


def _is_whole(rows: FusedRows) -> bool:
    """Whether a layer's rows run both sublayers, or would without routers."""
    return rows.joint.count > 0 and rows.feeding.count > 0 and rows.then_attention is None
