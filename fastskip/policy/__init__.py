"""What a user wants to skip: pure data that knows no model, its presets and its file format."""

from fastskip.policy.fields import (
    select_layers,
    select_pairs,
)
from fastskip.policy.removals import (
    Keep,
    RemovalRule,
)
from fastskip.policy.routers import (
    ROUTER_KINDS,
    RouterRule,
)
from fastskip.policy.rules import (
    ArrangementRule,
    MaskRule,
    SkipRule,
)
from fastskip.policy.skip_policy import (
    SCHEMA_VERSION,
    PolicyLike,
    SkipPolicy,
)
from fastskip.policy.vocabulary import (
    Agreement,
    Arrangement,
    Combine,
    Group,
    Mask,
    Measure,
    Norm,
    PolicyError,
    PolicyFitWarning,
    Ranking,
    Semantics,
    SkippedKV,
    Sublayer,
    TokenClass,
)

__all__ = [
    "ROUTER_KINDS",
    "SCHEMA_VERSION",
    "Agreement",
    "Arrangement",
    "ArrangementRule",
    "Combine",
    "Group",
    "Keep",
    "Mask",
    "MaskRule",
    "Measure",
    "Norm",
    "PolicyError",
    "PolicyFitWarning",
    "PolicyLike",
    "Ranking",
    "RemovalRule",
    "RouterRule",
    "Semantics",
    "SkipPolicy",
    "SkipRule",
    "SkippedKV",
    "Sublayer",
    "TokenClass",
    "select_layers",
    "select_pairs",
]
