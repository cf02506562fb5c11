"""Do CUDA graphs pay off for a prefill and for the vision tower? Captured against eager."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.cells import Cell, Setting
from benchmarks.gpu.inputs import SEVEN, TINY, Maker, Widths
from benchmarks.gpu.models import load, shape
from benchmarks.gpu.results import Values
from benchmarks.gpu.timing import captured, eager_seconds
from benchmarks.shapes import prompts
from fastskip.ops.contracts import Term
from fastskip.ops.operations import FusedOperations

ROUNDS = 9
OWN_LAYERS = 4
"""Layers with distinct weights; a prefill cycles through them."""


def prefill(setting: Setting, widths: Widths) -> Values:
    """The fused operations of all layers over one prompt."""
    widths = TINY if setting.is_tiny else widths
    make = Maker(widths, setting.dtype, setting.device)
    h = make.noise(widths.context, widths.hidden)
    layers = [_layer(make, setting.ops) for _ in range(OWN_LAYERS)]

    def run() -> None:
        for number in range(widths.layers):
            layers[number % OWN_LAYERS](h)

    with torch.inference_mode():
        return {"widths": widths.name, "rows": widths.context, **_both_ways(setting, run)}


def tower(setting: Setting, widths: Widths, images: int) -> Values:
    """Time to the first token of ``generate`` with the vision tower as a CUDA graph and eager."""
    widths = TINY if setting.is_tiny else widths
    device = setting.device.type
    both = load(widths, setting.dtype, device, setting.impl)
    model, graphs = both.ours, both.ours._fastskip.tower
    inputs = prompts(both.hf, shape(widths, device), images)

    def run() -> None:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)

    times: dict[bool, list[float]] = {False: [], True: []}
    features = {}
    try:
        for _ in range(1 if setting.is_tiny else ROUNDS):
            for graphs.captures in times:
                run()  # and once more in eager_seconds, before the timed call: the graphs exist
                times[graphs.captures].append(eager_seconds(run, setting.device, runs=1))
        other = torch.randn_like(inputs["pixel_values"])
        with torch.no_grad(), model._fastskip.generating(1):
            for graphs.captures in times:
                found = model.model.get_image_features(pixel_values=other).pooler_output
                features[graphs.captures] = torch.stack(list(found)).clone()
        captured_ones = len(graphs)
    finally:
        graphs.captures = None
    if not captured_ones:
        raise RuntimeError("no graph was captured, so nothing was compared")
    # Zero, unless libraries choose other algorithms during capture.
    worst = (features[False] - features[True]).abs().max().item()
    eager, inside = (statistics.median(own) for own in times.values())
    values = {"eager_ms": 1e3 * eager, "captured_ms": 1e3 * inside, "worst_difference": worst}
    return {"images": images, **values, "gain": eager / inside}


def _layer(make: Maker, ops: FusedOperations) -> Callable[[torch.Tensor], None]:
    size = make.widths
    projection = make.projection(make.prompt_targets(), make.pages(1))
    assert projection.pages is not None
    pages, reach, part = projection.pages, make.prompt_reach(range(size.context)), make.feed()
    output = make.linear(size.hidden, size.heads * size.head_dim)
    down = make.linear(size.hidden, size.ffn)
    scale = size.head_dim**-0.5

    def run(h: torch.Tensor) -> None:
        (queries,) = ops.project_append(h, [projection])
        attended = ops.attend_rows(queries, reach, pages, scale)
        ops.add_terms_(h, [Term(attended, output)])
        (inner,) = ops.feed(h, [part])
        ops.add_terms_(h, [Term(inner, down)])

    return run


def _both_ways(setting: Setting, run: Callable[[], object]) -> dict[str, Any]:
    eager = eager_seconds(run, setting.device)
    if setting.device.type != "cuda":
        return {"eager_ms": 1e3 * eager, "captured_ms": None}
    graph = captured(run)
    inside = eager_seconds(graph.replay, setting.device)
    return {"eager_ms": 1e3 * eager, "captured_ms": 1e3 * inside, "gain": eager / inside}


CELLS = [
    Cell("graphs.prefill", "a 7B prefill captured and eager", 1, partial(prefill, widths=SEVEN)),
    *(
        Cell(
            f"graphs.tower.b{images}",
            f"the first token with the vision tower over {images} images captured and eager",
            1,
            partial(tower, widths=SEVEN, images=images),
        )
        for images in (1, 4)
    ),
]
