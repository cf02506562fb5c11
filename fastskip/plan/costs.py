"""FLOPs and bytes of a plan, operation by operation, and a lower bound on the time they take.

Counted: the decoder's linears, attention and the lm_head, at 2 FLOPs per multiply-add. Not counted:
the vision tower, activations, norms and other elementwise work. Bytes are weights and biases (once
for the whole batch), K and V read, and K and V written. Attention counts visible pairs only. The
last-layer rule applies: in the last step only rows whose logits are wanted go beyond K and V;
the exception is a pair whose blocks some rows run one after the other, where all rows do. What a
removal computes to rank its rows is not counted: at most one query, and K of the image rows.

Where routers decide, counts are expected values at their rates (`plan.chances`), rounded to
whole numbers for each operation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

from fastskip.plan.chances import LayerChance
from fastskip.plan.layer_plan import ModelShape
from fastskip.plan.layer_work import LayerWork, held, work_of
from fastskip.plan.survivors import counts_left, left
from fastskip.policy import RemovalRule, TokenClass

KINDS = ("qkv", "scores", "output", "ffn", "lm_head")


class CountError(ValueError):
    """An invalid number of rows, tokens, steps or sequences; names it, its value and what is
    allowed."""


class Planned(Protocol):
    """What the cost functions read of a `SkipPlan` or an `ExpectedPlan`."""

    @property
    def shape(self) -> ModelShape: ...
    @property
    def chances(self) -> tuple[LayerChance, ...]: ...
    @property
    def steps(self) -> tuple[tuple[int, ...], ...]: ...
    @property
    def removals(self) -> tuple[RemovalRule, ...]: ...


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What a machine reaches: memory bandwidth in bytes/s, matrix multiplication in FLOP/s."""

    bandwidth_bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True, slots=True)
class Operation:
    """One linear, attention or copy of cache entries, run `times` times with the same counts.

    FLOPs and bytes are those of one run over the whole batch. `kind` is one of `KINDS` or "copy".
    """

    kind: str
    layer: int | None
    flops: int = 0
    weight_bytes: int = 0
    kv_read_bytes: int = 0
    kv_written_bytes: int = 0
    times: int = 1

    @property
    def bytes(self) -> int:
        """All bytes of one run."""
        return self.weight_bytes + self.kv_read_bytes + self.kv_written_bytes


@dataclass(frozen=True)
class Cost:
    """The operations of a prefill, or of `steps` decode steps."""

    ops: tuple[Operation, ...]
    steps: int = 1

    @cached_property
    def flops_by_kind(self) -> Mapping[str, int]:
        """FLOPs of each of `KINDS`."""
        return {k: sum(op.times * op.flops for op in self.ops if op.kind == k) for k in KINDS}

    @property
    def flops(self) -> int:
        """All FLOPs."""
        return sum(self.flops_by_kind.values())

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights and biases read, in all steps."""
        return sum(op.times * op.weight_bytes for op in self.ops)

    @property
    def kv_read_bytes(self) -> int:
        """Bytes of K and V read."""
        return sum(op.times * op.kv_read_bytes for op in self.ops)

    @property
    def kv_written_bytes(self) -> int:
        """Bytes of K and V written."""
        return sum(op.times * op.kv_written_bytes for op in self.ops)

    @property
    def bytes(self) -> int:
        """All bytes."""
        return self.weight_bytes + self.kv_read_bytes + self.kv_written_bytes

    @property
    def operations(self) -> int:
        """Operations in one step; linears on the same rows of one input count as one."""
        return sum(op.times for op in self.ops) // max(self.steps, 1)


@dataclass(frozen=True, slots=True)
class GenerationCost:
    """Prefill and decode of one `generate` call."""

    prefill: Cost
    decode: Cost

    @property
    def flops(self) -> int:
        """FLOPs of both."""
        return self.prefill.flops + self.decode.flops


@dataclass(frozen=True, slots=True)
class Speedup:
    """floor(dense) / floor(plan), separately for prefill and decode."""

    prefill: float
    decode: float


def prefill_cost(
    plan: Planned,
    classes: Sequence[TokenClass],
    batch: int = 1,
    *,
    wanted: int = 1,
    past: Mapping[TokenClass, int] | None = None,
) -> Cost:
    """Cost of a forward over `batch` sequences of rows of these classes, in prompt order.

    Args:
        plan: The plan that runs.
        classes: The class of each new row of one sequence.
        batch: Number of such sequences.
        wanted: How many of the last rows need logits; only these go beyond K and V in the last
            step.
        past: Rows per class that earlier forwards left in the cache.
    Raises:
        CountError: a count is negative or not an integer, `batch` is less than 1, or the model has
            no rows of a class.
    """
    _check_counts(1, batch=batch)
    _check_counts(0, wanted=wanted)
    past = _checked(plan, past or {})
    _checked(plan, dict.fromkeys(classes, 0))
    wanted = min(wanted, len(classes))
    ops: list[Operation] = []
    known: dict[object, LayerWork] = {}  # most layers do the same work as another
    stages = [_stage(plan, classes, past, wanted, n) for n in range(len(plan.removals) + 1)]
    for layer in plan.chances:
        rows, kept, last = stages[layer.stage]
        first = last if layer.index in plan.steps[-1] and not layer.is_split else 0
        key = (layer.key, first)
        work = known.get(key) or known.setdefault(key, work_of(layer, rows, kept, first, batch))
        ops += _linears(plan.shape, layer.index, work, batch)
        ops.append(_attention(plan.shape, layer.index, work, batch))
    ops.append(_lm_head(plan.shape, wanted * batch))
    return Cost(tuple(op for op in ops if op.flops or op.bytes))


def decode_cost(
    plan: Planned, context: Mapping[TokenClass, int], batch: int = 1, *, steps: int = 1
) -> Cost:
    """Cost of `steps` decode steps of one GENERATED row per sequence, the first over `context`.

    `context` counts the rows per class that one sequence has before the first step. Raises as
    `prefill_cost` does.
    """
    _check_counts(1, batch=batch)
    _check_counts(0, steps=steps)
    context = _checked(plan, context)
    ops: list[Operation] = []
    for layer in plan.chances:
        seen = counts_left(plan.removals[: layer.stage], context)
        work = work_of(layer, (TokenClass.GENERATED,), seen, 0, batch)
        ops += (replace(op, times=steps) for op in _linears(plan.shape, layer.index, work, batch))
        more = work.attending * layer.cells[TokenClass.GENERATED].holds
        for step in range(steps if work.attending else 0):  # each step may add one entry
            grown = step * more
            seeing = replace(work, pairs=work.pairs + grown, visible=work.visible + grown)
            ops.append(_attention(plan.shape, layer.index, seeing, batch))
    ops.append(replace(_lm_head(plan.shape, batch), times=steps))
    return Cost(tuple(op for op in ops if op.times and (op.flops or op.bytes)), steps)


def generation_cost(
    plan: Planned, n_image: int, n_text: int, n_new: int, batch: int = 1, *, text_before: int = 0
) -> GenerationCost:
    """Cost of a prompt of `n_image` + `n_text` rows per sequence and `n_new` new tokens.

    `text_before` of the text rows precede the image rows, the others follow them. The prefill
    yields the first new token, so there are `n_new - 1` decode steps. Raises as `prefill_cost`
    does.
    """
    _check_counts(0, n_image=n_image, n_text=n_text, text_before=text_before)
    _check_counts(1, n_new=n_new, batch=batch)
    if text_before > n_text:
        raise CountError(f"text_before: got {text_before}; allowed: at most n_text ({n_text})")
    context = prompt_counts(n_image, n_text)
    prompt = [TokenClass.TEXT] * n_text
    prompt[text_before:text_before] = [TokenClass.IMAGE] * n_image
    return GenerationCost(
        prefill_cost(plan, prompt, batch), decode_cost(plan, context, batch, steps=n_new - 1)
    )


def prompt_counts(n_image: int, n_text: int, n_generated: int = 0) -> dict[TokenClass, int]:
    """Row counts by class; classes without rows are omitted, so text-only models fit too."""
    counts = zip(TokenClass, (n_image, n_text, n_generated), strict=True)
    return {token_class: count for token_class, count in counts if count}


def cache_bytes(plan: Planned, context: Mapping[TokenClass, int], batch: int = 1) -> int:
    """Bytes of live cache entries of `batch` sequences with these rows per class.

    Raises as `prefill_cost` does.
    """
    _check_counts(1, batch=batch)
    context = _checked(plan, context)
    entries = sum(
        held(layer, counts_left(plan.removals[: layer.stage], context)) for layer in plan.chances
    )
    return round(entries * plan.shape.kv_entry_bytes * batch)


def floor_seconds(cost: Cost, ceilings: Ceilings) -> float:
    """A lower bound on the time: each operation, one by one, at the memory or compute ceiling."""
    return sum(
        op.times * max(op.bytes / ceilings.bandwidth_bytes_per_s, op.flops / ceilings.flops_per_s)
        for op in cost.ops
    )


def ideal_speedup(
    dense: Planned,
    plan: Planned,
    ceilings: Ceilings,
    *,
    n_image: int,
    n_text: int,
    n_new: int,
    batch: int = 1,
) -> Speedup:
    """floor(dense) / floor(plan) for one `generate` call; decode is 1 without decode steps."""
    a, b = (generation_cost(each, n_image, n_text, n_new, batch) for each in (dense, plan))
    decode = floor_seconds(b.decode, ceilings)
    return Speedup(
        floor_seconds(a.prefill, ceilings) / floor_seconds(b.prefill, ceilings),
        floor_seconds(a.decode, ceilings) / decode if decode else 1.0,
    )


def _stage(
    plan: Planned,
    classes: Sequence[TokenClass],
    past: Mapping[TokenClass, int],
    wanted: int,
    stage: int,
) -> tuple[list[TokenClass], Mapping[TokenClass, int], int]:
    """A forward after the first `stage` removals: its rows, those of the cache, and how many rows
    precede those whose logits are wanted."""
    removals = plan.removals[:stage]
    rows = left(removals, classes)
    last = sum(row < len(classes) - wanted for row in rows)
    return [classes[row] for row in rows], counts_left(removals, past), last


def _linears(shape: ModelShape, layer: int, work: LayerWork, batch: int) -> list[Operation]:
    hidden, ffn, entry = shape.hidden_size, shape.ffn_size, shape.kv_entry_bytes * batch
    q, kv = shape.num_heads * shape.head_dim, 2 * shape.num_kv_heads * shape.head_dim

    def linear(
        kind: str, rows: float, reading: float, n_in: int, n_out: int, bias: bool, stored: float = 0
    ) -> None:
        if rows:
            weights = round(reading * (n_in + bias) * n_out * shape.weight_bytes)
            flops = round(2 * rows * batch * n_in * n_out)
            written = round(stored * entry)
            ops.append(Operation(kind, layer, flops, weights, kv_written_bytes=written))

    ops: list[Operation] = []
    a, p = work.attending, work.projecting
    if a == p:
        linear("qkv", a, work.reading_q, hidden, q + kv, shape.attention_bias, p)
    else:
        linear("qkv", a, work.reading_q, hidden, q, shape.attention_bias)
        linear("qkv", p, work.reading_kv, hidden, kv, shape.attention_bias, p)
    if work.copied:
        copied = round(work.copied * entry)
        ops.append(Operation("copy", layer, kv_read_bytes=copied, kv_written_bytes=copied))
    linear("output", a, work.reading_q, q, hidden, shape.attention_output_bias)
    wide = (2 if shape.gated_ffn else 1) * ffn
    linear("ffn", work.feeding, work.reading_ffn, hidden, wide, shape.ffn_bias)
    linear("ffn", work.feeding, work.reading_ffn, ffn, hidden, shape.ffn_bias)
    return ops


def _attention(shape: ModelShape, layer: int, work: LayerWork, batch: int) -> Operation:
    flops = round(4 * work.pairs * shape.num_heads * shape.head_dim * batch)  # scores, weighted sum
    read = round(work.visible * shape.kv_entry_bytes * batch)
    return Operation("scores", layer, flops, kv_read_bytes=read)


def _lm_head(shape: ModelShape, rows: int) -> Operation:
    size = shape.hidden_size * shape.vocab_size
    weights = size * shape.dtype_bytes if rows else 0
    return Operation("lm_head", None, 2 * rows * size, weights)


def _check_counts(least: int, **counts: object) -> None:
    for name, count in counts.items():
        if not isinstance(count, int) or count < least:
            raise CountError(f"{name}: got {count!r}; allowed: an integer >= {least}")


def _checked(plan: Planned, rows: Mapping[TokenClass, int]) -> Mapping[TokenClass, int]:
    """Row counts per class, checked against the classes that the model has."""
    for token_class, count in rows.items():
        if token_class not in plan.shape.classes or count < 0:
            known = ", ".join(plan.shape.classes)
            raise CountError(f"{token_class}: {count}; allowed: counts >= 0 of {known}")
    return rows
