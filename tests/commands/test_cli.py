"""The command line as a user meets it: answers, tables, exit codes, and errors of one line."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, logging
from typer.testing import CliRunner

import fastskip
from fastskip.cli import app
from fastskip.prompts import build_inputs, processor_for
from fastskip.prompts.images import load_image
from tests.checkpoints import save_checkpoint
from tests.models import tiny_llava

COMMANDS = (
    *("generate", "plan", "verify", "calibrate", "train", "prune", "bench", "demo", "policies"),
)
MACHINE = ("--bandwidth", "20", "--tflops", "0.1")


def run(*arguments: object) -> Any:
    terminal = {"COLUMNS": "120", "TERM": "dumb", "NO_COLOR": "1"}
    return CliRunner().invoke(app, [str(each) for each in arguments], env=terminal)


def succeed(*arguments: object) -> Any:
    result = run(*arguments)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("llava"), max_shard_size="20KB")


@pytest.fixture(scope="session")
def text_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "red.png"
    Image.new("RGB", (30, 20), "red").save(path)
    return path


@pytest.fixture(autouse=True)
def kept_progress_bars() -> Iterator[None]:
    """The commands turn them off for the whole process."""
    yield
    logging.enable_progress_bar()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_by_example(command: str) -> None:
    text = succeed(command, "--help").stdout
    assert "Example" in text
    assert f"fastskip {command}" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_whole_in_80_columns(command: str) -> None:
    terminal = {"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"}
    assert "…" not in CliRunner().invoke(app, [command, "--help"], env=terminal).stdout


def test_brackets_in_help_are_not_taken_for_markup() -> None:
    assert "Default: 64" in " ".join(succeed("bench", "--help").stdout.replace("│", " ").split())


def test_help_lists_all_commands() -> None:
    text = succeed("--help").stdout
    for command in COMMANDS:
        assert command in text


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, fastskip.cli; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_version() -> None:
    assert succeed("--version").stdout == f"fastskip {fastskip.__version__}\n"


def test_generate_streams_the_answer_of_hugging_face(checkpoint: Path, picture: Path) -> None:
    result = succeed(
        "generate",
        "-m",
        checkpoint,
        "-i",
        picture,
        "-i",
        picture,
        "-q",
        "what?",
        "--policy",
        "dense",
        "--max-new-tokens",
        7,
    )
    processor = processor_for(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    inputs = build_inputs(processor, "what?", [load_image(picture)] * 2)
    tokens = model.generate(**inputs, max_new_tokens=7, do_sample=False)
    answer = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert result.stdout == answer + "\n"
    assert re.fullmatch(
        r"7 tokens in [\d.]+ s: TTFT [\d.]+ ms, TPOT [\d.]+ ms, [\d.]+ tokens/s, policy dense\n",
        result.stderr,
    )


def test_generate_follows_the_policy(checkpoint: Path, picture: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    succeed("policies", "every_nth_block", "-s", "interval=1", "-s", "start=0", "-o", file)
    arguments = ("generate", "-m", checkpoint, "-i", picture, "-q", "what?", "--max-new-tokens", 5)
    dense = succeed(*arguments, "-p", "dense")
    skipping = succeed(*arguments, "-p", file)
    assert dense.stdout != skipping.stdout
    assert skipping.stderr.endswith("policy every_nth_block\n")


def test_generate_one_token_has_no_tpot(text_only: Path) -> None:
    result = succeed(
        "generate", "-m", text_only, "-q", "what?", "-p", "dense", "--max-new-tokens", 1
    )
    assert result.stderr.startswith("1 token in ")
    assert "TPOT -" in result.stderr


def test_samples_repeat_by_seed(text_only: Path) -> None:
    arguments = ("generate", "-m", text_only, "-q", "what?", "-p", "dense", "--temperature", 2)
    first, again, warm, other = (
        succeed(*arguments, "--seed", seed, "--max-new-tokens", 12, *extra).stdout
        for seed, extra in ((1, ()), (1, ()), (1, ("--warmup",)), (2, ()))
    )
    assert first == again == warm != other


@pytest.mark.parametrize("policy", ["dense", "image_ffn", "every_nth_block"])
def test_verify_holds(policy: str, checkpoint: Path, picture: Path) -> None:
    result = succeed("verify", "-m", checkpoint, "-i", picture, "-p", policy, "--max-new-tokens", 3)
    assert result.stdout.startswith(f"policy {policy} holds")
    assert "3 of 3" in result.stdout


def test_verify_exits_with_1_where_it_does_not_hold(
    text_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastskip.verification import check

    # the runtime leaves nothing out, whatever the policy says
    monkeypatch.setattr(check, "apply_", lambda model, policy: fastskip.apply_(model, "dense"))
    result = run("verify", "-m", text_only, "-p", "every_nth_ffn", "--max-new-tokens", 3)
    assert result.exit_code == 1
    assert result.stdout.startswith("policy every_nth_ffn DOES NOT HOLD")
    assert re.search("first difference: .*layer 2", result.stdout)


def test_threads_are_set_only_on_request(text_only: Path) -> None:
    before = torch.get_num_threads()
    arguments = ("generate", "-m", text_only, "-q", "what?", "-p", "dense", "--max-new-tokens", 1)
    try:
        succeed(*arguments)
        assert torch.get_num_threads() == before
        succeed(*arguments, "--threads", before + 1)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_plan_shows_layers_costs_and_the_ideal(checkpoint: Path) -> None:
    text = succeed("plan", "-m", checkpoint, "-p", "image_ffn", *MACHINE).stdout
    assert "image_ffn on" in text and "4 layers" in text
    assert re.search(r"2 +sequential +attention +attention \+ ffn +attention \+ ffn", text)
    assert re.search(r"prefill FLOPs +[\d.]+ MFLOP +[\d.]+ MFLOP +1\.\d\d", text)
    assert re.search(
        r"Ideal gain: prefill 1\.\d\dx, decode 1\.00x, .* 20 GB/s .* 100 GFLOP/s", text
    )
    assert "1 x (4 image + 64 text positions, 128 new tokens)" in text


@pytest.mark.parametrize(
    ("kind", "assumed"),
    [
        ("llava_next_vicuna", "one image of a single crop; this model cuts larger images"),
        ("qwen2_vl", "one image of 448 x 448 pixels; this model keeps image sizes"),
        ("llava_pixtral", "one image of 16 x 16 pixels; this model keeps image sizes"),
        ("llava", None),
    ],
)
def test_plan_says_what_image_it_counts(tmp_path: Path, kind: Any, assumed: str | None) -> None:
    config = tiny_llava(kind).config
    config.text_config.max_position_embeddings = 4096
    config.save_pretrained(tmp_path)
    arguments = ("plan", "-m", tmp_path, "-p", "dense", *MACHINE)
    text = succeed(*arguments).stdout
    assert f"Assumed: {assumed}" in text if assumed else "Assumed" not in text
    assert "Assumed" not in succeed(*arguments, "--image-tokens", 8).stdout
    found = json.loads(succeed(*arguments, "--json").stdout)["assumed_image"]
    assert found.startswith(assumed) if assumed else found is None
    found = json.loads(succeed(*arguments, "--json", "--image-tokens", 8).stdout)
    assert found["assumed_image"] is None


def test_plan_of_nothing_says_so(checkpoint: Path) -> None:
    text = succeed("plan", "-m", checkpoint, "-p", "dense", *MACHINE).stdout
    assert "Nothing is skipped. Name a policy with -p" in text
    assert "/ policy" not in text
    assert "prefill 1.00x, decode 1.00x" in text


def test_plan_needs_no_weights(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    succeed("plan", "-m", tmp_path, "-p", "dense", *MACHINE)


def test_plan_of_a_quantised_checkpoint_says_what_it_counts(
    checkpoint: Path, tmp_path: Path
) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = ("plan", "-m", tmp_path, "-p", "dense", "--dtype", "float32", *MACHINE)
    text = " ".join(succeed(*arguments).stdout.split())
    assert "quantised but counted as float32" in text
    assert json.loads(succeed(*arguments, "--json").stdout)["is_quantised"] is True


def test_plan_as_json_is_what_the_model_would_run(checkpoint: Path) -> None:
    load = ("--image-tokens", 8, "--text-tokens", 5, "--new-tokens", 3, "--batch", 2)
    arguments = ("plan", "-m", checkpoint, "-p", "image_ffn", *load, *MACHINE, "--json")
    found = json.loads(succeed(*arguments).stdout)
    policy = fastskip.SkipPolicy.preset("image_ffn")
    plan = fastskip.plan_of(fastskip.load_model(checkpoint, policy))
    dense = fastskip.plan_of(fastskip.load_model(checkpoint, "dense"))
    assert fastskip.SkipPolicy.from_dict(found["policy"]) == policy
    for key, each in (("with_policy", plan), ("dense", dense)):
        totals = found[key]
        assert totals["prefill_flops"] + 2 * totals["decode_flops"] == each.flops(8, 5, 3, 2)
        assert totals["kv_bytes"] == each.kv_bytes(8, 5, 2, 2)
    assert found["workload"] == {"image_tokens": 8, "text_tokens": 5, "new_tokens": 3, "batch": 2}
    assert found["ceilings"] == {"bandwidth_bytes_per_s": 20e9, "flops_per_s": 1e11}
    assert [row["cells"]["image"] for row in found["layers"]] == [
        "attention + ffn",
        "attention",
        "attention + ffn",
    ]
    gain = found["dense"]["prefill_floor_s"] / found["with_policy"]["prefill_floor_s"]
    assert found["ideal_speedup"]["prefill"] == pytest.approx(gain)


ROUTERS = (
    {"layers": [1], "tokens": "all", "skip": ["ffn"], "kind": "similarity", "threshold": 0.9},
    {"layers": [2], "tokens": ["text"], "skip": ["attention"], "kind": "random", "rate": 0.3},
)


def routed(folder: Path, *routers: Any) -> Path:
    file = folder / "routed.json"
    file.write_text(json.dumps({"schema_version": 1, "name": "mine", "routers": routers}))
    return file


def test_plan_of_routers_shows_what_to_expect(checkpoint: Path, tmp_path: Path) -> None:
    arguments = ("plan", "-m", checkpoint, "-p", routed(tmp_path, *ROUTERS), *MACHINE)
    text = succeed(*arguments).stdout
    assert "attention + ffn?" in text and "attention? + ffn" in text
    assert re.search(r"dense *\n +dense +all run +all skip +/ all skip", text)
    assert "Pass --rate SHARE" in text
    text = succeed(*arguments, "--rate", 0.5, "--batch", 4).stdout
    assert re.search(r"dense *\n +dense +all run +expected +all skip +/ expected", text)
    assert re.search(r"ideal decode gain +- +1\.00x +1\.\d\dx +1\.\d\dx", text)
    assert "if 50% of rows skip. A decode step of batch 4 then reads 94% of" in " ".join(
        text.split()
    )


def test_plan_of_routers_that_state_their_rate(checkpoint: Path, tmp_path: Path) -> None:
    text = succeed("plan", "-m", checkpoint, "-p", routed(tmp_path, ROUTERS[1]), *MACHINE).stdout
    assert "if 30% of rows skip" in text


def test_plan_of_routers_as_json(checkpoint: Path, tmp_path: Path) -> None:
    from fastskip.plan.costs import generation_cost

    policy = routed(tmp_path, *ROUTERS)
    load = ("--image-tokens", 8, "--text-tokens", 5, "--new-tokens", 3)
    arguments = ("plan", "-m", checkpoint, "-p", policy, *MACHINE, *load, "--json")
    found = json.loads(succeed(*arguments).stdout)["routed"]
    assert found["rates"] is None and found["expected"] is None
    found = json.loads(succeed(*arguments, "--rate", 0.25).stdout)
    plan = fastskip.plan_of(fastskip.load_model(checkpoint, policy))
    assert found["routed"]["rates"] == [0.25, 0.25]
    for key, cost in (
        ("expected", generation_cost(plan.expected(0.25), 8, 5, 3)),
        ("all_skip", plan.when_skipping.cost(8, 5, 3)),
    ):
        assert found["routed"][key]["prefill_flops"] == cost.prefill.flops
        assert found["routed"][key]["decode_bytes"] == cost.decode.bytes / 2
    gain = found["dense"]["decode_floor_s"] / found["routed"]["expected"]["decode_floor_s"]
    assert found["routed"]["expected"]["ideal_speedup"]["decode"] == pytest.approx(gain)
    assert "routed" not in json.loads(
        succeed("plan", "-m", checkpoint, "-p", "image_ffn", *MACHINE, "--json").stdout
    )


def test_plan_measures_the_machine(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastskip import machine
    from fastskip.plan.costs import Ceilings

    asked = []

    def ceilings(dtype: torch.dtype, device: torch.device) -> Ceilings:
        asked.append((dtype, device.type))
        return Ceilings(1e9, 1e12)

    monkeypatch.setattr(machine, "ceilings", ceilings)
    text = succeed(
        "plan", "-m", checkpoint, "-p", "dense", "--dtype", "bfloat16", "--device", "cpu"
    ).stdout
    assert asked == [(torch.bfloat16, "cpu")]
    assert "1 GB/s" in text and "1 TFLOP/s" in text


def test_plan_of_a_text_only_model(text_only: Path) -> None:
    text = succeed("plan", "-m", text_only, "-p", "every_nth_ffn", *MACHINE).stdout
    assert "(0 image + 64 text" in text
    assert "image " not in text.splitlines()[2]


def test_policies_are_listed() -> None:
    from fastskip.policy.presets import PRESETS

    text = succeed("policies").stdout
    for name in PRESETS:
        assert name in text
    assert "interval=2" in text


def test_policy_as_file(tmp_path: Path) -> None:
    options = ("-s", "interval=3", "-s", "scope=image")
    printed = json.loads(succeed("policies", "every_nth_ffn", *options).stdout)
    expected = fastskip.SkipPolicy.preset("every_nth_ffn", interval=3, scope="image")
    assert fastskip.SkipPolicy.from_dict(printed) == expected
    for suffix in ("json", "yaml"):
        file = tmp_path / f"mine.{suffix}"
        text = succeed("policies", "every_nth_ffn", *options, "--layers", 32, "-o", file).stderr
        assert fastskip.SkipPolicy.from_file(file) == expected
        assert re.search(r"^3 +sequential +attention +attention \+ ffn", text, re.MULTILINE)


def test_demo_runs_the_show(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []
    show = ModuleType("fastskip.demo.show")
    show.run = lambda **options: calls.append(options)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fastskip.demo.show", show)
    monkeypatch.setattr("fastskip.demo.show", show, raising=False)
    succeed("demo", "--quick", "--plots", tmp_path)
    assert calls == [{"plots": tmp_path, "quick": True, "json": None}]


@pytest.mark.parametrize(
    "command, message",
    [
        (
            "generate -q hi -m {folder}/absent",
            "--model .*absent: no such folder; allowed: an exist",
        ),
        ("generate -q hi -m {folder}", "--model .*; allowed: a folder or hub checkpoint"),
        ("generate -q hi -m {model} -i absent.png", "absent.png: no such file; allowed: the path"),
        ("generate -q hi -m {model} -i {model}", "a directory; allowed: a JPEG, PNG, WEBP file"),
        ("generate -q <image>hi -m {model}", "1 <image> for 0 images; allowed: one <image> per"),
        ("generate --prompt= -m {model}", "prompt: got ''; allowed: non-empty text"),
        ("generate -q hi -m {model} --max-new-tokens 999", "allowed: at most 256 positions"),
        ("generate -q hi -m {model} -p nothing", "--policy nothing: no such file or preset; allo"),
        ("generate -q hi -m {model} -p {broken}", "broken.json: not JSON .*; allowed: a policy"),
        ("generate -q hi -m {text} -i {image}", "images: got 1; allowed: none"),
        ("generate -q hi -m {text} -p image_ffn", "image"),
        ("generate -q hi -m {model} --device mps", "--device mps: [^;]{1,120}; allowed here: cpu"),
        ("generate -q hi -m {model} --device gpu", "--device gpu: .*; allowed here: cpu"),
        ("generate -q hi -m {weightless}", "--model .*; allowed: .* config and weights"),
        (
            "generate -q hi -m {truncated} -p dense",
            "--model .*deserializing.*; allowed: .* weights",
        ),
        ("generate -q hi -m {bert}", "model_type: 'bert' is not supported; supported: llava"),
        ("verify -m {bert}", "model_type: 'bert' is not supported"),
        ("verify -m {model} -p nothing", "--policy nothing: no such file or preset"),
        ("verify -m {weightless} -p dense", "--model .*; allowed: .* config and weights"),
        ("plan -m {bert}", "model_type: 'bert' is not supported; supported: llava"),
        ("plan -m {folder}/absent", "--model .*absent: no such folder"),
        ("plan -m {folder}", "--model .*; allowed: a folder or hub checkpoint"),
        (
            "plan -m {model} -p {folder}",
            "--policy .*: is a folder; allowed: .* `fastskip policies`",
        ),
        ("plan -m {model} -p visual_withdrawal", "layers.*allowed: slice bounds"),
        ("plan -m {text} --image-tokens 3 " + " ".join(MACHINE), "--image-tokens 3: allowed: 0"),
        ("plan -m {model} --new-tokens 999 " + " ".join(MACHINE), "allowed: at most 256"),
        ("plan -m {model} --tflops 1", "--tflops 1.0: allowed: both, as numbers"),
        ("plan -m {model} --tflops 1 --bandwidth -2", "allowed: both, as numbers"),
        (
            "plan -m {model} -p image_ffn --rate 0.5 " + " ".join(MACHINE),
            "--rate 0.5: allowed: none, the policy has no routers",
        ),
        ("policies -s interval=3", "--set interval=3: no preset is named; allowed: with a"),
        ("policies --layers 3", "--layers 3: no preset is named"),
        ("policies -o {folder}/x.json", "--out .*x.json: no preset is named"),
        ("policies nothing", "preset: got 'nothing'; allowed: dense"),
        ("policies image_ffn -s size=3", "image_ffn.size: unknown option; allowed: start, end"),
        ("policies image_ffn -s start=a", "image_ffn.start: got 'a'; allowed: an integer"),
        ("policies image_ffn -s start", "image_ffn: 'start' is not KEY=VALUE; allowed: KEY=VALUE"),
        ("policies nothing -s start", "preset: got 'nothing'; allowed: dense"),
        ("policies dense -s start", "dense: 'start' is not KEY=VALUE; allowed: no options"),
        (
            "policies image_ffn -s start=2 -s start=3",
            r"image_ffn.start: got \[2, 3\]; allowed: each option once",
        ),
        ("policies pyramid_drop -s stages=7,3", "stages: got '7,3'; .* ascending order"),
        ("plan -p image_ffn:", "image_ffn: '' is not KEY=VALUE; .* is one of start, end"),
        ("plan -p image_ffn:start=2:start=3", r"image_ffn.start: got \[2, 3\]; allowed: each"),
        ("plan -p image_ffn:start=a", "image_ffn.start: got 'a'; allowed: an integer"),
        ("plan -p image:start=1", "--policy image:start=1: no such file or preset"),
        (
            "plan -p image_fnn:start=1",
            r"no such file or preset \(did you mean image_ffn\?\); allow",
        ),
        ("policies image_fnn", r"preset: .*\(did you mean image_ffn\?\); allowed: dense"),
        ("policies image_ffn --layers 2", "allowed: "),
        ("policies image_ffn -o {folder}/x.txt", "--out .*x.txt: the suffix .*; allowed: "),
        ("policies image_ffn -o {folder}/absent/x.json", "No such file.*; allowed: a writable"),
    ],
)
def test_errors_are_one_line(
    command: str,
    message: str,
    checkpoint: Path,
    text_only: Path,
    picture: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "broken.json").write_text("{")
    weightless = shutil.copytree(
        text_only, tmp_path / "weightless", ignore=shutil.ignore_patterns("*.safetensors")
    )
    truncated = shutil.copytree(text_only, tmp_path / "truncated")
    (truncated / "model.safetensors").write_bytes(b"\0" * 20)
    bert = shutil.copytree(weightless, tmp_path / "bert")
    (bert / "config.json").write_text('{"model_type": "bert"}')
    names = {
        "folder": tmp_path,
        "model": checkpoint,
        "text": text_only,
        "image": picture,
        "broken": tmp_path / "broken.json",
        "weightless": weightless,
        "truncated": truncated,
        "bert": bert,
    }
    result = run(*(part.format(**names) for part in command.split()))
    assert result.exit_code == 2, (result.stdout, result.stderr, result.exception)
    assert re.search(message, result.stderr), result.stderr
    assert result.stderr.count("\n") == 1 and result.stderr.endswith("\n")
    assert result.stdout == ""


@pytest.mark.parametrize("arguments", [("generate",), ("plan", "--batch", "0"), ("absent",)])
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Usage" in result.stderr


def test_unexpected_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError("unforeseen")

    monkeypatch.setattr(fastskip.SkipPolicy, "preset", fail)
    result = run("policies", "dense")
    assert isinstance(result.exception, ZeroDivisionError)


def allocate() -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


def run_out_on_a_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.")


@pytest.mark.parametrize("work", [allocate, run_out_on_a_gpu])
def test_memory_that_runs_out_is_one_line(
    work: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastskip.SkipPolicy, "preset", lambda *_, **__: work())
    result = run("policies", "dense")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert re.match("out of memory: .* allocate", result.stderr)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("arguments", [("--help",), ("policies",), ("policies", "dense")])
def test_a_full_disk_is_one_line(arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "fastskip", *arguments]
    with open("/dev/full", "wb") as full:
        found = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
        assert subprocess.run(command, stdout=full, stderr=full).returncode == 2
    assert (found.returncode, found.stderr) == (2, "cannot write: No space left on device\n")


@pytest.mark.parametrize("arguments", [("--help",), ("policies",), ("policies", "dense")])
def test_a_closed_pipe_is_silent(arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "fastskip", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None and running.stderr is not None
        running.stdout.close()
        assert running.stderr.read() == b"" and running.wait() == 1


def test_verify_gives_the_demo_a_scene_and_needs_rows_to_prove_anything(checkpoint: Path) -> None:
    arguments = ("verify", "-p", "image_ffn", "--max-new-tokens", 2)
    text = succeed(*arguments).stdout
    assert text.startswith("policy image_ffn holds (float32")
    assert "image: a generated scene" in text
    result = run(*arguments, "-m", checkpoint)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "image_ffn: not checked, as it only affects image rows" in result.stderr


def test_plan_says_what_steps_read_where_generated_rows_are_routed(tmp_path: Path) -> None:
    apart = {"layers": [1], "tokens": "all", "skip": ["ffn"], "kind": "random", "rate": 0.5}
    one = apart | {"layers": [2], "group": "batch"}
    prompt = apart | {"layers": [3], "tokens": ["text", "image"], "rate": 0.25}
    for routers, said in (
        ((prompt,), "if 25% of rows skip. Decode steps are not routed"),
        ((apart, prompt), "50%, 25% of rows skip. A decode step of batch 4 then reads 94% of"),
        ((apart, one), "then reads 50% (50% by batch), 94% (50% by row) of"),
        ((one, apart), "then reads 50% (50% by batch), 94% (50% by row) of"),
    ):
        policy = routed(tmp_path, *routers)
        text = succeed("plan", "-p", policy, "--batch", 4, *MACHINE).stdout
        assert said in " ".join(text.split())


def test_the_demos_number_format_is_the_same_everywhere_and_told() -> None:
    assert "dense on" in succeed("plan", *MACHINE).stdout.splitlines()[0]
    assert succeed("plan", *MACHINE).stdout.splitlines()[0].endswith("8 layers, float32")
    assert json.loads(succeed("plan", "--json", *MACHINE).stdout)["dtype"] == "float32"
    told = succeed("plan", "--json", "--dtype", "float16", *MACHINE).stdout
    assert json.loads(told)["dtype"] == "float16"


@pytest.mark.parametrize(
    "command, message",
    [
        ("generate -q hi --device meta", "--device meta: holds no data; allowed here: cpu"),
        ("generate -q hi -p " + "long" * 2000, "long: no such file or preset"),
        ("plan --bandwidth inf --tflops inf", "--bandwidth inf --tflops inf: allowed: both"),
        ("plan --bandwidth 1 --tflops 1 --device foo", "--device foo: allowed: only without"),
        ("plan -p \udcff.json", r"--policy \\udcff.json: no such file"),
    ],
)
def test_more_errors_are_one_line(command: str, message: str) -> None:
    result = run(*command.split())
    assert (result.exit_code, result.stdout) == (2, ""), result.exception
    assert re.search(message, result.stderr), result.stderr
    assert result.stderr.count("\n") == 1


def test_seeds_are_what_torch_takes(text_only: Path) -> None:
    arguments = ("generate", "-m", text_only, "-q", "hi", "--max-new-tokens", 1, "--seed")
    assert succeed(*arguments, 2**64 - 1).stderr.endswith("policy dense\n")
    assert run(*arguments, 2**64).exit_code == 2


@pytest.mark.parametrize("wrong", ["shape", "absent"])
def test_weights_that_do_not_fit_are_the_checkpoints_fault(
    wrong: str, text_only: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(text_only, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    own = weights.pop(name)
    if wrong == "shape":
        weights[name] = own[:3].clone()
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    result = run("generate", "-m", broken, "-q", "hi", "-p", "dense")
    assert result.exit_code == 2, result.exception
    assert f"--model {broken}: weights do not fit config.json" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_attention_heads": 5}, "not a multiple of the number of attention heads"),
        ({"num_hidden_layers": "two"}, "'num_hidden_layers' expected int, got str"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: 0 is not supported; supported: 1 or more"),
        ({"hidden_size": -32}, "hidden_size: -32 is not supported; supported: 1 or more"),
        ({"text_config": {"hidden_size": 32}}, "model_type: 'llama' is not supported; supported: "),
    ],
)
def test_values_of_a_config_are_checked(
    changed: dict[str, Any], message: str, text_only: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(text_only, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | changed))
    for command in (("plan",), ("generate", "-q", "hi")):
        result = run(*command, "-m", broken)
        assert (result.exit_code, result.stdout) == (2, ""), result.exception
        assert message in result.stderr and result.stderr.count("\n") == 1


def test_a_cut_off_index_is_the_checkpoints_fault(text_only: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(text_only, tmp_path / "broken")
    (broken / "model.safetensors").rename(broken / "model-00001-of-00001.safetensors")
    (broken / "model.safetensors.index.json").write_text('{"weight_map": {')
    result = run("generate", "-m", broken, "-q", "hi", "-p", "dense")
    assert result.exit_code == 2, result.exception
    assert f"--model {broken}: one of its JSON files is broken (Expecting" in result.stderr


@pytest.mark.parametrize("command", (("generate", "-q", "hi"), ("verify",), ("bench",)))
def test_what_transformers_takes_for_granted_is_one_line(
    command: tuple[str, ...], text_only: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(text_only, tmp_path / "broken")
    (broken / "model.safetensors").rename(broken / "model-00001-of-00001.safetensors")
    (broken / "model.safetensors.index.json").write_text('{"metadata": {}}')
    result = run(*command, "-m", broken, "-p", "dense")
    assert result.exit_code == 2, result.exception
    assert "model.safetensors.index.json: weight_map: None is not supported" in result.stderr
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"hidden_act": "siloo"}))
    result = run(*command, "-m", broken, "-p", "dense")
    assert result.exit_code == 2, result.exception
    assert "hidden_act: 'siloo' is not supported; supported: gelu, " in result.stderr


@pytest.mark.parametrize("command", (("plan",), ("generate", "-q", "hi"), ("bench",)))
def test_a_folder_of_adapters_says_how_they_are_used(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    result = run(*command, "-m", tmp_path)
    assert result.exit_code == 2, result.exception
    assert "whole checkpoints (" in result.stderr and "--merge" in result.stderr


def test_a_narrow_terminal_shows_whole_names() -> None:
    narrow = {"COLUMNS": "40", "TERM": "dumb", "NO_COLOR": "1"}
    text = CliRunner().invoke(app, ["policies"], env=narrow).stdout
    assert "…" not in text
    assert (
        "".join(line[:12].strip() for line in text.splitlines()).count("every_nth_attention") == 1
    )


def test_options_are_shown_as_they_are_set() -> None:
    assert "stages=7,15,23" in succeed("policies").stdout
    found = json.loads(succeed("policies", "pyramid_drop", "-s", "stages=2,4").stdout)
    assert [rule["after_layer"] for rule in found["removals"]] == [2, 4]


def test_launches_of_a_policy_that_no_device_runs() -> None:
    done = CliRunner().invoke(app, ["plan", "-p", "paper/entropy", "--launches", "nvidia-h200"])
    assert done.exit_code == 2 and "needs the plain executor" in done.output.replace("\n", " ")


def test_more_threads_than_processors() -> None:
    done = CliRunner().invoke(app, ["verify", "--threads", "9999"])
    assert done.exit_code == 2 and "--threads 9999: allowed: 1 to" in done.output


def test_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastskip", "--help"], capture_output=True, text=True, check=True
    )
    assert "Usage: fastskip" in done.stdout


def test_a_preset_that_does_not_fit_says_where_its_options_are() -> None:
    done = CliRunner().invoke(app, ["plan", "-p", "visual_withdrawal"])
    told = " ".join(done.output.split())
    assert done.exit_code == 2 and "slice bounds in [-8, 8]" in told
    assert "its options: after; written as visual_withdrawal:after=VALUE" in told
