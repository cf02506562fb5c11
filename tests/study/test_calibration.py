"""Calibration: thresholds that give what is asked for, and that say so where nothing does."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

import fastskip
from fastskip.cli import app
from fastskip.loading import watching_routers
from fastskip.policy import PolicyError, SkipPolicy
from fastskip.policy_fit import made_for
from fastskip.prompts import processor_for
from fastskip.routing.weights import LayerScore, write_weights
from fastskip.study.calibration import Calibration, CalibrationError, calibrate
from fastskip.study.calibration.observation import Observer, Scores
from fastskip.study.calibration.thresholds import bar_for
from fastskip.study.samples import SampleError, inputs_of, read_samples
from fastskip.tokens import CODES
from tests.batches import random_batch
from tests.checkpoints import save_checkpoint
from tests.commands.test_cli import run, succeed
from tests.models import tiny_llava

pytestmark = pytest.mark.reference
Samples = list[dict[str, Any]]
NEW = 5
NEAR = 0.03
"""The last layer has few candidates, so shares come in steps of 1 in 12 to 60."""


def routed(*routers: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {"schema_version": 1, "name": "mine", "routers": list(routers), **others}


def similarity(layers: Any = "1:4", tokens: Any = "all", skip: Any = "block", **more: Any) -> Any:
    head = {"layers": layers, "tokens": tokens, "skip": [skip], "kind": "similarity"}
    return head | {"threshold": 0.5} | more


@pytest.fixture(scope="module")
def stock() -> Any:
    return tiny_llava()


@pytest.fixture(scope="module")
def samples(stock: Any) -> Samples:
    return [random_batch(stock, images=(1, 2), seed=seed).inputs() for seed in range(6)]


def prepared(stock: Any, policy: Any) -> Any:
    return fastskip.apply_(copy.deepcopy(stock), policy, impl="reference")


def measured(
    model: Any, samples: Samples, calibration: Calibration
) -> dict[tuple[int, int], float]:
    """The share of each router in each layer, under its policy, from the decisions read back."""
    fastskip.set_policy(model, calibration.policy)
    plan = fastskip.plan_of(model)
    asked: dict[tuple[int, int], int] = {}
    skipped: dict[tuple[int, int], int] = {}
    for inputs in samples:
        with fastskip.record_routing(model) as record:
            model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        for each in record.forwards:
            for cell in plan.routed:
                key = cell.layer, next(iter(cell.skip))
                if key in each.candidates:
                    mine = each.candidates[key] & (each.codes == CODES[cell.token_class])
                    at = cell.number, cell.layer
                    asked[at] = asked.get(at, 0) + int(mine.sum())
                    skipped[at] = skipped.get(at, 0) + int((mine & each.skipped[key]).sum())
    return {at: skipped[at] / asked[at] for at in asked}


CASES: dict[str, Sequence[dict[str, Any]]] = {
    "cosine": [similarity()],
    "change, FFN": [similarity("2:", "all", "ffn", measure="change")],
    "holes": [similarity(skip="attention", kv="omit")],
    "classes apart": [
        similarity("1:3", ["image"], "ffn"),
        similarity("1:4", ["text", "generated"], "ffn", threshold=0.99),
    ],
}


@pytest.mark.parametrize("rate", [0.3, 0.7])
@pytest.mark.parametrize("name", CASES)
def test_each_layer_lets_the_wanted_share_skip(
    stock: Any, samples: Samples, name: str, rate: float
) -> None:
    model = prepared(stock, routed(*CASES[name]))
    found = calibrate(model, samples, rate, new_tokens=NEW, tolerance=NEAR, sweeps=12)
    assert found.is_reached and found.gap <= NEAR
    assert fastskip.plan_of(model).policy == found.policy
    # A rule a layer, each with a threshold of its own.
    assert [rule.layers for rule in found.policy.routers] == [(s.layer,) for s in found.shares]
    shares = measured(model, samples, found)
    assert shares == {(s.router, s.layer): s.achieved for s in found.shares}
    assert all(abs(share - rate) <= NEAR for share in shares.values())


def test_overall_sets_one_threshold_a_rule(stock: Any, samples: Samples) -> None:
    model = prepared(stock, routed(*CASES["cosine"]))
    found = calibrate(model, samples, 0.5, per="overall", new_tokens=NEW, tolerance=0.01, sweeps=12)
    (rule,) = found.policy.routers
    assert rule.layers == "1:4" and rule.threshold != 0.5
    assert found.is_reached and abs(found.achieved - 0.5) <= 0.01
    each = [share.achieved for share in found.shares]
    assert max(each) - min(each) > 0.02  # layers differ; only together they make the half
    assert measured(model, samples, found) == {(0, s.layer): s.achieved for s in found.shares}


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_the_ends(stock: Any, samples: Samples, rate: float) -> None:
    model = prepared(stock, routed(similarity([2], measure="change")))
    found = calibrate(model, samples, rate, new_tokens=NEW, tolerance=0)
    assert found.achieved == rate


def linear(tmp_path: Path, stock: Any, **fields: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    size = stock.config.text_config.hidden_size
    write_weights(tmp_path / "w.st", {n: LayerScore(torch.randn(size), 0.0) for n in range(4)})
    head = {"layers": "1:4", "tokens": ["image", "text"], "skip": ["ffn"], "kind": "linear"}
    return head | {"weights": "w.st"} | fields


def test_learned_routers(stock: Any, samples: Samples, tmp_path: Path) -> None:
    policy = SkipPolicy.from_dict(routed(linear(tmp_path, stock, threshold=0)))
    model = prepared(stock, replace(policy, folder=str(tmp_path)))
    found = calibrate(model, samples, 0.4, new_tokens=NEW, tolerance=NEAR)
    assert found.is_reached
    # Saved elsewhere, the policy still knows where the weights lie.
    (tmp_path / "deep").mkdir()
    found.policy.save(tmp_path / "deep" / "policy.json")
    again = SkipPolicy.from_file(tmp_path / "deep" / "policy.json")
    assert measured(model, samples, replace(found, policy=again)) == {
        (s.router, s.layer): s.achieved for s in found.shares
    }


def test_capacity_and_random_need_no_search(stock: Any, samples: Samples, tmp_path: Path) -> None:
    other = {"layers": [1, 2], "tokens": "all", "skip": ["attention"], "kind": "random", "rate": 0}
    policy = SkipPolicy.from_dict(routed(linear(tmp_path, stock, capacity=0.9), other))
    model = prepared(stock, replace(policy, folder=str(tmp_path)))
    found = calibrate(model, samples, 0.25, new_tokens=NEW)
    capped, random = found.policy.routers
    assert (capped.capacity, capped.layers) == (0.75, "1:4")
    assert (random.rate, random.layers) == (0.25, (1, 2))
    assert found.sweeps == 1 and found.is_reached
    assert [share.possible for share in found.shares] == [None] * 5
    # What runs is rounded up, sequence by sequence.
    assert all(0.15 < share.achieved <= 0.25 for share in found.shares if share.router == 0)
    with pytest.raises(PolicyError, match=r"routers\[0\].capacity: .* a rate of 1"):
        calibrate(model, samples, 1, new_tokens=NEW)
    # Of ten rows that is three: no rounding of 1 - 0.7 makes them four.
    assert calibrate(model, samples, 0.7, new_tokens=NEW).policy.routers[0].capacity == 0.3


def test_rows_that_decide_together_make_steps(stock: Any, samples: Samples) -> None:
    """One prompt without an answer is one decision: all of it skips, or nothing."""
    alone = {name: value[:1] for name, value in samples[0].items() if name != "pixel_values"}
    alone["input_ids"] = torch.full_like(alone["input_ids"], 5)
    model = prepared(stock, routed(similarity([2], group="sequence")))
    found = calibrate(model, [alone], 0.4, new_tokens=1, sweeps=4)
    assert not found.is_reached
    (share,) = found.shares
    assert share.possible == share.achieved == 0
    assert found.gap == 0.4
    assert found.sweeps < 4  # it sees that nothing comes nearer


def test_layers_without_scores_do_not_spoil_the_others(stock: Any, samples: Samples) -> None:
    model = prepared(stock, routed(similarity("0:3")))
    found = calibrate(model, samples, 0.5, new_tokens=NEW, tolerance=0.01)
    lowest, *others = found.shares
    assert (lowest.layer, lowest.achieved, lowest.possible) == (0, 0, 0)
    assert lowest.rule.threshold == 0.5  # as it was written
    assert all(abs(share.achieved - 0.5) <= 0.01 for share in others)
    assert not found.is_reached and found.gap == 0.5


def test_provenance(stock: Any, samples: Samples, tmp_path: Path) -> None:
    model = prepared(stock, routed(similarity([2]), provenance={"by": "me"}))
    found = calibrate(model, samples, 0.5, new_tokens=NEW, about={"source": "here"})
    found.policy.save(tmp_path / "found.json")
    written = json.loads((tmp_path / "found.json").read_text())["provenance"]
    assert written["by"] == "me" and written["made_for"] == made_for(model)
    told = written["calibration"]
    assert (told["wanted"], told["per"], told["samples"]) == (0.5, "layer", 6)
    assert (told["new_tokens"], told["source"], told["dtype"]) == (NEW, "here", "float32")
    assert told["cells"] == [share.to_dict() for share in found.shares]
    assert told["cells"][0]["achieved"] == pytest.approx(found.achieved, abs=1e-6)
    assert told["cells"][0]["threshold"] == found.policy.routers[0].threshold
    assert told["versions"]["torch"] == torch.__version__
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]+\+00:00", told["date"])


def test_progress(stock: Any, samples: Samples) -> None:
    ticks: list[int] = []
    model = prepared(stock, routed(similarity()))
    found = calibrate(model, samples, 0.5, new_tokens=NEW, on_sample=lambda: ticks.append(1))
    assert len(ticks) == found.sweeps * len(samples)


def test_watching_changes_nothing(stock: Any, samples: Samples) -> None:
    policies = [routed(similarity(group="sequence")), routed(similarity(skip="ffn"))]
    for policy in policies:
        model, found = prepared(stock, policy), Scores()
        inputs = samples[0]
        with torch.no_grad():
            expected = model(**inputs).logits
            with watching_routers(model, lambda n, router: Observer(router, n, found)):  # noqa: B023
                watched = model(**inputs).logits
            again = model(**inputs).logits
        assert torch.equal(watched, expected) and torch.equal(again, expected)
        rows = int(inputs["attention_mask"].sum())
        assert {at: len(torch.cat(each)) for at, each in found.items()} == {
            (0, layer): rows for layer in (1, 2, 3)
        }


def test_errors_leave_the_policy_as_it_was(stock: Any, samples: Samples) -> None:
    model = prepared(stock, routed(similarity(tokens=["generated"])))
    before = fastskip.plan_of(model).policy
    with pytest.raises(CalibrationError, match=r"none has a row that routers\[0\] .* layer 1"):
        calibrate(model, samples, 0.5, new_tokens=1)

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, samples, 0.5, new_tokens=NEW, on_sample=stop)
    assert fastskip.plan_of(model).policy == before


class Never:
    def decide(self, context: fastskip.RoutingContext) -> fastskip.Decision:
        return fastskip.Decision(torch.zeros(len(context.codes), dtype=torch.bool))


def test_what_cannot_be_calibrated(stock: Any, samples: Samples) -> None:
    model = prepared(stock, routed(similarity()))
    for change, message in (
        ({"rate": 1.5}, "rate: 1.5; allowed: a share"),
        ({"rate": True}, "rate: True"),
        ({"per": "row"}, "per: 'row'; allowed: layer, overall"),
        ({"samples": []}, "samples: 0; allowed: 1 or more"),
        ({"new_tokens": 0}, "new_tokens: 0"),
        ({"sweeps": 0}, "sweeps: 0"),
    ):
        with pytest.raises(CalibrationError, match=re.escape(message)):
            calibrate(model, **{"samples": samples, "rate": 0.5, **change})  # type: ignore[arg-type]
    with pytest.raises(PolicyError, match="routers: nothing to calibrate"):
        calibrate(fastskip.set_policy(model, "dense"), samples, 0.5)
    plug_in = {"layers": [1], "skip": ["ffn"], "kind": "my.router"}
    fastskip.set_policy(model, routed(plug_in), routers={"my.router": Never()})
    with pytest.raises(PolicyError, match=r"routers\[0\].kind: .*plug-in"):
        calibrate(model, samples, 0.5)


def test_the_device_executor_keeps_scores_to_itself(stock: Any, samples: Samples) -> None:
    model = fastskip.apply_(copy.deepcopy(stock), routed(similarity()), impl="torch")
    with pytest.raises(fastskip.UnsupportedModelError, match="impl='reference'"):
        calibrate(model, samples, 0.5)


few = st.sampled_from([-1.0, -0.5, 0.0, 0.25, 0.2500001, 0.5, 0.9, 1.0, float("-inf")])


@given(st.lists(few, min_size=1, max_size=12), st.floats(0, 1))
def test_bars_are_as_near_as_any(drawn: list[float], rate: float) -> None:
    scores = torch.tensor(drawn)
    found = bar_for(scores, rate, -2.0, 2.0)
    shares = {float((scores >= bar).float().mean()) for bar in (*drawn, 2.0) if bar > -2}
    if found is None:
        assert all(score == float("-inf") for score in drawn)
        return
    bar, share = found
    reaching = scores >= torch.tensor(bar, dtype=torch.float32)
    assert share == pytest.approx(float(reaching.float().mean()))
    assert abs(share - rate) == pytest.approx(min(abs(each - rate) for each in shares), abs=1e-6)


@pytest.mark.parametrize(
    ("scores", "rate", "bounds", "bar", "share"),
    [
        ([1.0, 1.0, 0.5], 0, (-1, 1), 0.8, 2 / 3),  # a cosine of 1 always skips
        ([-1.0, 0.0], 1, (-1, 1), -1, 1),
        ([-0.3, -0.1], 0, (-math.inf, 0), -0.09, 0),
        ([0.9312345, 0.912345, 0.1], 1 / 3, (-1, 1), 0.92, 1 / 3),  # in the middle, and short
    ],
)
def test_bars_by_hand(
    scores: list[float], rate: float, bounds: tuple[float, float], bar: float, share: float
) -> None:
    found = bar_for(torch.tensor(scores), rate, *bounds)
    assert found is not None
    assert found[0] == pytest.approx(bar, abs=0.011) and found[1] == pytest.approx(share)


# --- samples and the command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("llava"))


def write(folder: Path, *lines: str) -> Path:
    file = folder / "samples.jsonl"
    file.write_text("\n".join(lines))
    return file


def test_samples_of_a_file(checkpoint: Path, tmp_path: Path) -> None:
    Image.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    file = write(tmp_path, '{"prompt": "what?", "image": "red.png"}', "", '{"prompt": "who?"}')
    found = read_samples(file)
    assert [(each.prompt, each.images) for each in found] == [
        ("what?", (tmp_path / "red.png",)),
        ("who?", ()),
    ]
    assert found[1].where.endswith("line 3")
    config = fastskip.load_model(checkpoint).config
    inputs = inputs_of(found, processor_for(checkpoint), config, 3)
    assert ["pixel_values" in each for each in inputs] == [True, False]


def test_questions_of_an_evaluation_are_samples(checkpoint: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (30, 20), "red").save(photos / "red.png")
    items = [
        {"question": "what?", "answer": "a", "image": "red.png", "kind": "plain"},
        {"question": "which?", "answer": ["a", "b"], "image": ["red.png"] * 2, "metric": "exact"},
    ]
    file = write(tmp_path, *map(json.dumps, items))
    found = read_samples(file, photos)
    assert [each.prompt for each in found] == ["what?", "which?"]
    assert [len(each.images) for each in found] == [1, 2]
    config = fastskip.load_model(checkpoint).config
    inputs = inputs_of(found, processor_for(checkpoint), config, 3)
    assert [len(each["pixel_values"]) for each in inputs] == [1, 2]
    with pytest.raises(SampleError, match=r"images: .*absent is not a folder"):
        read_samples(file, tmp_path / "absent")
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps(routed(similarity("1:3", skip="ffn"))))
    given = ("--samples", file, "--images", photos, "--rate", 0.5, "-o", tmp_path / "half.json")
    succeed("calibrate", "-m", checkpoint, "-p", policy, *given)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", r"line 2: got \[1\]; allowed: one JSON object per line"),
        ('{"image": "a.png"}', "line 2: prompt is None; allowed: a non-empty string"),
        ('{"prompt": " "}', "line 2: prompt is ' '"),
        ('{"prompt": "a", "picture": "b"}', "line 2: unknown field 'picture'"),
        ('{"prompt": "a", "image": 3}', "line 2: image is 3"),
        ('{"prompt": "a", "image": "https://a.b/c.png"}', "line 2: image .* is a URL"),
        ('{"question": 3, "answer": "b"}', "line 2: question is 3"),
        ('{"prompt": "a", "question": "b"}', "line 2: has prompt and question"),
        ('{"prompt": "a", "image": "absent.png"}', "line 2: .*absent.png: no such file"),
        ('{"prompt": "<image> a"}', "line 2: prompt: 1 <image> for 0 images"),
    ],
)
def test_samples_that_cannot_be_used(
    checkpoint: Path, tmp_path: Path, line: str, message: str
) -> None:
    file = write(tmp_path, '{"prompt": "who?"}', line)
    with pytest.raises(SampleError, match=message):
        inputs_of(read_samples(file), processor_for(checkpoint), None, 3)


def test_files_of_samples_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(SampleError, match="absent.jsonl: .*allowed: a readable file"):
        read_samples(tmp_path / "absent.jsonl")
    with pytest.raises(SampleError, match="no samples"):
        read_samples(write(tmp_path, "", " "))


def test_the_command(checkpoint: Path, tmp_path: Path) -> None:
    Image.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    words = ("what is this", "who", "where is it")
    lines = [json.dumps({"prompt": text, "image": "red.png"}) for text in words]
    file, out = write(tmp_path, *lines), tmp_path / "half.json"
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps(routed(similarity("1:3", skip="ffn"))))
    given = ("--rate", 0.5, "--samples", file, "--new-tokens", 3, "-o", out)
    arguments = ("calibrate", "-m", checkpoint, "-p", policy, *given)
    result = succeed(*arguments)
    assert re.search(r"0 +similarity +all +ffn +1 +threshold .* \d\d\.\d%", result.stdout)
    assert "(target 50.0%)" in result.stdout
    assert re.search(r"Overall \d\d\.\d% of rows skip after \d+ sweeps?", result.stdout)
    assert result.stderr.endswith(f"wrote {out}\n")
    found = SkipPolicy.from_file(out)
    assert len(found.routers) == 2
    assert found.provenance["calibration"]["source"] == str(file)
    assert found.provenance["calibration"]["samples"] == 3
    told = json.loads(succeed(*arguments, "--per", "overall", "--json", "--count", 2).stdout)
    assert told["per"] == "overall" and told["policy"] == str(out)
    assert len(SkipPolicy.from_file(out).routers) == 1
    assert SkipPolicy.from_file(out).provenance["calibration"]["samples"] == 2


def test_the_command_on_the_demo(tmp_path: Path) -> None:
    policy, out = tmp_path / "policy.json", tmp_path / "found.yaml"
    policy.write_text(json.dumps(routed(similarity([6], ["image"], "ffn"))))
    few = ("--count", 2, "--new-tokens", 2, "--sweeps", 2)
    succeed("calibrate", "-p", policy, "--rate", 0.25, "-o", out, *few)
    told = SkipPolicy.from_file(out).provenance["calibration"]
    assert told["cells"][0]["candidates"] == 2 * 64
    assert told["achieved"] == pytest.approx(0.25, abs=0.02)


def test_the_command_says_what_is_not_reached(checkpoint: Path, tmp_path: Path) -> None:
    file, policy = write(tmp_path, '{"prompt": "who"}'), tmp_path / "policy.json"
    policy.write_text(json.dumps(routed(similarity([0, 2], skip="ffn"))))
    arguments = ("calibrate", "-m", checkpoint, "-p", policy, "--rate", 0.5, "--samples", file)
    narrow = {"COLUMNS": "80", "NO_COLOR": "1"}
    asked = [str(each) for each in (*arguments, "-o", tmp_path / "o.json")]
    text = CliRunner().invoke(app, asked, env=narrow).stdout
    assert "similarity" in text and "threshold" in text and "…" not in text
    assert "Not reached within 2.0%." in text
    assert "In layer 0 no threshold comes closer" in " ".join(text.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("-p {policy} -o {folder}/x.txt", "--out .*x.txt: allowed: a file"),
        ("-p {policy} -o {folder}/absent/x.json", "--out .*: allowed: .* existing folder"),
        ("-p {policy} -o {folder}/dir.json", "--out .*dir.json: is a folder; allowed: a file"),
        ("-p {policy} -o {folder}/x.json -m {model}", "--samples: needed with --model"),
        ("-p dense -o {folder}/x.json -m {model} --samples {samples}", "routers: nothing to"),
        ("-p {policy} -o {folder}/x.json -m {model} --samples {broken}", "line 1: not JSON"),
    ],
)
def test_errors_of_the_command_are_one_line(
    checkpoint: Path, tmp_path: Path, arguments: str, message: str
) -> None:
    policy, broken = tmp_path / "policy.json", tmp_path / "broken.jsonl"
    policy.write_text(json.dumps(routed(similarity([2]))))
    broken.write_text("{")
    (tmp_path / "dir.json").mkdir()
    names = {
        "policy": policy,
        "folder": tmp_path,
        "model": checkpoint,
        "samples": write(tmp_path, '{"prompt": "who"}'),
        "broken": broken,
    }
    given = (part.format(**names) for part in arguments.split())
    result = run("calibrate", "--rate", 0.5, *given)
    assert result.exit_code == 2, (result.stdout, result.stderr, result.exception)
    assert re.search(message, result.stderr), result.stderr
    assert result.stderr.count("\n") == 1
