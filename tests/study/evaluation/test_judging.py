"""Policies judged on the bundled model: agreement, verdicts, going on, the command."""

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

import fastskip
from fastskip.cli import app
from fastskip.commands.demo_items import demo_tasks
from fastskip.demo import checkpoint_path
from fastskip.fingerprints import model_fingerprint
from fastskip.intervals import Verdict
from fastskip.policy import PolicyError, RouterRule, SkipPolicy, SkipRule
from fastskip.prompts import processor_for
from fastskip.routing.weights import LayerScore, write_weights
from fastskip.study.calls import end_tokens
from fastskip.study.evaluation.agreement import AnswerLog
from fastskip.study.evaluation.exam import Exam
from fastskip.study.evaluation.items import Item
from fastskip.study.evaluation.judging import Judgement, JudgementFile, judge
from fastskip.study.evaluation.metrics import Metric
from fastskip.study.evaluation.smaller_images import shrunk_processor, taking_smaller_images
from fastskip.study.fingerprints import items_fingerprint, policy_fingerprint
from fastskip.study.paper.measuring import Effort, asked, items_of

ITEMS = items_of(asked(0, Effort(questions=10, captions=4)))
HALF = ("half", SkipPolicy.preset("every_nth_block"))


@pytest.fixture(scope="module")
def model() -> Any:
    return fastskip.load_model(checkpoint_path(), "image_ffn", dtype="float32")


@pytest.fixture(scope="module")
def exam(model: Any) -> Exam:
    return Exam(ITEMS, processor_for(checkpoint_path()), config=model.config, batch_size=8)


def log(answers: list[list[int]], scores: Tensor | None = None) -> AnswerLog:
    made = AnswerLog({9})
    tokens = torch.tensor(answers)
    made.note(
        range(len(answers)), tokens, torch.zeros(len(answers), 4) if scores is None else scores
    )
    return made


def test_tokens_agree_up_to_the_first_that_differs() -> None:
    dense = log([[1, 2, 3, 9], [1, 2, 9, 0], [1, 9, 0, 0], [1, 2, 3, 4]])
    other = log([[1, 2, 4, 9], [1, 2, 9, 7], [1, 2, 9, 0], [1, 2, 3, 4]])
    # What stands behind the token that ends an answer is filling.
    assert other.against(dense).tokens == (2 / 4, 1.0, 1 / 2, 1.0)
    assert dense.against(dense).tokens == (1.0,) * 4


def test_divergence_is_that_of_the_definition() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0, -1.0], [3.0, 0.0, 0.0, 0.0]])
    other = torch.tensor([[0.5, 0.5, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0]])
    found = log([[1], [1]], other).against(log([[1], [1]], scores)).divergence
    p, q = scores[0].softmax(0), other[0].softmax(0)
    assert found[0] == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)
    assert found[1] == 0
    ruled_out = torch.tensor([[0.0, -math.inf]])
    assert log([[1]], ruled_out).against(log([[1]], ruled_out)).divergence == (0.0,)
    # a model that overflows is not one that agrees
    overflown = log([[1]], torch.tensor([[0.0, math.nan]])).against(log([[1]], torch.zeros(1, 2)))
    assert overflown.divergence[0] > 1e6
    with pytest.raises(ValueError, match="different items"):
        log([[1]]).against(log([[1], [2]]))


def test_a_policy_is_held_to_the_dense_model(model: Any, exam: Exam) -> None:
    labels: list[str] = []
    before = fastskip.plan_of(model).policy
    dense, half = judge(model, [HALF], exam, new_tokens=3, rounds=1, on_policy=labels.append)
    assert labels == ["dense", "half"] and fastskip.plan_of(model).policy == before
    assert dense.agreement.tokens == (1.0,) * len(ITEMS) and not any(dense.agreement.divergence)
    assert dense.verdict(dense) is Verdict.NOT_TOLD_APART
    assert 0.5 < half.flops / dense.flops < 0.7
    assert min(half.agreement.divergence) > 0 and min(half.agreement.tokens) < 1
    change = half.change(dense)
    assert change.mean == pytest.approx(half.evaluation.mean() - dense.evaluation.mean())
    assert half.speed is not None and half.speed.ttft_s > half.speed.tpot_s > 0
    fastskip.set_policy(model, HALF[1])
    assert half.evaluation == exam.take(model)
    assert Judgement.from_dict(json.loads(json.dumps(half.to_dict()))) == half
    with pytest.raises(ValueError, match="rounds: -1"):
        judge(model, [], exam, rounds=-1)


def test_compute_is_what_routers_let_run(model: Any, exam: Exam) -> None:
    def routed(**options: Any) -> SkipPolicy:
        return SkipPolicy(routers=(RouterRule("1:7", skip="ffn", **options),))

    none = SkipPolicy(rules=(SkipRule("1:7", skip="ffn"),))
    policies = [
        ("rules", none),
        ("all", routed(kind="similarity", threshold=-1.0)),
        ("some", routed(kind="random", rate=0.5)),
        ("nobody", routed(kind="random", rate=0.0)),
    ]
    dense, rules, everybody, some, nobody = judge(model, policies, exam, new_tokens=3, rounds=0)
    assert everybody.flops == rules.flops < some.flops < nobody.flops == dense.flops
    assert some.flops == pytest.approx((rules.flops + dense.flops) / 2, rel=0.1)


def test_a_run_goes_on(
    model: Any, exam: Exam, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = JudgementFile(tmp_path / "runs" / "kept.jsonl")
    options: dict[str, Any] = {"new_tokens": 3, "rounds": 0, "kept": kept}
    first = judge(model, [HALF], exam, **options)
    with (tmp_path / "runs" / "kept.jsonl").open("a") as file:
        file.write('{"of": "half a li')
    asked_again: list[int] = []
    take = Exam.take

    def counted(self: Exam, *given: Any) -> Any:
        asked_again.append(1)
        return take(self, *given)

    monkeypatch.setattr(Exam, "take", counted)
    assert judge(model, [HALF], exam, **options) == first and not asked_again
    # What a policy is called and where it comes from changes no answer; a date is always another.
    dated = replace(HALF[1], name="dated", provenance={"date": "today"})
    _, again = judge(model, [("half", dated)], exam, **options)
    assert again == replace(first[1], policy=dated.to_dict()) and not asked_again
    # A policy more: dense answers again, since its answers are what others are compared with.
    another = ("another", SkipPolicy.preset("image_ffn"))
    assert judge(model, [HALF, another], exam, **options)[:2] == first and len(asked_again) == 2
    # Another exam is another question.
    other = Exam(ITEMS[:3], exam._processor, config=model.config)
    judge(model, [], other, **options)
    assert len(asked_again) == 3
    # And so are longer answers.
    longer = Exam(ITEMS[:3], exam._processor, config=model.config, new_tokens=33)
    judge(model, [], longer, **options)
    assert len(asked_again) == 4
    # Other batches may be answered otherwise: routers can decide by the batch.
    singly = Exam(ITEMS[:3], exam._processor, config=model.config, batch_size=1)
    judge(model, [], singly, **options)
    assert len(asked_again) == 5


def test_policies_that_do_not_fit_are_found_before_anybody_answers(model: Any, exam: Exam) -> None:
    missing = RouterRule("1:", skip="ffn", kind="linear", weights="none.safetensors", threshold=0.0)
    before, told = fastskip.plan_of(model).policy, list[str]()
    for policy in (SkipPolicy.preset("fastv", after=40), SkipPolicy(routers=(missing,))):
        with pytest.raises(PolicyError):
            judge(model, [HALF, ("bad", policy)], exam, rounds=0, on_policy=told.append)
    assert not told and fastskip.plan_of(model).policy == before


def test_damaged_lines_are_asked_again(model: Any, exam: Exam, tmp_path: Path) -> None:
    kept = JudgementFile(tmp_path / "kept.jsonl")
    (first,) = judge(model, [], exam, rounds=0, kept=kept)
    (line,) = (tmp_path / "kept.jsonl").read_bytes().splitlines()
    (key,) = kept.load()
    document = json.loads(line)
    damaged = []
    for name, value in (
        ("agreement", []),
        ("evaluation", {"judged": [{}]}),
        ("policy", None),
        ("speed", 1),
    ):
        told = {**document["judgement"], name: value}
        if name == "policy":
            del told[name]
        damaged.append(json.dumps({"of": key, "judgement": told}).encode())
    damaged += [b"{}", b"123", b"[]", b"null", b"\xff", line.replace(b"dense", b"d\xffnse", 1)]
    damaged += [b"[" * 100_000, json.dumps({"of": [], "judgement": {}}).encode()]
    for each in damaged:
        (tmp_path / "kept.jsonl").write_bytes(each + b"\n")
        assert not kept.load(), each[:80]
    (tmp_path / "kept.jsonl").write_bytes(b"\n".join([*damaged, line, b"\xfe"]))
    assert kept.load() == {key: first}
    assert judge(model, [], exam, rounds=0, kept=kept) == (first,)


def test_fingerprints(model: Any) -> None:
    own = model_fingerprint(model)
    with torch.no_grad():
        weight = model.lm_head.weight
        weight[0, 0] += 1
        assert model_fingerprint(model) != own
        weight[0, 0] -= 1
    assert model_fingerprint(model) == own
    assert (
        items_fingerprint(ITEMS) == items_fingerprint(list(ITEMS)) != items_fingerprint(ITEMS[1:])
    )
    same = SkipPolicy.from_dict(HALF[1].to_dict())
    assert policy_fingerprint(same) == policy_fingerprint(HALF[1])
    assert policy_fingerprint(same) != policy_fingerprint(SkipPolicy())


def test_routers_with_other_weights_are_other_policies(tmp_path: Path) -> None:
    """Relative paths to them say nothing: they start at each policy's folder."""
    rule = RouterRule(":", skip="ffn", kind="linear", weights="router.safetensors", threshold=0.0)
    policies = []
    for name, weight in (("a", 0.0), ("b", 1.0), ("c", 1.0)):
        (tmp_path / name).mkdir()
        score = LayerScore(torch.full((4,), weight), 0.0)
        write_weights(tmp_path / name / "router.safetensors", {0: score})
        policies.append(SkipPolicy(routers=(rule,), folder=str(tmp_path / name)))
    a, b, c = map(policy_fingerprint, policies)
    assert a != b and b == c
    (tmp_path / "a" / "router.safetensors").unlink()
    assert policy_fingerprint(policies[0]) not in (a, b)


def test_tokens_that_end_an_answer(model: Any) -> None:
    assert end_tokens(model) == {model.generation_config.eos_token_id}
    assert end_tokens(object()) == frozenset()


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["eval", "--threads", "1", "--rounds", "0", *arguments])


def write(folder: Path, lines: list[dict[str, Any]]) -> str:
    (image,) = ITEMS[0].images
    assert not isinstance(image, Path)
    image.save(folder / "a.png")
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(folder / "items.jsonl")


YES = {"question": "is there a circle?", "answer": "yes", "image": "a.png", "metric": "yes-no"}


def test_the_command(tmp_path: Path) -> None:
    items = write(tmp_path, [YES, {**YES, "answer": "no"}, {**YES, "image": "gone.png"}])
    found = run("-p", "image_ffn", "--items", items)
    assert found.exit_code == 2 and "gone.png" in found.output and "--skip-broken" in found.output
    found = run("-p", "image_ffn", "--items", items, "--skip-broken", "--out", str(tmp_path))
    assert found.exit_code == 0, found.output
    assert "1 of 3 items left out" in found.output and "image_ffn: yes/no accuracy" in found.output
    assert "not told apart" in found.output
    again = run(
        "-p", "image_ffn", "--items", items, "--skip-broken", "--out", str(tmp_path), "--json"
    )
    text = again.output[again.output.index("[\n") :]
    dense, other = json.loads(text[: text.rindex("]") + 1])
    assert (dense["label"], other["label"], other["speed"]) == ("dense", "image_ffn", None)
    assert len((tmp_path / "judgements.jsonl").read_text().splitlines()) == 2


def test_the_dense_model_is_judged_once(tmp_path: Path) -> None:
    found = run("-p", "dense", "--items", write(tmp_path, [YES]))
    assert found.exit_code == 0 and len(re.findall("^ dense ", found.output, re.M)) == 1


def test_conversations_and_captions_by_the_command(tmp_path: Path) -> None:
    """LLaVA's array with a folder of images; what a report reads; a run that goes on."""
    (tmp_path / "photos").mkdir()
    for name, size in (("a.png", (64, 64)), ("b.png", (700, 350))):
        Image.new("RGB", size, "red").save(tmp_path / "photos" / name)
    rows: list[dict[str, Any]] = [
        {
            "id": 1,
            "image": ["a.png", "b.png"],
            "conversations": [
                {"from": "human", "value": "<image>\n<image>\nis there a circle?"},
                {"from": "gpt", "value": "yes"},
                {"from": "human", "value": "describe the image."},
                {"from": "gpt", "value": "a red circle"},
            ],
        },
        {"question": "how many objects are there?", "answer": "zero", "metric": "exact"},
        {"question": "is it?", "answer": "no", "image": "gone.png"},
        {"conversations": [{"from": "human", "value": "odd"}]},
    ]
    (tmp_path / "items.json").write_text(json.dumps(rows))
    out = tmp_path / "runs" / "eval"
    arguments = ["-p", "image_ffn", "--items", str(tmp_path / "items.json"), "--images"]
    arguments += [str(tmp_path / "photos"), "--metric", "cider", "--by-kind", "--out", str(out)]
    arguments += ["--answer-tokens", "4"]
    found = run(*arguments)
    assert found.exit_code == 2 and "entry 4: conversations" in found.output
    found = run(*arguments, "--skip-broken")
    assert found.exit_code == 0, found.output
    assert "2 of 5 items left out" in found.output and "gone.png" in found.output
    assert "image_ffn: captions CIDEr" in found.output and "multi-turn, 1 item" in found.output
    document = json.loads((out / "eval.json").read_text())
    assert (document["schema_version"], document["kind"]) == (1, "eval")
    assert document["circumstances"].keys() > {"model_fingerprint", "items_fingerprint", "date"}
    first, late, bare = document["items"]
    assert first["images"] == late["images"] == ["images/0.jpg", "images/1.jpg"]
    assert (first["image"], bare["image"]) == ("images/0.jpg", None)
    assert (late["kind"], late["metric"], bare["metric"]) == ("multi-turn", "cider", "exact")
    assert late["history"][0]["answer"] == "yes"
    with Image.open(out / "images" / "0.jpg") as small, Image.open(out / "images/1.jpg") as large:
        assert (small.size, large.size) == ((64, 64), (336, 168))
    assert [each["label"] for each in document["judgements"]] == ["dense", "image_ffn"]
    # cut off within the last line, and while the file for reports was written
    kept = (out / "judgements.jsonl").read_bytes()
    (out / "judgements.jsonl").write_bytes(kept[:-40])
    (out / "eval.json").unlink()
    again = run(*arguments, "--skip-broken")
    assert again.exit_code == 0, again.output
    assert json.loads((out / "eval.json").read_text())["judgements"] == document["judgements"]
    known = JudgementFile(out / "judgements.jsonl").load()
    assert sorted(each.label for each in known.values()) == ["dense", "image_ffn"]


def test_cider_is_no_percentage(tmp_path: Path) -> None:
    """Beside questions: two tables, each with the mean of its own, and none over both."""
    rows = [{**YES, "metric": "exact"}, {**YES, "answer": "no", "metric": "exact"}]
    rows += [{**YES, "question": "describe the image.", "metric": "cider"}] * 2
    rows[-1] = {**rows[-1], "answer": "a red circle"}
    items = write(tmp_path, rows)
    found = run("-p", "image_ffn", "--items", items, "--by-kind", "--answer-tokens", "4")
    assert found.exit_code == 0, found.output
    shares, captions = found.output.index("score"), found.output.index("CIDEr")
    assert shares < captions and "4 items, 95 %" in found.output
    assert found.output.count("2 items") >= 2 and "50.0%" in found.output[shares:captions]
    assert "%" not in found.output[captions : found.output.index("kind")]


def test_no_policy_is_lost_in_a_narrow_terminal(tmp_path: Path) -> None:
    items = write(tmp_path, [YES])
    arguments = ["eval", "--threads", "1", "--rounds", "1", "--new-tokens", "2", "--by-kind"]
    arguments += ["-p", "image_ffn", "--items", items]
    narrow = CliRunner().invoke(app, arguments, env={"COLUMNS": "40"})
    assert narrow.exit_code == 0, narrow.output
    assert re.search(r"^image_ffn\n  score: 100.0%, ", narrow.output, re.MULTILINE)
    assert "TTFT, ms: " in narrow.output and "policy: image_ffn" in narrow.output
    assert "1 item, 95 %" in narrow.output.replace("\n", " ")
    wide = CliRunner().invoke(app, arguments, env={"COLUMNS": "80"})
    assert re.search(r"^ image_ffn +100.0% ", wide.output, re.MULTILINE)


def test_the_demos_own_tasks() -> None:
    items = demo_tasks(14)
    kinds = [item.kind for item in items]
    assert len(items) == 14 and demo_tasks(1)
    assert [kinds.count(kind) for kind in ("caption", "multi-turn", "detail")] == [3, 3, 3]
    for item in items:
        assert len(item.history) == (item.kind == "multi-turn")
        assert item.question not in {turn.question for turn in item.history}
    assert items_fingerprint(items) == items_fingerprint(demo_tasks(14))
    late = next(item for item in items if item.kind == "multi-turn")
    assert items_fingerprint([late]) != items_fingerprint([replace(late, history=())])


def test_nothing_is_judged_without_the_scorers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = write(tmp_path, [YES | {"metric": "cider"}] * 2)
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider_scorer", None)
    found = run("--items", items)
    assert found.exit_code == 2 and "fastskip[captions]" in found.output
    (tmp_path / "items.jsonl").write_text("")
    found = run("--items", items)
    assert found.exit_code == 2 and "no items" in found.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "some/model"], "--items: needed with --model"),
        (["--images", "."], "--items: needed with --images"),
        (["--items", "x", "--metric", "bleu"], "bleu"),
        (["--metric", "cider"], "--metric cider: the demo's items name theirs; allowed: with"),
        (["-p", "dense", "-p", "dense"], "one is given twice"),
        (["-p", "nonsense"], "nonsense"),
        (["--count", "4", "--rounds", "1", "--new-tokens", "2000"], "allowed: at most 1024"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str) -> None:
    found = run(*arguments)
    assert found.exit_code == 2 and message in found.output


def test_verdicts(model: Any, exam: Exam) -> None:
    """By where the interval of the differences lies."""
    (dense,) = judge(model, [], exam, rounds=0)

    def scored(score: float) -> Judgement:
        judged = [replace(each, score=score) for each in dense.evaluation.judged]
        return replace(dense, evaluation=type(dense.evaluation)(tuple(judged)))

    worst, best = scored(0.0), scored(1.0)
    assert worst.verdict(best) is Verdict.WORSE and best.verdict(worst) is Verdict.BETTER
    assert best.yes_no(ITEMS) is None
    yes = [Item("is it?", ("yes",), metric=Metric.YES_NO)] * len(ITEMS)
    found = best.yes_no(yes)
    assert found is not None and found.said_yes == found.accuracy


def test_smaller_images_are_a_rival(model: Any, exam: Exam, tmp_path: Path) -> None:
    few = Exam(ITEMS[:3], processor_for(checkpoint_path()), config=model.config, new_tokens=8)
    half = Exam(
        few.items,
        shrunk_processor(processor_for(checkpoint_path()), 2),
        config=model.config,
        new_tokens=8,
    )
    kept = JudgementFile(tmp_path / "judgements.jsonl")
    dense, small = judge(model, [], few, smaller={2: half}, rounds=1, kept=kept)
    assert (dense.label, small.label) == ("dense", "images 1/2")
    # 16 of 64 image rows
    plan = fastskip.plan_of(fastskip.set_policy(model, "dense"))
    n_text = few.single(0)["input_ids"].shape[1] - 64
    before = int((few.single(0)["input_ids"][0] == model.config.image_token_id).int().argmax())
    assert small.flops == plan.flops(16, n_text, 16, text_before=before) < dense.flops
    with taking_smaller_images(model):
        assert small.evaluation == half.take(model)
    assert small.speed is not None
    again = judge(model, [], few, smaller={2: half}, rounds=0, kept=kept)
    assert [each.evaluation for each in again] == [dense.evaluation, small.evaluation]
