"""What Hugging Face's decoder layers are made of: what modules are called, and which are known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastskip.ops.contracts import Activation, Norm


@dataclass(frozen=True, slots=True)
class LayerParts:
    """The modules of one decoder layer as they are at the moment; users may replace any of them.

    Attributes:
        attention: the module around ``queries``, ``keys``, ``values`` and ``output``.
        feed: the first product of the FFN: gate and up, or one linear. Not all of them are linears
            (``None``: not even there) where the FFN is of another kind.
        ffn: the module that is the whole FFN; ``None`` where a layer calls its parts.
        head_norms: of each query head and of each key head; none in most families.
        attention_dropout, dropout: probabilities at present, 0 out of training: on attention
            weights, and on what each sublayer adds.
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

    @property
    def linears(self) -> tuple[Any, ...]:
        """All products."""
        return self.queries, self.keys, self.values, self.output, *self.feed, self.down

    @property
    def norms(self) -> tuple[Any, ...]:
        """All norms."""
        return self.attention_norm, self.ffn_norm, *self.head_norms

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All that a whole layer calls, one inside another included."""
        others = *self.norms, self.activation, self.ffn
        return tuple(each for each in (*self.linears, *others) if isinstance(each, nn.Module))

    @property
    def known_activation(self) -> Activation | None:
        """The activation as the operations name it; ``None`` if they have no name for it."""
        kind = type(self.activation).__name__
        if len(self.feed) == 2:
            return Activation.GATED_SILU if kind in ("SiLU", "SiLUActivation") else None
        return Activation.RELU if kind == "ReLU" else None

    def activate(self, fed: Tensor) -> Tensor:
        """Between the products, by the layer's own activation: ``[N, F]`` of what ``feed`` says."""
        if len(self.feed) == 1:
            activated: Tensor = self.activation(fed)
            return activated
        gate, up = fed.chunk(2, dim=-1)
        gated: Tensor = self.activation(gate) * up
        return gated

    def attend_out(self, mixed: Tensor) -> Tensor:
        """The output projection as the attention adds it: ``[N, H * K] -> [N, D]``."""
        return self._drop(self.output(mixed))

    def run_ffn(self, x: Tensor) -> Tensor:
        """The FFN as the layer adds it, without norm: ``[N, D] -> [N, D]``."""
        if self.ffn is not None:
            return self._drop(self.ffn(x))
        return self._drop(self.down(self.activation(self.feed[0](x))))

    def _drop(self, change: Tensor) -> Tensor:
        return F.dropout(change, self.dropout) if self.dropout else change


def parts_of(layer: Any) -> LayerParts:
    """The parts of a Llama-like layer, or of an OPT layer that normalises first."""
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
        # Looked up by name: another kind of FFN, or a wrapped one, has no such attributes.
        feed=(getattr(mlp, "gate_proj", None), getattr(mlp, "up_proj", None)),
        activation=getattr(mlp, "act_fn", None),
        down=getattr(mlp, "down_proj", None),
        ffn=mlp,
        attention_dropout=float(attention.attention_dropout) if layer.training else 0.0,
        dropout=0.0,
        head_norms=(attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else (),
    )


NORM_NUMBERS = ("variance_epsilon", "eps")
"""What modules call the number under a norm's root."""


def norm_of(module: Any) -> Norm | None:
    """A norm as the operations read it; ``None`` if they do not compute it."""
    if type(module) is nn.LayerNorm:
        if module.weight is None:
            return None
        return Norm(module.weight, module.eps, module.bias, is_centred=True)
    epsilon = getattr(module, "variance_epsilon", None)
    return None if epsilon is None else Norm(module.weight, float(epsilon))


def is_plain(module: Any, kind: type[nn.Module]) -> bool:
    """Whether calling the module is ``kind``'s own forward on an ordinary weight, and no more."""
    # Quantised and distributed weights are subclasses of Parameter inside a plain nn.Linear.
    return type(module) is kind and type(module.weight) is nn.Parameter and not has_hooks(module)


def has_hooks(module: Any) -> bool:
    """Whether calling the module does more than its own forward."""
    own = vars(module)
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own  # as accelerate hooks a module
    )


def is_transformers_own(hook: object) -> bool:
    """Whether a hook only notes the outputs that a call asked for."""
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


def hooks_of(module: Any) -> list[Any]:
    """What calling the module does besides its own forward, or instead of it."""
    own = vars(module)
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    found = [hook for name in names for hook in own[name].values()]
    return [*found, own["forward"]] if "forward" in own else found
