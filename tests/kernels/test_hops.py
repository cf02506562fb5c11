"""Loops over layers: kernels find what the layer that is next has, and which one that is."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastskip.kernels import feed, hops, projection, residual, step_attention
from fastskip.kernels.launch import recording
from fastskip.ops import fused, fused_routes
from fastskip.ops.allocate import poisoned
from fastskip.ops.contracts import Activation, Pages, StepReach, Term
from fastskip.ops.hops import Field, HopLayer, Hops, can_hop
from fastskip.ops.routes import Agreement, Chosen, Group, Score, Terms, Trace
from tests.kernels.paging import fill_pages
from tests.kernels.sublayers import DTYPES, GUARDED_FORMS, FeedCase, Place, ProjectionCase, memory

WIDTH, HEADS, GROUPS, HEAD_DIM, INNER = 48, 4, 2, 16, 40
ROWS, DEPTH = 5, 4
LENGTHS = ((3, 64, 0), (65, 1, 130), (2, 70, 5), (64, 63, 1))
"""Entries of three sequences, layer by layer."""
SHARED = ProjectionCase(HEADS, GROUPS, HEAD_DIM, WIDTH, has_bias=True, leaves_all=False)
CENTRED = replace(SHARED, is_centred=True, has_rotation=False)


def layers_on(
    place: Place, terms: Sequence[Terms | None], case: ProjectionCase = SHARED, rows: int = ROWS
) -> list[HopLayer]:
    """Layers whose tensors all differ; their pages hold entries."""
    found: list[HopLayer] = []
    for number, own in enumerate(terms):
        made = case.build(min(rows, 3), place, seed=2 * number)
        assert made.pages is not None
        pages = fill_pages(_moved(made.pages, found), LENGTHS[number], seed=number)
        counts = place.integers(*LENGTHS[number])[:rows]
        targets = replace(made.targets, sequences=place.integers(0, 1, 2)[:rows], slots=counts)
        kind = Activation.RELU if case.is_centred else Activation.GATED_SILU
        seed = 100 * number
        found.append(
            HopLayer(
                projection=replace(made, pages=pages, targets=targets),
                reach=StepReach(counts, 1, 600, place.integers(*[0] * (3 * HEADS))),
                output=place.linear(WIDTH, HEADS * HEAD_DIM, seed=seed + 1, has_bias=True),
                feed=FeedCase(INNER, WIDTH, kind, True, case.is_centred).build(
                    place, seed=seed + 2
                ),
                down=place.linear(WIDTH, INNER, seed=seed + 3, has_bias=True),
                terms=own,
                home=None if own is None else place.integers(*[7] * rows),
            )
        )
    if case.is_centred:  # or what two norms have would lie at the same distances
        found[1::2] = [_with_shifts_elsewhere(own) for own in found[1::2]]
    if case.has_rotation:  # the same tables for all
        shared = found[0].projection.rotation
        found = [replace(own, projection=replace(own.projection, rotation=shared)) for own in found]
    return found


def _with_shifts_elsewhere(layer: HopLayer) -> HopLayer:
    own, part = layer.projection, layer.feed
    first, second = (
        replace(n, bias=n.bias.clone()) for n in (own.norm, part.norm) if n.bias is not None
    )
    return replace(layer, projection=replace(own, norm=first), feed=replace(part, norm=second))


def _moved(pages: Pages, before: Sequence[HopLayer]) -> Pages:
    """The same pages, counted from the anchor of the layers before."""
    if not before:
        return pages
    anchor = before[0].pages.anchor
    size = anchor.element_size()
    distance = (pages.anchor.data_ptr() - anchor.data_ptr()) // size
    return replace(pages, anchor=anchor, table=pages.table + distance)


def loop_over(
    layers: Sequence[HopLayer], place: Place, rows: int = ROWS, *, live: Sequence[int] = ()
) -> Hops:
    looks_back = any(
        own.terms is not None and own.terms.score in (Score.COSINE, Score.CHANGE) for own in layers
    )
    trace = None
    if looks_back:
        found = torch.rand(rows, 2, generator=torch.Generator().manual_seed(rows)) * 2 - 1
        trace = Trace(place.numbers(rows, WIDTH, seed=77), found.to(place.device))
    return Hops.over(
        layers,
        live=place.integers(*(live or [1] * rows)),
        positions=place.integers(*range(3, 3 + 2 * rows, 2)),
        sequences=place.integers(*[number % 3 for number in range(rows)]),
        trace=trace,
        arrivals=place.integers(0),
        scale=0.25,
    )


ALWAYS: tuple[Terms | None, ...] = (Terms(score=Score.RANDOM, bar=-0.5), *[None] * (DEPTH - 1))
RUNS = (1, 0, 1)
Launch = Callable[[HopLayer, Any], Tensor]


@pytest.mark.parametrize("case", (SHARED, CENTRED), ids=("RMS norms", "LayerNorms"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_by_distances_is_that_layer(
    dtype: torch.dtype, case: ProjectionCase, device: torch.device
) -> None:
    """To the bit, since the same kernels compute it."""
    place = Place(dtype, device)
    for number in range(DEPTH):
        ours, theirs = (layers_on(place, ALWAYS, case, 3) for _ in range(2))
        loop = loop_over(ours, place, 3)
        chosen = Chosen(place.integers(*RUNS))
        loop.runs.copy_(chosen.runs)
        loop.now.copy_(loop.table[number])
        h, first, own = place.numbers(3, WIDTH, seed=5), ours[0], theirs[number]
        now, running = loop.now, chosen.runs.bool()
        reach = [replace(each.reach, runs=chosen.runs) for each in (first, own)]

        def same(one: Tensor, other: Tensor, running: Tensor = running) -> None:
            assert torch.equal(one[running], other[running]) and not one[running].isnan().any()

        with poisoned():
            q = projection.project_append(h, [first.projection], chosen=chosen, now=now)[0]
            other = projection.project_append(h, [own.projection], chosen=chosen)[0]
            same(q, other)
            pages = [memory(each.pages) for each in (ours[number], own)]
            assert torch.equal(*(each.nan_to_num(9e4) for each in pages))
            mixed = step_attention.attend_step([q], reach[:1], [first.pages], 0.25, now=now)[0]
            same(mixed, step_attention.attend_step([q], reach[1:], [own.pages], 0.25)[0])
            mixed = mixed.nan_to_num()
            added = [h.clone(), h.clone()]
            term = Term(mixed, first.output)
            residual.add_terms_(added[0], [term], chosen=[chosen], loop=loop, field=Field.OUTPUT)
            residual.add_terms_(added[1], [Term(mixed, own.output)], chosen=[chosen])
            assert torch.equal(*added) and not torch.equal(added[0], h)
            fed = feed.feed(h, [first.feed], chosen=chosen, now=now)[0]
            same(fed, feed.feed(h, [own.feed], chosen=chosen)[0])
            fed = fed.nan_to_num()
            added = [h.clone(), h.clone()]
            residual.add_terms_(
                added[0], [Term(fed, first.down)], chosen=[chosen], loop=loop, field=Field.DOWN
            )
            residual.add_terms_(added[1], [Term(fed, own.down)], chosen=[chosen])
            assert torch.equal(*added) and not torch.equal(added[0], h)


@pytest.mark.parametrize(("config", "dtype"), GUARDED_FORMS)
def test_every_form_of_a_product_goes_by_distances(
    config: dict[str, int], dtype: torch.dtype, device: torch.device
) -> None:
    """A norm in a launch of its own, which would need its weights, becomes part of the product."""
    place = Place(dtype, device)
    layers = layers_on(place, ALWAYS, rows=3)
    loop = loop_over(layers, place, 3)
    loop.now.copy_(loop.table[2])
    chosen, h = Chosen(place.integers(1, 1, 1)), place.numbers(3, WIDTH, seed=5)
    plain = {**config, "NORM_APART": 0} if "NORM_APART" in config else config
    with recording() as account:
        fed = feed.feed(h, [layers[0].feed], chosen=chosen, now=loop.now, config=config)[0]
    assert [each.name for each in account.launches] == ["feed"]
    assert torch.equal(fed, feed.feed(h, [layers[2].feed], chosen=chosen, config=plain)[0])
    queries = projection.project_append(
        h, [layers[0].projection], chosen=chosen, now=loop.now, config=config
    )[0]
    own = projection.project_append(h, [layers[2].projection], chosen=chosen, config=plain)[0]
    assert torch.equal(queries, own)


def terms_for(score: Score, number: int, place: Place, **shared: Any) -> Terms:
    weight = None
    if score is Score.LINEAR:
        weight = place.numbers(WIDTH, seed=number, scale=WIDTH**-0.5).float()
    bars = {Score.COSINE: 0.8, Score.CHANGE: 0.8, Score.LINEAR: 0.4}
    bar = -0.7 if score is Score.RANDOM else bars[score] - 0.1 * number
    salt, bias = 12345 * number + (number % 2 << 31), 0.1 * number
    return Terms(score=score, bar=bar, weight=weight, bias=bias, salt=salt, **shared)


GROUPINGS = [(Group.ROW, Agreement.MEAN), *itertools.product(list(Group)[1:], Agreement)]


@pytest.mark.parametrize(("group", "agreement"), GROUPINGS)
@pytest.mark.parametrize("score", Score)
def test_the_next_layer(
    score: Score, group: Group, agreement: Agreement, device: torch.device
) -> None:
    """That of the torch form, on the rows that the update leaves; with all that it writes."""
    place = Place(torch.float32, device)
    shared = {"group": group, "agreement": agreement}
    terms = [
        None if number == 2 else terms_for(score, number, place, **shared)
        for number in range(DEPTH)
    ]
    found, seen = [], set()
    for start, live in itertools.product(range(-1, DEPTH), ((1,) * ROWS, (1, 0, 0, 1, 0))):
        h = place.numbers(ROWS, WIDTH, seed=31)
        sides = []
        for _ in range(2):
            loop = loop_over(_bare(place, terms), place, live=live)
            loop.now.copy_(loop.table[max(start, 0)])
            loop.runs.copy_(place.integers(0, 1, 0, 0, 1) * loop.live)
            home = loop.layers[0].home
            assert home is not None
            # Somebody runs the first layer, or nobody.
            home.copy_(loop.runs * (live[1]))
            sides.append(loop)
        ours, theirs = sides
        if start < 0:
            hops.begin_hops(h, ours)
            fused.begin_hops(h, theirs)
        else:
            x = place.numbers(ROWS, INNER, seed=8)
            residual.add_terms_(
                h,
                [Term(x, ours.layers[0].down)],
                chosen=[Chosen(ours.runs)],
                loop=ours,
                field=Field.DOWN,
                config={"BLOCK_M": 8, "BLOCK_N": 2, "BLOCK_E": 64, "STAGES": 1, "num_warps": 4},
            )
            fused_routes.land(h, theirs)
        assert not ours.arrivals.any()
        assert ours.runs.tolist() == theirs.runs.tolist()
        assert ours.now.tolist()[0] == theirs.now.tolist()[0]
        assert torch.equal(ours.now, ours.table[ours.now[0]])
        for own, other in zip(ours.layers, theirs.layers, strict=True):
            assert (own.home is None) is (other.home is None)
            if own.home is not None and other.home is not None:
                assert torch.equal(own.home, other.home)
        if ours.trace is not None and theirs.trace is not None:
            assert torch.equal(ours.trace.snapshot, theirs.trace.snapshot)
            torch.testing.assert_close(ours.trace.found, theirs.trace.found)
        found.append((start, int(ours.now[0]), ours.runs.tolist()))
        seen.add(int(ours.now[0]) - start)
    assert len(seen) > 1, "no layer was passed by"
    assert found[-1][2] == [0] * ROWS  # behind the last


def _bare(place: Place, terms: Sequence[Terms | None]) -> list[HopLayer]:
    """Layers of three rows, with decisions on five."""
    layers = layers_on(place, terms)
    return [
        own if own.home is None else replace(own, home=place.integers(*[7] * ROWS))
        for own in layers
    ]


def test_rows_that_are_not_numbers_run(device: torch.device) -> None:
    place = Place(torch.float32, device)
    terms = [replace(terms_for(Score.LINEAR, number, place), bar=-1e6) for number in range(DEPTH)]
    loop = loop_over(_bare(place, terms), place)
    assert loop.layers[0].home is not None
    loop.layers[0].home.zero_()
    h = place.numbers(ROWS, WIDTH, seed=31)
    h[3] = math.nan
    hops.begin_hops(h, loop)
    assert loop.runs.tolist() == [0, 0, 0, 1, 0] and int(loop.now[0]) == 1


def test_one_row_of_a_model_of_two_layers(device: torch.device) -> None:
    """A number 1 is no number to Triton."""
    place = Place(torch.bfloat16, device)
    terms = [terms_for(Score.RANDOM, number, place) for number in range(2)]
    for bar, expected in ((-2.0, 0), (0.5, 1)):
        own = [replace(each, bar=bar) for each in terms]
        loop = loop_over(layers_on(place, own, rows=1), place, 1)
        assert loop.layers[0].home is not None
        loop.layers[0].home.zero_()
        h = place.numbers(1, WIDTH, seed=31)
        hops.begin_hops(h, loop)
        assert loop.runs.tolist() == [expected] and int(loop.now[0]) == 1


def test_what_differs_too_much_does_not_hop(device: torch.device) -> None:
    place = Place(torch.float32, device)
    terms = [terms_for(Score.RANDOM, number, place) for number in range(DEPTH)]
    layers = layers_on(place, terms)
    last = layers[-1]
    apart = replace(last.pages, anchor=place.numbers(16, seed=1))
    assert can_hop(layers) and can_hop([layers[0], replace(last, terms=None)])
    others = (
        replace(last, down=place.linear(WIDTH, INNER, seed=1)),
        replace(last, output=place.linear(WIDTH, HEADS * HEAD_DIM + 8, seed=1, has_bias=True)),
        replace(last, feed=FeedCase(INNER, WIDTH, has_bias=False).build(place)),
        replace(last, terms=terms_for(Score.COSINE, 1, place)),
        replace(last, terms=replace(terms[-1], group=Group.BATCH)),
        replace(last, projection=replace(last.projection, head_dim=8)),
        replace(last, projection=replace(last.projection, pages=apart)),
    )
    for other in others:
        assert not can_hop([*layers[:-1], other])
    assert not can_hop([replace(layers[0], terms=None), *layers[1:]])
    few = [replace(own, terms=replace(own.terms, capacity=0.5)) for own in layers if own.terms]
    assert not can_hop(few)


def test_distances_that_would_split_loads_do_not_hop(device: torch.device) -> None:
    place = Place(torch.bfloat16, device)
    layers = layers_on(place, [terms_for(Score.RANDOM, number, place) for number in range(2)])
    down = layers[1].down
    room = torch.zeros(down.weight.numel() + 1, dtype=down.weight.dtype, device=device)
    for start, fits in ((0, True), (1, False)):
        weight = room[start : start + down.weight.numel()].view_as(down.weight)
        own = replace(layers[1], down=replace(down, weight=weight))
        assert can_hop([layers[0], own]) is fits


def test_too_many_rows(device: torch.device) -> None:
    place = Place(torch.float32, device)
    loop = loop_over(_bare(place, [terms_for(Score.RANDOM, 0, place)] * 2), place)
    with pytest.raises(ValueError, match="h: 65 rows; allowed: at most 64"):
        hops.begin_hops(torch.zeros(65, WIDTH, device=device), loop)
