"""The papers' routers: what they decide, for each sequence of a batch, and that it is what ran."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import fastskip
from fastskip.families import text_model_of
from fastskip.policy import PolicyError, SkipPolicy, Sublayer, TokenClass
from fastskip.routing.paper import RandomInterval
from tests.agreement import Trio
from tests.batches import Batch, random_batch
from tests.models import tiny_llava
from tests.routing.routed import check_forward, check_generate

pytestmark = pytest.mark.reference

DEPTH = 6
SKIPS = ("block", "ffn", "attention")


@pytest.fixture(scope="module")
def trio() -> Trio:
    return Trio(tiny_llava(depth=DEPTH, seed=4))


@pytest.fixture(scope="module", params=["left", "right"])
def batch(trio: Trio, request: pytest.FixtureRequest) -> Batch:
    return random_batch(trio.plain, 7, images=(1, 0, 2), text=(3, 7), padding=request.param)


@pytest.fixture(scope="module")
def padded(trio: Trio) -> Batch:
    """Padded on the left, as `generate` wants it."""
    return random_batch(trio.plain, 8, images=(1, 0, 2), text=(3, 7), padding="left")


def dictionary(name: str, **options: Any) -> dict[str, Any]:
    return SkipPolicy.preset(f"paper/{name}", **options).to_dict()


@torch.no_grad()
def run(trio: Trio, policy: dict[str, Any], batch: Batch) -> tuple[Any, tuple[Tensor, ...]]:
    """What was decided, and the residual stream that entered each layer."""
    model = trio.under(policy)
    with fastskip.record_routing(model) as record:
        out = model(**batch.inputs(), output_hidden_states=True)
    return record, out.hidden_states


def last_rows(batch: Batch, classes: set[int]) -> list[int | None]:
    """The last real column of each sequence that has one of these classes."""
    known = torch.isin(batch.token_classes, torch.tensor(sorted(classes))) & batch.real
    return [int(row.nonzero()[-1]) if row.any() else None for row in known]


@torch.no_grad()
def lens(trio: Trio, h: Tensor, normed: bool) -> Tensor:
    head = trio.prepared.get_output_embeddings()
    chances: Tensor = head(text_model_of(trio.prepared).norm(h) if normed else h).double()
    return chances.softmax(-1)


@pytest.mark.parametrize("semantics", ["clean", "reference"])
@pytest.mark.parametrize("scope", ["all", "image", "prompt"])
def test_entropy_by_sequence(trio: Trio, batch: Batch, scope: str, semantics: str) -> None:
    classes = {"all": {0, 1, 2}, "image": {0}, "prompt": {0, 1}}[scope]
    rows = last_rows(batch, classes)

    def entropies(h: Tensor) -> list[float | None]:
        found = []
        for sequence, row in enumerate(rows):
            p = None if row is None else lens(trio, h[sequence, row], semantics == "clean")
            found.append(None if p is None else -float((p * p.log()).sum()))
        return found

    _, stream = run(trio, dictionary("entropy", threshold=-1.0, scope=scope), batch)
    known = sorted(e for h in stream[1 : DEPTH - 1] for e in entropies(h) if e is not None)
    bar = (known[len(known) // 2] + known[len(known) // 2 - 1]) / 2
    policy = dictionary("entropy", threshold=bar, scope=scope, semantics=semantics)
    record, stream = run(trio, policy, batch)
    answers = set()
    for layer in range(1, DEPTH - 1):
        skipped = record.skipped(layer, Sublayer.FFN)
        for sequence, entropy in enumerate(entropies(stream[layer])):
            own = batch.real[sequence] & torch.isin(
                batch.token_classes[sequence], torch.tensor(sorted(classes))
            )
            expected = entropy is not None and entropy < bar
            assert torch.equal(skipped[sequence], own & expected)
            answers.add(expected)
    assert answers == {True, False}


def test_entropy_selects_multiples_too(trio: Trio, batch: Batch) -> None:
    record, _ = run(trio, dictionary("entropy", threshold=-1.0, interval=2), batch)
    for layer in range(1, DEPTH - 1):
        assert bool(record.skipped(layer, Sublayer.FFN)[batch.real].all()) == (layer % 2 == 0)


@pytest.mark.parametrize("start", [0, 2])
def test_token_index_by_sequence(trio: Trio, batch: Batch, start: int) -> None:
    policy = dictionary("token-index", interval=3, start=start)
    record, stream = run(trio, policy, batch)
    rows = last_rows(batch, {0, 1, 2})
    answers = set()
    for layer in range(start, DEPTH - 1):
        skipped = record.skipped(layer, Sublayer.ATTENTION)
        for sequence, row in enumerate(rows):
            assert row is not None
            tokens = [
                int(lens(trio, stream[n][sequence, row], True).argmax())
                for n in ((layer - 1, layer) if layer > start else (layer,))
            ]
            interval = 2 if len(tokens) == 2 and tokens[0] == tokens[1] else 3
            expected = layer > start and layer % interval == 0
            assert torch.equal(skipped[sequence], batch.real[sequence] & expected)
            answers.add((layer % 2 == 0, expected))
    assert {expected for _, expected in answers} == {True, False}


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("name", ["entropy", "token-index", "random"])
def test_what_was_decided_is_what_ran(
    trio: Trio, batch: Batch, padded: Batch, name: str, skip: str
) -> None:
    options: dict[str, Any] = {"threshold": 4.0} if name == "entropy" else {"interval": 3}
    policy = dictionary(name, skip=skip, **options)
    check_forward(trio, policy, batch)
    _, masks = check_generate(trio, policy, padded)
    assert masks


@pytest.mark.parametrize("name", ["entropy", "token-index", "exit"])
def test_alone_as_in_a_batch(trio: Trio, padded: Batch, name: str) -> None:
    options: dict[str, Any] = {"threshold": 4.0} if name == "entropy" else {}
    policy = dictionary(name, **options)
    tokens, _ = check_generate(trio, policy, padded)
    for index in range(padded.size):
        alone, _ = check_generate(trio, policy, padded.alone(index))
        assert torch.equal(alone[0], tokens[index])


@pytest.mark.parametrize("after", [-5, 0, DEPTH - 2])
def test_only_the_last_prompt_row_goes_on(trio: Trio, padded: Batch, after: int) -> None:
    policy = dictionary("exit", after=after)
    check_forward(trio, policy, padded)
    tokens, masks = check_generate(trio, policy, padded)
    first = after % DEPTH + 1
    lasts = last_rows(padded, {0, 1})
    for layer in range(DEPTH):
        gone = masks.get((layer, "attention"), torch.zeros(padded.size, 1).bool())
        for sequence, last in enumerate(lasts):
            expected = padded.real[sequence].clone()
            expected[last] = False
            own = gone[sequence, : padded.columns]
            assert torch.equal(own, expected) if layer >= first else not own.any()
            assert not gone[sequence, padded.columns :].any()
    # Nothing of them is kept.
    model = trio.under(policy)
    out = model(**padded.inputs(), use_cache=True)
    cache = out.past_key_values if "past_key_values" in out else out.cache
    assert cache.tables[cache.plan.layers[DEPTH - 1].table].counts == [1] * padded.size
    assert tokens.shape[1] == 4


def test_random_intervals_are_drawn_for_each_layer_and_forward(trio: Trio, batch: Batch) -> None:
    policy = dictionary("random", interval=4, seed=5)
    model = trio.under(policy)
    with torch.no_grad(), fastskip.record_routing(model) as record:
        for _ in range(3):
            model(**batch.inputs())
    router = RandomInterval(4, 5)
    patterns = []
    for number, forward in enumerate(record.forwards):
        pattern = []
        for layer in range(1, DEPTH - 1):
            skipped = forward.skipped[layer, Sublayer.FFN]
            expected = layer % router.draw(number, layer) == 0
            assert torch.equal(skipped, batch.real & expected)
            pattern.append(expected)
        patterns.append(tuple(pattern))
    assert len(set(patterns)) > 1
    # The same again after the policy is set anew.
    model = trio.under(policy)
    with torch.no_grad(), fastskip.record_routing(model) as again:
        model(**batch.inputs())
    for key, skipped in record.forwards[0].skipped.items():
        assert torch.equal(skipped, again.forwards[0].skipped[key])


def test_draws_are_uniform() -> None:
    router = RandomInterval(5, seed=1)
    drawn = [router.draw(forward, layer) for forward in range(500) for layer in range(8)]
    for interval in range(2, 6):
        # Five standard deviations of a share of 1/4 among 4000 draws.
        assert abs(drawn.count(interval) / len(drawn) - 0.25) < 5 * (0.25 * 0.75 / 4000) ** 0.5


def test_token_ratio_takes_a_share_of_the_image_rows(trio: Trio, batch: Batch) -> None:
    policy = dictionary("token-ratio-ffn", ratio=0.5, scope="image", start=1)
    masks = check_forward(trio, policy, batch)
    assert {key[1] for key in masks} == {"ffn"} and min(key[0] for key in masks) == 2
    is_image = batch.token_classes == list(TokenClass).index(TokenClass.IMAGE)
    assert not any((mask & ~is_image).any() for mask in masks.values())
    share = sum(int(m.sum()) for m in masks.values()) / (len(masks) * int(is_image.sum()))
    assert 0.2 < share < 0.8


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("paper.entropy", {}, "threshold"),
    ("paper.entropy", {"threshold": "1"}, "threshold"),
    ("paper.entropy", {"threshold": 1, "interval": 0}, "interval"),
    ("paper.token-index", {"interval": 1}, "interval"),
    ("paper.random", {"interval": 2.0}, "interval"),
    ("paper.random", {"interval": 3, "seed": -1}, "seed"),
    ("paper.exit", {"after": 2}, "after"),
]


@pytest.mark.parametrize(("kind", "options", "field"), WRONG)
def test_wrong_options_are_named(
    trio: Trio, kind: str, options: dict[str, Any], field: str
) -> None:
    rule = {"layers": "1:3", "skip": ["block"], "kind": kind, "options": options}
    policy = {"schema_version": 1, "rules": [], "routers": [rule]}
    with pytest.raises(PolicyError) as caught:
        fastskip.apply_(copy.deepcopy(trio.plain), policy)
    assert caught.value.field == f"routers[0].options.{field}"
