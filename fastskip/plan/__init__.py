"""What one model does under a policy, layer by layer, and what that costs."""

from fastskip.plan.cells import RoutedCell
from fastskip.plan.layer_plan import (
    Cell,
    LayerPlan,
    ModelShape,
    shape_of_depth,
)
from fastskip.plan.skip_plan import (
    SkipPlan,
    TableRow,
    make_plan,
)

__all__ = [
    "Cell",
    "LayerPlan",
    "ModelShape",
    "RoutedCell",
    "SkipPlan",
    "TableRow",
    "make_plan",
    "shape_of_depth",
]
