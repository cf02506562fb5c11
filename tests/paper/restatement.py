"""What the papers' code computes, written down again from a description of it, in plain matrices.

One sequence, one row at a time where it matters; a cache of K and V per layer that obeys the
description's last column. Selected layers do one mode; all others are dense. It shares nothing with
the runtime but the weights.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

MODES = ("skip_block", "skip_ffn", "skip_attn", "parallel_attn", "parallel_block")


@dataclass
class Entries:
    """K and V of one layer, ``[rows, heads, width]``."""

    keys: Tensor
    values: Tensor

    def __add__(self, new: "Entries") -> "Entries":
        keys = torch.cat((self.keys, new.keys))
        return Entries(keys, torch.cat((self.values, new.values)))


@dataclass
class Reference:
    """A decoder of the papers' code: Llama or OPT, by the names of its weights.

    ``selected`` layers run ``mode``; of a pair, the first layer is named. ``decode``, ``prompt``:
    whether they do so in decode steps and in the prompt.
    """

    model: Any
    mode: str
    selected: Collection[int]
    prompt: bool = True
    decode: bool = True
    cache: dict[int, Entries] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.weights: dict[str, Tensor] = dict(self.model.named_parameters())
        self.is_opt = any(name.endswith("fc1.weight") for name in self.weights)
        config = self.model.config.get_text_config()
        self.heads, self.depth = config.num_attention_heads, config.num_hidden_layers
        self.config = config
        end = "layers.0.self_attn.q_proj.weight"
        (name,) = (name for name in self.weights if name.endswith("." + end))
        self.prefix = name.removesuffix(end)

    def logits(self, ids: list[int]) -> Tensor:
        """Logits of new rows, which follow what the cache holds: ``[rows, vocabulary]``."""
        first = len(self.cache[0].keys) if self.cache else 0
        is_active = self.decode if self.cache else self.prompt
        positions = torch.arange(first, first + len(ids))
        h = self.weights[self.prefix + "embed_tokens.weight"][torch.tensor(ids)]
        if self.is_opt:
            h = h + self.weights[self.prefix + "embed_positions.weight"][positions + 2]
        layer = 0
        while layer < self.depth:
            if not (is_active and layer in self.selected):
                h, self.cache[layer] = self._dense(layer, h, positions)
                layer += 1
            elif self.mode == "parallel_block":
                h = self._pair(layer, h, positions)
                layer += 2
            else:
                h = getattr(self, "_" + self.mode)(layer, h, positions)
                layer += 1
        final = "final_layer_norm" if self.is_opt else "norm"
        h = self._norm(self.prefix + final, h)
        return h @ self.weights["lm_head.weight"].T

    def _dense(self, layer: int, h: Tensor, positions: Tensor) -> tuple[Tensor, Entries]:
        attention, entries = self._attend(layer, self._first(layer, h), positions)
        middle = h + attention
        return middle + self._ffn(layer, self._second(layer, middle)), entries

    def _skip_block(self, layer: int, h: Tensor, positions: Tensor) -> Tensor:
        # The present K and V of the layer before, as a whole.
        self.cache[layer] = self.cache[layer - 1]
        return h

    def _skip_ffn(self, layer: int, h: Tensor, positions: Tensor) -> Tensor:
        attention, self.cache[layer] = self._attend(layer, self._first(layer, h), positions)
        return h + attention

    def _skip_attn(self, layer: int, h: Tensor, positions: Tensor) -> Tensor:
        normed = self._first(layer, h)
        raw = normed.view(len(h), self.heads, -1)
        new = Entries(raw if self.is_opt else self._rotate(raw, positions), raw)
        self.cache[layer] = self.cache[layer] + new if layer in self.cache else new
        if self.is_opt:
            return normed + self._ffn(layer, self._second(layer, normed))
        return h + self._ffn(layer, normed)

    def _parallel_attn(self, layer: int, h: Tensor, positions: Tensor) -> Tensor:
        normed = self._first(layer, h)
        attention, self.cache[layer] = self._attend(layer, normed, positions)
        read = self._second(layer, normed) if self.is_opt else normed
        return h + attention + self._ffn(layer, read)

    def _pair(self, layer: int, h: Tensor, positions: Tensor) -> Tensor:
        own = self.cache.get(layer)
        if own is not None:  # both attend to what the first one's cache holds
            self.cache[layer + 1] = own
        first, a = self._dense(layer, h, positions)
        second, b = self._dense(layer + 1, h, positions)
        mean = Entries((a.keys + b.keys) / 2, (a.values + b.values) / 2)
        self.cache[layer] = self.cache[layer + 1] = mean
        return (first + second) / 2

    def _attend(self, layer: int, x: Tensor, positions: Tensor) -> tuple[Tensor, Entries]:
        q, k, v = (
            self._linear(layer, f"self_attn.{name}_proj", x).view(len(x), self.heads, -1)
            for name in "qkv"
        )
        if not self.is_opt:
            q, k = self._rotate(q, positions), self._rotate(k, positions)
        entries = Entries(k, v)
        if layer in self.cache:
            entries = self.cache[layer] + entries
        before = len(entries.keys) - len(x)
        mixed = []
        for row, query in enumerate(q):
            keys, values = (part[: before + row + 1] for part in (entries.keys, entries.values))
            scores = torch.einsum("hk,nhk->hn", query, keys) / math.sqrt(query.shape[-1])
            mixed.append(torch.einsum("hn,nhk->hk", scores.softmax(-1), values).flatten())
        output = "self_attn.out_proj" if self.is_opt else "self_attn.o_proj"
        return self._linear(layer, output, torch.stack(mixed)), entries

    def _ffn(self, layer: int, x: Tensor) -> Tensor:
        if self.is_opt:
            return self._linear(layer, "fc2", self._linear(layer, "fc1", x).relu())
        gate = self._linear(layer, "mlp.gate_proj", x)
        wide = gate * gate.sigmoid() * self._linear(layer, "mlp.up_proj", x)
        return self._linear(layer, "mlp.down_proj", wide)

    def _linear(self, layer: int, name: str, x: Tensor) -> Tensor:
        path = f"{self.prefix}layers.{layer}.{name}"
        y = x @ self.weights[path + ".weight"].T
        bias = self.weights.get(path + ".bias")
        return y if bias is None else y + bias

    def _first(self, layer: int, h: Tensor) -> Tensor:
        name = "self_attn_layer_norm" if self.is_opt else "input_layernorm"
        return self._norm(f"{self.prefix}layers.{layer}.{name}", h)

    def _second(self, layer: int, h: Tensor) -> Tensor:
        name = "final_layer_norm" if self.is_opt else "post_attention_layernorm"
        return self._norm(f"{self.prefix}layers.{layer}.{name}", h)

    def _norm(self, path: str, h: Tensor) -> Tensor:
        weight = self.weights[path + ".weight"]
        if not self.is_opt:
            scale = (h.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt()
            normed: Tensor = h / scale * weight
            return normed
        centred = h - h.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return centred / scale * weight + self.weights[path + ".bias"]

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        theta = self.config.rope_parameters["rope_theta"]
        steps = theta ** (-torch.arange(half, dtype=x.dtype) / half)
        angle = (positions.to(x.dtype)[:, None] * steps)[:, None]
        a, b = x[..., :half], x[..., half:]
        turned = (a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin())
        return torch.cat(turned, dim=-1)
