"""fastskip: skip computation in LLaVA-style multimodal LLMs, with real speed-ups.

model = fastskip.load_model("llava-hf/llava-1.5-7b-hf", policy="policy.json")
out = model.generate(**inputs, max_new_tokens=64)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastskip.plan import SkipPlan
from fastskip.policy import (
    Arrangement,
    PolicyError,
    PolicyFitWarning,
    RouterRule,
    SkippedKV,
    SkipPolicy,
    SkipRule,
    Sublayer,
    TokenClass,
)

if TYPE_CHECKING:
    from fastskip.families import UnsupportedModelError
    from fastskip.loading import apply_, load_model, plan_of, record_routing, set_policy
    from fastskip.routing import Decision, Router, RouterError, RoutingContext, Scope

__version__ = "0.1.0"

__all__ = [
    "Arrangement",
    "Decision",
    "PolicyError",
    "PolicyFitWarning",
    "Router",
    "RouterError",
    "RouterRule",
    "RoutingContext",
    "Scope",
    "SkipPlan",
    "SkipPolicy",
    "SkipRule",
    "SkippedKV",
    "Sublayer",
    "TokenClass",
    "UnsupportedModelError",
    "__version__",
    "apply_",
    "load_model",
    "plan_of",
    "record_routing",
    "set_policy",
]

# torch and transformers take seconds to import; code that only reads policies need not wait.
_LAZY = {
    "apply_": "fastskip.loading",
    "load_model": "fastskip.loading",
    "plan_of": "fastskip.loading",
    "record_routing": "fastskip.loading",
    "set_policy": "fastskip.loading",
    "UnsupportedModelError": "fastskip.families",
    "Decision": "fastskip.routing",
    "Router": "fastskip.routing",
    "RouterError": "fastskip.routing",
    "RoutingContext": "fastskip.routing",
    "Scope": "fastskip.routing",
}
_LAZY_MODULES = ("profiling",)


def __dir__() -> list[str]:
    """Names that are not loaded yet as well, so that prompts and editors complete them."""
    return sorted({*globals(), *_LAZY, *_LAZY_MODULES})


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _LAZY_MODULES:
        return import_module(f"fastskip.{name}")
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'fastskip' has no attribute {name!r}")
    return getattr(import_module(module), name)
