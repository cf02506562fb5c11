"""The prunable weight matrices of a decoder's blocks, and where they are in the module tree.

Matrices have names that no wrapper changes, such as ``layers.3.self_attn.q_proj``: the same within
a LLaVA, in a bare decoder, prepared or under LoRA.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastskip.policy import Sublayer

# OPT's names are out_proj, fc1, fc2; all others' are o_proj, gate_proj, up_proj, down_proj.
PROJECTIONS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "out_proj"), Sublayer.ATTENTION),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj", "fc1", "fc2"), Sublayer.FFN),
}


class SparseError(ValueError):
    """Weights that cannot be stored or pruned as requested; names them and what is allowed."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        self.field, self.value, self.allowed = field, value, allowed
        super().__init__(f"{field}: {value}; allowed: {allowed}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.field, self.value, self.allowed)


@dataclass(frozen=True, slots=True)
class Matrix:
    """One projection of one layer.

    ``module`` is the attribute of ``parent`` with the last part of the name. An adapter (LoRA) may
    wrap the linear.
    """

    layer: int
    sublayer: Sublayer
    name: str
    parent: nn.Module
    module: Any

    @property
    def attribute(self) -> str:
        """The name of the module in ``parent``."""
        return self.name.rpartition(".")[2]

    @property
    def linear(self) -> Any:
        """The module that holds the weight, without adapters around it."""
        found = self.module
        while hasattr(found, "base_layer"):
            found = found.base_layer
        return found

    @property
    def is_plain(self) -> bool:
        """Whether it is a linear with an ordinary weight: neither sparse nor quantised."""
        return type(self.linear) is nn.Linear and type(self.linear.weight) is nn.Parameter

    @property
    def weight(self) -> Tensor:
        """``[M, E]``, the parameter itself.

        Raises:
            SparseError: the weight is not held as a plain parameter in memory.
        """
        weight: Any = getattr(self.linear, "weight", None)
        if not self.is_plain or weight.device.type == "meta":
            kind = type(self.linear).__name__ if weight is None else type(weight).__name__
            allowed = "plain weights in memory (use fastskip.sparse.expand_ on sparse ones, "
            allowed += "model.dequantize() on quantised ones)"
            raise SparseError(self.name, f"held as {kind}", allowed)
        plain: Tensor = weight
        return plain

    def replace(self, module: nn.Module) -> None:
        """Puts another module in its place."""
        setattr(self.parent, self.attribute, module)


def stack_of(model: Any) -> Any:
    """The module that owns the decoder's ``layers``, whatever wraps it.

    Raises:
        SparseError: there is none.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = base.get_decoder() if hasattr(base, "get_decoder") else base
    found = getattr(found, "decoder", found)  # OPT has one more level
    if not isinstance(getattr(found, "layers", None), nn.ModuleList):
        kinds = "a Hugging Face model with a Llama, Mistral, Qwen2, Qwen3 or OPT decoder"
        raise SparseError("model", type(model).__name__, kinds)
    return found


def matrices(model: Any) -> Iterator[Matrix]:
    """All projections of the decoder, layer by layer."""
    for number, layer in enumerate(stack_of(model).layers):
        parents = dict(layer.named_modules())
        for path, module in parents.items():
            above, _, last = path.rpartition(".")
            if last in PROJECTIONS:
                yield Matrix(
                    number, PROJECTIONS[last], f"layers.{number}.{path}", parents[above], module
                )
