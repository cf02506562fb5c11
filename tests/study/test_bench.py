"""The benchmark of a user's model: who takes part, what is made up, what is told of the times."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig
from typer.testing import CliRunner

import fastskip
from fastskip.cli import app
from fastskip.demo import checkpoint_path
from fastskip.intervals import SpeedVerdict, Spread
from fastskip.plan.costs import Ceilings, floor_seconds
from fastskip.policy import PolicyError, SkipPolicy
from fastskip.prompts import build_inputs, processor_for
from fastskip.sparse import save_sparse
from fastskip.study.bench.contenders import HF, HF_COMPILED, Models
from fastskip.study.bench.errors import BenchError
from fastskip.study.bench.results import BenchResult, Phases, Speedup
from fastskip.study.bench.run import bench, cost_of, ideal_share
from fastskip.study.bench.workload import (
    Workload,
    drawn_image,
    padded,
    repeated,
    synthetic_inputs,
    workload_of,
)
from fastskip.study.evaluation.comparison import prompt_sizes
from fastskip.study.pruning import Recipe, prune_
from tests.checkpoints import VOCAB, build_processor, save_checkpoint
from tests.models import LLAVA_KINDS, tiny_llama, tiny_llava

CEILINGS = Ceilings(1e10, 1e11)
IMAGE_FFN = ("no FFNs", SkipPolicy(SkipPolicy.preset("image_ffn").rules, provenance={"by": "me"}))
RANDOM = SkipPolicy.from_dict(
    {
        "schema_version": 1,
        "routers": [{"layers": "1:3", "skip": ["block"], "kind": "random", "rate": 0.5, "seed": 1}],
    }
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def models(checkpoint: Path) -> Models:
    return Models.load(str(checkpoint), dtype="float32")


@pytest.fixture(scope="module")
def inputs(models: Models) -> dict[str, Any]:
    made = synthetic_inputs(
        build_processor(), models.hf.config, [drawn_image()], text_tokens=40, new_tokens=4
    )
    return repeated(made, 2)


def run(models: Models, inputs: Any, *policies: tuple[str, SkipPolicy], **options: Any) -> Any:
    return bench(models, policies, inputs, CEILINGS, **{"new_tokens": 4, "rounds": 3} | options)


def test_everybody_takes_part(models: Models, inputs: dict[str, Any], tmp_path: Path) -> None:
    fastskip.set_policy(models.ours, "frozen_visual")
    called: list[str] = []
    parallel = ("parallel", SkipPolicy.preset("parallel_blocks"))
    found = run(models, inputs, IMAGE_FFN, ("routed", RANDOM), parallel, on_call=called.append)
    labels = [HF, "dense", "no FFNs", "routed", "parallel"]
    assert [each.label for each in found.contenders] == labels
    # First calls, then three rounds, each of which starts elsewhere.
    rounds = [called[5 * number : 5 * number + 5] for number in range(4)]
    assert all(sorted(each) == sorted(labels) for each in rounds) and len(called) == 20
    assert len({each[0] for each in rounds[1:]}) == 3
    assert fastskip.plan_of(models.ours).policy == SkipPolicy.preset("frozen_visual")

    load = found.workload
    assert (load.batch, load.n_image, load.n_text, load.new_tokens) == (2, 4, 40, 4)
    hf, dense, sparse, routed, arranged = found.contenders
    assert found.dense is dense and found.rounds == 3
    for each in found.contenders:
        assert each.times.ttft_s.median > each.times.prefill_s.median > 0
        assert 0 < each.times.tpot_s.low <= each.times.tpot_s.median <= each.times.tpot_s.high
        assert each.tokens_per_s > 0 and each.peak_bytes is None and each.left_out is None
    assert hf.policy is None and sparse.policy["provenance"] == {"by": "me"}
    assert hf.as_hf == dense.as_hf and dense.as_hf.equal == 8 and sparse.as_hf is None
    assert dense.speedup is None and hf.speedup.ttft.low <= hf.speedup.ttft.high

    plan = fastskip.plan_of(fastskip.set_policy(models.ours, IMAGE_FFN[1]))
    cost = plan.cost(4, 40, 4, 2, text_before=load.text_before)
    assert sparse.flops == cost.flops < dense.flops == hf.flops
    assert sparse.kv_bytes == plan.kv_bytes(4, 40, 3, 2) == dense.kv_bytes
    assert sparse.floor_s.prefill == floor_seconds(cost.prefill, CEILINGS)
    assert sparse.floor_s.decode == pytest.approx(floor_seconds(cost.decode, CEILINGS) / 3)
    assert dense.ideal_share == Phases(1.0, 1.0)
    assert sparse.ideal_share.prefill > 0 and hf.ideal_share is arranged.ideal_share is None
    # What the draws left out, and not what might run.
    assert routed.flops < fastskip.plan_of(fastskip.set_policy(models.ours, RANDOM)).flops(
        4, 40, 4, 2
    )

    path = found.save(tmp_path / "deep" / "er")
    document = json.loads(path.read_text())
    assert [each.name for each in path.parent.iterdir()] == ["bench.json"]
    assert BenchResult.from_dict(document) == found
    assert (document["schema_version"], document["kind"]) == (1, "bench")
    assert document["workload"]["rounds"] == 3
    assert document["circumstances"].keys() >= {"model", "device", "versions", "model_fingerprint"}
    assert document["contenders"][2]["verdict"].keys() == {"ttft", "tpot"}
    with pytest.raises(ValueError, match="allowed: .'bench', 1"):
        BenchResult.from_dict({**document, "schema_version": 2})
    with pytest.raises(KeyError):
        found.of("nobody")


def test_both_models_hold_the_same_weights(models: Models) -> None:
    own = dict(models.ours.named_parameters())
    assert all(own[name] is weight for name, weight in models.hf.named_parameters())
    assert models.hf.generation_config is not models.ours.generation_config


def test_without_hugging_face(checkpoint: Path, inputs: dict[str, Any]) -> None:
    alone = Models.load(str(checkpoint), dtype="bfloat16", hf=False)
    found = run(alone, inputs)
    assert [each.label for each in found.contenders] == ["dense"]
    assert found.dense.as_hf is None and found.circumstances["dtype"] == "bfloat16"


def other_weights(dtype: torch.dtype) -> Models:
    """Two models that have nothing to do with one another."""
    hf, ours = (tiny_llava(vocab=VOCAB, seed=seed, dtype=dtype) for seed in (1, 2))
    return Models(fastskip.apply_(ours), hf)


def test_wrong_tokens_are_not_timed(inputs: dict[str, Any]) -> None:
    called: list[str] = []
    with pytest.raises(BenchError, match=r"dense tokens: \d of 8 .* nothing was timed"):
        run(other_weights(torch.float32), inputs, on_call=called.append)
    assert called == [HF, "dense"]
    # Where rounding decides, they are counted.
    found = run(other_weights(torch.bfloat16), inputs)
    assert found.dense.as_hf.equal < found.dense.as_hf.of == 8


def test_what_cannot_be_compiled_is_left_out(
    models: Models, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = models.hf.generate

    def generate(**options: Any) -> Tensor:
        if "compile_config" in options:
            assert options["cache_implementation"] == "static"
            raise RuntimeError("no compiler here\nand much more")
        tokens: Tensor = plain(**options)
        return tokens

    monkeypatch.setattr(models.hf, "generate", generate)
    found = run(models, inputs, is_compiled=True)
    lost = found.of(HF_COMPILED)
    assert lost.left_out == "RuntimeError: no compiler here" and lost.times is None
    assert BenchResult.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.gpu
def test_memory_is_told_on_a_gpu() -> None:
    models = Models.load(str(checkpoint_path()), dtype="bfloat16", device="cuda")
    config, processor = models.hf.config, processor_for(checkpoint_path())
    made = synthetic_inputs(processor, config, [drawn_image(None)], text_tokens=40, new_tokens=9)
    found = run(models, made, IMAGE_FFN, new_tokens=9)
    weights = sum(weight.nbytes for weight in models.hf.parameters())
    for each in found.contenders:
        assert each.peak_bytes > weights + each.kv_bytes
        assert each.times.ttft_s.median > each.times.prefill_s.median > 0


def test_time_is_limited(models: Models, inputs: dict[str, Any]) -> None:
    assert run(models, inputs, rounds=50, budget_s=0.0).rounds == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [({"new_tokens": 1}, "new_tokens: 1"), ({"rounds": 2}, "rounds: 2; allowed: 3 or more")],
)
def test_bad_numbers(models: Models, inputs: Any, options: Any, message: str) -> None:
    with pytest.raises(BenchError, match=message):
        run(models, inputs, **options)


def test_bad_policies(models: Models, inputs: dict[str, Any]) -> None:
    for twice in ([IMAGE_FFN, IMAGE_FFN], [("dense", SkipPolicy())]):
        with pytest.raises(BenchError, match="appears twice"):
            run(models, inputs, *twice)
    rule = {"layers": [9], "tokens": "all", "skip": ["ffn"]}
    deep = SkipPolicy.from_dict({"schema_version": 1, "rules": [rule]})
    called: list[str] = []
    with pytest.raises(PolicyError, match="layer indices in"):
        run(models, inputs, ("deep", deep), on_call=called.append)
    assert not called


def test_verdicts_and_shares_by_hand() -> None:
    assert SpeedVerdict.of(Spread(1.2, 1.01, 1.4)) is SpeedVerdict.FASTER
    assert SpeedVerdict.of(Spread(1.2, 0.99, 1.4)) is SpeedVerdict.NOT_TOLD_APART
    assert SpeedVerdict.of(Spread(0.9, 0.8, 0.99)) is SpeedVerdict.SLOWER
    both = Speedup(Spread(2, 1.5, 3), Spread(1, 1, 1)).verdicts
    assert both == {"ttft": "faster", "tpot": "not told apart"}
    # Floors promise 4x and 2x; 3x and 0.5x were had.
    found = ideal_share(Phases(3.0, 0.5), Phases(8.0, 4.0), Phases(2.0, 2.0))
    assert found == Phases(0.75, 0.25)


@pytest.mark.parametrize("kind", LLAVA_KINDS)
def test_made_up_prompts_have_just_so_many_tokens(kind: Any) -> None:
    processor, model = build_processor(kind), tiny_llava(kind, vocab=VOCAB)
    shortest = dict(build_inputs(processor, "describe the image.", [drawn_image()]))
    n_image, n_text, before = prompt_sizes(shortest, model.config)
    for text_tokens in (n_text, n_text + 1, n_text + 90):
        found = synthetic_inputs(
            processor, model.config, [drawn_image()], text_tokens=text_tokens, new_tokens=2
        )
        load = workload_of(repeated(found, 3), model.config, 2)
        assert (load.batch, load.n_image, load.n_text) == (3, n_image, text_tokens)
        assert load.text_before == before and bool(found["attention_mask"].all())
        assert torch.equal(found["input_ids"][:, -9:], shortest["input_ids"][:, -9:])
    out = model.generate(**repeated(found, 2), max_new_tokens=2, do_sample=False)
    assert out.shape == (2, n_image + n_text + 92) and torch.equal(out[0], out[1])
    for text_tokens, message in ((n_text - 1, f"{n_text} or more"), (250, "256 in all")):
        with pytest.raises(BenchError, match=message):
            synthetic_inputs(
                processor, model.config, [drawn_image()], text_tokens=text_tokens, new_tokens=9
            )


@pytest.mark.parametrize("kind", LLAVA_KINDS)
def test_prompts_that_are_not_alike_are_padded(kind: Any) -> None:
    processor, model = build_processor(kind), tiny_llava(kind, vocab=VOCAB)
    every = [
        synthetic_inputs(processor, model.config, [drawn_image()], text_tokens=n, new_tokens=3)
        for n in (60, 90, 40)
    ]
    found = padded(every)
    load = workload_of(found, model.config, 3)
    assert (load.batch, load.n_text, load.texts) == (3, 90, (60, 90, 40))
    assert load.text == "60/90/40"
    options = {"max_new_tokens": 3, "do_sample": False}
    together = model.generate(**found, **options)[:, -3:]
    alone = [model.generate(**each, **options)[0, -3:] for each in every]
    assert torch.equal(together, torch.stack(alone))
    assert workload_of(padded(every[:1]), model.config, 3).texts == ()


def test_a_bench_of_prompts_that_are_not_alike(models: Models, tmp_path: Path) -> None:
    every = [
        synthetic_inputs(
            build_processor(), models.hf.config, [drawn_image()], text_tokens=n, new_tokens=4
        )
        for n in (40, 90)
    ]
    found = run(models, repeated(padded(every), 2), IMAGE_FFN)
    assert found.workload.texts == (40, 90, 40, 90)
    assert found.dense.as_hf.equal == 16
    plan = fastskip.plan_of(fastskip.set_policy(models.ours, IMAGE_FFN[1]))
    before = found.workload.text_before
    own = found.of(IMAGE_FFN[0])
    assert own.flops == sum(plan.cost(4, n, 4, 2, text_before=before).flops for n in (40, 90))
    assert own.kv_bytes == sum(plan.kv_bytes(4, n, 3, 2) for n in (40, 90))
    path = found.save(tmp_path)
    assert BenchResult.from_dict(json.loads(path.read_text())) == found


def test_a_step_of_prompts_that_are_not_alike_reads_what_any_row_runs(models: Models) -> None:
    plan = fastskip.plan_of(fastskip.set_policy(models.ours, RANDOM))
    weights = []
    for texts in ((), (40, 41, 40, 41)):
        load = Workload(4, 4, 41, 2, 4, texts)
        weights.append(cost_of(plan, ({0: 0.5}, {0: 0.5}), load).decode.weight_bytes)
    assert weights[0] == weights[1]


def test_made_up_prompts_of_text(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "llama")
    config, processor = AutoConfig.from_pretrained(tmp_path), processor_for(tmp_path)
    found = synthetic_inputs(processor, config, [], text_tokens=50, new_tokens=3)
    assert workload_of(found, config, 3).n_text == 50 and found["input_ids"][0, 0] == 1
    result = run(Models.sharing(tiny_llama(vocab=VOCAB)), found, new_tokens=3)
    assert result.workload.n_image == 0 and result.dense.as_hf.equal == 3


def command(*arguments: object) -> Any:
    machine = ("--bandwidth", "20", "--tflops", "0.1", "--rounds", "3", "--new-tokens", "3")
    return CliRunner().invoke(
        app, ["bench", *machine, *map(str, arguments)], env={"COLUMNS": "120", "NO_COLOR": "1"}
    )


def test_the_command(checkpoint: Path, tmp_path: Path) -> None:
    drawn_image().save(tmp_path / "a.png")
    image = ("-i", tmp_path / "a.png")
    found = command("-m", checkpoint, "-p", "image_ffn", "--batch", 2, "-o", tmp_path, *image)
    assert found.exit_code == 0, (found.output, found.exception)
    assert "4 image and 64 text tokens" in found.stdout and "batch 2" in found.stdout
    assert "image_ffn vs dense: TTFT " in found.stdout
    assert "dense: 6 of 6 greedy tokens match Hugging Face's" in found.stdout
    kept = BenchResult.from_dict(json.loads((tmp_path / "bench.json").read_text()))
    assert kept.of("image_ffn").speedup is not None and "command" in kept.circumstances

    asked = ("-q", "what is it?", "--no-hf", "--json", "--dtype", "bfloat16")
    found = command("-m", checkpoint, "-p", "dense", *image, *asked)
    document = json.loads(found.stdout)
    assert [each["label"] for each in document["contenders"]] == ["dense"]
    assert document["workload"]["n_image"] == 4 and document["workload"]["n_text"] < 64


@pytest.mark.parametrize(("budget", "total"), [((), 4), (("--budget-seconds", 60), None)])
def test_progress_has_no_total_under_a_budget(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, budget: tuple[object, ...], total: int | None
) -> None:
    totals: list[int | None] = []

    def bar(total: int | None, **options: Any) -> Any:
        totals.append(total)
        return tqdm(total=total, **options)

    monkeypatch.setattr("tqdm.tqdm", bar)
    assert command("-m", checkpoint, "--no-hf", *budget).exit_code == 0
    assert totals == [total]


def test_nothing_is_lost_where_it_cannot_be_kept(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: BenchResult, folder: Path) -> Path:
        raise OSError("no space left")

    monkeypatch.setattr(BenchResult, "save", full)
    found = command("-m", checkpoint, "--no-hf", "-o", tmp_path)
    assert isinstance(found.exception, OSError) and re.search(r"^ dense +\d", found.stdout, re.M)


def test_no_contender_is_lost_in_a_narrow_terminal(checkpoint: Path) -> None:
    arguments = ["bench", "--bandwidth", "20", "--tflops", "0.1", "--rounds", "3"]
    arguments += ["--new-tokens", "2", "-m", str(checkpoint), "-p", "image_ffn"]
    found = CliRunner().invoke(app, arguments, env={"COLUMNS": "40", "NO_COLOR": "1"})
    assert found.exit_code == 0, found.output
    for label in ("Hugging Face", "dense", "image_ffn"):
        for quantity in ("TTFT", "TPOT"):
            assert f"\n{label}\n  {quantity}, ms, quartiles: " in found.stdout, label


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-q", "what?", "--text-tokens", "9"], "only without --prompt"),
        (["--no-hf", "--compiled"], "only without --no-hf"),
        (["--text-tokens", "2"], "text_tokens: 2"),
        (["-p", "nonsense"], "nonsense"),
        (["-p", "image_ffn", "-p", "image_ffn"], "one is given twice"),
        (["-i", "gone.png"], "gone.png"),
        (["-m", "no/such/model"], "no such folder"),
        (["--device", "cuda:77"], "cuda:77"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str) -> None:
    found = command(*arguments)
    assert found.exit_code == 2 and message in " ".join(found.output.split())


def test_incomplete_checkpoints_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if "gate_proj" in name)
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the checkpoint has no .*gate_proj"):
        Models.load(str(tmp_path))


def test_sparse_checkpoints_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    model = fastskip.load_model(checkpoint)
    prune_(model, Recipe("magnitude", 0.5))
    save_sparse(model, tmp_path)
    with pytest.raises(BenchError, match="cannot read its weights .*without Hugging Face"):
        Models.load(str(tmp_path))
    assert Models.load(str(tmp_path), hf=False).hf is None
