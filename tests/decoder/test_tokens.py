"""Rows: packing and unpacking, slices for class sets, and the class of every column."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastskip.families import shape_of
from fastskip.generation.classes import classify
from fastskip.plan import make_plan
from fastskip.policy import SkipPolicy, TokenClass
from fastskip.tokens import CODES, PAD, Rows, TokenLayout, add, add_
from tests.models import tiny_llama, tiny_llava
from tests.policies import Policy, policy_of, skip
from tests.removals.removing import removal, removing

IMAGE, TEXT, GENERATED = TokenClass
GROUPINGS: tuple[tuple[frozenset[TokenClass], ...], ...] = (
    (frozenset(TokenClass),),
    (frozenset({IMAGE}), frozenset({TEXT, GENERATED})),
    (frozenset({IMAGE, GENERATED}), frozenset({TEXT})),
    (frozenset({IMAGE}), frozenset({TEXT}), frozenset({GENERATED})),
)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[TokenLayout, Tensor]:
    batch, width = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    column = st.sampled_from([PAD, *CODES.values()])
    codes = torch.tensor(
        draw(
            st.lists(
                st.lists(column, min_size=width, max_size=width), min_size=batch, max_size=batch
            )
        )
    )
    first = draw(st.integers(0, 4))
    positions = torch.arange(width).expand(batch, width) + 7 * torch.arange(batch)[:, None]
    groups = draw(st.sampled_from(GROUPINGS))
    return TokenLayout(codes, positions, first, groups), codes


def unions(layout: TokenLayout) -> list[frozenset[TokenClass]]:
    """Every class set that is a union of the layout's groups."""
    sets = [frozenset[TokenClass]()]
    for group in layout._groups:
        sets += [each | group for each in sets]
    return sets


def is_one_of(codes: Tensor, classes: frozenset[TokenClass]) -> Tensor:
    return torch.isin(codes, torch.tensor([CODES[each] for each in classes]))


@given(layouts())
def test_packing_keeps_every_real_column_once(drawn: tuple[TokenLayout, Tensor]) -> None:
    layout, codes = drawn
    batch, width = codes.shape
    real = codes != PAD
    numbers = torch.arange(batch * width).view(batch, width)
    packed = layout.pack(numbers[..., None])
    assert len(layout) == int(real.sum()) == len(packed)
    assert set(packed.flatten().tolist()) == set(numbers[real].tolist())
    unpacked = layout.unpack(packed)[..., 0]
    assert torch.equal(unpacked, torch.where(real, numbers, 0))
    where = packed[:, 0]
    assert torch.equal(layout.codes, codes.flatten()[where])
    assert torch.equal(layout.sequences, where // width)
    assert torch.equal(layout.columns, where % width + layout.first_column)
    assert torch.equal(layout.positions, where % width + 7 * (where // width))


@given(layouts())
def test_rows_of_class_sets(drawn: tuple[TokenLayout, Tensor]) -> None:
    layout, codes = drawn
    for classes in unions(layout):
        rows = layout.rows(classes)
        wanted = is_one_of(layout.codes, classes)
        assert torch.equal(rows.ids(torch.device("cpu")), wanted.nonzero().squeeze(1))
        assert rows.count == int(wanted.sum())
        assert layout.counts(classes) == is_one_of(codes, classes).sum(1).tolist()


@given(layouts())
def test_rows_of_one_group_are_a_slice(drawn: tuple[TokenLayout, Tensor]) -> None:
    """What makes skipping free of copies: a product on these rows reads a view."""
    layout, _ = drawn
    packed = torch.zeros(len(layout), 2)
    for group in (*layout._groups, frozenset(TokenClass)):
        taken = layout.rows(group).take(packed)
        assert isinstance(layout.rows(group).index, slice)
        assert taken.numel() == 0 or taken.untyped_storage().data_ptr() == packed.data_ptr()


@given(layouts())
def test_located_columns(drawn: tuple[TokenLayout, Tensor]) -> None:
    layout, codes = drawn
    flat = (codes.flatten() != PAD).nonzero().squeeze(1).flip(0)
    numbers = torch.arange(codes.numel()).view_as(codes)[..., None]
    assert torch.equal(layout.locate(flat).take(layout.pack(numbers))[:, 0], flat)


@given(layouts())
def test_a_step_is_one_row_a_sequence_in_order(drawn: tuple[TokenLayout, Tensor]) -> None:
    layout, codes = drawn
    if layout.is_step:
        assert codes.shape[1] == 1
        assert torch.equal(layout.sequences, torch.arange(layout.batch))


def test_a_step_of_several_classes_is_none() -> None:
    codes = torch.tensor([[CODES[GENERATED]], [CODES[TEXT]]])
    apart = TokenLayout(codes, torch.zeros(2, 1, dtype=torch.long), 5, GROUPINGS[3])
    assert not apart.is_step and apart.sequences.tolist() == [1, 0]
    assert TokenLayout(codes, torch.zeros(2, 1, dtype=torch.long), 5, GROUPINGS[1]).is_step


def test_advanced_is_the_layout_of_the_next_column() -> None:
    codes = torch.full((2, 1), CODES[GENERATED])
    here = TokenLayout(codes, torch.tensor([[4], [2]]), 6, GROUPINGS[1])
    after = TokenLayout(codes, torch.tensor([[5], [3]]), 7, GROUPINGS[1])
    stepped = here.advanced()
    for name in ("source", "source_positions", "positions", "columns", "sequences", "codes"):
        assert torch.equal(getattr(stepped, name), getattr(after, name)), name
    assert (stepped.first_column, stepped.is_step) == (7, True)
    assert here.first_column == 6 and here.positions.tolist() == [4, 2]


@pytest.mark.parametrize(
    "rows", [Rows(slice(1, 3), 2), Rows(torch.tensor([3, 0]), 2), Rows(slice(0, 4), 4)]
)
def test_both_forms_of_adding(rows: Rows) -> None:
    packed, change = torch.randn(4, 3), torch.randn(rows.count, 3)
    expected = packed.clone()
    expected[rows.index] += change
    before = packed.clone()
    assert torch.equal(add(packed, rows, change), expected)
    assert torch.equal(packed, before)
    assert add_(packed, rows, change) is packed
    assert torch.equal(packed, expected)


LLAVA, LLAMA = tiny_llava("llava_onevision"), tiny_llama()
APART = policy_of(skip([0], ["image"], "ffn"))
IDS = torch.tensor([[5, 63, 62, 7], [63, 8, 9, 63]])


def codes_of(
    policy: Policy = APART,
    *,
    text_only: bool = False,
    first_column: int = 0,
    prompt_columns: int | None = None,
    **inputs: Any,
) -> Tensor | None:
    config = (LLAMA if text_only else LLAVA).config
    plan = make_plan(SkipPolicy.from_dict(policy), shape_of(config))
    return classify(plan, config, inputs, first_column=first_column, prompt_columns=prompt_columns)


def names(codes: Tensor | None) -> list[str]:
    assert codes is not None
    return ["".join("itg"[code] for code in row) for row in codes.tolist()]


def test_placeholders_are_images_where_features_fill_them() -> None:
    assert names(codes_of(input_ids=IDS, pixel_values=torch.ones(1))) == ["tiit", "itti"]
    assert names(codes_of(input_ids=IDS, pixel_values_videos=torch.ones(1))) == ["tiit", "itti"]
    assert names(codes_of(input_ids=IDS)) == ["tttt", "tttt"]
    text = policy_of()
    assert names(codes_of(text, text_only=True, input_ids=IDS)) == ["tttt", "tttt"]


def test_columns_past_the_prompt_are_generated_whatever_their_id() -> None:
    inputs: dict[str, Any] = {"input_ids": IDS, "pixel_values": torch.ones(1)}
    assert names(codes_of(**inputs, prompt_columns=2)) == ["tigg", "itgg"]
    assert names(codes_of(**inputs, prompt_columns=9)) == ["tiit", "itti"]
    assert names(codes_of(**inputs, prompt_columns=9, first_column=8)) == ["tggg", "iggg"]
    assert names(codes_of(**inputs, prompt_columns=3, first_column=8)) == ["gggg", "gggg"]


def test_labelled_rows_are_generated_but_images_stay_images() -> None:
    labels = torch.tensor([[-100, -100, 62, 7], [-100, -100, 9, 63]])
    inputs: dict[str, Any] = {"input_ids": IDS, "labels": labels}
    assert names(codes_of(**inputs, pixel_values=torch.ones(1))) == ["tiig", "itgi"]
    assert names(codes_of(**inputs)) == ["ttgg", "ttgg"]
    # Inside generate the prompt has no answer in it.
    assert names(codes_of(**inputs, prompt_columns=4)) == ["tttt", "tttt"]


def test_embeddings_alone() -> None:
    embeddings = torch.zeros(2, 4, 8)
    alike = policy_of(skip([0], ["generated"], "ffn"))
    assert names(codes_of(alike, inputs_embeds=embeddings)) == ["tttt", "tttt"]
    labels = torch.tensor([[-100, -100, 1, 1], [-100, -100, -100, 1]])
    assert names(codes_of(alike, inputs_embeds=embeddings, labels=labels)) == ["ttgg", "tttg"]
    assert names(codes_of(policy_of(), text_only=True, inputs_embeds=embeddings))[0] == "tttt"
    assert codes_of(alike) is None
    with pytest.raises(TypeError, match="token_classes: needed with inputs_embeds"):
        codes_of(APART, inputs_embeds=embeddings)
    # Rows that are all generated leave nothing open.
    assert names(codes_of(APART, inputs_embeds=embeddings, prompt_columns=0))[0] == "gggg"


def test_embeddings_alone_where_image_rows_are_removed() -> None:
    """Without classes no row would be removed: a dense run that nobody asked for."""
    embeddings, policy = torch.zeros(2, 4, 8), removing(removal(1, "attention"))
    with pytest.raises(TypeError, match="token_classes: needed with inputs_embeds"):
        codes_of(policy, inputs_embeds=embeddings)
    given: Any = {"inputs_embeds": embeddings, "token_classes": [["image"] * 4] * 2}
    assert names(codes_of(policy, **given)) == ["iiii", "iiii"]
    assert names(codes_of(policy, inputs_embeds=embeddings, prompt_columns=0))[0] == "gggg"


def test_given_classes() -> None:
    given = torch.tensor([[2, 1, 0, 0], [1, 1, 2, 0]])
    inputs: dict[str, Any] = {
        "input_ids": IDS,
        "pixel_values": torch.ones(1),
        "token_classes": given,
    }
    assert names(codes_of(**inputs)) == ["gtii", "ttgi"]
    assert inputs["token_classes"] is given and given[0].tolist() == [2, 1, 0, 0]
    # Inside generate they are the whole prompt's, of which a forward may bring a part.
    first = {**inputs, "token_classes": given[:, :3]}
    assert names(codes_of(**first, prompt_columns=3)) == ["gtig", "ttgg"]
    later = {**inputs, "token_classes": torch.cat((given, given[:, :2]), dim=1)}
    assert names(codes_of(**later, prompt_columns=6, first_column=3)) == ["igtg", "ittg"]
    for width in (3, 5):
        with pytest.raises(ValueError, match=rf"shape \(2, 4\); needed: \[2, {width}\]"):
            codes_of(**inputs, prompt_columns=width)
    words = [["generated", "text", "image", "image"]] * 2
    assert names(codes_of(input_ids=IDS, token_classes=words)) == ["gtii", "gtii"]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (torch.tensor([[0, 1, 2, 3]] * 2), r"token_classes: \[0, 1, 2, 3\]; .*'generated': 2"),
        (torch.tensor([[0, 1, -1, 2]] * 2), "token_classes"),
        (torch.tensor([[0, 1, 1]] * 2), r"shape \(2, 3\); needed: \[2, 4\]"),
        (torch.tensor([0, 1, 1, 1]), r"shape \(4,\); needed"),
        ([["text", "picture", "text", "text"]] * 2, r"token_classes: \['picture'\]; allowed"),
        ([["text"] * 4, ["text"] * 3], r"token_classes: rows of \[3, 4\] .*needed: \[2, 4\]"),
    ],
)
def test_wrong_classes(given: object, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        codes_of(input_ids=IDS, token_classes=given)


def test_a_text_only_model_has_no_images() -> None:
    for classes in (torch.zeros(2, 4, dtype=torch.long), [["image"] * 4] * 2):
        with pytest.raises(ValueError, match="token_classes: .*'text'"):
            codes_of(policy_of(), text_only=True, input_ids=IDS, token_classes=classes)
