"""How decode steps bypass sublayers that no row runs."""

from __future__ import annotations

from enum import Enum

MOST_ROWS = 64
"""Larger steps run library GEMMs in their guarded sublayers, and keep early exits."""


class Guarding(Enum):
    """How a decode step bypasses sublayers that no row runs.

    ``EARLY_EXIT``: every kernel reads the flags and exits. Works in every graph, costs one node per
    kernel (about 1 us), and lets decisions be fused into residual updates.

    ``CONDITIONAL``: what is bypassed is the body of an IF node. Costs that node, one launch that
    sets its condition, and one launch for each decision that an update in the body would carry.

    ``HOPS``: the step is a loop on the device over the layers that some row runs (``ops.hops``):
    one WHILE node, whose body holds the launches of a few layers and finds weights by distances.
    Layers that no row runs cost nothing; an iteration costs a node, and the last may hold launches
    that exit early. Only where routers guard whole sequential blocks, skipping rows leave no
    entries, and all decisions are of one kind; other plans keep early exits.

    ``EARLY_EXIT`` is the default. ``benchmarks.gpu routing`` measures all three; another becomes
    the default once it makes a step at batch 1 at least 3 % faster.
    """

    EARLY_EXIT = "early_exit"
    CONDITIONAL = "conditional"
    HOPS = "hops"
