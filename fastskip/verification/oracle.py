"""The masked dense computation: what a policy means, computed the slow way.

A plain Hugging Face model computes every layer for every row; hooks then remove what the policy
skips. Nothing is fast here, and nothing is shared with the runtime, so that agreement between the
two means something.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from fastskip.verification.cells import (
    GENERATED,
    IMAGE,
    UncheckedPolicyError,
    classes_of,
    classify_prompt,
    is_member,
    read_decidable,
    read_joint,
    read_policy,
    read_routed_kv,
)
from fastskip.verification.exact import compute_in_double
from fastskip.verification.hooks import HookedLayer

NOTHING = -1
"""In place of a layer: a row exposes no key and value."""


class Continuation(NamedTuple):
    """New tokens [batch, new], and the scores [batch, new, vocabulary] they were chosen by."""

    tokens: Tensor
    scores: Tensor


class Prompt(NamedTuple):
    """A batch of prompts as the decoder sees it, padded on the left.

    `axes`: [3, batch, columns], for models with positions in time, height and width. `deep`: the
    columns [batch, columns] where features are added after the first layers, and those features,
    [n, hidden] each.
    """

    embeddings: Tensor
    attention_mask: Tensor
    token_classes: Tensor
    axes: Tensor | None = None
    deep: tuple[Tensor, list[Tensor]] | None = None

    def inputs_with(self, embeddings: Tensor) -> dict[str, Any]:
        """A decoder's inputs: the prompt, followed by new tokens [batch, new, hidden]."""
        new = embeddings.shape[1]
        mask = nn.functional.pad(self.attention_mask, (0, new), value=1)
        given: dict[str, Any] = {
            "inputs_embeds": torch.cat([self.embeddings, embeddings], dim=1),
            "attention_mask": mask,
            "position_ids": (mask.long().cumsum(dim=1) - 1).clamp(min=0),
        }
        if self.axes is not None:
            later = self.axes[:, :, -1:] + torch.arange(1, new + 1, device=self.axes.device)
            given["position_ids"] = torch.cat([self.axes, later], dim=2)
        if self.deep is not None:
            where, features = self.deep
            given["visual_pos_masks"] = nn.functional.pad(where, (0, new))
            given["deepstack_visual_embeds"] = features
        return given


class MaskedOracle:
    """A plain Hugging Face model that obeys a policy while the oracle is entered.

    `policy` is the plain data of a policy file, for example `SkipPolicy.to_dict()`. Inside the
    `with` block call `forward` or `greedy`; leaving it restores the model. Weights are never
    touched. The model must be in evaluation mode. Cost: a visibility mask and attention
    scores of [batch, heads, columns, columns] per layer, and no cache.

        with MaskedOracle(model, policy.to_dict()) as oracle:
            logits = oracle.forward(**processor(images=image, text=text, return_tensors="pt"))

    `decisions` says what routers and removals let rows skip, by (layer, "attention" or "ffn"):
    boolean, [batch, columns], for the columns of `forward`. A policy with either needs them.
    Decisions that the policy does not leave open are ignored.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Mapping[str, Any],
        decisions: Mapping[tuple[int, str], Tensor] | None = None,
    ) -> None:
        if decisions is None and (policy.get("routers") or policy.get("removals")):
            raise ValueError(
                "decisions: needed for a policy with routers or removals; pass what they decided"
            )
        self.model = model
        decoder = model.get_decoder()
        self._decoder = decoder if hasattr(decoder, "layers") else decoder.get_decoder()
        depth = len(self._decoder.layers)
        self._config = model.config
        if policy.get("semantics") == "reference" and hasattr(self._decoder.layers[0], "fc1"):
            raise UncheckedPolicyError(
                'semantics: "reference" has no form as a masked OPT; allowed: "clean"'
            )
        self.cells = read_policy(policy, depth, classes_of(model.config))
        self._layers: list[HookedLayer] = []
        for module, cells in zip(self._decoder.layers, self.cells, strict=True):
            before = self._layers[-1] if self._layers else None
            self._layers.append(HookedLayer(module, cells, before))
        self._decisions = decisions or {}
        self._decidable = read_decidable(policy, depth)
        # What a class always skips is not open to decisions.
        self._joint = [
            classes - cells.without_attention - cells.without_ffn
            for classes, cells in zip(read_joint(policy, depth), self.cells, strict=True)
        ]
        self._routed_kv = read_routed_kv(policy, depth)
        self._undo: ExitStack | None = None
        self._run: _Run | None = None
        # The decoder's inputs in the last run.
        self._seen: dict[str, Any] = {}
        rotary = getattr(self._decoder, "rotary_emb", None)
        self._has_axes = hasattr(rotary, "mrope_section")

    def __enter__(self) -> Self:
        if self._undo is not None:
            raise RuntimeError("this oracle has already been entered")
        if self.model.training:
            raise ValueError("the model is in training mode; call model.eval() first")
        with ExitStack() as undo:
            self._attach(undo)
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        undo, self._undo = self._undo, None
        if undo is not None:
            undo.close()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_classes: Tensor | None = None,
        position_ids: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Return the logits of all rows, [batch, columns, vocabulary].

        `token_classes` holds 0 (image), 1 (text) or 2 (generated) for each position; by default
        placeholders are image if pixels are given, all others text. Positions count the real rows
        of each sequence. Rows of pads come out finite and mean nothing. Afterwards `stream` holds
        the residual stream after each layer, and `attentions` its attention weights.
        """
        if token_classes is None:
            token_classes = self._default_classes(input_ids, inputs)
        for key, value in inputs.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                inputs[key] = value.to(self._decoder.dtype)
        inputs["input_ids"] = input_ids
        outputs = self._compute(self.model, token_classes, attention_mask, position_ids, **inputs)
        logits: Tensor = outputs.logits
        return logits

    @property
    def stream(self) -> list[Tensor]:
        """The residual stream after each layer of the last run, [batch, columns, hidden] each.

        The first layer of a pair leaves the stream as it was.
        """
        return [layer.output for layer in self._layers]

    @torch.no_grad()
    def prompt(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_classes: Tensor | None = None,
        **inputs: Any,
    ) -> Prompt:
        """Run a batch of prompts and return what the decoder saw, moved to left padding."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if token_classes is None:
            token_classes = self._default_classes(input_ids, inputs)
        self.forward(input_ids, mask, token_classes, **inputs)
        embeddings = self._seen.get("inputs_embeds")
        if embeddings is None:
            embeddings = self.model.get_input_embeddings()(input_ids)
        # A stable sort by the mask moves the pads to the front and keeps the order of the rest.
        order = mask.long().argsort(dim=1, stable=True)
        index = order[..., None].expand_as(embeddings)
        axes, deep = self._seen.get("position_ids"), self._seen.get("visual_pos_masks")
        if axes is not None:
            axes = axes[-3:].gather(2, order.expand(3, -1, -1)) if axes.ndim == 3 else None
        if deep is not None:
            deep = deep.gather(1, order), self._seen["deepstack_visual_embeds"]
        return Prompt(
            embeddings.gather(1, index),
            mask.gather(1, order),
            token_classes.gather(1, order),
            axes,
            deep,
        )

    @torch.no_grad()
    def continuation(self, prompt: Prompt, tokens: Tensor) -> Tensor:
        """Score given new tokens [batch, new] after `prompt`: logits [batch, new + 1, vocabulary].

        Entry j holds the logits after the prompt and the first j tokens.
        """
        new = self.model.get_input_embeddings()(tokens)
        outputs = self._compute(
            self._decoder,
            torch.cat([prompt.token_classes, torch.full_like(tokens, GENERATED)], dim=1),
            **prompt.inputs_with(new),
        )
        columns = prompt.attention_mask.shape[1]
        head: Callable[[Tensor], Tensor] = self.model.get_output_embeddings()
        # Granite's, by itself; LLaVA-NeXT's head around it divides by nothing.
        scaling = getattr(self._config, "logits_scaling", 1.0)
        return head(outputs.last_hidden_state[:, columns - 1 :]) / scaling

    @torch.no_grad()
    def greedy(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int = 0,
        **inputs: Any,
    ) -> Continuation:
        """Greedy tokens, with everything recomputed at every step.

        Each sequence continues from its last real row, whatever the padding side. After an
        end-of-sequence token a sequence gets `pad_token_id`; by default no token ends it.
        """
        ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or [])
        end = torch.tensor(ends, dtype=torch.long, device=input_ids.device)
        prompt = self.prompt(input_ids, **inputs)
        tokens = input_ids.new_empty(len(input_ids), 0)
        finished = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        scores: list[Tensor] = []
        while len(scores) < max_new_tokens and not finished.all():
            scores.append(self.continuation(prompt, tokens)[:, -1])
            chosen = scores[-1].argmax(dim=-1).masked_fill(finished, pad_token_id)
            tokens = torch.cat([tokens, chosen[:, None]], dim=1)
            finished |= torch.isin(chosen, end)
        return Continuation(tokens, torch.stack(scores, dim=1))

    def _attach(self, undo: ExitStack) -> None:
        """Register everything; `undo` reverts it."""

        def keep(handle: Any) -> None:
            undo.callback(handle.remove)

        if self._decoder.dtype == torch.float64:
            compute_in_double(self._decoder, keep)
        keep(self._decoder.register_forward_pre_hook(self._see, with_kwargs=True))
        for layer in self._layers:
            layer.attach(keep)
        # A name that has no mask registered also keeps Hugging Face from building its own.
        name = f"fastskip_oracle_{id(self)}"
        ALL_ATTENTION_FUNCTIONS[name] = self._attend
        undo.callback(ALL_ATTENTION_FUNCTIONS.__delitem__, name)
        modules = [self._decoder, *(module.self_attn for module in self._decoder.layers)]
        for config in {id(module.config): module.config for module in modules}.values():
            undo.callback(setattr, config, "_attn_implementation", config._attn_implementation)
            config._attn_implementation = name

    def _default_classes(self, input_ids: Tensor | None, inputs: Mapping[str, Any]) -> Tensor:
        if input_ids is None:
            raise TypeError("token_classes: needed without input_ids")
        return classify_prompt(input_ids, self._config, inputs)

    def _see(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._seen = kwargs

    def _compute(
        self,
        module: nn.Module,
        token_classes: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        if self._undo is None:
            raise RuntimeError("enter the oracle first: with MaskedOracle(model, policy) as oracle")
        mask = torch.ones_like(token_classes) if attention_mask is None else attention_mask
        # The model itself works out positions in time, height and width.
        is_asked = self._has_axes and module is self.model
        if position_ids is None and not is_asked:
            position_ids = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        self.attentions: dict[int, Tensor] = {}
        decided = self._obeyed(token_classes)
        self._run = _Run(token_classes, mask.bool(), {}, self._sources(token_classes, decided))
        for number, layer in enumerate(self._layers):
            layer.token_classes = token_classes
            layer.decided = {
                sublayer: rows for (index, sublayer), rows in decided.items() if index == number
            }
        try:
            return module(attention_mask=mask, position_ids=position_ids, use_cache=False, **inputs)
        finally:
            self._run = None

    def _obeyed(self, token_classes: Tensor) -> dict[tuple[int, str], Tensor]:
        """The decisions that the policy allows; joint ones on half a block hold for all of it."""
        found = {
            key: rows & is_member(token_classes, self._decidable.get(key, ()))
            for key, rows in self._decisions.items()
        }
        no_rows = torch.zeros_like(token_classes, dtype=torch.bool)
        for layer, classes in enumerate(self._joint):
            halves = [(layer, "attention"), (layer, "ffn")]
            either = torch.stack([found.get(key, no_rows) for key in halves]).any(0)
            either &= is_member(token_classes, classes)
            if either.any():
                found |= {key: found.get(key, no_rows) | either for key in halves}
        return found

    def _sources(
        self, token_classes: Tensor, decided: Mapping[tuple[int, str], Tensor]
    ) -> list[Tensor]:
        """By layer, which layer's key and value each row exposes there: [batch, columns]."""
        found: list[Tensor] = []
        for layer, cells in enumerate(self.cells):
            by_class = torch.tensor([NOTHING if s is None else s for s in cells.sources])
            sources = by_class.to(token_classes.device)[token_classes]
            # With reuse: what the row itself exposes below, which a router may have changed.
            reused = torch.full_like(sources, NOTHING)
            for below in reversed(found):
                reused = torch.where(reused == NOTHING, below, reused)
            copies = torch.tensor([s not in (None, layer) for s in cells.sources])
            sources = torch.where(copies.to(sources.device)[token_classes], reused, sources)
            skipped = decided.get((layer, "attention"))
            if skipped is not None and any(s is not None for s in cells.sources):
                for token_class, kv in enumerate(self._routed_kv[layer]):
                    rows = skipped & (token_classes == token_class)
                    left = {"project": torch.full_like(sources, layer), "reuse": reused}
                    nothing = torch.full_like(sources, NOTHING)
                    sources = torch.where(rows, left.get(kv, nothing), sources)
            found.append(sources)
        return found

    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Masked softmax attention, [batch, heads, columns, head width] in, rows first out."""
        run, layer = self._run, module.layer_idx
        if run is None or not isinstance(layer, int):
            raise RuntimeError("call the oracle, not the model, while the oracle is entered")
        columns = key.shape[2]
        window = kwargs.get("sliding_window")
        if window is not None and window < columns:
            raise ValueError(f"sliding_window: {window} is shorter than the {columns} columns")
        run.entries[layer] = (key, value)
        sources = run.sources[layer]
        for source in set(sources[run.real].tolist()) - {NOTHING, layer}:
            rows = sources == source
            other_key, other_value = run.entries[source]
            key = torch.where(rows[:, None, :, None], other_key, key)
            value = torch.where(rows[:, None, :, None], other_value, value)
        shown = run.real & (sources != NOTHING)
        causal = torch.ones(columns, columns, dtype=torch.bool, device=key.device).tril()
        visible = (causal & shown[:, None, :])[:, None]
        if self.cells[layer].unimodal:
            is_image = run.token_classes == IMAGE
            visible = visible & (is_image[:, :, None] == is_image[:, None, :])[:, None]

        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        # The lowest finite number, not -inf: a row that sees nothing (a pad) must stay finite.
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
        wide = torch.promote_types(scores.dtype, torch.float32)
        weights = scores.softmax(dim=-1, dtype=wide).to(value.dtype)
        self.attentions[layer] = weights
        return (weights @ value).transpose(1, 2).contiguous(), None


class _Run(NamedTuple):
    """The state of one run of the model."""

    token_classes: Tensor
    real: Tensor
    entries: dict[int, tuple[Tensor, Tensor]]
    sources: list[Tensor]
