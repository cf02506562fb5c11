"""What a cell computes, from its plan and sizes; no weights are read."""

from __future__ import annotations

from typing import Any

from fastskip.demo.model import HEAD, Size, build_config
from fastskip.demo.text import build_processor
from fastskip.families import shape_of
from fastskip.plan import SkipPlan, make_plan
from fastskip.study.paper.experiments import Cell


def plan_of_cell(cell: Cell) -> SkipPlan:
    """The plan of a cell's model under its policy."""
    return make_plan(cell.policy, shape_of(build_config(build_processor().tokenizer, cell.size)))


def canonical_plan(plan: SkipPlan) -> list[Any]:
    """What a plan does, layer by layer, regardless of how its policy was written."""
    return [
        [
            *(layer.arrangement, layer.norm, layer.combine, layer.partner),
            {each: [cell.attention, cell.ffn, cell.kv] for each, cell in layer.cells.items()},
        ]
        for layer in plan.layers
    ]


def parameters(size: Size) -> int:
    """The number of weights of the language model, including embeddings and head."""
    decoder = size.value
    vocabulary: int = build_config(build_processor().tokenizer, size).text_config.vocab_size
    attention = 4 * decoder.width * decoder.heads * HEAD
    layer = attention + 3 * decoder.width * decoder.ffn + 2 * decoder.width
    return decoder.layers * layer + decoder.width + 2 * vocabulary * decoder.width
