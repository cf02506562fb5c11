"""Rows removed from a prompt between two layers: which ones, and what remains of the forward.

After a removal the remaining rows are a smaller forward: the removed columns are pads to all later
layers, which compute, store and see nothing of them. Sources of the rankings: FastV (arXiv
2403.06764), PyramidDrop (arXiv 2410.17247).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastskip.decoder.entries import Keys
from fastskip.decoder.layer import Block
from fastskip.decoder.positions import HeadRotation
from fastskip.ops.allocate import to_device
from fastskip.ops.routes import draw, mixed
from fastskip.plan import SkipPlan
from fastskip.plan.survivors import spaced
from fastskip.policy import Ranking, RemovalRule, Sublayer, TokenClass
from fastskip.routing import Decisions
from fastskip.tokens import CODES, PAD, Rows, TokenLayout, member

GENERATED = CODES[TokenClass.GENERATED]


def attention_weights(block: Block, h: Tensor, at: HeadRotation, keys: Tensor) -> Tensor:
    """The attention weights of one row: ``[H, s]`` fp32 over rotated ``keys [G, s, K]``.

    ``h [1, D]``: the row as it enters the layer; ``at``: its rotation.
    """
    queries = at.turn(block.products.queries(block.products.attention_norm(h)))[0]
    keys = keys.float()
    heads = queries.float().view(keys.shape[0], -1, keys.shape[-1])
    scores = (heads @ keys.transpose(-1, -2) * block.scale).flatten(0, 1)
    return scores.softmax(-1)


@dataclass(frozen=True, slots=True)
class _Choice:
    """In one sequence: the removable rows ``[n]``, in column order, and the prompt's last row."""

    candidates: Tensor
    last: int


def may_leave(plan: SkipPlan, layout: TokenLayout, rows: Rows) -> bool:
    """Whether a removal may drop any of these rows."""
    codes = rows.take(layout.codes)
    return any(bool(member(codes, rule.classes).any()) for rule in plan.removals)


class RemainingRows:
    """The rows of one forward that remain after the removals so far.

    Attributes:
        layout: of these rows; the forward's original one if none was removed.
        rotation: of these rows.
    """

    def __init__(
        self,
        plan: SkipPlan,
        blocks: Sequence[Block],
        layout: TokenLayout,
        rotation: HeadRotation,
        entries: Keys,
        *,
        keeps_gone: bool,
    ) -> None:
        """``keeps_gone``: whether ``whole`` will be called."""
        self.layout, self.rotation = layout, rotation
        self._blocks, self._entries, self._keeps_gone = blocks, entries, keeps_gone
        self._rules = {rule.after_layer: rule for rule in plan.removals}
        self._choices: list[_Choice] = []
        self._entering = torch.empty(0)
        # Which rows of the whole forward these are, and the removed ones as they were then.
        self._ids: Tensor | None = None
        self._gone: list[tuple[Tensor, Tensor]] = []
        # For ``decisions``: the original layout, and ``[B, T]`` the removable rows after a layer.
        self._start, self._asked = layout, dict[int, Tensor]()

    def look(self, layer: int, h: Tensor) -> None:
        """Takes from the input ``h [N, D]`` of a layer what a removal after that layer needs."""
        rule = self._rules.get(layer)
        # A decode step has no removable rows.
        if rule is None or not any(self.layout.counts(rule.classes)):
            return
        self._choices = self._choose(rule)
        if rule.keep.by is Ranking.ATTENTION and self._choices:
            last = torch.tensor([choice.last for choice in self._choices])
            self._entering = h.detach()[to_device(last, h.device)]

    def remove(self, layer: int, h: Tensor) -> Tensor:
        """From the output ``[N, D]`` of a layer: the rows that remain after it, ``[n, D]``."""
        rule = self._rules.get(layer)
        if rule is None:
            return h
        if not self._choices:
            self._entries.enter(self.layout)
            return h
        gone = torch.zeros(len(self.layout), dtype=torch.bool)
        asked = gone.clone()
        sizes = [len(choice.candidates) for choice in self._choices]
        with torch.no_grad():
            # The only host sync.
            scores = torch.cat(self._scores(rule, h.detach())).cpu().split(sizes)
        for choice, own in zip(self._choices, scores, strict=True):
            asked[choice.candidates] = gone[choice.candidates] = True
            # Of equal scores the earlier rows stay.
            order = torch.sort(own, descending=True, stable=True).indices
            gone[choice.candidates[order[: rule.keep.count(len(own))]]] = False
        self._asked[layer] = self.layout.unpack(asked)
        self._choices = []
        h = self._leave(gone, h)
        self.layout = self.layout.without(gone)
        self._entries.enter(self.layout)
        return h

    def whole(self, h: Tensor) -> Tensor:
        """All rows of the forward ``[N, D]``, in their original order; removed rows as they were
        at their removal."""
        if self._ids is None:
            return h
        ids, rows = zip(*self._gone, (self._ids, h), strict=True)
        return torch.cat(rows)[to_device(torch.argsort(torch.cat(ids)), h.device)]

    def decisions(self, plan: SkipPlan) -> Decisions:
        """Which rows were removed, by column: in every layer, all those removed before it."""
        start = self._start
        left = [start, *self._entries.left]
        skipped, asked = {}, {}
        for layer in plan.layers if plan.removals else ():
            gone = left[layer.stage].source != start.source
            for sublayer in Sublayer if layer.stage else ():
                skipped[layer.index, sublayer] = gone
                if layer.index - 1 in self._asked:
                    asked[layer.index, sublayer] = self._asked[layer.index - 1]
        return Decisions(start.first_column, start.source, skipped, asked)

    def _leave(self, gone: Tensor, h: Tensor) -> Tensor:
        stay = (~gone).nonzero().squeeze(1)
        ids = torch.arange(len(gone)) if self._ids is None else self._ids
        if self._keeps_gone:
            away = gone.nonzero().squeeze(1)
            self._gone.append((ids[away], h[to_device(away, h.device)]))
        self._ids = ids[stay]
        self.rotation = self.rotation.take(Rows(stay, len(stay)))
        return h[to_device(stay, h.device)]

    def _choose(self, rule: RemovalRule) -> list[_Choice]:
        layout = self.layout
        is_prompt = (layout.codes != GENERATED) & (layout.codes != PAD)
        is_removable = member(layout.codes, rule.classes)
        found = []
        for sequence in sorted(set(layout.sequences[is_removable].tolist())):
            own = layout.sequences == sequence
            prompt = (own & is_prompt).nonzero().squeeze(1)
            last = int(prompt[layout.columns[prompt].argmax()])
            candidates = (own & is_removable).nonzero().squeeze(1)
            candidates = candidates[layout.columns[candidates].argsort()]
            candidates = candidates[candidates != last]
            if len(candidates):
                found.append(_Choice(candidates, last))
        return found

    def _scores(self, rule: RemovalRule, h: Tensor) -> list[Tensor]:
        """The scores of each sequence's candidates, ``[n]`` each; the highest stay."""
        layer, by = rule.after_layer, rule.keep.by
        if by is Ranking.ATTENTION:
            entering = self._entering.split(1)
            return [
                self._attended(layer, own, choice)
                for own, choice in zip(entering, self._choices, strict=True)
            ]
        if by is Ranking.NEXT_ATTENTION:
            return [self._to_attend(layer + 1, h, choice) for choice in self._choices]
        candidates = [choice.candidates for choice in self._choices]
        if by is Ranking.RANDOM:
            salt = mixed(mixed(rule.seed or 0) ^ mixed(4 * layer))
            return [draw(self.layout.positions[own], salt) for own in candidates]
        found = []
        for own in candidates:
            scores = torch.zeros(len(own))
            scores[spaced(len(own), rule.keep.count(len(own)))] = 1
            found.append(scores)
        return found

    def _attended(self, layer: int, entering: Tensor, choice: _Choice) -> Tensor:
        """How much the last row attended to each candidate in a layer, averaged over heads."""
        layout = self.layout
        sequence, last = int(layout.sequences[choice.last]), layout.columns[choice.last]
        columns = self._entries.columns(layer, sequence)
        count = int((columns <= last).sum())
        keys = self._entries.keys(layer, sequence, count)
        weights = attention_weights(self._blocks[layer], entering, self._at(choice.last), keys)
        spots = torch.searchsorted(columns[:count], layout.columns[choice.candidates])
        return weights.mean(0)[to_device(spots, weights.device)]

    def _to_attend(self, layer: int, h: Tensor, choice: _Choice) -> Tensor:
        """The same for a layer that has not run yet, from its projections of the current rows."""
        layout, block = self.layout, self._blocks[layer]
        sequence, last = int(layout.sequences[choice.last]), layout.columns[choice.last]
        seen = (layout.sequences == sequence) & (layout.columns <= last)
        rows = (seen & member(layout.codes, block.plan.projecting)).nonzero().squeeze(1)
        x = block.products.attention_norm(h[to_device(rows, h.device)])
        keys, _ = block.products.keys_values(x)
        keys = self.rotation.take(Rows(rows, len(rows))).turn(keys).transpose(0, 1)
        past = self._entries.past(layer, sequence)
        before = 0 if past is None else past.shape[1]
        every = keys if past is None else torch.cat((past, keys), dim=1)
        row = h[choice.last : choice.last + 1]
        weights = attention_weights(block, row, self._at(choice.last), every).mean(0)
        where = torch.empty(len(layout), dtype=torch.int64)
        where[rows] = torch.arange(len(rows))
        return weights[to_device(before + where[choice.candidates], weights.device)]

    def _at(self, row: int) -> HeadRotation:
        return self.rotation.take(Rows(slice(row, row + 1), 1))
