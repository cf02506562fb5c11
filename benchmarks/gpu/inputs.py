"""Inputs of the fused operations at the shapes of real models, made on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastskip.ops.contracts import (
    PAGE,
    Activation,
    Bounds,
    Choice,
    Feed,
    Linear,
    Norm,
    Pages,
    Projection,
    Reach,
    Rotation,
    StepReach,
    Targets,
)
from fastskip.plan import ModelShape


@dataclass(frozen=True)
class Widths:
    """A decoder's sizes, and the length of a prompt with one image."""

    name: str
    hidden: int
    heads: int
    groups: int
    head_dim: int
    ffn: int
    vocabulary: int
    layers: int
    n_image: int = 576
    n_text: int = 64

    @property
    def context(self) -> int:
        return self.n_image + self.n_text

    def model_shape(self, dtype: torch.dtype, depth: int | None = None) -> ModelShape:
        """The shape of a LLaVA with such a decoder; ``depth``: instead of all its layers."""
        return ModelShape(
            depth=self.layers if depth is None else depth,
            hidden_size=self.hidden,
            ffn_size=self.ffn,
            num_heads=self.heads,
            num_kv_heads=self.groups,
            head_dim=self.head_dim,
            vocab_size=self.vocabulary,
            has_images=True,
            dtype_bytes=dtype.itemsize,
            max_positions=4096,
        )


def text_before(n_text: int) -> int:
    """Text rows before the image of a prompt with ``n_text`` text rows."""
    return min(4, n_text // 2)


SEVEN = Widths("7b", 4096, 32, 32, 128, 11008, 32064, 32)
THIRTEEN = Widths("13b", 5120, 40, 40, 128, 13824, 32064, 40)
SMALL = Widths("small", 256, 4, 2, 64, 512, 512, 6, n_image=16, n_text=8)
TINY = Widths("tiny", 64, 4, 2, 16, 96, 128, 6, n_image=4, n_text=4)


class Maker:
    """Makes inputs from running seeds: makers that differ only in dtype make the same numbers.

    bf16 and fp16 both represent these exactly, so every dtype sees the same input.
    """

    def __init__(
        self, widths: Widths, dtype: torch.dtype, device: torch.device, seed: int = 0
    ) -> None:
        self.widths, self.dtype, self.device = widths, dtype, device
        self._seed = 1000 * seed

    def noise(self, *shape: int, scale: float = 1.0) -> Tensor:
        self._seed += 1
        generator = torch.Generator(self.device).manual_seed(self._seed)
        x = torch.randn(*shape, device=self.device, generator=generator) * scale
        return x.bfloat16().half().to(self.dtype)

    def integers(self, values: list[int] | range) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int32, device=self.device)

    def norm(self) -> Norm:
        return Norm(1 + self.noise(self.widths.hidden, scale=0.125), 1e-5)

    def linear(self, n_out: int, n_in: int) -> Linear:
        return Linear(self.noise(n_out, n_in, scale=n_in**-0.5))

    def rotation(self) -> Rotation:
        half, positions = self.widths.head_dim // 2, self.widths.context + 1
        speeds = 10000.0 ** (-torch.arange(half, device=self.device) / half)
        angles = torch.arange(positions, device=self.device)[:, None] * speeds
        cosine, sine = (x.bfloat16().half().to(self.dtype) for x in (angles.cos(), angles.sin()))
        return Rotation(cosine, sine)

    def pages(self, sequences: int) -> Pages:
        """Pages for ``sequences`` prompts plus one entry each, in shuffled order, full of noise."""
        size = self.widths
        count = -(-(size.context + 1) // PAGE)
        elements = 2 * size.groups * PAGE * size.head_dim
        slab = self.noise(sequences * count * elements)
        order = torch.randperm(sequences * count, generator=torch.Generator().manual_seed(0))
        table = (order * elements).view(sequences, count).to(self.device)
        return Pages(slab, table, 0, size.groups, size.head_dim, [slab])

    def projection(self, targets: Targets, pages: Pages) -> Projection:
        size = self.widths
        rows = (size.heads + 2 * size.groups) * size.head_dim
        linear = self.linear(rows, size.hidden)
        return Projection(self.norm(), linear, self.rotation(), targets, pages, size.head_dim)

    def feed(self) -> Feed:
        size = self.widths
        return Feed(self.norm(), self.linear(2 * size.ffn, size.hidden), Activation.GATED_SILU)

    def step_targets(self, sequences: int) -> Targets:
        """The last entry of each sequence."""
        last = self.integers([self.widths.context] * sequences)
        return Targets(last, self.integers(range(sequences)), last)

    def prompt_targets(self) -> Targets:
        """One sequence, a prompt long."""
        rows = self.integers(range(self.widths.context))
        return Targets(rows, torch.zeros_like(rows), rows)

    def step_reach(self, sequences: int) -> StepReach:
        counts = self.integers([self.widths.context] * sequences)
        arrivals = self.integers([0] * (sequences * self.widths.heads))
        return StepReach(counts, 1, sequences * (self.widths.context + 1), arrivals)

    def prompt_reach(self, rows: list[int] | range) -> Reach:
        """Causal queries of these rows of one prompt: each sees all rows before it and itself."""
        limits = self.integers([row + 1 for row in rows])
        bounds = Bounds.of((0, len(limits)), limits.device)
        return Reach(limits, self.integers(range(len(limits))), bounds)

    def text_rows(self) -> list[int]:
        """Indices of a prompt's text rows: a few before the image, most after it."""
        before = text_before(self.widths.n_text)
        return [*range(before), *range(before + self.widths.n_image, self.widths.context)]

    def choice(self, rows: int) -> Choice:
        def whole(*shape: int, value: int = 0) -> Tensor:
            return torch.full(shape, value, dtype=torch.int32, device=self.device)

        return Choice(
            tokens=whole(rows).long(),
            history=whole(1 << 14, rows).long(),
            step=whole(1),
            unfinished=whole(rows, value=1),
            stops=whole(0).long(),
            pad=0,
            counts=whole(1, rows),
            grows=whole(1, rows, value=1),
            positions=whole(rows),
        )
