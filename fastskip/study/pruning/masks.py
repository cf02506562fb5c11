"""The kept weights of a model, as masks that can be applied, combined, held and stored."""

from __future__ import annotations

import hashlib
import json
import operator
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from fastskip.sparse.matrices import Matrix, matrices
from fastskip.study.pruning.kept_set import KeptSet, Shape
from fastskip.study.pruning.mask_file import MaskFile
from fastskip.study.pruning.recipe import PruningError


@dataclass(frozen=True, eq=False)
class WeightMasks:
    """The weights that a pruned model keeps, matrix by matrix; all of it without a set.

    ``kept``: sets by the names of ``sparse.matrices``, which are the same inside a LLaVA, alone, or
    under LoRA. ``fingerprint``: of the shapes of the model that the masks were made for. Masks of
    one model and the same matrices combine: ``a & b`` (kept by both), ``a | b`` (by either),
    ``a - b`` (by the first only), ``~a`` (what was removed), ``exclude``, ``shared``. Masks are
    equal if their fingerprints and sets are.
    """

    kept: Mapping[str, KeptSet]
    fingerprint: str
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def apply_(self, model: Any) -> None:
        """Sets every removed weight to zero, in place; call it after each optimizer step.

        Views of merged storages and weights under LoRA are written in place. It costs one pass over
        the weights; move the masks to the weights' device first (``to``).

        Raises:
            PruningError: the masks were made for another model.
        """
        weights = self._weights(model)
        with torch.no_grad():
            for name, weight in weights:
                # Not a product, which would keep weights that are not finite.
                weight.masked_fill_(~self.kept[name].mask.to(weight.device), 0)

    @contextmanager
    def held(self, model: Any, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Within this block removed weights are zero after every optimizer step."""
        self.apply_(model)
        handle = optimizer.register_step_post_hook(lambda *_: self.apply_(model))
        try:
            yield
        finally:
            handle.remove()

    @property
    def device(self) -> torch.device:
        """The device of the masks."""
        found = next(iter(self.kept.values()), None)
        return torch.device("cpu") if found is None else found.bitmap.device

    def to(self, device: torch.device | str) -> WeightMasks:
        """The same masks on another device."""
        return self._with({k: replace(s, bitmap=s.bitmap.to(device)) for k, s in self.kept.items()})

    @property
    def digest(self) -> str:
        """A hash of the kept sets, whatever their provenance or device."""
        found = hashlib.sha256()
        for name, own in sorted(self.kept.items()):
            found.update(f"{name} {own.shape} ".encode() + own.bitmap.cpu().numpy().tobytes())
        return found.hexdigest()

    def check(self, model: Any) -> None:
        """Raises ``PruningError`` unless the masks fit this model."""
        self._weights(model)

    def kept_share(self) -> float:
        """The share of weights kept in all matrices that have a set."""
        total = sum(own.shape[0] * own.shape[1] for own in self.kept.values())
        return sum(int(own.mask.sum()) for own in self.kept.values()) / total if total else 1.0

    def zeros(self, model: Any) -> dict[str, int]:
        """How many weights of each matrix with a set are zero, pruned or not.

        Raises:
            PruningError: the masks were made for another model.
        """
        return {name: int((weight == 0).sum()) for name, weight in self._weights(model)}

    def __and__(self, other: WeightMasks) -> WeightMasks:
        return self._combined(other, torch.bitwise_and, "intersection")

    def __or__(self, other: WeightMasks) -> WeightMasks:
        return self._combined(other, torch.bitwise_or, "union")

    def __sub__(self, other: WeightMasks) -> WeightMasks:
        return self._combined(other, lambda a, b: a & ~b, "difference")

    def __invert__(self) -> WeightMasks:
        flipped = {name: KeptSet.of(~own.mask) for name, own in self.kept.items()}
        return self._with(flipped, operation="complement", of=[dict(self.provenance)])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WeightMasks):
            return NotImplemented
        return (
            self.fingerprint == other.fingerprint
            and self.kept.keys() == other.kept.keys()
            and all(torch.equal(s.bitmap, other.kept[k].bitmap) for k, s in self.kept.items())
        )

    __hash__ = None  # type: ignore[assignment]

    def exclude(self, other: WeightMasks, share: float, *, seed: int = 0) -> WeightMasks:
        """Removes, matrix by matrix, a random ``share`` of the weights that both keep.

        The share is exact, to the nearest whole number; at 1 the result is ``self - other``. The
        paper's code (arXiv 2410.09454) measures in this way what a shared sub-network is worth.
        """
        if isinstance(share, bool) or not 0 <= share <= 1:
            raise PruningError("share", share, "a share in [0, 1]")
        self._check_alike(other)
        result = {}
        for name, own in self.kept.items():
            mask = own.mask.cpu()
            common = (mask & other.kept[name].mask.cpu()).nonzero()
            order = torch.randperm(len(common), generator=generator_for(name, seed))
            mask[common[order[: round(share * len(common))]].unbind(1)] = False
            result[name] = KeptSet.of(mask.to(own.bitmap.device))
        of = [dict(self.provenance), dict(other.provenance)]
        return self._with(result, operation="exclusion", share=share, seed=seed, of=of)

    @classmethod
    def shared(cls, masks: Sequence[WeightMasks]) -> WeightMasks:
        """The shared sub-network of several tasks (arXiv 2405.16700): what all masks keep."""
        if not masks:
            raise PruningError("masks", "none", "one or more")
        return reduce(operator.and_, masks)

    def covering(self, other: WeightMasks) -> WeightMasks:
        """The same masks with a set for every matrix of ``other``: missing ones keep everything."""
        whole = {
            name: KeptSet.of(torch.ones(own.shape, dtype=torch.bool, device=own.bitmap.device))
            for name, own in other.kept.items()
            if name not in self.kept
        }
        return self._with({**self.kept, **whole})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file: one bit per weight, with the provenance as metadata."""
        MaskFile(self.kept, self.fingerprint, self.provenance).write(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> WeightMasks:
        """Reads what ``save`` wrote.

        Raises:
            PruningError: the file cannot be used.
        """
        found = MaskFile.read(path)
        return cls(found.kept, found.fingerprint, found.provenance)

    def _weights(self, model: Any) -> list[tuple[str, Tensor]]:
        """The model's weights that have a set, after checking that the masks fit the model."""
        known = {matrix.name: matrix for matrix in matrices(model)}
        for name, own in self.kept.items():
            matrix = known.get(name)
            if matrix is None:
                raise PruningError(name, "the model has no such matrix", "masks of this model")
            if tuple(matrix.weight.shape) != own.shape:
                found = f"the mask has shape {list(own.shape)}"
                allowed = f"{list(matrix.weight.shape)}, as in masks of this model"
                raise PruningError(name, found, allowed)
        if self.fingerprint != fingerprint_of(known.values()):
            found = f"made for another model ({self.fingerprint[:16]})"
            raise PruningError("masks", found, fingerprint_of(known.values())[:16])
        return [(name, known[name].weight) for name in self.kept]

    def _combined(
        self, other: WeightMasks, combine: Callable[[Tensor, Tensor], Tensor], operation: str
    ) -> WeightMasks:
        self._check_alike(other)
        result = {
            name: replace(
                own, bitmap=combine(own.bitmap, other.kept[name].bitmap.to(own.bitmap.device))
            )
            for name, own in self.kept.items()
        }
        of = [dict(self.provenance), dict(other.provenance)]
        return self._with(result, operation=operation, of=of)

    def _check_alike(self, other: WeightMasks) -> None:
        if self.fingerprint != other.fingerprint:
            raise PruningError("masks", "made for different models", "masks of one model")
        apart = sorted(self.kept.keys() ^ other.kept.keys())
        if apart:
            allowed = "masks of the same matrices (`covering` adds the missing ones)"
            raise PruningError("masks", f"only one of the two has {apart[0]}", allowed)

    def _with(self, kept: Mapping[str, KeptSet], **provenance: Any) -> WeightMasks:
        return replace(self, kept=kept, provenance=provenance or self.provenance)


def fingerprint_of(found: Any) -> str:
    """A hash of the names and shapes of a model's matrices, whatever their values."""
    shapes = sorted((matrix.name, list(_shape(matrix))) for matrix in found)
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()


def generator_for(name: str, seed: int) -> torch.Generator:
    """A generator for one matrix: same draws on every device, whatever other matrices draw."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))


def _shape(matrix: Matrix) -> Shape:
    linear = matrix.linear
    return linear.out_features, linear.in_features
