"""Steps at fixed addresses: buckets, growth, what makes them stale, and what they may not touch."""

import copy
import dataclasses
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

import fastskip
from fastskip.decoder.fused.paged_cache import PagedCache
from fastskip.decoder.fused.parts import Stream
from fastskip.decoder.fused.stack import FusedDecoder
from fastskip.decoder.fused.step_state import StepState
from fastskip.decoder.fused.steps import run_steps
from fastskip.generation.cache_name import CACHE_NAME
from fastskip.generation.device_loop import GreedyEnd, StepLogits, decode_greedily
from fastskip.generation.device_step import KEPT, DeviceStep, StepRequest, bucket
from fastskip.generation.runtime import Runtime
from fastskip.kernels import overlap
from fastskip.ops.contracts import PAGE
from fastskip.ops.overlap import Overlap
from fastskip.ops.ranges import ranges
from fastskip.verification.cells import GENERATED
from tests.agreement import Trio, generate, greedy
from tests.batches import Batch, random_batch
from tests.continuing import CACHE_POLICIES, Continued, some_tokens
from tests.device.conftest import IMPL
from tests.models import tiny_llama, tiny_llava

NEW = 6


@pytest.fixture(scope="module")
def trio() -> Trio:
    return Trio(tiny_llava(), IMPL)


@pytest.fixture(scope="module")
def batch(trio: Trio) -> Batch:
    """Three sequences, which run in a bucket of four."""
    return random_batch(trio.plain, seed=1, images=(2, 0, 1))


@pytest.fixture
def model() -> Any:
    """One that a test may spoil."""
    return fastskip.apply_(tiny_llava(), CACHE_POLICIES["mixed"], impl=IMPL)


def runtime_of(model: Any) -> Runtime:
    runtime: Runtime = model._fastskip
    return runtime


def fill(model: Any, batch: Batch) -> PagedCache:
    with torch.no_grad():
        cache = model(**batch.inputs(), use_cache=True, logits_to_keep=1)[CACHE_NAME]
    assert isinstance(cache, PagedCache)
    return cache


def take(model: Any, cache: PagedCache, columns: int = 1, **options: Any) -> DeviceStep:
    runtime = runtime_of(model)
    runtime.decoder.refresh(wants_gradient=False)
    asked = StepRequest(model, runtime.fused_decoder, cache, columns, chooses=True, **options)
    return runtime.steps.take(asked)


def kept(model: Any) -> list[DeviceStep]:
    """The steps that are ready to run."""
    return list(runtime_of(model).steps._steps.values())


@torch.no_grad()
def decode(model: Any, cache: PagedCache, tokens: Tensor) -> Tensor:
    """Logits after each of ``tokens [B, n]``, a step each; no step writes to those before."""
    step = StepLogits(model, runtime_of(model), cache)
    return torch.stack([step(column) for column in tokens.T], dim=1)


def test_buckets() -> None:
    expected = {1: 1, 2: 2, 3: 4, 5: 8, 64: 64, 65: 128, 128: 128, 129: 192}
    assert {count: bucket(count) for count in expected} == expected


def bits(cache: PagedCache) -> list[Tensor]:
    """Copies of all slabs as integers, since what nobody has written is NaN."""
    return [slab.view(torch.int32).clone() for pool in cache.pools.values() for slab in pool.slabs]


def allow(cache: PagedCache, changed: list[Tensor], start: list[dict[Any, int]]) -> None:
    """Marks what the sequences' new entries may change: those since ``start``."""
    numbers = iter(changed)
    for pool, counts, now in zip(
        cache.pools.values(),
        start,
        map(cache._most, cache.pools),
        strict=True,
    ):
        slabs = [next(numbers) for _ in pool.slabs]
        pages = [
            slab.view(-1, len(pool.layers), 2, pool.groups, PAGE, pool.head_dim) for slab in slabs
        ]
        for sequence, places in enumerate(pool._pages):
            for slot in range(counts[sequence], now[sequence]):
                slab, page = places[slot // PAGE]
                pages[slab][page, :, :, :, slot % PAGE] = False


@pytest.mark.parametrize("name", CACHE_POLICIES)
def test_steps_write_new_entries_and_nothing_else(trio: Trio, batch: Batch, name: str) -> None:
    """Three sequences in a bucket of four: the idle one has no place in a cache."""
    case = Continued(trio, CACHE_POLICIES[name], batch)
    model, cache = case.model, fill(case.model, batch)
    cache.make_room_for_steps(0, 70)
    before = bits(cache)
    start = [dict(enumerate(cache._most(pool))) for pool in cache.pools]
    tokens = some_tokens(batch, 70)
    logits = decode(model, cache, tokens)
    case.check(logits, tokens, GENERATED)
    (step,) = kept(model)
    assert step.state.shape.batch == 4
    changed = [now != then for now, then in zip(bits(cache), before, strict=True)]
    allow(cache, changed, start)
    assert not any(bool(each.any()) for each in changed)
    idle = [pool.slabs[0] for pool in step.state._idle.values()]
    assert all(bool(slab.isfinite().all()) for slab in idle)


@pytest.mark.parametrize("images", [(1,), (0, 1), (1, 0, 1, 0, 2)])
def test_batches_of_other_buckets(trio: Trio, images: tuple[int, ...]) -> None:
    batch = random_batch(trio.plain, seed=2, images=images)
    case = Continued(trio, CACHE_POLICIES["mixed"], batch)
    model, tokens = case.model, some_tokens(batch, 3)
    case.check(decode(model, fill(model, batch), tokens), tokens, GENERATED)
    assert kept(model)[0].state.shape.batch == bucket(len(images))


@pytest.mark.parametrize("name", ["dense", "mixed", "omit generated"])
def test_slots_are_outgrown(trio: Trio, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pages are full in the middle: the cache grows, and a larger step takes over."""
    monkeypatch.setattr("fastskip.generation.device_step.SLOTS", 2 * PAGE)
    long = random_batch(trio.plain, seed=3, images=(1, 0), text=(2 * PAGE - 10, 2 * PAGE - 8))
    case = Continued(trio, CACHE_POLICIES[name], long)
    model, cache = case.model, fill(case.model, long)
    tokens = some_tokens(long, 16)
    logits = decode(model, cache, tokens)
    case.check(logits, tokens, GENERATED)
    assert cache.columns > 2 * PAGE
    assert [step.state.shape.slots for step in kept(model)] == [2 * PAGE, 4 * PAGE]


@pytest.mark.parametrize("name", ["dense", "mixed", "pair"])
def test_growth_while_decoding_ahead(trio: Trio, name: str) -> None:
    """Nothing was reserved, so pages come while steps are under way."""
    small = random_batch(trio.plain, seed=3, images=(1, 0), text=(PAGE - 8, PAGE - 4))
    policy = CACHE_POLICIES[name]
    expected = greedy(trio.plain, policy, small, 12)
    model = trio.under(policy)
    with torch.no_grad():
        outputs = model(**small.inputs(), use_cache=True, logits_to_keep=1)
        cache = outputs[CACHE_NAME]
        slabs = [list(pool.slabs) for pool in cache.pools.values()]
        ids = decode_greedily(
            model,
            runtime_of(model),
            cache,
            small.input_ids,
            outputs.logits[:, -1],
            GreedyEnd(small.columns + 12, ()),
            pad=0,
            streamer=None,
        )
    assert torch.equal(ids[:, small.columns :], expected)
    assert cache.columns == small.columns + 11
    grown = [pool.slabs for pool in cache.pools.values()]
    assert any(len(now) > len(then) for now, then in zip(grown, slabs, strict=True))
    for now, then in zip(grown, slabs, strict=True):
        assert all(a is b for a, b in zip(now, then, strict=False))


def test_two_caches_take_turns_on_one_step(trio: Trio, batch: Batch) -> None:
    policy = CACHE_POLICIES["mixed"]
    other = random_batch(trio.plain, seed=8, images=(0, 1, 1), text=(9, 12))
    model = trio.under(policy)
    expected = [generate(model, one, 9) for one in (batch, other)]
    # The same conversations by the plain runtime, each alone.
    plain = fastskip.apply_(copy.deepcopy(trio.plain), policy, impl="reference")
    assert all(
        torch.equal(generate(plain, one, 9), said)
        for one, said in zip((batch, other), expected, strict=True)
    )
    said: list[list[Tensor]] = [[], []]
    caches: list[Any] = [None, None]
    masks = [one.attention_mask for one in (batch, other)]
    ids = [one.input_ids for one in (batch, other)]
    for _ in range(3):
        for number, one in enumerate((batch, other)):
            inputs = one.inputs() if caches[number] is None else {}
            out = model.generate(
                **{**inputs, "input_ids": ids[number], "attention_mask": masks[number]},
                **{CACHE_NAME: caches[number]},
                max_new_tokens=3,
                return_dict_in_generate=True,
            )
            caches[number] = out[CACHE_NAME]
            said[number].append(out.sequences[:, ids[number].shape[1] :])
            more = out.sequences.shape[1] - masks[number].shape[1]
            ones = torch.ones(3, more, dtype=torch.long)
            ids[number], masks[number] = out.sequences, torch.cat((masks[number], ones), dim=1)
    assert len({step.state.shape for step in kept(model)}) == len(kept(model)) == 1
    for number in range(2):
        assert torch.equal(torch.cat(said[number], dim=1)[:, :3], expected[number][:, :3])
        assert_goes_on(plain, (batch, other)[number], said[number])


def assert_goes_on(plain: Any, batch: Batch, turns: list[Tensor]) -> None:
    """The turns are those of a cache that the plain runtime keeps."""
    ids, mask, cache, inputs = batch.input_ids, batch.attention_mask, None, batch.inputs()
    for turn in turns:
        out = plain.generate(
            **{**inputs, "input_ids": ids, "attention_mask": mask},
            **{CACHE_NAME: cache},
            max_new_tokens=3,
            return_dict_in_generate=True,
        )
        assert torch.equal(out.sequences[:, ids.shape[1] :], turn)
        mask = torch.cat((mask, torch.ones(3, 3, dtype=torch.long)), dim=1)
        ids, cache, inputs = out.sequences, out[CACHE_NAME], {}


def tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """All tensors that are reached from ``value``, but not a cache's slabs."""
    if id(value) in seen or callable(value):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            if field.name != "slabs":
                yield from tensors(getattr(value, field.name), seen)
    elif isinstance(value, dict):
        for inner in value.values():
            yield from tensors(inner, seen)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from tensors(inner, seen)


def addresses(state: StepState) -> list[int]:
    held = {key: value for key, value in vars(state).items() if key not in ("_slabs", "plan")}
    held["_idle"] = [pool.slabs for pool in state._idle.values()]
    return [tensor.data_ptr() for tensor in tensors(held, set())]


def test_addresses_stay(trio: Trio, batch: Batch) -> None:
    model = trio.under(CACHE_POLICIES["mixed"])
    other = random_batch(trio.plain, seed=8, images=(0, 1, 1))
    seen = []
    for one, new in ((batch, 3), (other, 9), (batch, 50), (other, 2)):
        generate(model, one, new, eos_token_id=[1])
        (step,) = kept(model)
        seen.append((step, addresses(step.state)))
    assert len(seen[0][1]) > 20
    assert all(each == seen[0] for each in seen)


def replace_norm(model: Any) -> None:
    norm = model.model.language_model.norm
    norm.weight = nn.Parameter(norm.weight.detach() * 2)


def replace_layer_norm(model: Any) -> None:
    norm = model.model.language_model.layers[1].input_layernorm
    norm.weight = nn.Parameter(norm.weight.detach().flip(0))


def give_other_data(model: Any) -> None:
    weight = model.model.language_model.layers[3].mlp.down_proj.weight
    weight.data = weight.data * 1.5


def replace_head(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().flip(0))


def replace_embedding(model: Any) -> None:
    table = model.get_input_embeddings()
    table.weight = nn.Parameter(table.weight.detach().flip(1))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "there and back": lambda model: model.to(torch.float64).to(torch.float32),
    "another policy": lambda model: fastskip.set_policy(model, CACHE_POLICIES["pair"]),
    "final norm": replace_norm,
    "layer norm": replace_layer_norm,
    "data of a projection": give_other_data,
    "head": replace_head,
    "embedding": replace_embedding,
    "hook on the head": lambda m: m.lm_head.register_forward_hook(lambda _m, _i, out: -out),
    "hook on the embedding": lambda m: m.get_input_embeddings().register_forward_hook(
        lambda _m, _i, out: out.flip(-1)
    ),
    "hook on the final norm": lambda m: m.get_decoder().norm.register_forward_hook(
        lambda _m, _i, out: out.flip(-1)
    ),
    "training": lambda model: model.train(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_stale_steps_are_thrown_away(
    model: Any, batch: Batch, change: Callable[[Any], Any]
) -> None:
    """A graph has addresses baked in, and what hooks did once."""
    plain = fastskip.apply_(tiny_llava(), CACHE_POLICIES["mixed"], impl="reference")
    before = generate(model, batch, NEW)
    assert torch.equal(before, generate(plain, batch, NEW))
    (old,) = kept(model)
    for each in (model, plain):
        change(each)
    after = generate(model, batch, NEW)
    assert torch.equal(after, generate(plain, batch, NEW))
    is_same = change in (CHANGES["training"],)
    assert (kept(model) == [old]) == is_same
    # And back to graphs, which stay.
    steps = kept(model)
    assert torch.equal(after, generate(model, batch, NEW))
    assert kept(model) == steps


@pytest.mark.parametrize("do_sample", [False, True])
def test_hooks_around_the_layers_run_in_every_step(
    model: Any, batch: Batch, launches: list[DeviceStep], do_sample: bool
) -> None:
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    model.generate(**batch.inputs(), max_new_tokens=NEW, do_sample=do_sample)
    # The prompt's is one of them; ahead of the host no more than needed are launched.
    assert len(calls) == NEW and not launches


def test_attention_dropout_leaves_the_fused_operations(batch: Batch) -> None:
    model = fastskip.apply_(tiny_llava(), impl=IMPL)
    decoder = runtime_of(model).fused_decoder
    for layer in model.get_decoder().layers:
        layer.self_attn.attention_dropout = 0.5
    for is_training in (False, True, False):
        model.train(is_training)
        with torch.no_grad():
            drawn = [model(**batch.inputs()).logits for _ in range(2)]
        assert decoder.is_fused == (not is_training) == torch.equal(*drawn)


def test_only_so_many_steps_are_kept(trio: Trio, batch: Batch) -> None:
    model = trio.under(CACHE_POLICIES["mixed"])
    cache = fill(model, batch)
    first, *others = [take(model, cache, pad=pad) for pad in range(KEPT)]
    assert take(model, cache, pad=0) is first and kept(model) == [*others, first]
    newest = take(model, cache, pad=KEPT)
    assert kept(model) == [*others[1:], first, newest] and len(kept(model)) == KEPT
    assert take(model, cache, pad=1) is not others[0]


def test_stops_of_any_number(trio: Trio, batch: Batch) -> None:
    model = trio.under(CACHE_POLICIES["dense"])
    cache = fill(model, batch)
    steps = [take(model, cache, stops=count) for count in (0, 1, 2, 3, 4)]
    assert [step.state.shape.stops for step in steps] == [0, 1, 2, 4, 4]
    assert steps[3] is steps[4]


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_of_a_model_that_has_steps(way: str) -> None:
    # Hugging Face's vision towers carry hooks of their own after a call, which no pickle takes.
    model: Any = fastskip.apply_(tiny_llama(), CACHE_POLICIES["omit generated"], impl=IMPL)
    batch = random_batch(model, images=(0, 0, 0))
    expected = generate(model, batch, NEW)
    steps = kept(model)
    copied = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert kept(copied) == [] and kept(model) == steps != []
    assert torch.equal(generate(copied, batch, NEW), expected)
    assert kept(model) == steps
    with torch.no_grad():
        copied.lm_head.weight.neg_()
    assert not torch.equal(generate(copied, batch, NEW), expected)
    assert torch.equal(generate(model, batch, NEW), expected)
    assert kept(model) == steps


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_call_inside_a_call(trio: Trio, batch: Batch, do_sample: bool) -> None:
    """A processor or a streamer may ask the same model something."""
    model = trio.under(CACHE_POLICIES["mixed"])
    other = random_batch(trio.plain, seed=8, images=(0, 1, 1))
    answer = generate(model, other, 4)
    options = {"do_sample": do_sample, "max_new_tokens": NEW, "top_k": 0}
    torch.manual_seed(2)
    expected = model.generate(**batch.inputs(), **options)

    class Asks(LogitsProcessor):
        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            assert torch.equal(generate(model, other, 4), answer)
            return scores

        def put(self, tokens: Tensor) -> None:
            assert torch.equal(generate(model, other, 4), answer)

        def end(self) -> None:
            pass

    for asking in ({"logits_processor": LogitsProcessorList([Asks()])}, {"streamer": Asks()}):
        torch.manual_seed(2)
        assert torch.equal(model.generate(**batch.inputs(), **options, **asking), expected)


@pytest.mark.parametrize("do_sample", [False, True])
def test_steps_let_go_of_a_cache(trio: Trio, batch: Batch, do_sample: bool) -> None:
    """Else eight steps would keep the memory of eight caches."""
    model = trio.under(CACHE_POLICIES["mixed"])
    out = model.generate(
        **batch.inputs(), max_new_tokens=3, do_sample=do_sample, return_dict_in_generate=True
    )
    pools = out[CACHE_NAME].pools.values()
    slabs = [weakref.ref(slab) for pool in pools for slab in pool.slabs]
    assert slabs and all(ref() is not None for ref in slabs)
    del out, pools
    gc.collect()
    assert all(ref() is None for ref in slabs)
    assert len(kept(model)) == 1


@pytest.mark.parametrize("do_sample", [False, True])
def test_inference_mode_now_and_then(trio: Trio, batch: Batch, do_sample: bool) -> None:
    """Buffers made in one call are written in the next, whatever mode that one is in."""
    model = trio.under(CACHE_POLICIES["mixed"])
    options = {**batch.inputs(), "do_sample": do_sample, "max_new_tokens": NEW}
    said = []
    for is_on in (True, False, True):
        torch.manual_seed(0)
        with torch.inference_mode(is_on):
            said.append(model.generate(**options))
    assert all(torch.equal(each, said[0]) for each in said)
    assert len(kept(model)) == 1


@pytest.mark.parametrize("do_sample", [False, True])
def test_named_ranges_now_and_then(
    trio: Trio, batch: Batch, launches: list[DeviceStep], do_sample: bool
) -> None:
    """Steps then run kernel by kernel, and leave their results where graphs leave them."""
    model = trio.under(CACHE_POLICIES["mixed"])
    options = {**batch.inputs(), "do_sample": do_sample, "max_new_tokens": NEW}
    said = []
    for context in (nullcontext(), ranges(), nullcontext()):
        torch.manual_seed(0)
        with context:
            said.append(model.generate(**options))
    assert all(torch.equal(each, said[0]) for each in said)
    assert len(kept(model)) == 1 and len(launches) == 2 * (NEW - 1)


@pytest.mark.parametrize("do_sample", [False, True])
def test_positions_ahead_of_columns(batch: Batch, do_sample: bool) -> None:
    """A caller's position ids may lie beyond every table made for lengths."""
    stock: Any = tiny_llama()
    ours = fastskip.apply_(copy.deepcopy(stock), impl=IMPL)
    inputs = random_batch(stock, seed=1, images=(0, 0), text=(5, 5)).inputs()
    said = []
    for model in (ours, stock):
        torch.manual_seed(0)
        position_ids = torch.arange(5)[None].expand(2, -1) + 1017  # the tables end at 1024
        said.append(
            model.generate(
                **inputs, position_ids=position_ids, do_sample=do_sample, max_new_tokens=NEW
            )
        )
    assert torch.equal(*said)


def test_overlapping_is_for_steps_alone(
    trio: Trio, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the device can, all launches of a step see it, and nothing else does."""
    steps = runtime_of(trio.prepared).steps
    plain = generate(trio.prepared, batch, NEW)
    seen = []
    whole = FusedDecoder.run

    def run(*arguments: Any, **options: Any) -> Any:
        seen.append(("prompt", _overlap()))
        return whole(*arguments, **options)

    def layers(*arguments: Any, **options: Any) -> Stream:
        seen.append(("step", _overlap()))
        return run_steps(*arguments, **options)

    monkeypatch.setattr(FusedDecoder, "run", run)
    monkeypatch.setattr("fastskip.generation.device_step.run_steps", layers)
    for can, how in ((False, Overlap.NONE), (True, Overlap.START)):
        monkeypatch.setattr(
            "fastskip.generation.device_step.can_overlap", lambda device, can=can: can
        )
        seen.clear()
        assert torch.equal(generate(trio.prepared, batch, NEW), plain)
        assert set(seen) == {("prompt", Overlap.NONE), ("step", how)}
    for how in (Overlap.NONE, Overlap.READ):
        steps.overlap = how
        try:
            seen.clear()
            generate(trio.prepared, batch, NEW)
            assert copy.deepcopy(steps).overlap is how
        finally:
            steps.overlap = Overlap.START
        assert set(seen) == {("prompt", Overlap.NONE), ("step", how)}
    assert _overlap() is Overlap.NONE


def _overlap() -> Overlap:
    """What launches are told at this moment."""
    ways = (Overlap.NONE, Overlap.START, Overlap.READ)
    return ways[sum(overlap._modes.get())]
