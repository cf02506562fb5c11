"""Routers of the user's own: what they see, how far they reach, and what is refused."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch

import fastskip
from fastskip import Decision, PolicyError, RouterError, RoutingContext, Scope, Sublayer
from fastskip.routing import ENTRY_POINTS
from fastskip.verification.oracle import MaskedOracle
from tests.agreement import Trio
from tests.batches import Batch, random_batch
from tests.models import tiny_llava
from tests.policies import KV, pair, parallel, skip
from tests.routing.routed import check_forward, check_generate, random, routed

pytestmark = pytest.mark.reference
NAME = "tests.own"


@dataclass
class Own:
    """Does what a function says, and remembers what it was asked."""

    answer: Callable[[RoutingContext], Any]
    uses_attention: bool = False
    needs_trace: bool = True
    seen: list[RoutingContext] = field(default_factory=list)

    def decide(self, context: RoutingContext) -> Any:
        self.seen.append(context)
        return self.answer(context)


def own(layers: Any, tokens: Any = "all", *skips: str, **fields: Any) -> dict[str, Any]:
    head = {"layers": layers, "tokens": tokens, "skip": list(skips) or ["block"], "kind": NAME}
    return head | fields


def nobody(context: RoutingContext) -> Decision:
    return Decision(torch.zeros(len(context.columns), dtype=torch.bool))


def every_third(context: RoutingContext) -> Decision:
    return Decision((context.positions + context.layer) % 3 == 0)


def exit_late(context: RoutingContext) -> Decision:
    """Every third row exits."""
    return Decision(context.positions % 3 == 1, Scope.REST)


@pytest.fixture(scope="module")
def trio() -> Trio:
    return Trio(tiny_llava())


@pytest.fixture(scope="module")
def batch(trio: Trio) -> Batch:
    return random_batch(trio.plain, images=(2, 0, 1), seed=5)


def run(trio: Trio, batch: Batch, policy: dict[str, Any], router: Any) -> Any:
    model = fastskip.set_policy(trio.prepared, policy, routers={NAME: router})
    with torch.no_grad():
        return model(**batch.inputs()).logits


@pytest.mark.parametrize("skips", ("block", "attention", "ffn"))
def test_decisions_are_obeyed(trio: Trio, batch: Batch, skips: str) -> None:
    policy = routed(own("1:", "all", skips))
    options: Any = {"routers": {NAME: Own(every_third)}}
    masks = check_forward(trio, policy, batch, **options)
    expected = (batch.real.long().cumsum(1) - 1 + 2) % 3 == 0
    key = (2, "attention" if skips == "attention" else "ffn")
    # Positions are columns in a plain forward, as in Hugging Face.
    columns = torch.arange(batch.columns).expand_as(expected)
    assert torch.equal(masks[key], ((columns + 2) % 3 == 0) & batch.real)
    check_generate(trio, policy, batch, **options)


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("first", (0, 1, 3))
def test_rows_exit(trio: Trio, batch: Batch, first: int, kv: str) -> None:
    policy = routed(own([first], ["text", "generated"], "block", kv=kv))
    options: Any = {"routers": {NAME: Own(exit_late)}}
    masks = check_forward(trio, policy, batch, **options)
    gone = masks[first, "ffn"]
    assert gone.any() and not gone[batch.real].all()
    for layer in range(first, 4):
        for sublayer in ("attention", "ffn"):
            assert torch.equal(masks[layer, sublayer], gone)
    check_generate(trio, policy, batch, **options)


@pytest.mark.parametrize(
    "policy",
    (
        routed(own([0], "all", "ffn"), arrangements=(pair([[1, 2]]),)),
        routed(own([1], "all", "ffn"), arrangements=(parallel(":"),)),
        routed(own([0]), random([2, 3], "all", "attention")),
        routed(own([1]), rules=[skip([2], ["image"], "block", kv="reuse")]),
    ),
    ids=("before a pair", "parallel", "before a router", "before a rule"),
)
def test_rows_exit_past_everything(trio: Trio, batch: Batch, policy: dict[str, Any]) -> None:
    options: Any = {"routers": {NAME: Own(exit_late)}}
    check_forward(trio, policy, batch, **options)
    check_generate(trio, policy, batch, **options)


def test_context_tells_what_stands_there(trio: Trio, batch: Batch) -> None:
    router = Own(nobody)
    run(trio, batch, routed(own([1, 2], ["image", "text"], "ffn")), router)
    assert [context.layer for context in router.seen] == [1, 2]
    for context in router.seen:
        assert context.skip == {Sublayer.FFN}
        count = int(batch.real.sum())
        assert context.hidden.shape == (count, 32)
        at = context.sequences, context.columns
        assert torch.equal(context.codes, batch.token_classes[at])
        assert batch.real[at].all() and len(torch.stack(at).unique(dim=1).T) == count
        assert torch.equal(context.positions, context.columns)


def test_hidden_is_what_enters_the_sublayer(trio: Trio, batch: Batch) -> None:
    """Against the oracle's residual stream: the layer's input, or that of its FFN."""
    inputs = {**batch.inputs(), "token_classes": batch.token_classes}
    with torch.no_grad(), MaskedOracle(trio.plain, routed()) as oracle:
        oracle.forward(**inputs)
        stream = [each.clone() for each in oracle.stream]
    found: dict[str, torch.Tensor] = {}

    def keep(context: RoutingContext) -> Decision:
        rows = torch.zeros(batch.size, batch.columns, 32)
        rows[context.sequences, context.columns] = context.hidden
        found["rows"], found["last"] = rows, context.last_layer.clone()
        found["at"] = context.sequences * batch.columns + context.columns
        return nobody(context)

    run(trio, batch, routed(own([2])), Own(keep))
    torch.testing.assert_close(found["rows"][batch.real], stream[1][batch.real])
    before, after = (each.flatten(0, 1)[found["at"]] for each in (stream[0], stream[1]))
    cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1)
    change = (after - before).norm(dim=-1) / before.norm(dim=-1)
    torch.testing.assert_close(found["last"], torch.stack((cosine, change), dim=1))
    layer = trio.plain.model.language_model.layers[2]
    run(trio, batch, routed(own([2], "all", "ffn")), Own(keep))
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        hook = layer.post_attention_layernorm.register_forward_pre_hook(
            lambda _, args: seen.append(args[0])
        )
        positions = torch.arange(batch.columns).expand(batch.size, -1)
        trio.plain(**batch.inputs(), position_ids=positions)
        hook.remove()
    torch.testing.assert_close(found["rows"][batch.real], seen[0][batch.real])


def test_logits_are_those_of_the_head(trio: Trio, batch: Batch) -> None:
    logits: list[torch.Tensor] = []

    def look(context: RoutingContext) -> Decision:
        logits.append(context.logits(torch.tensor([0, 2])))
        norm, head = trio.plain.model.language_model.norm, trio.plain.lm_head
        torch.testing.assert_close(logits[-1], head(norm(context.hidden[[0, 2]])))
        return nobody(context)

    run(trio, batch, routed(own([3])), Own(look))
    assert logits[0].shape == (2, 64)


def test_attention_is_that_of_the_layer_below(trio: Trio, batch: Batch) -> None:
    """Against Hugging Face's own attention weights."""
    eager = copy.deepcopy(trio.plain)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        positions = torch.arange(batch.columns).expand(batch.size, -1)
        theirs = eager(**batch.inputs(), output_attentions=True, position_ids=positions).attentions

    def look(context: RoutingContext) -> Decision:
        for row in (0, len(context.columns) - 1):
            sequence, column = int(context.sequences[row]), int(context.columns[row])
            ours = context.attention_of(row)
            assert ours.layer == 1
            expected = theirs[1][sequence, :, column, ours.columns]
            torch.testing.assert_close(ours.weights, expected)
            torch.testing.assert_close(ours.weights.sum(-1), torch.ones(4))
        return nobody(context)

    router = Own(look, uses_attention=True)
    run(trio, batch, routed(own([2])), router)
    assert router.seen


def test_attention_has_conditions(trio: Trio, batch: Batch) -> None:
    def look(context: RoutingContext) -> Decision:
        context.attention_of(0)
        return nobody(context)

    with pytest.raises(RouterError, match="uses_attention"):
        run(trio, batch, routed(own([2])), Own(look))
    with pytest.raises(RouterError, match="not attended in any layer"):
        run(trio, batch, routed(own([0])), Own(look, uses_attention=True))


def test_looking_back_has_a_condition(trio: Trio, batch: Batch) -> None:
    def look(context: RoutingContext) -> Decision:
        return Decision(context.last_layer[:, 0] > 2)

    router = Own(look)
    run(trio, batch, routed(own([2])), router)
    assert router.seen
    router.needs_trace = False
    with pytest.raises(RouterError, match=r"layer 2: last_layer needs .* needs_trace = True"):
        run(trio, batch, routed(own([2])), router)


def test_states_live_as_long_as_they_say(trio: Trio, batch: Batch) -> None:
    counts: list[tuple[int, int]] = []

    def count(context: RoutingContext) -> Decision:
        for state in (context.forward_state, context.generation_state):
            state["calls"] = state.get("calls", 0) + 1
        counts.append((context.forward_state["calls"], context.generation_state["calls"]))
        return nobody(context)

    model = fastskip.set_policy(trio.prepared, routed(own([1, 2])), routers={NAME: Own(count)})
    for _ in range(2):
        model.generate(**batch.inputs(), max_new_tokens=3, do_sample=False, eos_token_id=None)
        assert counts == [(1, 1), (2, 2), (1, 3), (2, 4), (1, 5), (2, 6)]
        counts.clear()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda _: None, "NoneType.*allowed: a Decision"),
        (lambda c: Decision(torch.zeros(len(c.columns))), r"float32.*allowed: bool"),
        (lambda c: Decision(torch.zeros(1, dtype=torch.bool)), r"bool \[1\].*allowed: bool \["),
        (lambda c: Decision(nobody(c).skip, cast(Any, "rest")), "scope is 'rest'"),
        (lambda c: Decision(nobody(c).skip, factor=cast(Any, [1.0])), r"factor is list.*\["),
        (lambda c: Decision(nobody(c).skip, factor=torch.ones(1)), r"factor is .*\[1\].*\["),
    ],
)
def test_answers_are_checked(
    trio: Trio, batch: Batch, answer: Callable[[RoutingContext], Any], message: str
) -> None:
    with pytest.raises(RouterError, match=f"{NAME}.*layer 1.*{message}"):
        run(trio, batch, routed(own([1])), Own(answer))


def test_an_error_inside_names_the_router(trio: Trio, batch: Batch) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        run(trio, batch, routed(own([2])), Own(lambda _: 1 / 0))
    assert caught.value.__notes__ == [f"raised by router '{NAME}' in layer 2"]


@pytest.mark.parametrize("tokens", ("all", ["text"]))
def test_hidden_states_changed_in_place_are_refused(trio: Trio, batch: Batch, tokens: Any) -> None:
    """Of all rows they are the residual stream itself, of some a copy; both are refused."""

    def change(context: RoutingContext) -> Decision:
        context.hidden.mul_(0.5)
        return nobody(context)

    message = f"router '{NAME}' in layer 1: changed context.hidden in place; allowed: a copy of it"
    for policy in (routed(own([1], tokens)), routed(own([1], tokens, "ffn"))):
        with pytest.raises(RouterError, match=message):
            run(trio, batch, policy, Own(change))


def test_what_else_is_changed_in_place_is_the_routers_own(trio: Trio, batch: Batch) -> None:
    def change(context: RoutingContext) -> Decision:
        answer = every_third(context)
        for name in ("codes", "sequences", "columns", "positions", "last_layer"):
            getattr(context, name).fill_(0)
        context.attention_of(0).columns.fill_(0)
        context.attention_of(0).weights.fill_(0)
        return answer

    policy = routed(own("1:", "all"))
    expected = run(trio, batch, policy, Own(every_third, uses_attention=True))
    assert torch.equal(run(trio, batch, policy, Own(change, uses_attention=True)), expected)


def test_names_must_be_known(trio: Trio) -> None:
    with pytest.raises(PolicyError, match=r"routers\[0\].kind: no plug-in 'tests.own'"):
        fastskip.set_policy(trio.prepared, routed(own([1])))
    with pytest.raises(PolicyError, match=r"\['tests.own'\].*allowed: the plug-ins"):
        fastskip.set_policy(trio.prepared, routed(), routers={NAME: Own(nobody)})
    with pytest.raises(PolicyError, match="without decide"):
        fastskip.set_policy(trio.prepared, routed(own([1])), routers={NAME: object()})  # type: ignore[dict-item]
    with pytest.raises(PolicyError, match="is the class Own; allowed: an instance of it"):
        fastskip.set_policy(trio.prepared, routed(own([1])), routers={NAME: cast(Any, Own)})
    with pytest.raises(PolicyError, match="options"):
        policy = routed(own([1], options={"a": 1}))
        fastskip.set_policy(trio.prepared, policy, routers={NAME: Own(nobody)})
    for given in (Own(nobody), [Own(nobody)]):
        with pytest.raises(PolicyError, match=r"routers: .*Own.*allowed: a dict of routers by"):
            fastskip.set_policy(trio.prepared, routed(own([1])), routers=cast(Any, given))


@dataclass
class Point:
    """An installed entry point; ``factory`` is what it loads, or the error of loading it."""

    factory: Any
    name: str = NAME

    def load(self) -> Any:
        if isinstance(self.factory, Exception):
            raise self.factory
        return self.factory


def install(monkeypatch: pytest.MonkeyPatch, factory: Any) -> None:
    def points(*, group: str) -> list[Point]:
        assert group == ENTRY_POINTS
        return [Point(factory)]

    monkeypatch.setattr("fastskip.routing.registry.entry_points", points)


def test_an_installed_plug_in_is_found(
    trio: Trio, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Mapping[str, Any]] = []

    def make(options: Mapping[str, Any]) -> Own:
        given.append(options)
        return Own(every_third)

    install(monkeypatch, make)
    check_forward(trio, routed(own([1], options={"k": [1]})), batch)
    assert given == [{"k": [1]}]


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (ModuleNotFoundError("No module named 'gone'"), r"kind: .*cannot be loaded \(Module.*gone"),
        (lambda options: Own(options["rate"]), r"options: .*failed \(KeyError: 'rate'\)"),
        (3, r"options: .*failed \(TypeError: 'int' object is not callable\)"),
        (lambda _: Own, "kind: .*is the class Own"),
    ],
    ids=("not importable", "misses an option", "no factory", "returns a class"),
)
def test_an_installed_plug_in_that_fails_is_named(
    trio: Trio, monkeypatch: pytest.MonkeyPatch, factory: Any, message: str
) -> None:
    install(monkeypatch, factory)
    with pytest.raises(PolicyError, match=rf"routers\[0\].{message}") as caught:
        fastskip.set_policy(trio.prepared, routed(own([1])))
    assert NAME in str(caught.value)
