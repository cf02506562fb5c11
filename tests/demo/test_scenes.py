"""The scenes, their splits, and that every answer is what the picture shows."""

import re
from collections import Counter

import numpy as np
import pytest

from fastskip.demo.evaluation import held_out_conversations, held_out_details
from fastskip.demo.scenes import (
    COLOURS,
    GRID,
    IMAGE_SIZE,
    SHAPES,
    QuestionKind,
    Scene,
    Split,
    ask,
    caption,
    draw,
    is_detailed,
    questions,
    scenes,
    split_of,
)

NUMBERS = ["zero", "one", "two", "three", "four", "five"]


@pytest.fixture(scope="module")
def train() -> list[Scene]:
    return scenes(Split.TRAIN, 1500, seed=3)


def test_same_seed_same_scenes_pixels_and_questions(train: list[Scene]) -> None:
    again = scenes(Split.TRAIN, 1500, seed=3)
    assert again == train
    assert scenes(Split.TRAIN, 20, seed=4) != train[:20]
    for ours, theirs in zip(train[:20], again[:20], strict=True):
        assert np.array_equal(np.asarray(draw(ours)), np.asarray(draw(theirs)))
        assert questions(ours, 5) == questions(theirs, 5)
    assert any(questions(scene, 5) != questions(scene, 6) for scene in train[:20])


def test_global_random_state_plays_no_part() -> None:
    np.random.seed(1)
    first = scenes(Split.TEST, 10, seed=0)
    np.random.seed(2)
    assert scenes(Split.TEST, 10, seed=0) == first


def test_splits_share_no_scene() -> None:
    keys = {
        split: {scene.key for seed in range(2) for scene in scenes(split, 150, seed)}
        for split in Split
    }
    for split in Split:
        for other in Split:
            assert split is other or not keys[split] & keys[other]
        assert all(split_of(scene) is split for scene in scenes(split, 50, seed=9))


def test_scenes_of_one_call_differ(train: list[Scene]) -> None:
    assert len({scene.key for scene in train}) == len(train)


def test_scenes_are_unambiguous(train: list[Scene]) -> None:
    for scene in train:
        assert 1 <= len(scene.figures) <= 5
        assert len({figure.name for figure in scene.figures}) == len(scene.figures)
        assert len({(figure.row, figure.column) for figure in scene.figures}) == len(scene.figures)
        for figure in scene.figures:
            reach = max(abs(figure.shift_x), abs(figure.shift_y)) + figure.radius
            assert reach <= IMAGE_SIZE / GRID / 2


def test_picture_shows_the_figures_where_the_scene_says() -> None:
    cell = IMAGE_SIZE // GRID
    for scene in scenes(Split.VALIDATION, 50, seed=0):
        pixels = np.asarray(draw(scene)).astype(float)
        assert pixels.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
        lively = {
            (row, column)
            for row in range(GRID)
            for column in range(GRID)
            if np.ptp(
                pixels[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell].max(2)
            )
            > 90
        }
        assert lively == {(figure.row, figure.column) for figure in scene.figures}


def told(scene: Scene, text: str) -> str:
    """The answer, worked out from the words of the question alone and the list of figures."""
    facts = [(f.colour, f.shape, f.column, f.row) for f in scene.figures]

    def those(words: str) -> list[tuple[str, str, int, int]]:
        colour, shape = None, None
        for word in words.split():
            if word not in SHAPES:
                word = {"crosses": "cross"}.get(word, word.removesuffix("s"))
            colour = word if word in COLOURS else colour
            shape = word if word in SHAPES else shape
            assert word in COLOURS or word in SHAPES or word == "object"
        return [f for f in facts if colour in (None, f[0]) and shape in (None, f[1])]

    if match := re.fullmatch(r"what colour is the (\w+)\?", text):
        ((colour, *_),) = those(match[1])
        return colour
    if match := re.fullmatch(r"what shape is the (\w+ object)\?", text):
        ((_, shape, *_),) = those(match[1])
        return shape
    if match := re.fullmatch(r"how many (.+) are there\?", text):
        return NUMBERS[len(those(match[1]))]
    if match := re.fullmatch(r"is there a (.+)\?", text):
        return "yes" if those(match[1]) else "no"
    if match := re.fullmatch(r"where is the (.+)\?", text):
        ((_, _, column, row),) = those(match[1])
        return f"row {NUMBERS[row + 1]} column {NUMBERS[column + 1]}"
    match = re.fullmatch(r"is the (.+) (left of|right of|above|below) the (.+)\?", text)
    assert match, text
    ((_, _, x, y),), ((_, _, other_x, other_y),) = those(match[1]), those(match[3])
    gap = {
        "left of": other_x - x,
        "right of": x - other_x,
        "above": other_y - y,
        "below": y - other_y,
    }[match[2]]
    assert gap, "asked where neither direction holds"
    return "yes" if gap > 0 else "no"


def test_answers_are_right(train: list[Scene]) -> None:
    seen: Counter[QuestionKind] = Counter()
    for seed in range(3):
        for scene in train:
            for question in questions(scene, seed):
                seen[question.kind] += 1
                if question.kind is QuestionKind.CAPTION:
                    names = sorted(scene.figures, key=lambda f: (f.row, f.column))
                    assert question.answer == " and ".join(f"a {f.colour} {f.shape}" for f in names)
                    assert question.answer == caption(scene)
                else:
                    assert question.answer == told(scene, question.text), question
    assert set(seen) == set(QuestionKind)


@pytest.mark.parametrize("kind", [QuestionKind.EXISTENCE, QuestionKind.RELATION])
def test_yes_and_no_are_balanced(train: list[Scene], kind: QuestionKind) -> None:
    given = Counter(
        question.answer
        for seed in range(4)
        for scene in train
        for question in questions(scene, seed, [kind])
    )
    assert set(given) == {"yes", "no"}
    assert abs(given["yes"] / given.total() - 0.5) < 0.03


def test_counts_and_colours_and_shapes_are_spread(train: list[Scene]) -> None:
    for kind, least, variety in [
        (QuestionKind.COUNT, 0.03, 6),
        (QuestionKind.COLOUR, 0.12, 6),
        (QuestionKind.SHAPE, 0.2, 4),
    ]:
        given = Counter(q.answer for scene in train for q in questions(scene, 0, [kind]))
        assert len(given) == variety
        assert min(given.values()) / given.total() > least


def test_what_cannot_be_asked_is_not_asked() -> None:
    alone = next(s for s in scenes(Split.TRAIN, 50, seed=0) if len(s.figures) == 1)
    assert ask(alone, QuestionKind.RELATION, np.random.default_rng(0)) is None
    asked = {question.kind for question in questions(alone, 0)}
    assert asked == set(QuestionKind) - {QuestionKind.RELATION}


def test_details_are_about_the_smallest_figure_or_a_number() -> None:
    found = held_out_details(20, seed=1)
    assert found == held_out_details(20, seed=1) and len(found) == 20
    assert len({question.kind for _, question in found}) == 5
    for scene, question in found:
        assert split_of(scene) is Split.TEST and is_detailed(scene)
        small = min(scene.figures, key=lambda figure: figure.radius)
        assert small.radius < 4.8 and len(scene.figures) == 5
        if question.kind is QuestionKind.COUNT:
            assert NUMBERS.index(question.answer) >= 2
        elif question.kind in (QuestionKind.COLOUR, QuestionKind.SHAPE):
            assert question.answer in (small.colour, small.shape)
            assert {small.colour, small.shape} & set(re.findall(r"\w+", question.text))
        else:
            assert small.name in question.text


def test_conversations_ask_two_different_things_of_one_scene() -> None:
    found = held_out_conversations(30, seed=1)
    assert found == held_out_conversations(30, seed=1) and len(found) == 30
    for scene, (first, second) in found:
        assert split_of(scene) is Split.TEST and first.kind is not second.kind
        assert QuestionKind.CAPTION not in (first.kind, second.kind)
