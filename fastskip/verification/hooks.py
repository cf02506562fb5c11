"""Hooks that make one plain decoder layer obey its row of a policy."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastskip.verification.cells import LayerCells, is_member


class HookedLayer:
    """One decoder layer of a Hugging Face model, with what its hooks saw in the current run.

    Keys and values are handled elsewhere. `token_classes` and `decided`, the rows that skip each
    sublayer by a router's decision, are set before each run; `output` is the residual stream that
    the layer passes on.
    """

    token_classes: Tensor
    decided: Mapping[str, Tensor]
    output: Tensor
    _before: "HookedLayer"
    _input: Tensor
    _normed: Tensor
    _attention: Tensor
    _ffn: Tensor
    _between: Tensor

    def __init__(self, module: Any, cells: LayerCells, before: "HookedLayer | None") -> None:
        if getattr(module, "do_layer_norm_before", True) is False:
            raise ValueError("do_layer_norm_before: only layers that normalise first are supported")
        self._module = module
        self._cells = cells
        self._before = before or self
        self._attention_norm = _first(module, "input_layernorm", "self_attn_layer_norm")
        self._ffn_norm = _first(module, "post_attention_layernorm", "final_layer_norm")
        self._ffn_end = _first(module, "mlp", "fc2")

    def attach(self, keep: Callable[[Any], None]) -> None:
        """Register the hooks; `keep` receives their handles."""
        keep(self._attention_norm.register_forward_hook(self._see_input))
        keep(self._module.self_attn.register_forward_hook(self._mask_attention))
        keep(self._ffn_norm.register_forward_pre_hook(self._choose_ffn_input))
        keep(self._ffn_norm.register_forward_hook(self._choose_ffn_norm))
        keep(self._ffn_end.register_forward_hook(self._mask_ffn))
        for name in ("k_proj", "v_proj") if self._cells.hidden else ():
            keep(getattr(self._module.self_attn, name).register_forward_hook(self._keep_hidden))
        if self._cells.pair_second is not None:
            keep(self._module.register_forward_pre_hook(self._take_input))
        keep(self._module.register_forward_hook(self._combine))

    def _take_input(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """A pair's second layer reads what the first one does; what the model adds to the stream
        between them (image features, in some models) is added after both."""
        same = self._where_arranged(self._before.output, args[0])
        self._between = args[0] - same
        return (same, *args[1:])

    def _see_input(self, module: nn.Module, args: tuple[Tensor, ...], normed: Tensor) -> None:
        self._input, self._normed = args[0], normed

    def _mask_attention(self, module: nn.Module, args: Any, output: tuple[Any, ...]) -> Any:
        self._attention = self._without(output[0], self._cells.without_attention, "attention")
        return (self._attention, *output[1:])

    def _choose_ffn_input(self, module: nn.Module, args: tuple[Tensor, ...]) -> Any:
        """Parallel with its own norm: the FFN reads the block's input."""
        if self._cells.parallel != "own":
            return args
        return (self._where_arranged(self._input.reshape(args[0].shape), args[0]),)

    def _choose_ffn_norm(self, module: nn.Module, args: Any, normed: Tensor) -> Tensor:
        """Parallel with the shared norm: the FFN reads what attention read."""
        if self._cells.parallel != "shared":
            return normed
        return self._where_arranged(self._normed.reshape(normed.shape), normed)

    def _keep_hidden(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Where K or V is what attention reads: its projection is bypassed."""
        rows = is_member(self.token_classes, self._cells.hidden)
        return torch.where(rows[..., None], args[0], output)

    def _mask_ffn(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        self._ffn = self._without(output, self._cells.without_ffn, "ffn")
        return self._ffn

    def _combine(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """A pair's first layer leaves the stream alone, so that the second reads the same."""
        self.output = output
        if self._cells.pair_first:
            self.output = self._where_arranged(self._input, output)
        elif self._cells.pair_second is not None:
            total = self._before._change() + self._change()
            change = total if self._cells.pair_second == "sum" else total / 2
            self.output = self._where_arranged(self._input + change + self._between, output)
        return self.output

    def _where_arranged(self, arranged: Tensor, others: Tensor) -> Tensor:
        """`arranged` for rows of the arranged classes, `others` for all others."""
        rows = is_member(self.token_classes, self._cells.arranged)
        return torch.where(rows.reshape(arranged.shape[:-1])[..., None], arranged, others)

    def _change(self) -> Tensor:
        change = self._attention + self._ffn.reshape(self._attention.shape)
        return change * getattr(self._module, "residual_multiplier", 1)  # Granite's

    def _without(self, rows: Tensor, classes: frozenset[int], sublayer: str) -> Tensor:
        skipped = is_member(self.token_classes, classes)
        if sublayer in self.decided:
            skipped = skipped | self.decided[sublayer]
        # OPT flattens batch and columns before its FFN.
        return rows.masked_fill(skipped.reshape(rows.shape[:-1])[..., None], 0)


def _first(module: nn.Module, *names: str) -> nn.Module:
    for name in names:
        if hasattr(module, name):
            return getattr(module, name)  # type: ignore[no-any-return]
    raise ValueError(f"{type(module).__name__}: a decoder layer needs one of {', '.join(names)}")
