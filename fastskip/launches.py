"""Kernel launches of a plan, counted by running the executor on meta tensors.

Nothing is modelled: the real layers, rows and steps run, only the kernels do not. A sublayer that
a policy skips therefore shows up as missing launches; one that a router lets rows skip shows up as
programs that may exit early (``Account.guarded_programs``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastskip.decoder.fused.forward_rows import ForwardRows
from fastskip.decoder.fused.guarded_layer import GuardedBlock
from fastskip.decoder.fused.paged_cache import PagedCache
from fastskip.decoder.fused.parts import Store
from fastskip.decoder.fused.row_numbers import RowNumbers
from fastskip.decoder.fused.rows import sender
from fastskip.decoder.fused.step_state import StepShape, StepState
from fastskip.decoder.fused.steps import run_steps
from fastskip.decoder.fused.support import unsupported_plan
from fastskip.decoder.weights import LayerWeights
from fastskip.ops import Implementation, operations_of
from fastskip.ops.account import Account, counted, tables
from fastskip.ops.contracts import Activation, HeadNorms, Linear, Norm, Rotation
from fastskip.ops.operations import FusedOperations
from fastskip.plan import ModelShape, SkipPlan
from fastskip.plan.survivors import spaced
from fastskip.policy import RemovalRule, RouterRule, TokenClass, select_layers
from fastskip.routing import ScoreRouter
from fastskip.routing.weights import LayerScore
from fastskip.tokens import CODES, TokenLayout, member

__all__ = ["Account", "decode_launches", "prefill_launches", "tables"]

_DTYPES = {2: torch.bfloat16, 4: torch.float32}


def prefill_launches(
    plan: SkipPlan, n_image: int, n_text: int, batch: int, table: str | None = None
) -> Account:
    """Launches of the decoder and its head for ``batch`` prompts of ``n_image + n_text`` positions.

    A captured prompt has the same launches, on rows padded to its shape, except for routed parts
    that use SWITCH nodes (``decoder.fused.counted_layer``): there the GEMM of the chosen rows is a
    library call, and their update takes one more launch. After a removal the remaining rows are
    assumed evenly spaced; what the removal computes to choose them is not counted.

    ``table``: the GPU's tuning table, which decides how a launch is split.
    """
    ops, anchor = _triton(), _empty(plan.shape, 16)
    codes = torch.full((batch, n_image + n_text), CODES[TokenClass.TEXT])
    codes[:, :n_image] = CODES[TokenClass.IMAGE]
    positions = torch.arange(n_image + n_text)[None]
    layout = TokenLayout(codes, positions, 0, plan.groups)
    cache = PagedCache(plan, anchor)
    h = _empty(plan.shape, len(layout), plan.shape.hidden_size)
    with counted(is_dry=True, table=table) as account:
        cache.grow(layout, h)
        wanted = torch.arange(1, batch + 1) * (n_image + n_text) - 1
        store, routers = Store(_rotation(plan.shape), cache.pages_of), _routers(plan)
        blocks = _blocks(plan, ops)
        for stage, steps in enumerate(plan.stages):
            if stage:
                layout = layout.without(_gone(layout, plan.removals[stage - 1]))
                cache.enter(stage, layout, anchor)
                h = _empty(plan.shape, len(layout), plan.shape.hidden_size)
            numbers = RowNumbers(layout, cache.seen.codes, layout.locate(wanted))
            send, counts = sender(numbers, anchor.device), cache.device_counts
            rows = ForwardRows(plan, numbers, send, counts, routers, anchor)
            h = run_steps(plan, blocks, h, rows.of, store, steps=steps).h
        ops.head_logits(h, _norm(plan.shape), _head(plan.shape))
    return account


def _gone(layout: TokenLayout, rule: RemovalRule) -> Tensor:
    """``[N]`` bool: rows that are removed if each sequence keeps evenly spaced ones."""
    gone = member(layout.codes, rule.classes)
    for sequence in range(layout.batch):
        mine = (gone & (layout.sequences == sequence)).nonzero().squeeze(1)
        mine = mine[layout.columns[mine].argsort()]
        gone[mine[spaced(len(mine), rule.keep.count(len(mine)))]] = False
    return gone


def decode_launches(plan: SkipPlan, batch: int, context: int, table: str | None = None) -> Account:
    """Launches of one greedy decode step: embedding, decoder, head, choice of the token."""
    ops, anchor, shape = _triton(), _empty(plan.shape, 16), plan.shape
    step = StepShape(batch, context, 1, 0)
    state = StepState(plan, anchor, _rotation(shape), step, _routers(plan))
    with counted(is_dry=True, table=table) as account:
        embedding = _empty(shape, shape.vocab_size, shape.hidden_size)
        ops.embed(state.choice.tokens, embedding, state.h)
        h = run_steps(plan, _blocks(plan, ops), state.h, state.rows_of, state.store).h
        ops.head_choose(h, _norm(shape), _head(shape), state.choice)
    return account


def _routers(plan: SkipPlan) -> list[ScoreRouter]:
    """The plan's routers, with learned weights on the meta device.

    Raises:
        ValueError: the device executor cannot run the plan's routers.
    """
    reason = unsupported_plan(plan)
    if reason is not None:
        raise ValueError(f"launches: this policy needs the plain executor; it has {reason}")
    return [_router(plan.shape, rule) for rule in plan.policy.routers]


def _router(shape: ModelShape, rule: RouterRule) -> ScoreRouter:
    if rule.kind != "linear":
        return ScoreRouter(rule)
    score = LayerScore(torch.empty(shape.hidden_size, device="meta"), 0.0)
    layers = select_layers(rule.layers, shape.depth, "layers")
    return ScoreRouter(rule, dict.fromkeys(layers, score))


def _triton() -> FusedOperations:
    ops = operations_of(Implementation.TRITON).fused
    assert ops is not None
    return ops


def _empty(shape: ModelShape, *size: int) -> Tensor:
    return torch.empty(size, dtype=_DTYPES.get(shape.dtype_bytes, torch.float32), device="meta")


def _norm(shape: ModelShape) -> Norm:
    return Norm(_empty(shape, shape.hidden_size), 1e-5)


def _head_norms(shape: ModelShape) -> HeadNorms | None:
    norm = Norm(_empty(shape, shape.head_dim), 1e-6)
    return HeadNorms(norm, norm) if shape.head_norms else None


def _linear(shape: ModelShape, rows: int, columns: int, *, has_bias: bool = False) -> Linear:
    return Linear(_empty(shape, rows, columns), _empty(shape, rows) if has_bias else None)


def _head(shape: ModelShape) -> Linear:
    return _linear(shape, shape.vocab_size, shape.hidden_size)


def _rotation(shape: ModelShape) -> Rotation:
    table = _empty(shape, shape.max_positions, shape.head_dim // 2)
    return Rotation(table, table)


def _blocks(plan: SkipPlan, ops: FusedOperations) -> list[GuardedBlock]:
    shape = plan.shape
    hidden, heads, groups = shape.hidden_size, shape.num_heads, shape.num_kv_heads
    bias = shape.attention_bias
    weights = LayerWeights(
        attention_norm=_norm(shape),
        qkv=_linear(shape, (heads + 2 * groups) * shape.head_dim, hidden, has_bias=bias),
        queries=_linear(shape, heads * shape.head_dim, hidden, has_bias=bias),
        keys_values=_linear(shape, 2 * groups * shape.head_dim, hidden, has_bias=bias),
        output=_linear(shape, hidden, heads * shape.head_dim, has_bias=shape.attention_output_bias),
        ffn_norm=_norm(shape),
        feed=_linear(
            shape, (1 + shape.gated_ffn) * shape.ffn_size, hidden, has_bias=shape.ffn_bias
        ),
        activation=Activation.GATED_SILU if shape.gated_ffn else Activation.RELU,
        down=_linear(shape, hidden, shape.ffn_size, has_bias=shape.ffn_bias),
        head_norms=_head_norms(shape),
    )
    scale = shape.head_dim**-0.5
    return [GuardedBlock(weights, layer, ops, scale, shape.head_dim) for layer in plan.layers]
