"""The search from end to end on the bundled model, small; resuming; seeds; errors."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import fastskip
from fastskip.cli import app
from fastskip.plan.costs import Ceilings, floor_seconds
from fastskip.policy import SkipPolicy, TokenClass
from fastskip.policy_fit import check_fit
from fastskip.study.evaluation.exam import Exam
from fastskip.study.evaluation.items import Item
from fastskip.study.search import (
    BudgetError,
    Search,
    SearchResult,
    SearchSettings,
    Watcher,
    parse_budget,
)
from fastskip.study.search.bench import Bench
from fastskip.study.search.calibrating import Calibrator, NonFiniteError
from fastskip.study.search.changes import changes_of, policy_of
from fastskip.study.search.measurement_cache import MeasurementCache
from fastskip.study.search.settings import SettingsError
from fastskip.study.similarity import LayerSimilarity
from fastskip.timing import Times, threads_set
from tests.models import tiny_llama, tiny_llava

CEILINGS = Ceilings(1e10, 1e11)
SETTINGS = SearchSettings(
    tries=6, points=1, new_tokens=3, rounds=1, randoms=1, wirings=True, routers=False
)
WORDS = ["b", "c", "d", "e", "f", "g"]


class Tokens:
    """A tokenizer and image processor of the tiny model: words are letters."""

    image_token, image_processor, chat_template, bos_token = "<image>", object(), None, None
    pad_token = "p"

    def __init__(self, vocab: int = 64, image_tokens: int = 4) -> None:
        self.image_id, self.image_tokens = vocab - 1, image_tokens

    def __call__(self, text: list[str], images: Any = None, **_: Any) -> Any:
        ids = []
        for each in text:
            own = [self.image_id] * (self.image_tokens * (images is not None))
            ids.append([2, *own, *(5 + ord(letter) % 40 for letter in each[-6:])])
        width = max(map(len, ids))
        mask = [[0] * (width - len(own)) + [1] * len(own) for own in ids]
        padded = [[0] * (width - len(own)) + own for own in ids]
        found = {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}
        if images is not None:
            generator = torch.Generator().manual_seed(len(ids))
            found["pixel_values"] = torch.randn(len(ids), 3, 8, 8, generator=generator)
        return found

    def batch_decode(self, rows: Any, **_: Any) -> list[str]:
        return [" ".join(WORDS[int(token) % len(WORDS)] for token in row) for row in rows]


def items(count: int, first: int = 0) -> list[Item]:
    from PIL import Image

    picture = Image.new("RGB", (8, 8))
    return [
        Item(f"what is {number}?", (WORDS[number % len(WORDS)],), (picture,))
        for number in range(first, first + count)
    ]


@pytest.fixture(scope="module")
def model() -> Any:
    return fastskip.apply_(tiny_llava(depth=3), "dense")


def exam(model: Any, count: int, first: int = 0) -> Exam:
    found = Exam(items(count, first), Tokens(), batch_size=4, new_tokens=3)
    return found


def similarity(depth: int = 3) -> list[LayerSimilarity]:
    return [
        LayerSimilarity(layer, c, 5, 0.9 - 0.1 * layer, 0.95, 0.9)
        for layer in range(depth)
        for c in TokenClass
    ]


def search(model: Any, folder: Path | None, budget: str = "flops 0.7", **options: Any) -> Search:
    return Search(
        model,
        parse_budget(budget),
        exam(model, 4),
        exam(model, 6, 10),
        CEILINGS,
        similarity=similarity(),
        folder=folder,
        settings=options.pop("settings", SETTINGS),
        **options,
    )


def test_what_does_nothing_moves_nothing(model: Any) -> None:
    calibrator = Calibrator(model, exam(model, 4))
    assert calibrator.moved(SkipPolicy()).kl == pytest.approx(0, abs=1e-6)
    assert len(calibrator) == 4 * 3  # the tiny model never ends an answer
    moved = [
        calibrator.moved(policy_of([(1, (x,))])).kl for x in changes_of(1, 3, tuple(TokenClass))
    ]
    assert min(moved) >= 0 and max(moved) > 0.01
    # what nobody does in a dense layer: a pair of layers of which one adds nothing is dense
    other = tiny_llava(depth=3)
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            other.model.language_model.layers[1].get_submodule(name).weight.zero_()  # type: ignore[attr-defined]
    idle = Calibrator(fastskip.apply_(other, "dense"), exam(model, 4))
    for change in changes_of(1, 3, tuple(TokenClass)):
        if len(change.tokens) == 3 and change.skip:
            assert idle.moved(policy_of([(1, (change,))])).kl == pytest.approx(0, abs=1e-6)


def test_a_model_that_overflows_is_not_taken_for_one_that_does_not_move() -> None:
    broken = tiny_llava(depth=3)
    calibrator = Calibrator(fastskip.apply_(broken, "dense"), exam(broken, 1))
    with torch.no_grad():
        broken.lm_head.weight[0] = float("inf")  # type: ignore[union-attr, operator, index]
    with pytest.raises(
        NonFiniteError, match="not finite in torch.float32; allowed: a dtype in which"
    ):
        calibrator.moved(SkipPolicy())


STAGES: list[str] = []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("search")


@pytest.fixture(scope="module")
def result(model: Any, folder: Path) -> SearchResult:
    fastskip.set_policy(model, "dense")
    watcher = Watcher(lambda stage, steps: STAGES.append(stage))
    return search(model, folder, watcher=watcher).run()


def test_a_whole_search(model: Any, result: SearchResult, folder: Path) -> None:
    assert fastskip.plan_of(model).is_dense
    assert STAGES[0] == "sensitivity" and STAGES[-1] == "judging"
    document = json.loads((folder / "search.json").read_text())
    assert (document["schema_version"], document["kind"]) == (1, "search")
    assert document == json.loads(json.dumps(result.to_dict()))
    assert document["budget"]["share"] == 0.7
    by_name = {each["name"]: each for each in document["candidates"]}
    assert by_name["dense"]["cost"] == 1 and by_name["dense"]["file"] is None
    found = by_name["search"]
    assert found["cost"] <= 0.7 + 1e-6 and found["keeps_budget"]
    assert {"search", "uniform", "random", "peer"} <= {each["source"] for each in by_name.values()}
    peers = "visual_withdrawal frozen_visual image_ffn v_skip fastv pyramid_drop random_removal "
    peers += "even_removal shortv parallel_blocks block_pairs shortgpt sleb"
    told = by_name.keys() | {each["name"] for each in document["left_out"]}
    assert set(peers.split()) <= told
    assert {"shortgpt", "sleb"} <= by_name.keys()
    for each in by_name.values():
        if each["source"] not in ("dense", "search"):
            assert each["cost"] <= 0.7 + 1e-6, each["name"]
        if each["file"] is not None:
            policy = SkipPolicy.from_file(folder / each["file"])
            assert policy == SkipPolicy.from_dict(each["policy"])
            assert policy.provenance["made_for"]["depth"] == 3
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                check_fit(model, policy)
            assert policy.provenance["search"]["measured"]["cost"] == each["cost"]
    kls = [each["calibration_kl"] for each in by_name.values() if each["source"] == "uniform"]
    assert found["calibration_kl"] <= min(kls) + 1e-9
    assert len(document["sensitivity"]) == sum(
        len(changes_of(n, 3, tuple(TokenClass))) for n in range(3)
    )
    assert any(each["is_on_front"] for each in by_name.values())
    assert document["conclusion"]["text"]
    rivals = [each["cost"] for each in by_name.values() if each["source"] in ("uniform", "peer")]
    if document["cheaper"] is not None:
        assert by_name[document["cheaper"]["name"]]["cost"] <= min(rivals) + 1e-6
    else:
        assert min(rivals) > 0.69


def test_policies_of_an_older_search_go(result: SearchResult, tmp_path: Path) -> None:
    result.write(tmp_path)
    (tmp_path / "policies" / "mine.json").write_text("{}")
    fewer = tuple(each for each in result.candidates if each.source in ("dense", "search"))
    again = replace(result, candidates=fewer).write(tmp_path)
    names = {str(path.relative_to(tmp_path)) for path in (tmp_path / "policies").iterdir()}
    assert names == {each.file for each in again.candidates if each.file} | {"policies/mine.json"}
    (tmp_path / "search.json").write_text('{"candidates": [{"file": "../x", "name": 3}]}')
    result.write(tmp_path)  # whatever lies there


def test_a_search_that_was_killed_goes_on(
    model: Any,
    result: SearchResult,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the result of one of the same seed that was not, in another folder."""
    steps: list[int] = []

    def killed() -> None:
        steps.append(1)
        if len(steps) == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(model, tmp_path / "cut", watcher=Watcher(on_step=killed)).run()
    file = tmp_path / "cut" / "measured.jsonl"
    lines = file.read_text().splitlines()
    assert len(lines) == 20
    file.write_text("\n".join([*lines[:-1], lines[-1][:30]]))  # and half a line
    asked: list[int] = []
    moved = Calibrator.moved

    def counted(self: Calibrator, policy: SkipPolicy) -> Any:
        asked.append(1)
        return moved(self, policy)

    monkeypatch.setattr(Calibrator, "moved", counted)
    again = search(model, tmp_path / "cut").run()
    known = len((folder / "measured.jsonl").read_text().splitlines())
    assert len(asked) == known - 19
    assert [(c.name, c.policy, c.calibration_kl, c.score) for c in again.candidates] == [
        (c.name, c.policy, c.calibration_kl, c.score) for c in result.candidates
    ]
    assert again.text == result.text


def test_a_budget_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine of which all times are known, since real ones are as loud as the machine."""

    def foretold(model: Any, inputs: Any, new_tokens: int) -> Times:
        cost = fastskip.plan_of(model).cost(4, 7, new_tokens)
        prefill, step = (floor_seconds(own, CEILINGS) for own in (cost.prefill, cost.decode))
        return Times(prefill, 1e-6 + step / (new_tokens - 1), 1e-5 + prefill)

    monkeypatch.setattr("fastskip.study.search.latency.time_once", foretold)
    monkeypatch.setattr("fastskip.study.evaluation.judging.time_once", foretold)
    settings = replace(SETTINGS, tries=2, points=0, randoms=0, wirings=False)
    model = fastskip.apply_(tiny_llava(depth=2), "dense")
    result = search(model, None, "tpot 1.2x", settings=settings).run()
    assert result.latency is not None and result.latency["probes"] >= 14
    assert result.latency["errors"]["decode"] < 0.01
    by_name = {each.name: each for each in result.candidates}
    dense, found = by_name["dense"], by_name["search"]
    assert dense.tpot_s and found.tpot_s and found.tpot_s <= dense.tpot_s / 1.2
    assert found.keeps_budget and found.cost == pytest.approx(found.tpot_s / dense.tpot_s, 0.02)
    with pytest.raises(BudgetError, match=r"TPOT 20x faster cannot be reached; .*: TPOT [\d.]+x"):
        search(model, None, "tpot 20x", settings=settings).run()


def test_a_text_only_model() -> None:
    model = fastskip.apply_(tiny_llama(depth=2), "dense")
    given = [replace(each, images=()) for each in items(6)]
    seen, other = (
        Exam(own, Tokens(), batch_size=4, new_tokens=3) for own in (given[:3], given[3:])
    )
    settings = replace(SETTINGS, tries=2, points=0, randoms=1)
    found = Search(model, parse_budget("flops 0.8"), seen, other, CEILINGS, settings=settings).run()
    names = {each.name for each in found.candidates}
    assert {"dense", "search", "sleb"} <= names and not {"shortv", "fastv"} & names
    assert {each.name for each in found.left_out} >= {"shortgpt"}  # nothing was compared


def test_impossible_budgets(model: Any) -> None:
    with pytest.raises(BudgetError, match="cannot be reached; the limit, with everything skipped"):
        search(model, None, "flops 0.001").run()


def test_settings() -> None:
    with pytest.raises(SettingsError, match="tries: 0; allowed: 1 or more"):
        SearchSettings(tries=0)
    for minutes in (0, float("nan"), float("inf")):  # no JSON holds the last two
        with pytest.raises(SettingsError, match="minutes"):
            SearchSettings(minutes=minutes)


def bench(model: Any, count: int, folder: Path) -> Bench:
    typical = exam(model, 1).single(0)
    return Bench(model, exam(model, count), typical, CEILINGS, SETTINGS, folder, Watcher())


def test_other_items_are_measured_anew(model: Any, tmp_path: Path) -> None:
    policy = SkipPolicy.preset("every_nth_block", start=1, end=3)
    first = bench(model, 4, tmp_path).moved(policy)
    assert bench(model, 4, tmp_path).moved(replace(policy, name="by another name")) == first
    assert len((tmp_path / "measured.jsonl").read_text().splitlines()) == 1
    bench(model, 3, tmp_path).moved(policy)
    assert len((tmp_path / "measured.jsonl").read_text().splitlines()) == 2


def test_times_of_another_machine_are_measured_anew(model: Any, tmp_path: Path) -> None:
    first = bench(model, 4, tmp_path).timed("probes", [])
    assert bench(model, 4, tmp_path).timed("probes", []) == first
    with threads_set(torch.get_num_threads() + 1):
        assert bench(model, 4, tmp_path).timed("probes", []) != first


def test_what_is_kept_survives_a_broken_file(tmp_path: Path) -> None:
    file = tmp_path / "measured.jsonl"
    file.write_text('{"of": "a", "value": [1]}\n[]\n{"of": "b"}\nnonsense\n{"of": "c", "val')
    kept = MeasurementCache(tmp_path)
    assert kept.value("a", lambda: None) == [1]
    assert kept.value("b", lambda: 2) == 2
    assert kept.value("c", lambda: {"x": (1, 2)}) == {"x": [1, 2]}
    assert MeasurementCache(tmp_path).value("c", lambda: None) == {"x": [1, 2]}


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["search", "--threads", "1", *arguments])


def test_bad_arguments(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "o")]
    line = json.dumps({"question": "what?", "answer": "this"})
    (tmp_path / "one.jsonl").write_text(line)
    (tmp_path / "none.jsonl").write_text("")
    (tmp_path / "gone.jsonl").write_text(
        "\n".join([line, json.dumps({"question": "what?", "answer": "x", "image": "gone.png"})])
    )
    both = [json.dumps({"question": "what?", "answer": "x", "metric": m}) for m in ("cider", "vqa")]
    both[1] = both[1].replace('"x"', '["x", "x", "x", "x"]')
    (tmp_path / "both.jsonl").write_text("\n".join([*both, both[0], both[1]]))
    good = ["-b", "flops 0.5", *out]
    for arguments, message in (
        (["-b", "flops 3", *out], "a share in (0, 1]"),
        ([*good, "-m", "some/model"], "--items: needed with --model"),
        ([*good, "--items", str(tmp_path / "one.jsonl")], "allowed: more than the 32"),
        ([*good, "--items", str(tmp_path / "none.jsonl")], "no items"),
        ([*good, "--items", str(tmp_path / "gone.jsonl"), "--calibration", "1"], "gone.png"),
        ([*good, "--minutes", "0"], "minutes: 0.0; allowed: a number above 0"),
        (
            [*good, "--items", str(tmp_path / "both.jsonl"), "--calibration", "1"],
            "allowed: cider for all items together or for none",
        ),
    ):
        found = run(*arguments)
        assert found.exit_code == 2 and message in found.output, (arguments, found.output)
    assert not (tmp_path / "o").exists()
