"""The parts of Hugging Face's decoder layers: module names, and which modules are recognised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastskip.ops.contracts import Activation, Norm


@dataclass(frozen=True, slots=True)
class LayerParts:
    """The current modules of one decoder layer; users may replace any of them.

    Attributes:
        attention: the module that holds ``queries``, ``keys``, ``values`` and ``output``.
        feed: the FFN's first projection: gate and up, or one linear. In another kind of FFN some
            may not be linears, or may be missing (``None``).
        ffn: the module of the whole FFN; ``None`` where the layer calls the FFN's parts itself.
        head_norms: the norms of query heads and of key heads; empty in most families.
        attention_dropout, dropout: current probabilities, 0 outside training: for attention
            weights, and for the output of each sublayer.
        multiplier: of the output of each sublayer, before it is added (Granite).
    """

    attention: Any
    attention_norm: Any
    queries: Any
    keys: Any
    values: Any
    output: Any
    ffn_norm: Any
    feed: tuple[Any, ...]
    activation: Any
    down: Any
    ffn: Any
    attention_dropout: float
    dropout: float
    head_norms: tuple[Any, ...] = ()
    multiplier: float = 1.0

    @property
    def qkv(self) -> tuple[Any, ...]:
        """The projections that read the attention's input."""
        return self.queries, self.keys, self.values

    @property
    def linears(self) -> tuple[Any, ...]:
        """All projections."""
        return *self.qkv, self.output, *self.feed, self.down

    @property
    def norms(self) -> tuple[Any, ...]:
        """All norms."""
        return self.attention_norm, self.ffn_norm, *self.head_norms

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Every module that a whole layer calls, nested ones included."""
        others = *self.norms, self.activation, self.ffn
        return tuple(each for each in (*self.linears, *others) if isinstance(each, nn.Module))

    @property
    def known_activation(self) -> Activation | None:
        """The activation as the operations know it; ``None`` if they do not."""
        kind = type(self.activation).__name__
        if len(self.feed) == 2:
            return Activation.GATED_SILU if kind in ("SiLU", "SiLUActivation") else None
        return Activation.RELU if kind == "ReLU" else None

    def activate(self, fed: Tensor) -> Tensor:
        """The layer's own activation on the output of the ``feed`` projection: ``-> [N, F]``."""
        if len(self.feed) == 1:
            activated: Tensor = self.activation(fed)
            return activated
        gate, up = fed.chunk(2, dim=-1)
        gated: Tensor = self.activation(gate) * up
        return gated

    def attend_out(self, mixed: Tensor) -> Tensor:
        """What attention adds, with the layer's dropout: ``[N, H * K] -> [N, D]``."""
        return self._change(self.output(mixed))

    def run_ffn(self, x: Tensor) -> Tensor:
        """What the FFN adds, with the layer's dropout, without its norm: ``[N, D] -> [N, D]``."""
        if self.ffn is not None:
            return self._change(self.ffn(x))
        return self._change(self.down(self.activation(self.feed[0](x))))

    def _change(self, output: Tensor) -> Tensor:
        """What the output of a sublayer adds to the residual stream."""
        change = F.dropout(output, self.dropout) if self.dropout else output
        return change if self.multiplier == 1.0 else change * self.multiplier


def parts_of(layer: Any) -> LayerParts:
    """The parts of a Llama-like layer or of a pre-norm OPT layer."""
    attention = layer.self_attn
    projections = {
        "attention": attention,
        "queries": attention.q_proj,
        "keys": attention.k_proj,
        "values": attention.v_proj,
    }
    if hasattr(layer, "self_attn_layer_norm"):
        return LayerParts(
            **projections,
            attention_norm=layer.self_attn_layer_norm,
            output=attention.out_proj,
            ffn_norm=layer.final_layer_norm,
            feed=(layer.fc1,),
            activation=layer.activation_fn,
            down=layer.fc2,
            ffn=None,
            attention_dropout=float(attention.dropout) if layer.training else 0.0,
            dropout=float(layer.dropout) if layer.training else 0.0,
        )
    mlp = layer.mlp
    return LayerParts(
        **projections,
        attention_norm=layer.input_layernorm,
        output=attention.o_proj,
        ffn_norm=layer.post_attention_layernorm,
        # With a default: other kinds of FFN, and wrapped ones, lack these attributes.
        feed=(getattr(mlp, "gate_proj", None), getattr(mlp, "up_proj", None)),
        activation=getattr(mlp, "act_fn", None),
        down=getattr(mlp, "down_proj", None),
        ffn=mlp,
        attention_dropout=float(attention.attention_dropout) if layer.training else 0.0,
        dropout=0.0,
        head_norms=(attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else (),
        multiplier=getattr(layer, "residual_multiplier", 1.0),
    )


NORM_NUMBERS = ("variance_epsilon", "eps")
"""Attribute names under which modules keep a norm's epsilon."""


def norm_of(module: Any) -> Norm | None:
    """A norm in the form that the operations take; ``None`` if they do not support it."""
    if type(module) is nn.LayerNorm:
        if module.weight is None:
            return None
        return Norm(module.weight, module.eps, module.bias, is_centred=True)
    epsilon = getattr(module, "variance_epsilon", None)
    return None if epsilon is None else Norm(module.weight, float(epsilon))


def is_plain(module: Any, kind: type[nn.Module]) -> bool:
    """Whether calling the module runs only ``kind``'s own forward, on an ordinary weight."""
    # Quantised and distributed weights are subclasses of Parameter inside a plain nn.Linear.
    return type(module) is kind and type(module.weight) is nn.Parameter and not has_hooks(module)


def has_hooks(module: Any) -> bool:
    """Whether calling the module runs anything but its class's own forward."""
    return bool(hooks_of(module))


def is_transformers_own(hook: object) -> bool:
    """Whether a hook is transformers' own, which only records the outputs that a call requests."""
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


def hooks_of(module: Any) -> list[Any]:
    """Everything that runs when the module is called, besides or instead of its own forward."""
    own = vars(module)
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    found = [hook for name in names for hook in own[name].values()]
    return [*found, own["forward"]] if "forward" in own else found  # how accelerate hooks a module
