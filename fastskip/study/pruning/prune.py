"""Finding masks by a score, and pruning a model with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from fastskip.sparse.matrices import Matrix, matrices, stack_of
from fastskip.study.provenance import circumstances
from fastskip.study.pruning.activations import InputNorms, Walk, walks
from fastskip.study.pruning.kept_set import KeptSet
from fastskip.study.pruning.masks import WeightMasks, fingerprint_of, generator_for
from fastskip.study.pruning.recipe import Method, PruningError, Recipe
from fastskip.study.pruning.selection import kept_by

Samples = Sequence[Mapping[str, Any]]


def prune_(
    model: Any,
    recipe: Recipe,
    samples: Samples = (),
    *,
    about: Mapping[str, Any] | None = None,
    on_layer: Callable[[], object] = lambda: None,
) -> WeightMasks:
    """Sets a share of a model's weights to zero, in place; returns the masks of those kept.

    Equals ``find_masks``, with its arguments and errors, then ``WeightMasks.apply_``.
    """
    masks = find_masks(model, recipe, samples, about=about, on_layer=on_layer)
    masks.apply_(model)
    return masks


def find_masks(
    model: Any,
    recipe: Recipe,
    samples: Samples = (),
    *,
    about: Mapping[str, Any] | None = None,
    on_layer: Callable[[], object] = lambda: None,
) -> WeightMasks:
    """The weights that a recipe keeps; the model is left unchanged, even on failure.

    Wanda (Sun et al. 2023, arXiv 2306.11695) works layer by layer: it scores the weights of every
    projection by |weight| times the norm of its input, prunes the layer, and runs the next one on
    the pruned layer's output. Removed weights are held in host memory until the end.

    Args:
        model: a Hugging Face model with a Llama, Mistral, Qwen2, Qwen3 or OPT decoder, inside a
            LLaVA or alone, plain or prepared. Wanda runs it dense, whatever its policy.
        recipe: what to prune.
        samples: calibration samples for Wanda: inputs of the model, as ``processor(...)`` returns
            them. Their padding has no effect. Other methods need none.
        about: added to the masks' provenance, such as the source of the samples.
        on_layer: called after each layer.
    Raises:
        PruningError: the recipe does not fit the model, Wanda has no samples, or activations are
            not finite.
        SparseError: weights are not plain tensors in memory.
    """
    every = list(matrices(model))
    chosen = recipe.choose(every)
    if recipe.method is Method.WANDA:
        if not samples:
            raise PruningError("samples", "none", "one or more, as Wanda calibrates on them")
        found = _by_activations(model, recipe, chosen, samples, on_layer)
    else:
        found = dict(_by_weights(recipe, chosen, on_layer))
    provenance = {
        **recipe.to_dict(),
        "samples": len(samples) if recipe.method is Method.WANDA else 0,
        **circumstances(model),
        **(about or {}),
    }
    return WeightMasks(found, fingerprint_of(every), provenance)


def _by_weights(
    recipe: Recipe, chosen: Iterable[Matrix], on_layer: Callable[[], object]
) -> Iterator[tuple[str, KeptSet]]:
    for _, layer in groupby(chosen, key=lambda matrix: matrix.layer):
        for matrix in layer:
            yield matrix.name, KeptSet.of(kept_by(_score(matrix, recipe), recipe))
        on_layer()


def _score(matrix: Matrix, recipe: Recipe) -> Tensor:
    weight = matrix.weight.detach()
    if recipe.method is Method.MAGNITUDE:
        return weight.abs()
    draws = torch.rand(weight.shape, generator=generator_for(matrix.name, recipe.seed))
    return draws.to(weight.device)


@torch.no_grad()
def _by_activations(
    model: Any,
    recipe: Recipe,
    chosen: Sequence[Matrix],
    samples: Samples,
    on_layer: Callable[[], object],
) -> dict[str, KeptSet]:
    layers: Sequence[nn.Module] = stack_of(model).layers
    by_layer: dict[int, list[Matrix]] = {}
    for matrix in chosen:
        by_layer.setdefault(matrix.layer, []).append(matrix)
    last = max(by_layer)
    kept: dict[str, KeptSet] = {}
    with _evaluating(model), ExitStack() as undo:
        underway = walks(model, samples)
        for number, layer in enumerate(layers[: last + 1]):
            for matrix, mask in _wanda(layer, recipe, by_layer.get(number, []), underway):
                own = kept[matrix.name] = KeptSet.of(mask)
                undo.callback(_restore, matrix.weight, own, matrix.weight[~mask].cpu())
                matrix.weight.masked_fill_(~mask, 0)
            if number < last:
                for walk in underway:
                    walk.advance(layer, number)
            on_layer()
    return kept


def _wanda(
    layer: nn.Module, recipe: Recipe, chosen: Sequence[Matrix], underway: Iterable[Walk]
) -> list[tuple[Matrix, Tensor]]:
    """The masks of one layer: the inputs of all its projections are recorded before pruning any."""
    if not chosen:
        return []
    norms = InputNorms(chosen)
    with norms.watching():
        for walk in underway:
            walk.through(layer)
    scores = [matrix.weight.detach().abs().double() * norms.of(matrix) for matrix in chosen]
    return [(m, kept_by(score, recipe)) for m, score in zip(chosen, scores, strict=True)]


def _restore(weight: Tensor, kept: KeptSet, removed: Tensor) -> None:
    with torch.no_grad():
        weight[~kept.mask] = removed.to(weight.device)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Within this block the model is in evaluation mode; every module's mode is restored after."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
