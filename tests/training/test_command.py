"""`fastskip train` as a user meets it, and what it measures."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import fastskip
from fastskip.policy import SkipPolicy
from fastskip.study.training import DataError, Example, Parts, Settings, Turn
from fastskip.study.training.curve import write_curve
from fastskip.study.training.measuring import batches_of, compare_dense, held_out_loss
from tests.checkpoints import save_checkpoint
from tests.commands.test_cli import run, succeed
from tests.training.conversations import POLICY, examples, picture, prepared, processor

ROW = {
    "image": "a.png",
    "conversations": [
        {"from": "human", "value": "<image>\nwhat?"},
        {"from": "gpt", "value": "red"},
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint, a policy, and six rows of which two are broken."""
    home = tmp_path_factory.mktemp("train")
    save_checkpoint(home / "model", chat_template=None)
    (home / "policy.json").write_text(json.dumps(POLICY))
    picture(1).save(home / "a.png")
    (home / "b.png").write_text("no picture")
    good = [json.dumps(ROW)] * 4
    broken = json.dumps({**ROW, "image": "b.png"})
    (home / "train.jsonl").write_text("\n".join([broken, *good, "{"]))
    (home / "good.jsonl").write_text("\n".join(good))
    return home


def options(folder: Path, out: Path, *more: object) -> list[object]:
    return [
        *("train", "-m", folder / "model", "-p", folder / "policy.json", "-o", out),
        *("--batch", 2, "--compare-dense", 1, *more),
    ]


def test_a_run(folder: Path, tmp_path: Path) -> None:
    data = ("--data", folder / "train.jsonl", "--held-out", folder / "good.jsonl")
    result = succeed(*options(folder, tmp_path, *data, "--steps", 3, "--skip-broken"))
    assert "times as fast as dense" in result.stdout and "Held-out loss" in result.stdout
    assert "2 rows were left out" in result.stdout and "line 6: not JSON" in result.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["losses"]) == report["steps"] == 3 and report["broken"] == 2
    assert report["held_out_loss"]["after"] < report["held_out_loss"]["before"]
    assert report["seconds"]["policy"].keys() == {"forward", "backward"}
    with Image.open(tmp_path / "loss.png") as curve:
        assert curve.format == "PNG" and curve.width > 500
    model = fastskip.load_model(tmp_path / "model")
    assert fastskip.plan_of(model).policy == SkipPolicy.from_dict(POLICY)
    # The checkpoint is whole: it can be used by the other commands.
    succeed("generate", "-m", tmp_path / "model", "-i", folder / "a.png", "-q", "what?")


def test_losses_before_and_after_are_those_of_pruned_weights(folder: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks.safetensors"
    succeed(
        *("prune", "-m", folder / "model", "--method", "magnitude", "--ratio", 0.7),
        *("--save-masks", masks),
    )
    rows = folder / "good.jsonl"
    data = ("--data", rows, "--held-out", rows, "--mask", masks)
    # The only step is the warm-up's first, which changes nothing.
    result = succeed(*options(folder, tmp_path / "run", *data, "--steps", 1, "--json"))
    losses = json.loads(result.stdout)["held_out_loss"]
    assert losses["before"] == losses["after"]


def test_adapters_and_routers(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    data = ("--data", folder / "good.jsonl", "--steps", 2)
    lora = ("--parts", "lora", "--lora-rank", 2)
    succeed(*options(folder, tmp_path / "lora", *data, *lora))
    assert (tmp_path / "lora/adapters/adapter_model.safetensors").is_file()
    succeed(*options(folder, tmp_path / "merged", *data, *lora, "--merge"))
    assert (tmp_path / "merged/model/fastskip_policy.json").is_file()

    rule = {"layers": [1], "skip": ["ffn"], "kind": "linear", "weights": "w", "threshold": 0}
    policy = tmp_path / "routers.json"
    policy.write_text(json.dumps({"schema_version": 1, "routers": [rule]}))
    held_out = ("--held-out", folder / "good.jsonl")
    routers = ("--parts", "routers", "--rate", 0.5, *held_out, "-p", policy)
    untimed = ("--compare-dense", 0, "--json")
    result = succeed(*options(folder, tmp_path / "routers", *data, *routers, *untimed))
    shares = json.loads(result.stdout)["skipped"]
    assert shares.keys() == {"-1", "1"} and 0 <= shares["-1"] <= 1
    found = SkipPolicy.from_file(tmp_path / "routers" / "policy.json")
    assert found.routers[0].kind == "linear"
    fastskip.load_model(folder / "model", policy=found)
    fastskip.load_model(tmp_path / "routers" / "model")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "--data or --demo: neither given"),
        (["--data", "x", "--demo"], "--data or --demo: both given"),
        (["--data", "no.jsonl"], r"no\.jsonl"),
        (["--data", "x", "--merge"], "--merge: --parts is projector"),
        (["--data", "x", "--lora-rank", 64], "--lora-rank 64: --parts is projector; allowed: with"),
        (["--data", "x", "--lora-alpha", 3], "--lora-alpha 3.0: --parts is projector"),
        (["--data", "x", "--steps", 1, "--epochs", 2], "epochs: 2.0; allowed: steps or epochs"),
        (["--demo"], "allowed: only without --demo"),
        (
            ["--data", "x", "--parts", "routers"],
            "--compare-dense 1: training routers computes all that they may skip; allowed: 0",
        ),
        (["--data", "x", "--warmup", 2], "warmup: 2.0"),
        (["--data", "x", "--rate", 0.5], "rate: 0.5; allowed: none, unless parts is routers"),
    ],
)
def test_errors_are_one_line(folder: Path, tmp_path: Path, more: list[Any], message: str) -> None:
    result = run(*options(folder, tmp_path, *more))
    assert result.exit_code == 2
    assert message.replace("\\", "") in result.stderr and result.stderr.count("\n") == 1


def test_the_demo_has_pictures_of_its_own(tmp_path: Path) -> None:
    result = run("train", "--demo", "--images", tmp_path, "-o", tmp_path / "run")
    assert result.exit_code == 2 and not (tmp_path / "run").exists()
    assert f"--images {tmp_path}: the demo draws its own images; allowed: with" in result.stderr


def test_broken_rows_stop_a_run(folder: Path, tmp_path: Path) -> None:
    result = run(*options(folder, tmp_path, "--data", folder / "train.jsonl"))
    assert result.exit_code == 2 and "train.jsonl, line 6: not JSON" in result.stderr


def strict(text: str) -> Any:
    """JSON as its standard has it."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    return json.loads(text, parse_constant=refuse)


def test_going_on(folder: Path, tmp_path: Path) -> None:
    data = ("--data", folder / "good.jsonl", "--compare-dense", 0, "--epochs", 1)
    fresh = options(folder, tmp_path, *data, "--save-every", 1)
    succeed(*fresh)
    report = tmp_path / "report.json"
    first = report.read_text()
    # Nothing is left to do: the times of the run that made the steps stay.
    again = strict(succeed(*fresh, "--resume", "--json").stdout)
    assert again["steps"] == 2
    assert again["seconds_per_step"] is None and again["rows_per_second"] is None
    assert report.read_text() == first and strict(first)["seconds_per_step"] > 0
    assert "No steps were left to do" in succeed(*fresh, "--resume").stdout
    result = run(*fresh, "--resume", "-p", "every_nth_block")
    assert result.exit_code == 2 and '"2:-1:2"' in result.stderr  # and no emoji in its place
    assert re.search(r"policy.rules: \[.*\], in the checkpoints \[\{", result.stderr)
    # The same file elsewhere is the same data, another row is not.
    lines = (folder / "good.jsonl").read_text().replace("red", "green", 1)
    (tmp_path / "other.jsonl").write_text(lines)
    moved = ("--data", tmp_path / "other.jsonl", "--images", folder, "--resume")
    result = run(*fresh, *moved)
    assert result.exit_code == 2 and "data.fingerprint: " in result.stderr
    (tmp_path / "other.jsonl").write_text((folder / "good.jsonl").read_text())
    assert "No steps were left to do" in succeed(*fresh, *moved).stdout


def test_a_finished_run_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    data = ("--data", folder / "good.jsonl", "--compare-dense", 0, "--steps", 1)
    result = succeed(*options(folder, tmp_path, *data))
    assert "1 step, " in result.stdout
    before = (tmp_path / "report.json").read_bytes()
    for more in ((), ("--resume",)):
        result = run(*options(folder, tmp_path, *data, *more))
        assert (
            result.exit_code == 2
            and "holds model of an earlier run; allowed: another folder" in result.stderr
        )
    assert (tmp_path / "report.json").read_bytes() == before


def test_a_run_that_was_cut_off_says_how_it_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C, then the same command again: the way on is told before anything loads."""
    data = ("--data", folder / "good.jsonl", "--compare-dense", 0, "--save-every", 1)

    def stop(bar: Any, count: float) -> None:
        if bar.n or count > 1:
            raise KeyboardInterrupt
        bar.n += count

    monkeypatch.setattr("fastskip.commands.train_run.tqdm.update", stop)
    result = run(*options(folder, tmp_path, *data))
    assert result.exit_code == 130
    kept = f"{tmp_path}/checkpoints/checkpoint-1"
    assert f"stopped; {kept} is kept, --resume continues it" in result.stderr.splitlines()
    monkeypatch.undo()
    result = run(*options(folder, tmp_path, *data))
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    allowed = "another folder, or --resume to continue it"
    assert f"--out {tmp_path}: holds checkpoints of an earlier run; allowed: {allowed}" in (
        result.stderr
    )
    assert "2 steps, " in succeed(*options(folder, tmp_path, *data, "--resume")).stdout


def test_halves_are_warned_of_once(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = ("--data", folder / "good.jsonl", "--steps", 1, "--dtype", "bfloat16")
    succeed(*options(folder, tmp_path, *data))
    assert sum("small updates are lost" in each.getMessage() for each in caplog.records) == 1


def test_the_demo(tmp_path: Path) -> None:
    """Nothing but a folder is needed; the demo's own model learns and gets better."""
    result = succeed(
        *("train", "--demo", "-o", tmp_path, "--steps", 8, "--batch", 4, "--json"),
        *("--compare-dense", 0),
    )
    report = json.loads(result.stdout)
    assert report["held_out_loss"]["after"] < report["held_out_loss"]["before"]


@pytest.mark.parametrize("parts", [Parts.PROJECTOR, Parts.EVERYTHING])
def test_comparing_changes_nothing(parts: Parts) -> None:
    model = prepared().train()
    model.lm_head.weight.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batches = batches_of(examples(), processor(), Settings(batch=3), 2)
    assert [len(batch["input_ids"]) for batch in batches] == [3, 3]
    found = compare_dense(model, batches, Settings(parts=parts), rounds=2)
    assert found.rounds == found.batches == 2 and found.speed_up > 0
    assert min(found.policy.forward, found.policy.backward, found.dense.both) > 0
    assert fastskip.plan_of(model).policy == SkipPolicy.from_dict(POLICY)
    assert model.training and not model.lm_head.weight.requires_grad
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


def test_held_out_loss_is_the_mean_over_tokens() -> None:
    model = prepared()
    one_by_one = batches_of(examples(6), processor(), Settings(batch=1), 6)
    together = batches_of(examples(6), processor(), Settings(batch=6), 1)
    (whole,), counts = together, [int((b["labels"] >= 0).sum()) for b in one_by_one]
    losses = [held_out_loss(model, [batch]) for batch in one_by_one]
    mean = sum(a * b for a, b in zip(losses, counts, strict=True)) / sum(counts)
    # The same numbers in another order of sums.
    allowed = 64 * torch.finfo(torch.float32).eps * abs(mean)
    assert abs(held_out_loss(model, [whole]) - mean) <= allowed
    assert abs(held_out_loss(model, one_by_one) - mean) <= allowed


def test_what_training_leaves_out_is_not_measured(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    broken = Example((Turn("hi", "yes"),), (tmp_path / "a.png",), "row 2")
    long = Example((Turn("what " * 200, "yes"),))
    first, second, third = examples(3)
    data = [first, broken, second, long, third]
    settings = Settings(batch=2, skip_broken=True)
    found = batches_of(data, processor(), settings, 3, max_tokens=150)
    expected = batches_of([first, second, third], processor(), settings, 3)
    assert len(found) == len(expected) == 2
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(DataError, match="row 2: "):
        batches_of(data, processor(), Settings(batch=2), 3)
    with pytest.raises(DataError, match="data: no example can be used; row 2: "):
        batches_of([broken], processor(), settings, 3)


def test_curves_of_one_step(tmp_path: Path) -> None:
    write_curve([1.0], tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as curve:
        assert curve.format == "PNG"
