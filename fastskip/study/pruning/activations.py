"""The inputs of each layer's projections on calibration samples, layer by layer.

Samples are split into sequences of real rows, each run alone: without padding, nothing but real
rows counts in a norm or is attended to. (The paper's code attends to its padding.) Each layer runs
once to record its inputs and, once its weights are pruned, again to feed the layer above, which
thus sees pruned inputs. This runs the plain dense model; a policy has no effect.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastskip.families import DEEP_INPUTS
from fastskip.sparse.matrices import Matrix, stack_of
from fastskip.study.calls import placed
from fastskip.study.pruning.recipe import PruningError


@dataclass(slots=True)
class Walk:
    """One sequence on its way through the layers: the next layer's arguments.

    ``hidden [1, T, D]``: its hidden states; ``beside``: its other arguments, the same for all
    layers; ``features``, ``[n, D]`` each: added after each of the first layers at columns
    ``where [1, T]``.
    """

    hidden: Tensor
    beside: Mapping[str, Any]
    where: Tensor | None = None
    features: Sequence[Tensor] = ()

    def through(self, layer: nn.Module) -> Tensor:
        """The output of the layer for this sequence."""
        result = layer(self.hidden, **self.beside)
        found: Tensor = result[0] if isinstance(result, tuple) else result
        return found

    def advance(self, layer: nn.Module, number: int) -> None:
        """Moves past ``layer``, whose index is ``number``."""
        self.hidden = self.through(layer)
        if number < len(self.features):
            assert self.where is not None
            self.hidden = self.hidden.clone()
            self.hidden[self.where] += self.features[number]


class _Called(Exception):
    """Ends a forward at the module that was just called."""

    def __init__(self, module: nn.Module, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.module, self.arguments = module, arguments


def walks(model: Any, samples: Sequence[Mapping[str, Any]]) -> list[Walk]:
    """The sequences of all samples, at the input of the first layer.

    Args:
        samples: inputs of the model, each as ``processor(...)`` returns them, padded or not.
    Raises:
        PruningError: a sequence has no real row, or a sample cannot be run.
    """
    stack = stack_of(model)
    found = []
    for number, sample in enumerate(samples):
        given = placed(sample, model)
        given.pop("labels", None)
        text_model, arguments = _arguments_of_first(
            _text_models(model, stack), lambda given=given: model(**given, use_cache=False)
        )
        sequences = list(_sequences(arguments, f"samples[{number}]"))
        for sequence in sequences:
            with _stock(text_model):
                run = partial(text_model, **sequence, use_cache=False)
                _, entry = _arguments_of_first([stack.layers[0]], run)
            where, features = (sequence.get(name) for name in DEEP_INPUTS)
            found.append(Walk(entry.pop("hidden_states"), entry, where, features or ()))
    return found


class InputNorms:
    """Sums of squares of the projections' inputs, feature by feature, over real rows."""

    def __init__(self, watched: Sequence[Matrix]) -> None:
        self._watched = watched
        self._squares: dict[str, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within this block all inputs of the projections are accumulated."""
        with ExitStack() as hooks:
            for matrix in self._watched:
                hook = matrix.module.register_forward_pre_hook(self._counter(matrix.name))
                hooks.callback(hook.remove)
            yield

    def of(self, matrix: Matrix) -> Tensor:
        """The norm of each input feature of a projection, ``[E]`` in fp64.

        Raises:
            PruningError: its input was not finite, or it was never called.
        """
        squares = self._squares.get(matrix.name)
        if squares is None:
            raise PruningError(matrix.name, "never called", "samples that reach every projection")
        if not bool(squares.isfinite().all()):
            allowed = "finite activations (try another dtype, or samples and weights without NaN)"
            raise PruningError(matrix.name, "its input is not finite", allowed)
        return squares.sqrt()

    def _counter(self, name: str) -> Any:
        def count(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].detach()
            squares = x.reshape(-1, x.shape[-1]).double().square().sum(0)
            before = self._squares.get(name)
            self._squares[name] = squares if before is None else before + squares

        return count


def _sequences(arguments: Mapping[str, Any], where: str) -> Iterator[dict[str, Any]]:
    """The real rows of each sequence, as inputs of the text model."""
    key = "input_ids" if arguments.get("inputs_embeds") is None else "inputs_embeds"
    rows, mask = arguments[key], arguments.get("attention_mask")
    if mask is not None and mask.ndim != 2:
        allowed = "an attention_mask [batch, columns], 1 on real rows"
        raise PruningError(where, f"attention_mask of shape {list(mask.shape)}", allowed)
    positions = arguments.get("position_ids")
    seen, features = arguments.get(DEEP_INPUTS[0]), arguments.get(DEEP_INPUTS[1], ())
    for index in range(len(rows)):
        real = slice(None) if mask is None else mask[index].bool()
        own: dict[str, Any] = {key: rows[index, real][None]}
        if not own[key].shape[1]:
            raise PruningError(where, f"sequence {index} is all padding", "real rows in each")
        if positions is not None:  # [B, T], or [axes, B, T] for time, height and width
            number = index % positions.shape[-2]
            own["position_ids"] = positions[..., number : number + 1, real]
        if seen is not None:
            begin, end = (int(seen[:stop].sum()) for stop in (index, index + 1))
            own[DEEP_INPUTS[0]] = seen[index, real][None]
            own[DEEP_INPUTS[1]] = [own_features[begin:end] for own_features in features]
        yield own


def _arguments_of_first(targets: Sequence[nn.Module], run: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Runs until one of the targets is called; returns it and its arguments by name."""

    def stop(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        named = dict(zip(("hidden_states",), arguments, strict=False))
        raise _Called(module, {**named, **keywords})

    with ExitStack() as hooks, torch.no_grad():
        for target in targets:
            hook = target.register_forward_pre_hook(stop, with_kwargs=True)
            hooks.callback(hook.remove)
        try:
            run()
        except _Called as called:
            return called.module, called.arguments
    raise PruningError("model", "its decoder was not called", "a Hugging Face model")


def _text_models(model: Any, stack: nn.Module) -> list[nn.Module]:
    """The modules that hold the layers and take no images, from the outermost in."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return [
        module
        for module in base.modules()
        if module is not base
        and not hasattr(module, "get_image_features")
        and any(inner is stack for inner in module.modules())
    ]


@contextmanager
def _stock(module: nn.Module) -> Iterator[None]:
    """Within this block a prepared model's modules behave as Hugging Face's own."""
    prepared = [each for each in module.modules() if vars(each).get("_fastskip") is not None]
    runtimes = [vars(each).pop("_fastskip") for each in prepared]
    try:
        yield
    finally:
        for each, runtime in zip(prepared, runtimes, strict=True):
            each._fastskip = runtime
