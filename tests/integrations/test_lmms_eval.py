"""The real lmms-eval asks the bundled model about a task that the test makes."""

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import fastskip
from fastskip.demo import checkpoint_path
from fastskip.prompts import build_inputs, processor_for
from fastskip.prompts.images import load_image
from tests.study.evaluation.test_exam import items_of

pytest.importorskip("lmms_eval", reason="needs lmms-eval: pip install 'fastskip[lmms]'")
pytestmark = pytest.mark.filterwarnings("ignore")

BATCH, COUNT, NEW = 4, 10, 8
WITHOUT_IMAGE = 3
"""Every so many documents have no image."""

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function shapes.pictures
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
generation_kwargs:
  max_new_tokens: {new}
  temperature: 0
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
{more}
"""
FUNCTIONS = """
from PIL import Image

def pictures(document):
    return [Image.open(document["image"])] if document["image"] else []

def missing(document):
    return [Image.open("nowhere.png")] if document["answer"] == "no" else pictures(document)

def earlier_turn(document):
    before = [{"type": "text", "text": "is it day?"}]
    now = [{"type": "image", "url": each} for each in pictures(document)]
    return [
        {"role": "system", "content": [{"type": "text", "text": "be brief"}]},
        {"role": "user", "content": before},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        {"role": "user", "content": [*now, {"type": "text", "text": document["question"]}]},
    ]
"""


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Questions about pictures in files; some come without one."""
    folder = tmp_path_factory.mktemp("documents")
    found = []
    for number, item in enumerate(items_of(COUNT)):
        path = ""
        if number % WITHOUT_IMAGE:
            (image,) = item.images
            assert isinstance(image, Image.Image)
            path = str(folder / f"{number}.png")
            image.save(path)
        found.append({"image": path, "question": item.question, "answer": item.references[0]})
    return found


@pytest.fixture(scope="module")
def tasks(documents: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks, as `--include_path` takes it."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "shapes.jsonl"
    data.write_text("\n".join(map(json.dumps, documents)))
    (folder / "shapes.py").write_text(FUNCTIONS)
    variants = {
        "shapes": "",
        "turns": "doc_to_messages: !function shapes.earlier_turn",
        "broken": "",
    }
    for name, more in variants.items():
        text = TASK.format(name=name, data=data, new=NEW, more=more)
        if name == "broken":
            text = text.replace("shapes.pictures", "shapes.missing")
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Data sets are kept in a folder of the test's own; no hub is asked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


def run(tasks: Path, names: list[str], policy: str = "dense", **options: Any) -> dict[str, Any]:
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    found = simple_evaluate(
        model="fastskip",
        model_args=f"pretrained={checkpoint_path()},policy={policy},dtype=float32,device=cpu",
        tasks=names,
        batch_size=BATCH,
        task_manager=TaskManager(
            include_path=str(tasks), include_defaults=False, model_name="fastskip"
        ),
        **options,
    )
    assert isinstance(found, dict)
    return found


def told(found: dict[str, Any], task: str) -> list[str]:
    """The answers in the order of the documents."""
    samples = sorted(found["samples"][task], key=lambda sample: int(sample["doc_id"]))
    return [sample["filtered_resps"][0] for sample in samples]


def direct(documents: list[dict[str, str]], policy: str) -> list[str]:
    """What `generate` alone says, one prompt at a time."""
    processor = processor_for(checkpoint_path())
    model = fastskip.load_model(checkpoint_path(), policy, dtype="float32")
    found = []
    for document in documents:
        images = [load_image(document["image"])] if document["image"] else []
        inputs = build_inputs(processor, document["question"], images)
        out = model.generate(**inputs, do_sample=False, max_new_tokens=NEW)
        new = out[0, inputs["input_ids"].shape[1] :]
        found.append(processor.decode(new, skip_special_tokens=True).split("\n\n")[0].strip())
    return found


def test_it_is_found_by_its_entry_point() -> None:
    from lmms_eval.models import get_model, get_model_manifest

    assert [each.name for each in entry_points(group="lmms_eval.models")] == ["fastskip"]
    assert get_model_manifest("fastskip").model_id == "fastskip"
    assert get_model("fastskip").__name__ == "FastSkip"


@pytest.fixture(scope="module")
def found(tasks: Path, offline: None) -> dict[str, dict[str, Any]]:
    """What lmms-eval makes of two tasks, by policy."""
    return {policy: run(tasks, ["shapes", "turns"], policy) for policy in ("dense", "image_ffn")}


@pytest.mark.parametrize("policy", ["dense", "image_ffn"])
def test_answers_are_those_of_generate(
    policy: str, found: dict[str, Any], documents: list[dict[str, str]]
) -> None:
    expected = direct(documents, policy)
    assert told(found[policy], "shapes") == expected
    right = [said == document["answer"] for said, document in zip(expected, documents, strict=True)]
    metric = found[policy]["results"]["shapes"]["exact_match,none"]
    assert metric == sum(right) / len(right) > 0


@pytest.mark.parametrize("policy", ["dense", "image_ffn"])
def test_times_of_every_task(policy: str, found: dict[str, Any]) -> None:
    times, samples = found[policy]["throughput"], found[policy]["samples"]
    for task in ("shapes", "turns"):
        ttft, tpot = (times[f"avg_{name}/{task}"] for name in ("ttft", "tpot"))
        assert 0 < ttft < times["total_elapsed_time"] and 0 < tpot < times["total_elapsed_time"]
    counts = [count for task in samples.values() for each in task for count in each["token_counts"]]
    assert len(counts) == 2 * COUNT
    assert times["total_gen_tokens"] == sum(count["output_tokens"] for count in counts)
    assert all(count["input_tokens"] > 3 for count in counts)


def test_earlier_turns_reach_the_model(
    found: dict[str, Any], documents: list[dict[str, str]]
) -> None:
    processor = processor_for(checkpoint_path())
    model = fastskip.load_model(checkpoint_path(), "dense", dtype="float32")
    for number in (1, 2):
        document = documents[number]
        inputs = processor(
            text="USER: be brief USER: is it day? ASSISTANT: yes</s>USER: <image>\n"
            f"{document['question']} ASSISTANT:",
            images=load_image(document["image"]),
            return_tensors="pt",
        )
        out = model.generate(**inputs, do_sample=False, max_new_tokens=NEW)
        answer = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert told(found["dense"], "turns")[number] == answer.strip()


def test_the_results_file_has_metric_and_times(found: dict[str, Any], tmp_path: Path) -> None:
    from lmms_eval.loggers import EvaluationTracker

    tracker = EvaluationTracker(output_path=str(tmp_path))
    tracker.general_config_tracker.model_name_sanitized = "demo"
    plain = {key: value for key, value in found["image_ffn"].items() if key != "samples"}
    tracker.save_results_aggregated(results=plain, samples=None, datetime_str="now")
    check_file(tmp_path)


def check_file(folder: Path) -> None:
    (file,) = folder.glob("**/*_results.json")
    written = json.loads(file.read_text())
    assert 0 < written["results"]["shapes"]["exact_match,none"] <= 1
    assert written["throughput"]["avg_ttft/shapes"] > 0
    assert "policy=image_ffn" in written["config"]["model_args"]


def test_a_sample_that_fails_ends_the_run(tasks: Path, offline: None) -> None:
    with pytest.raises(ValueError, match="task 'broken', doc [0-9]+: .*nowhere.png"):
        run(tasks, ["broken"])


def test_beams_have_no_token_times(tasks: Path, offline: None) -> None:
    found = run(tasks, ["shapes"], limit=3, gen_kwargs="num_beams=2")
    assert len(told(found, "shapes")) == 3
    assert found["throughput"]["total_elapsed_time"] > 0
    assert not [name for name in found["throughput"] if "ttft" in name or "tpot" in name]


def test_likelihoods(documents: list[dict[str, str]]) -> None:
    from lmms_eval.api.instance import Instance

    from fastskip.integrations.lmms_eval.model import FastSkip

    model = FastSkip(str(checkpoint_path()), dtype="float32", device="cpu", batch_size=2)
    model.task_dict = {"shapes": {"test": documents}}
    asked = [
        Instance(
            request_type="loglikelihood",
            arguments=(document["question"], f" {answer}", pictures, number, "shapes", "test"),
            idx=0,
            metadata={"task": "shapes", "doc_id": number, "repeats": 1},
        )
        for number, document in enumerate(documents)
        if document["image"]
        for answer in (document["answer"], "yellow yellow")
    ]
    found = model.loglikelihood(asked)
    right, wrong = found[::2], found[1::2]
    assert all(is_greedy for _, is_greedy in right) and not any(greedy for _, greedy in wrong)
    assert all(good > bad for (good, _), (bad, _) in zip(right, wrong, strict=True))
    with pytest.raises(NotImplementedError, match="supported: generate_until"):
        model.generate_until_multi_round([])


def pictures(document: dict[str, str]) -> list[Any]:
    return [load_image(document["image"])]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"batch_size": "auto"}, "batch_size: 'auto'; allowed: an integer >= 1"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0; allowed"),
        ({"policy": "no_such"}, "no_such"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    from fastskip.integrations.lmms_eval.model import FastSkip

    with pytest.raises(ValueError, match=message):
        FastSkip(str(checkpoint_path()), **arguments)


@pytest.mark.full  # the command first reads the hundreds of tasks that lmms-eval brings
def test_the_command(tasks: Path, tmp_path: Path) -> None:
    arguments = (
        ["--model", "fastskip", "--tasks", "shapes", "--batch_size", str(BATCH)]
        + ["--model_args", f"pretrained={checkpoint_path()},policy=image_ffn,device=cpu"]
        + ["--include_path", str(tasks), "--output_path", str(tmp_path), "--log_samples"]
    )
    done = subprocess.run(
        [sys.executable, "-m", "lmms_eval", *arguments],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "datasets")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    check_file(tmp_path)
