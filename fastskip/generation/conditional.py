"""How decode steps pass by what no row runs."""

from __future__ import annotations

from enum import Enum

MOST_ROWS = 64
"""Steps of more rows have library products in their guarded sublayers, and keep early exits."""


class Guarding(Enum):
    """How a decode step passes by what no row runs.

    ``EARLY_EXIT``: every kernel reads the flags and leaves. Works in every graph, costs a node for
    each kernel (about 1 us), and lets decisions ride in residual updates.

    ``CONDITIONAL``: what is passed by is the body of an IF node. Costs that node, a launch that
    sets its condition, and a launch for each decision that would ride in an update of the body.

    ``HOPS``: the step is a loop on the device over the layers that some row runs (``ops.hops``):
    one WHILE node, whose body holds the launches of a few layers and finds weights by distances.
    What nobody runs costs nothing; a turn costs a node, and the last one may have launches that
    leave. Where routers guard whole sequential blocks without entries of rows that skip, all by
    one kind of decision; other plans keep early exits.

    The first one is the default. ``benchmarks.gpu routing`` measures all; another is adopted where
    it makes a step at batch 1 at least 3 % faster, and not before.
    """

    EARLY_EXIT = "early_exit"
    CONDITIONAL = "conditional"
    HOPS = "hops"
