"""Result files as they are read: what is in them, and errors that name what is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastskip.intervals import paired_shares
from fastskip.study.bench.results import BenchResult
from fastskip.study.evaluation.judging import Judgement
from fastskip.study.report.accuracy_chart import DENSE, POLICY
from fastskip.study.report.bench_file import read_bench
from fastskip.study.report.eval_file import read_eval
from fastskip.study.report.examples import data_uri
from fastskip.study.report.fields import ReportError
from fastskip.study.report.joining import eval_points, policy_key, timed_by, workload_text
from fastskip.study.report.results import read_results
from tests.study.report.files import (
    bench_document,
    eval_document,
    policy,
    search_document,
    write,
)

Change = Callable[[dict[str, Any]], object]


def test_what_is_in_a_folder_is_read(tmp_path: Path) -> None:
    for document in (eval_document(), bench_document(), search_document()):
        write(tmp_path / "runs", document)
    found = read_results([tmp_path / "runs"])
    (run,), (bench,), (search,) = found.evals, found.benches, found.searches
    half = run.judged[2]
    assert [each.label for each in run.judged][:2] == ["dense", "image_ffn"]
    assert half.score.mean == 0.5 and half.tokens == 1 and half.divergence == pytest.approx(0.02)
    expected = paired_shares([1.0] * 8, [1.0, 0.0] * 4)
    assert half.minus(run.dense) == expected
    # all right: Wilson's interval, which a bootstrap of equal scores would not have
    assert run.dense.score.high == 1 and run.dense.score.low < 0.7
    assert [each.label for each in bench.left_out] == ["compiled"]
    assert bench.timed[2][1].verdict == {"ttft": "faster", "tpot": "slower"}
    assert search.recommended == "image_ffn" and search.rivals[0].difference.low == 0.02
    kinds = {"image: no FFN", "image: no attention, K/V project", "all: parallel"}
    assert {each.kind for each in search.sensitivity} == kinds
    assert search.left_out == (("fastv", "takes too much"),) and search.settings == {"seed": 7}


def test_prompts_of_a_bench_that_are_not_alike(tmp_path: Path) -> None:
    document = bench_document()
    document["workload"] |= {"batch": 2, "texts": [16, 64]}
    (tmp_path / "bench.json").write_text(json.dumps(document))
    assert "576 image and 16/64 text rows" in workload_text(read_bench(tmp_path))
    del document["workload"]["texts"]  # as written before there were such prompts
    (tmp_path / "bench.json").write_text(json.dumps(document))
    assert "576 image and 64 text rows" in workload_text(read_bench(tmp_path))


def test_the_files_of_these_tests_are_as_the_commands_write_them() -> None:
    document = bench_document()
    written = BenchResult.from_dict(document).to_dict()
    # verdicts follow from the ratios there
    for each, own in zip(written["contenders"], document["contenders"], strict=True):
        assert each.keys() == own.keys()
        assert {**each, "verdict": own["verdict"]} == own
    assert {**written, "contenders": document["contenders"]} == document
    for judgement in eval_document()["judgements"]:
        read = Judgement.from_dict(judgement).to_dict()
        assert json.loads(json.dumps(read)) == judgement


def test_a_rival_without_a_policy_of_its_own_is_not_dense(tmp_path: Path) -> None:
    document = eval_document()
    document["judgements"].append({**document["judgements"][2], "label": "images 1/2"})
    document["judgements"][-1]["policy"] = policy("dense")
    found = read_results([write(tmp_path / "e", document), write(tmp_path / "b", bench_document())])
    own, _ = eval_points(found.evals[0], ())
    assert [point.kind for point in own.points] == [DENSE, *[POLICY] * 4]
    timed, _ = eval_points(found.evals[0], found.benches)
    assert "images 1/2" not in {point.name for point in timed.points}


def test_depth_is_that_of_the_policy_files(tmp_path: Path) -> None:
    folder = write(tmp_path, search_document())
    assert read_results([folder]).searches[0].depth is None
    (folder / "policies").mkdir()
    made = {"provenance": {"made_for": {"depth": 8}}}
    (folder / "policies" / "image_ffn.json").write_text(json.dumps(made))
    assert read_results([folder]).searches[0].depth == 8


EVAL_ERRORS: list[tuple[Change, str]] = [
    (lambda d: d.update(kind="bench"), "kind: got 'bench'; allowed: \"eval\""),
    (lambda d: d.update(schema_version=2), "schema_version: got 2; allowed: 1; a newer"),
    (lambda d: d.pop("items"), "items: missing; allowed: this field"),
    (lambda d: d.update(items=[]), r"items: got \[\]; allowed: at least one item"),
    (lambda d: d.update(items={}), "items: got {}; allowed: a list"),
    (lambda d: d["items"][2].update(question=3), r"items\[2\].question: got 3; allowed: a string"),
    (
        lambda d: d["judgements"][1]["evaluation"]["judged"].pop(),
        r"judgements\[1\].evaluation.judged: 7 answers; allowed: one answer per item, 8",
    ),
    (
        lambda d: d["judgements"][1]["evaluation"]["judged"][0].update(score=float("nan")),
        r"judged\[0\].score: got nan; allowed: a finite number in \[0, 1\]",
    ),
    (
        lambda d: d["judgements"][1]["evaluation"]["judged"][0].update(score=1.5),
        r"judged\[0\].score: got 1.5; allowed: a finite number in \[0, 1\]",
    ),
    (
        lambda d: d["judgements"][1]["agreement"]["tokens"].pop(),
        r"agreement.tokens: 7 numbers; allowed: one number per item, 8",
    ),
    (
        lambda d: d["judgements"][1]["speed"].update(tpot_s=1e308),
        r"speed.tpot_s: got 1e\+308; allowed: a finite number in \[0, 1e\+30\]",
    ),
    (
        lambda d: d["judgements"][1].update(flops=10**400),
        r"flops: got 10+\.\.\.; allowed: a finite",
    ),
    (lambda d: d.update(new_tokens=10**400), r"new_tokens: got 10+\.\.\.; allowed: an integer"),
    (
        lambda d: d["judgements"][0]["evaluation"]["judged"][3].update(question="another"),
        r"judged\[3\].question: got 'another'; allowed: .*as in items\[3\]",
    ),
    (lambda d: d["items"][0].update(images=["/etc/passwd"]), "allowed: a path within the folder"),
    (lambda d: d["items"][0].update(images=["../a.png"]), "allowed: a path within the folder"),
    (lambda d: d["judgements"][0].update(speed={"ttft_s": "fast"}), "speed.ttft_s: got 'fast'"),
    (lambda d: d["circumstances"].pop("model"), "circumstances.model: missing"),
]


@pytest.mark.parametrize(("change", "message"), EVAL_ERRORS)
def test_errors_name_file_field_value_and_what_is_allowed(
    tmp_path: Path, change: Change, message: str
) -> None:
    document = json.loads(json.dumps(eval_document()))
    folder = write(tmp_path, document)
    change(document)
    (folder / "eval.json").write_text(json.dumps(document))
    with pytest.raises(ReportError, match=message) as raised:
        read_results([folder])
    assert raised.value.file == folder / "eval.json" and str(folder) in str(raised.value)


@pytest.mark.parametrize(
    ("document", "change", "message"),
    [
        (
            bench_document(),
            lambda d: d["contenders"][0].update(source="vllm"),
            r"contenders\[0\].source: got 'vllm'; allowed: hf, hf-compiled, fastskip",
        ),
        (
            bench_document(),
            lambda d: d["contenders"][1]["ttft_s"].update(low=9),
            r"contenders\[1\].ttft_s: got .*; allowed: low <= median <= high",
        ),
        (
            bench_document(),
            lambda d: d.update(contenders=d["contenders"][-1:]),
            "contenders: .*; allowed: at least one that was measured",
        ),
        (
            search_document(),
            lambda d: d["conclusion"].update(recommended="nobody"),
            "conclusion.recommended: got 'nobody'; allowed: dense, image_ffn",
        ),
        (
            search_document(),
            lambda d: d["candidates"][0].update(is_on_front=1),
            r"candidates\[0\].is_on_front: got 1; allowed: true or false",
        ),
        (
            search_document(),
            lambda d: d["sensitivity"][0].update(kl=-1),
            r"sensitivity\[0\].kl: got -1; allowed: a finite number in \[0, 1e\+30\]",
        ),
    ],
)
def test_errors_of_bench_and_search(
    tmp_path: Path, document: dict[str, Any], change: Change, message: str
) -> None:
    document = json.loads(json.dumps(document))
    change(document)
    with pytest.raises(ReportError, match=message):
        read_results([write(tmp_path, document)])


def test_errors_of_folders_and_files(tmp_path: Path) -> None:
    allowed = "allowed: a folder that holds eval.json or bench.json or search.json"
    with pytest.raises(ReportError, match=f"holds none of them; {allowed}"):
        read_results([tmp_path])
    with pytest.raises(ReportError, match=f"no such folder; {allowed}"):
        read_results([tmp_path / "nowhere"])
    folder = write(tmp_path / "a", search_document())
    with pytest.raises(ReportError, match="named twice; allowed: each folder once"):
        read_results([folder, tmp_path / "a" / ".." / "a"])
    (folder / "search.json").write_text('{"kind": "sea')
    with pytest.raises(ReportError, match="search.json: not JSON"):
        read_results([folder])
    (folder / "search.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ReportError, match="search.json: cannot be read"):
        read_results([folder])
    (folder / "search.json").write_text("[" + "9" * 5000 + "]")
    with pytest.raises(ReportError, match="search.json: not JSON"):
        read_results([folder])
    (folder / "search.json").write_text("[]")
    with pytest.raises(ReportError, match=r"got \[\]; allowed: an object"):
        read_results([folder])


def test_pictures_are_pictures(tmp_path: Path) -> None:
    folder = write(tmp_path, eval_document())
    (folder / "images" / "3.png").unlink()
    with pytest.raises(ReportError, match=r"items\[3\].images\[0\]: no image 'images/3.png'"):
        read_eval(folder)
    assert data_uri(folder / "images" / "0.png").startswith("data:image/png;base64,iVBOR")
    (folder / "page.svg").write_text("<svg onload='alert(1)'/>")
    with pytest.raises(ReportError, match="page.svg: 24 bytes of unknown format; allowed: a PNG"):
        data_uri(folder / "page.svg")


def test_a_bench_of_the_same_model_times_what_an_eval_scored(tmp_path: Path) -> None:
    document = bench_document()
    folders = [write(tmp_path / "e", eval_document()), write(tmp_path / "b", document)]
    found = read_results(folders)
    (run,), benches = found.evals, found.benches
    assert timed_by(run, benches) is benches[0]
    ttft, _ = eval_points(run, benches)
    # those that both have, with quartiles; the numbers are those of the eval's table
    named = [(point.number, point.name) for point in ttft.points]
    assert named == [(1, "dense"), (2, "image_ffn"), (3, "every_nth_block")]
    assert ttft.points[1].cost == pytest.approx(70) and ttft.points[1].low == pytest.approx(66.5)
    assert ttft.times.endswith("not timed there: block_pairs")
    own, _ = eval_points(run, ())
    assert own.points[1].cost == pytest.approx(21) and own.points[1].low is None
    document["circumstances"] = {**document["circumstances"], "model_fingerprint": "another"}
    other = read_results([folders[0], write(tmp_path / "c", document)])
    assert timed_by(other.evals[0], other.benches) is None


def test_policies_are_the_same_whatever_they_are_called() -> None:
    one, other = policy("image_ffn"), policy("image_ffn")
    other |= {"name": "mine", "provenance": {"by": "me"}, "masks": []}
    assert policy_key(one) == policy_key(other) != policy_key(policy("frozen_visual"))
    assert policy_key(policy("dense")) == policy_key(None)
