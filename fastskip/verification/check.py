"""Does a policy, run by fastskip on this very input, compute what it means?

The runtime is compared with the masked dense computation, which shares no code with it. The
allowed error is measured: that of plain Hugging Face code in the tested dtype, against a truth in a
higher precision.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from fastskip.families import (
    UnsupportedModelError,
    final_norm_of,
    is_quantised,
    shape_of,
    text_model_of,
)
from fastskip.loading import apply_, record_routing
from fastskip.plan import SkipPlan, make_plan
from fastskip.policy import PolicyLike, SkipPolicy, TokenClass
from fastskip.routing import RoutingRecord
from fastskip.verification.budget import Budget, measure
from fastskip.verification.cells import (
    CLASS_NAMES,
    GENERATED,
    UncheckedPolicyError,
    classify_prompt,
)
from fastskip.verification.oracle import MaskedOracle, Prompt
from fastskip.wording import dtype_name

Decisions = Mapping[tuple[int, str], Tensor]


@dataclass(frozen=True, slots=True)
class Difference:
    """The first row that exceeds the budget, in the order of the computation.

    `column` counts the columns of the input, then new tokens. `budget` covers the whole layer.
    """

    layer: int
    sequence: int
    column: int
    token_class: str
    budget: Budget

    def __str__(self) -> str:
        return (
            f"output of layer {self.layer}, sequence {self.sequence}, column {self.column} "
            f"({self.token_class}); that layer's largest error is {self.budget.error:.3e}, "
            f"allowed {self.budget.allowed:.3e}"
        )


@dataclass(frozen=True, slots=True)
class WrongToken:
    """A greedy token that the masked dense computation would not have chosen.

    `gap`: how far its true score lies below the best one.
    """

    sequence: int
    step: int
    chosen: int
    expected: int
    gap: float

    def __str__(self) -> str:
        return (
            f"sequence {self.sequence}, new token {self.step}: {self.chosen} instead of "
            f"{self.expected}, whose score is higher by {self.gap:.3e}"
        )


@dataclass(frozen=True, slots=True)
class Report:
    """What `verify` found.

    `prompt` covers the logits of all prompt rows, `decoding` those from which the new tokens were
    chosen, with the cache. `first_difference` is only looked for if something is wrong.
    """

    policy: str
    dtype: str
    truth_dtype: str
    prompt: Budget
    decoding: Budget
    tokens_checked: int
    wrong_tokens: tuple[WrongToken, ...] = ()
    first_difference: Difference | None = None
    absent: tuple[str, ...] = ()
    """Classes that the policy also affects, but of which the input has no rows."""

    @property
    def holds(self) -> bool:
        """Whether the policy computed what it means, on this input."""
        return self.prompt.holds and self.decoding.holds and not self.wrong_tokens

    def __str__(self) -> str:
        def line(good: bool, text: object) -> str:
            return f"  {'ok   ' if good else 'WRONG'}  {text}"

        good = self.tokens_checked - len(self.wrong_tokens)
        verdict = "holds" if self.holds else "DOES NOT HOLD"
        lines = [
            f"policy {self.policy} {verdict} ({self.dtype}, truth in {self.truth_dtype})",
            line(self.prompt.holds, self.prompt),
            line(self.decoding.holds, self.decoding),
            line(not self.wrong_tokens, f"greedy tokens: {good} of {self.tokens_checked} agree"),
            *(f"         {wrong}" for wrong in self.wrong_tokens),
        ]
        lines += [f"  {name} rows: none in this input, so not checked" for name in self.absent]
        if self.first_difference is not None:
            lines.append(f"  first difference: {self.first_difference}")
        elif not self.holds:
            lines.append(
                "  one forward over prompt and new tokens shows no difference: the fault lies in "
                "the cache, the decode step, or the choice of rows whose logits are computed"
            )
        return "\n".join(lines)


@torch.no_grad()
def verify(
    model: PreTrainedModel,
    policy: PolicyLike | None,
    inputs: Mapping[str, Any],
    *,
    max_new_tokens: int = 16,
) -> Report:
    """Compares fastskip with the masked dense computation on one batch of prompts.

    Args:
        model: a plain Hugging Face model in evaluation mode. It is left unchanged: one copy of it
            is prepared, another computes the truth, so memory must suffice for both.
        policy: what to skip; `None` is dense.
        inputs: what the model's `generate` takes, as returned by a processor.
        max_new_tokens: how many greedy tokens to check; none of them ends a sequence.
    Raises:
        TypeError: `model` is already prepared.
        ValueError: `max_new_tokens` is less than 1.
        UnsupportedModelError: the model is quantised, so no copy of it can compute the truth.
        UncheckedPolicyError: the input has no rows that the policy affects, or the policy has no
            form as a masked dense computation.
    """
    _check_arguments(model, inputs, max_new_tokens)
    chosen = SkipPolicy() if policy is None else SkipPolicy.coerce(policy)
    inputs = _cast(inputs, model)
    real = inputs["attention_mask"].bool()

    product: Any = apply_(copy.deepcopy(model), chosen)
    # Not the product's own plan, which is under test.
    plan = make_plan(chosen, shape_of(model.config))
    absent = _absent(plan, model, inputs, real, max_new_tokens)
    logits, tokens, scores, decided = _run(product, inputs, real, max_new_tokens)
    eager = _expect(model, chosen, inputs, tokens, *decided)
    exact = copy.deepcopy(model).to(_truth_dtype(model))
    truth = _expect(exact, chosen, inputs, tokens, *decided)
    prompt = measure("prompt logits", logits[real], eager.logits[real], truth.logits[real])
    decoding = measure("logits of new tokens", scores, eager.scores, truth.scores)
    wrong = _wrong_tokens(tokens, truth.scores, decoding.allowed)
    first = None
    if wrong or not (prompt.holds and decoding.holds):
        with record_routing(product) as whole:
            states = _states(product, eager.prompt, tokens)
        if chosen.routers:
            again = decided[0], _decisions(whole, real.device)
            eager = _expect(model, chosen, inputs, tokens, *again)
            truth = _expect(exact, chosen, inputs, tokens, *again)
        first = _first_difference(states, eager, truth, real)
    return Report(
        policy=plan.name,
        dtype=dtype_name(model.dtype),
        truth_dtype=dtype_name(exact.dtype),
        prompt=prompt,
        decoding=decoding,
        tokens_checked=tokens.numel(),
        wrong_tokens=wrong,
        first_difference=first,
        absent=absent,
    )


def _check_arguments(
    model: PreTrainedModel, inputs: Mapping[str, Any], max_new_tokens: int
) -> None:
    if getattr(model, "_fastskip", None) is not None:
        raise TypeError("model: already prepared; needed: the plain Hugging Face model")
    if is_quantised(model.config):
        allowed = "plain weights, as model.dequantize() gives"
        raise UnsupportedModelError("quantization_config", "a quantised model", allowed)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: {max_new_tokens}; allowed: at least 1")
    if inputs.get("input_ids") is None:
        raise ValueError("inputs: no input_ids; allowed: what the processor returns for a prompt")


class _Found(NamedTuple):
    """Results of the product.

    `logits` of all prompt rows are from one forward; greedy `tokens`, and the `scores` that they
    were chosen by, from `generate`. `decided`: the decisions of both runs, as `_expect` takes them,
    since each is compared under its own.
    """

    logits: Tensor
    tokens: Tensor
    scores: Tensor
    decided: tuple[Decisions, Decisions]


def _run(product: Any, inputs: Mapping[str, Any], real: Tensor, max_new_tokens: int) -> _Found:
    # The checkpoint's own config may end sequences early, or sample.
    product.generation_config = GenerationConfig(pad_token_id=0)
    with record_routing(product) as forward:
        logits = product(**inputs).logits
    with record_routing(product) as steps:
        generated = product.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    tokens = generated.sequences[:, real.shape[1] :]
    scores = torch.stack(generated.logits, dim=1).to(logits.dtype)
    decided = (
        _decisions(forward, real.device),
        _padded_left(_decisions(steps, real.device), real, tokens),
    )
    return _Found(logits, tokens, scores, decided)


_NEEDED = {
    TokenClass.IMAGE: "an image",
    TokenClass.TEXT: "text",
    TokenClass.GENERATED: "two new tokens, as the last one is never fed back",
}
"""What an input needs to have rows of a class."""


def _absent(
    plan: SkipPlan,
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    real: Tensor,
    max_new_tokens: int,
) -> tuple[str, ...]:
    """Classes that the policy affects but the input has no rows of; raises if those are all."""
    codes = classify_prompt(inputs["input_ids"], model.config, inputs)[real].unique().tolist()
    there = {CLASS_NAMES[code] for code in codes} | ({"generated"} if max_new_tokens > 1 else set())
    absent = [c for c in TokenClass if c in plan.affected_classes and c not in there]
    if absent and len(absent) == len(plan.affected_classes):
        needed = " and ".join(_NEEDED[c] for c in absent)
        raise UncheckedPolicyError(
            f"policy {plan.name}: not checked, as it only affects {' and '.join(absent)} rows, "
            f"and this input has none; needed: {needed}"
        )
    return tuple(c.value for c in absent)


class _Expected(NamedTuple):
    """Results of the masked dense computation for the prompt and given new tokens.

    `logits` of all prompt rows and `scores` of the new tokens; `states` is the output of each
    layer (the last one's after the final norm) over `prompt` and new tokens, pads on the left.
    """

    logits: Tensor
    scores: Tensor
    states: list[Tensor]
    prompt: Prompt


def _expect(
    model: PreTrainedModel,
    policy: SkipPolicy,
    inputs: Mapping[str, Any],
    tokens: Tensor,
    prompt_decisions: Decisions,
    decisions: Decisions,
) -> _Expected:
    """`decisions`: for the left-padded prompt and the new tokens; `prompt_decisions`: for a forward
    over the prompt as given."""
    with MaskedOracle(model, policy.to_dict(), prompt_decisions) as oracle:
        logits = oracle.forward(**inputs)
        prompt = oracle.prompt(**inputs)
    with MaskedOracle(model, policy.to_dict(), decisions) as oracle:
        scores = oracle.continuation(prompt, tokens)[:, :-1]
        *states, last = oracle.stream
        return _Expected(
            logits, scores, [*states, final_norm_of(text_model_of(model))(last)], prompt
        )


def _decisions(record: RoutingRecord, device: torch.device) -> Decisions:
    """What routers let rows skip, in the oracle's form."""
    return {key: mask.to(device) for key, mask in record.all_skipped().items()}


def _padded_left(decisions: Decisions, real: Tensor, tokens: Tensor) -> Decisions:
    """Moves the prompt's pads to the left, and adds a column for the last token, never fed."""
    order = real.long().argsort(dim=1, stable=True)
    width = real.shape[1]
    found = {}
    for key, mask in decisions.items():
        last = mask.new_zeros(len(mask), width + tokens.shape[1] - mask.shape[1])
        found[key] = torch.cat((mask[:, :width].gather(1, order), mask[:, width:], last), dim=1)
    return found


def _states(product: Any, prompt: Prompt, tokens: Tensor) -> list[Tensor]:
    """The product's `states` of `_Expected`, from one forward without a cache."""
    text_model = text_model_of(product)
    outputs = text_model(
        **prompt.inputs_with(text_model.embed_tokens(tokens)),
        token_classes=_classes(prompt, tokens),
        output_hidden_states=True,
        use_cache=False,
    )
    return list(outputs.hidden_states[1:])


def _first_difference(
    states: list[Tensor], eager: _Expected, truth: _Expected, real: Tensor
) -> Difference | None:
    new = states[0].shape[1] - real.shape[1]
    # The columns of the left-padded prompt, as columns of the input.
    origin = real.long().argsort(dim=1, stable=True)
    rows = torch.cat([real.gather(1, origin), real.new_ones(len(real), new)], dim=1)
    for layer, (state, plain, exact) in enumerate(
        zip(states, eager.states, truth.states, strict=True)
    ):
        budget = measure(f"layer {layer}", state[rows], plain[rows], exact[rows])
        if budget.holds:
            continue
        error = (state.double() - exact.double()).abs().amax(dim=-1)
        # Negated, so that NaN counts as too large.
        sequence, column = (rows & ~(error <= budget.allowed)).nonzero()[0].tolist()
        prompt = real.shape[1]
        if column < prompt:
            code = int(truth.prompt.token_classes[sequence, column])
            column = int(origin[sequence, column])
        else:
            code = GENERATED
        return Difference(layer, sequence, column, CLASS_NAMES[code], budget)
    return None


def _wrong_tokens(tokens: Tensor, scores: Tensor, allowed: float) -> tuple[WrongToken, ...]:
    """Two scores may each be off by the allowance, so only a gap above twice that is wrong."""
    best, expected = scores.max(dim=-1)
    gap = best - scores.gather(2, tokens[..., None])[..., 0]
    return tuple(
        WrongToken(
            sequence,
            step,
            int(tokens[sequence, step]),
            int(expected[sequence, step]),
            float(gap[sequence, step]),
        )
        for sequence, step in (gap > 2 * allowed).nonzero().tolist()
    )


def _classes(prompt: Prompt, tokens: Tensor) -> Tensor:
    return torch.cat([prompt.token_classes, torch.full_like(tokens, GENERATED)], dim=1).cpu()


def _cast(inputs: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """The inputs on the model's device and in its dtype, with an attention mask."""
    cast: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            value = value.to(model.device)
            value = value.to(model.dtype) if value.is_floating_point() else value
        cast[name] = value
    if "attention_mask" not in cast:
        cast["attention_mask"] = torch.ones_like(cast["input_ids"])
    return cast


def _truth_dtype(model: PreTrainedModel) -> torch.dtype:
    """fp64 if the copy fits; else fp32, which is a truth for narrower dtypes only."""
    if model.dtype.itemsize >= torch.float32.itemsize:
        return torch.float64
    needed = sum(p.numel() for p in model.parameters()) * torch.float64.itemsize
    # The other half is for what the forward itself needs.
    return torch.float64 if needed < _free_bytes(model.device) / 2 else torch.float32


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:  # macOS does not report it, and can swap
        return torch.inf
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
