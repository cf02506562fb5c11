"""Llama written out in matrices, one row at a time: an oracle for the oracle.

Nothing is inferred here. A test says for every layer which rows attend, which rows feed forward
and which entries are there to be seen, so that the expectation is on the page.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layer:
    attend: Collection[int]
    """Rows that attend."""
    feed: Collection[int]
    """Rows that enter the FFN."""
    entries: Mapping[int, int]
    """Row -> layer whose key and value it shows."""
    ffn_reads: Literal["sum", "own", "shared"] = "sum"
    """The FFN's input: after the attention, or the block's input under either norm."""
    joins: Literal["no", "sum", "mean"] = "no"
    """Whether it forms a pair with the layer before."""


@dataclass
class Memory:
    keys: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    values: dict[tuple[int, int], Tensor] = field(default_factory=dict)


def logits_by_hand(model: Any, ids: list[int], layers: list[Layer]) -> Tensor:
    """Logits [rows, vocabulary] of one sequence, in fp64."""
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    prefix = "model.language_model." if "model.language_model.norm.weight" in weights else "model."
    h = weights[prefix + "embed_tokens.weight"][ids]
    memory = Memory()
    changes: list[Tensor] = []
    start = h
    for index, layer in enumerate(layers):
        of_layer = {
            name.removeprefix(f"{prefix}layers.{index}.").removesuffix(".weight"): w
            for name, w in weights.items()
            if name.startswith(f"{prefix}layers.{index}.")
        }
        if layer.joins == "no":
            start = h
        changes.append(_change(model, of_layer, start, index, layer, memory))
        match layer.joins:
            case "no":
                h = start + changes[-1]
            case "sum":
                h = start + changes[-2] + changes[-1]
            case "mean":
                h = start + (changes[-2] + changes[-1]) / 2
    normed = _norm(model, h, weights[prefix + "norm.weight"])
    return torch.einsum("td,vd->tv", normed, weights["lm_head.weight"])


def _change(
    model: Any, w: dict[str, Tensor], h: Tensor, index: int, layer: Layer, memory: Memory
) -> Tensor:
    config = model.config.get_text_config()
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    first_normed = _norm(model, h, w["input_layernorm"])
    attention = torch.zeros_like(h)
    for row, x in enumerate(first_normed):
        memory.keys[index, row] = _rotate(model, (w["self_attn.k_proj"] @ x).view(groups, -1), row)
        memory.values[index, row] = (w["self_attn.v_proj"] @ x).view(groups, -1)
        if row not in layer.attend:
            continue
        query = _rotate(model, (w["self_attn.q_proj"] @ x).view(heads, -1), row)
        seen = [(origin, other) for other, origin in layer.entries.items() if other <= row]
        mixed = []
        for head in range(heads):
            group = head * groups // heads
            keys = torch.stack([memory.keys[entry][group] for entry in seen])
            values = torch.stack([memory.values[entry][group] for entry in seen])
            scores = torch.exp(keys @ query[head] / config.head_dim**0.5)
            mixed.append(scores @ values / scores.sum())
        attention[row] = w["self_attn.o_proj"] @ torch.cat(mixed)
    second_normed = {
        "sum": _norm(model, h + attention, w["post_attention_layernorm"]),
        "own": _norm(model, h, w["post_attention_layernorm"]),
        "shared": first_normed,
    }[layer.ffn_reads]
    ffn = torch.zeros_like(h)
    for row in layer.feed:
        x = second_normed[row]
        gate = w["mlp.gate_proj"] @ x
        ffn[row] = w["mlp.down_proj"] @ (gate / (1 + torch.exp(-gate)) * (w["mlp.up_proj"] @ x))
    return attention + ffn


def _norm(model: Any, x: Tensor, weight: Tensor) -> Tensor:
    eps: float = model.config.get_text_config().rms_norm_eps
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _rotate(model: Any, x: Tensor, position: int) -> Tensor:
    theta: float = model.config.get_text_config().rope_parameters["rope_theta"]
    half = x.shape[-1] // 2
    angle = position * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    a, b = x[:, :half], x[:, half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=1)
