"""The bundled model as examinee: batches, order, comparisons, errors."""

import json
from pathlib import Path
from typing import Any

import pytest

import fastskip
from fastskip.demo import checkpoint_path
from fastskip.demo.evaluation import answers, held_out
from fastskip.demo.scenes import QuestionKind, draw
from fastskip.prompts import processor_for
from fastskip.prompts.conversations import Turn
from fastskip.study.evaluation.answers import Evaluation, Judged
from fastskip.study.evaluation.exam import Exam
from fastskip.study.evaluation.item_inputs import ItemInputs
from fastskip.study.evaluation.items import Item, ItemError, read_items
from fastskip.study.evaluation.metrics import Metric
from tests.checkpoints import VOCAB, build_processor
from tests.models import Kind, tiny_llava
from tests.training.conversations import examples


@pytest.fixture(scope="module")
def processor() -> Any:
    return processor_for(checkpoint_path())


@pytest.fixture(scope="module")
def model() -> Any:
    return fastskip.load_model(checkpoint_path(), "dense", dtype="float32")


def items_of(count: int, seed: int = 21) -> list[Item]:
    return [
        Item(
            question.text,
            (question.answer,),
            (draw(scene),),
            kind=question.kind.value,
            metric=Metric.CAPTION if question.kind is QuestionKind.CAPTION else Metric.EXACT,
        )
        for scene, question in held_out(count, seed)
    ]


def test_an_exam_is_judged_in_its_order(model: Any, processor: Any) -> None:
    items = items_of(14)
    batches: list[int] = []
    exam = Exam(items, processor, config=model.config, batch_size=4)
    found = exam.take(model, lambda: batches.append(1))
    assert len(batches) == len(exam) == 4
    assert [each.question for each in found.judged] == [item.question for item in items]
    told = answers(model, processor, held_out(14, 21))
    assert [each.answer for each in found.judged] == told
    assert found.mean() > 0.8
    exact = [each for each in found.judged if each.kind == "colour"]
    assert found.mean("colour") == sum(each.score for each in exact) / len(exact)


def test_batches_and_kept_inputs_change_nothing(model: Any, processor: Any) -> None:
    items = items_of(9)
    whole = Exam(items, processor, batch_size=9)
    assert whole.take(model) == whole.take(model)
    single = Exam(items, processor, batch_size=1, max_cache_bytes=0)
    assert single.take(model) == whole.take(model)


def test_prompts_without_images_go_together(model: Any, processor: Any) -> None:
    items = items_of(3)
    items.insert(1, Item("how many ?", ("two",)))
    exam = Exam(items, processor, batch_size=8)
    assert len(exam) == 2
    found = exam.take(model)
    assert [each.question for each in found.judged] == [item.question for item in items]


def test_inputs_are_kept_while_there_is_room(
    processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    build = ItemInputs.build

    def counted(self: ItemInputs, items: Any) -> Any:
        made.append(len(items))
        return build(self, items)

    monkeypatch.setattr(ItemInputs, "build", counted)
    items = items_of(6)
    size = 3 * 64 * 64 * 4  # bytes of one image; the tokens of some items take less
    exam = Exam(items, processor, batch_size=2, max_cache_bytes=5 * size)
    for _ in range(2):
        for number in range(len(exam)):
            exam.inputs(number)
    assert made == [2, 2, 2, 2]  # two batches found room, the third is made anew


def test_what_cannot_be_asked_is_told_item_by_item(
    model: Any, processor: Any, tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n and no more")
    items = items_of(4)
    bad = [
        Item("is there a circle?", ("yes",), (tmp_path / "none.png",), where="the first"),
        Item("is there a circle?", ("yes",), (tmp_path / "broken.png",), where="the second"),
        Item("red " * 2000, ("b",), items[0].images, where="the third"),
        Item("is it?", ("no",), where="the fourth", history=(Turn("is <pad>?", "</s>"),)),
    ]
    exam = Exam([*bad[:2], *items, *bad[2:]], processor, config=model.config, batch_size=3)
    batches: list[int] = []
    found = exam.problems(lambda: batches.append(1))
    assert list(found) == [0, 1, 6, 7] and len(batches) == len(exam)
    told = zip(found.values(), ("no such file", "broken.png", "at most 1024", "</s>"), strict=True)
    assert all(part in text for text, part in told)
    assert [text.partition(":")[0] for text in found.values()] == [item.where for item in bad]
    rest = exam.without(found)
    assert list(rest.items) == items and not rest.problems()
    assert rest.take(model) == Exam(items, processor, batch_size=4).take(model)
    with pytest.raises(ItemError, match="items: none"):
        rest.without(range(4))


@pytest.mark.parametrize("kind", ["llava", "llava_next_vicuna", "llava_onevision"])
def test_histories_and_images_go_together(kind: Kind) -> None:
    """A batch of conversations, with two images, one or none, is what they are one by one."""
    items = []
    for number, example in enumerate(examples(6)):
        *history, last = example.turns
        items.append(
            Item(last.question, (last.answer,), example.images, str(number), history=tuple(history))
        )
    tiny, own = tiny_llava(kind, vocab=VOCAB), build_processor(kind, chat_template=None)
    tiny.generation_config.eos_token_id = None
    fastskip.apply_(tiny, {"schema_version": 1, "rules": [
        {"layers": [1], "tokens": ["image"], "skip": ["block"]}
    ]})  # fmt: skip
    exams = [Exam(items, own, config=tiny.config, batch_size=n, new_tokens=4) for n in (6, 1)]
    assert [len(exam) for exam in exams] == [2, 6]
    together, alone = (exam.take(tiny) for exam in exams)
    assert together == alone
    assert len({each.answer for each in alone.judged}) > 1


def test_two_models_are_compared_item_by_item(model: Any, processor: Any) -> None:
    exam = Exam(items_of(35), processor)
    dense = exam.take(model)
    harsh = exam.take(fastskip.set_policy(model, {"schema_version": 1, "rules": [
        {"layers": "1:7", "tokens": "all", "skip": ["block"]}
    ]}))  # fmt: skip
    fastskip.set_policy(model, "dense")
    assert harsh.minus(dense).is_below_zero
    same = dense.minus(dense)
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    low, mean, high = dense.estimate().low, dense.mean(), dense.estimate().high
    assert low <= mean <= high
    with pytest.raises(ValueError, match="allowed: two of the same exam"):
        dense.minus(Evaluation(dense.judged[1:]))
    with pytest.raises(ValueError, match="kind: 'taste'"):
        dense.scores("taste")


def test_equal_answers_to_few_items_do_not_prove_that_nothing_is_lost() -> None:
    def answered(*scores: float) -> Evaluation:
        return Evaluation(
            tuple(Judged("k", "a?", ("b",), Metric.EXACT, "b", score) for score in scores)
        )

    same = answered(1, 1, 0, 1).minus(answered(1, 1, 0, 1))
    assert same.mean == 0 and same.low < -0.1 and same.high > 0.1
    assert not answered(0).minus(answered(1)).is_below_zero
    # shares of right answers are not all that scores are
    soft = answered(0.5, 1, 0.2).minus(answered(0.6, 1, 0.4))
    assert soft.is_below_zero is False and soft.mean == pytest.approx(-0.1)


def test_an_evaluation_survives_json(model: Any, processor: Any) -> None:
    found = Exam(items_of(3), processor).take(model)
    assert Evaluation.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_items_of_a_file(model: Any, processor: Any, tmp_path: Path) -> None:
    scene, question = held_out(1, seed=3)[0]
    draw(scene).save(tmp_path / "a.png")
    line = {"question": question.text, "answer": question.answer, "image": "a.png"}
    (tmp_path / "items.jsonl").write_text(json.dumps(line))
    found = Exam(read_items(tmp_path / "items.jsonl"), processor).take(model)
    assert found.judged[0].answer == answers(model, processor, [(scene, question)])[0]


def test_errors(model: Any, processor: Any, tmp_path: Path) -> None:
    with pytest.raises(ItemError, match="items: none"):
        Exam([], processor)
    with pytest.raises(ItemError, match="batch_size: 0"):
        Exam(items_of(1), processor, batch_size=0)
    missing = Item("a?", ("b",), (tmp_path / "none.png",), where="the first")
    with pytest.raises(ItemError, match="the first"):
        Exam([missing], processor).take(model)
    long = Item("red " * 2000, ("b",), where="the long one")
    with pytest.raises(ItemError, match="the long one.*allowed: at most 1024"):
        Exam([long], processor, config=model.config).take(model)
