"""The steps of a plan on the fused operations: one layer at a time, or two at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from fastskip.decoder.deep_features import PlacedFeatures
from fastskip.decoder.fused.layer import NO_READERS, FusedBlock, Readers, narrowed
from fastskip.decoder.fused.parts import FusedRows, Store, Stream
from fastskip.decoder.plain_forward import Watch
from fastskip.ops.contracts import Norm, StepReach, Term
from fastskip.ops.ranges import span
from fastskip.plan import LayerPlan, SkipPlan
from fastskip.policy import Combine
from fastskip.tokens import add_

# From a layer's plan, and whether it is in the last step, to what enters its parts.
RowsOf = Callable[[LayerPlan, bool], FusedRows]


def run_steps(
    plan: SkipPlan,
    blocks: Sequence[FusedBlock],
    h: Tensor,
    rows_of: RowsOf,
    store: Store,
    watch: Watch | None = None,
    steps: Sequence[tuple[int, ...]] | None = None,
    reader: Norm | None = None,
    features: PlacedFeatures | None = None,
    note: Watch | None = None,
) -> Stream:
    """Runs every step of the plan, or only ``steps``, on ``h [N, D]``, which is written.

    ``reader``: the norm that reads all rows after them; if given, every update also computes half
    of the norm that follows it, wherever that reads all rows too. ``features`` are added after the
    first layers, only without a ``reader``. ``watch`` gets the input of each layer before features
    are added, ``note`` what the last layer of each step reads.
    """
    assert features is None or reader is None
    steps = plan.steps if steps is None else steps
    readers = _readers(plan, blocks, rows_of, steps, reader)
    stream = Stream(h)
    before: tuple[int, ...] = ()
    for step, own_readers in zip(steps, readers, strict=True):
        is_last = step is plan.steps[-1]
        own = [blocks[index] for index in step]
        rows = [rows_of(block.plan, is_last) for block in own]
        if watch is not None:
            for index in step:
                watch(index, stream.h)
        if features is not None:
            features.enter(before, stream.h, add_)
        if note is not None:
            note(step[-1], stream.h)
        before = step
        with span(f"layer {'+'.join(map(str, step))}"):
            if len(step) == 1:
                stream = own[0].run(stream, rows[0], store, own_readers)
            else:
                pair = own[0], own[1]
                stream = Stream(run_pair(pair, stream.h, (rows[0], rows[1]), store))
    if features is not None:
        features.enter(before, stream.h, add_)
    return stream


def _readers(
    plan: SkipPlan,
    blocks: Sequence[FusedBlock],
    rows_of: RowsOf,
    steps: Sequence[tuple[int, ...]],
    reader: Norm | None,
) -> list[Readers]:
    """The readers of each step; ``NO_READERS`` where no half is wanted."""
    found = [NO_READERS] * len(steps)
    if reader is None:
        return found
    for number, step in reversed(list(enumerate(steps))):
        block = blocks[step[0]]
        if len(step) > 1:
            reader = None
        else:
            rows = rows_of(block.plan, step is plan.steps[-1])
            reader, found[number] = block.readers(rows, reader)
    return found


def run_pair(
    blocks: tuple[FusedBlock, FusedBlock],
    h: Tensor,
    rows: tuple[FusedRows, FusedRows],
    store: Store,
) -> Tensor:
    """Runs two blocks on the same input, each half of both in one launch.

    ``out = h + d_l + d_{l+1}``, or with the mean of the two, where ``d`` is the whole change that a
    dense block makes.
    """
    ops, (first, second) = blocks[0].ops, rows
    blocks[0].decide(h, first.before)
    entries = [store.pages(block.plan.index) for block in blocks]
    queries: list[Tensor] | None = None
    if first.joint.count:
        both = [
            block.projection(own.joint_targets, store)
            for block, own in zip(blocks, rows, strict=True)
        ]
        queries = ops.project_append(first.joint.view(h), both, index=first.joint.index)
    if first.stored.count:
        for block, own in zip(blocks, rows, strict=True):
            block.leave_entries(Stream(h), own, store)
    h = narrowed(h, first)
    if first.reach is None:  # every row that continues is a pad
        return h
    if isinstance(first.reach, StepReach) and isinstance(second.reach, StepReach):
        assert queries is not None
        mixed = ops.attend_step(queries, [first.reach, second.reach], entries, blocks[0].scale)
    else:
        mixed = [
            block.attend(h, None if queries is None else queries[number], own, store)
            for number, (block, own) in enumerate(zip(blocks, rows, strict=True))
        ]
    changes = ops.apply_terms(
        [Term(own, block.weights.output) for own, block in zip(mixed, blocks, strict=True)]
    )
    multiplier = blocks[0].weights.multiplier
    added = changes if multiplier == 1.0 else [change * multiplier for change in changes]
    fed = ops.feed(h, [block.part() for block in blocks], changes=added)
    downs = [Term(own, block.weights.down) for own, block in zip(fed, blocks, strict=True)]
    factor = multiplier * (0.5 if blocks[0].plan.combine is Combine.MEAN else 1.0)
    return ops.add_terms_(h, downs, changes=changes, factor=factor, then=first.then_ffn)
