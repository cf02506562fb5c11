"""Does a CUDA graph pay for a prefill and for the vision tower? Captured against eager."""

from __future__ import annotations

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

OWN_LAYERS = 4
"""Layers with weights of their own; a prefill runs over them again and again."""


def prefill(setting: Setting, widths: Widths) -> Values:
    """The fused operations of all layers over one prompt."""
    if setting.is_tiny:
        from fastskip.ops import fused as ops

        widths = TINY
    else:
        from fastskip.ops import compiled as ops  # type: ignore[no-redef]
    make = Maker(widths, setting.dtype, setting.device)
    h = make.noise(widths.context, widths.hidden)
    layers = [_layer(make, ops) for _ in range(OWN_LAYERS)]

    def run() -> None:
        for number in range(widths.layers):
            layers[number % OWN_LAYERS](h)

    with torch.inference_mode():
        return {"widths": widths.name, "rows": widths.context, **_both_ways(setting, run)}


def vision(setting: Setting, widths: Widths, images: int) -> Values:
    """The vision tower and the projector, Hugging Face's own code."""
    widths = TINY if setting.is_tiny else widths
    device = setting.device.type
    both = load(widths, setting.dtype, device, "torch" if setting.is_tiny else None)
    pixels = prompts(both.hf, shape(widths, device), images)["pixel_values"]
    with torch.inference_mode():
        times = _both_ways(setting, lambda: both.hf.model.get_image_features(pixel_values=pixels))
    return {"images": images, **times}


def _layer(make: Maker, ops: Any) -> Callable[[torch.Tensor], None]:
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
            f"graphs.vision.b{images}",
            f"the vision tower over {images} images captured and eager",
            1,
            partial(vision, widths=SEVEN, images=images),
        )
        for images in (1, 16)
    ),
]
