"""Runs of a few steps: what changes and what does not, resumption, files, masks."""

import copy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

import fastskip
from fastskip.sparse import compress_
from fastskip.study.pruning import Recipe, prune_
from fastskip.study.training import (
    DataError,
    Example,
    Lora,
    Parts,
    Settings,
    SettingsError,
    Trained,
    TrainingError,
    Turn,
    train,
)
from fastskip.study.training.loop import CHECKPOINTS
from tests.batches import random_batch
from tests.checkpoints import build_tokenizer
from tests.merging import assert_equal_parameters
from tests.training.conversations import POLICY, examples, picture, prepared, processor

peft = pytest.importorskip("peft")
MODEL_PARTS = [Parts.PROJECTOR, Parts.LANGUAGE, Parts.EVERYTHING]
LEARNS: dict[Parts, Callable[[str], bool]] = {
    Parts.PROJECTOR: lambda name: "multi_modal_projector" in name,
    Parts.LANGUAGE: lambda name: "vision_tower" not in name,
    # The tower's last layer and norm feed the pooled output only, which LLaVA does not read.
    Parts.EVERYTHING: lambda name: "post_layernorm" not in name and "layers.1." not in name,
}


class Cut(Exception):
    """A run that is cut off."""


def run(model: Any, out: Path | None = None, **settings: Any) -> Trained:
    chosen = Settings(**{"steps": 3, "batch": 2, "learning_rate": 1e-2} | settings)
    return train(model, processor(), examples(), out, chosen)


def state(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(**random_batch(model, images=(1, 0, 2)).inputs()).logits
    return found


@pytest.mark.parametrize("parts", MODEL_PARTS)
def test_what_learns_and_what_does_not(parts: Parts) -> None:
    model = prepared()
    model.lm_head.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before, were = state(model), logits(model)
    trained = run(model, parts=parts, gradient_checkpointing=parts is Parts.LANGUAGE)
    changed = {name for name, tensor in state(model).items() if not tensor.equal(before[name])}
    learned = {name for name in before if LEARNS[parts](name)}
    if parts is Parts.EVERYTHING:
        learned |= {name for name in before if "vision_tower" not in name}
        changed -= {name for name in before if "vision_tower" in name} - learned
    assert changed == learned
    assert not torch.equal(logits(model), were)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert not model.training and trained.model is model
    assert not any(module.gradient_checkpointing for module in model.model.language_model.layers)
    assert len(trained.losses) == len(trained.step_seconds) == 3
    assert trained.examples == 6 and 6 * 20 < trained.rows < 6 * 100
    assert min(trained.rows_per_second or 0, trained.seconds_per_step or 0) > 0


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastskip.study.training.learner.find_spec", lambda name: None)
    with pytest.raises(TrainingError, match="accelerate: not installed; needed: pip install"):
        run(prepared())


def test_it_learns() -> None:
    model = prepared()
    losses = run(model, parts=Parts.LANGUAGE, steps=30, batch=8, schedule="constant").losses
    assert losses[-1] < losses[0] / 2


def test_a_seed_says_it_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(5)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = prepared(), prepared(), prepared()
    losses = run(first, seed=1).losses
    assert torch.equal(torch.rand(3), drawn)  # the caller's generator is where it was
    assert run(again, seed=1).losses == losses
    assert_equal_parameters(again, first)
    assert run(other, seed=2).losses != losses
    assert not list(tmp_path.iterdir())  # without a folder nothing is written


def test_without_checkpoints_there_is_no_folder_for_them(tmp_path: Path) -> None:
    run(prepared(), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("full", ["model", CHECKPOINTS])
def test_a_full_disk_names_the_folder(
    full: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*arguments: Any, **options: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    trained = run(prepared())
    monkeypatch.setattr("safetensors.torch.serialize_file", write)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / full}'"):
        if full == "model":
            trained.save(tmp_path / full)
        else:
            run(prepared(), tmp_path, save_every=1)


@pytest.mark.parametrize("parts", [Parts.PROJECTOR, Parts.LORA])
def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(parts: Parts, tmp_path: Path) -> None:
    # Three epochs of two steps and a half: cut off within the second one.
    settings = Settings(
        parts=parts,
        epochs=3,
        batch=2,
        accumulation=2,
        save_every=2,
        resume=True,
        lora=Lora(rank=2, dropout=0.3),
    )
    whole, cut, resumed = prepared(), prepared(), prepared()
    data = examples(10)
    straight = train(whole, processor(), data, tmp_path / "straight", settings)
    assert len(straight.losses) == 9

    def stop(step: int, steps: int, loss: float) -> None:
        assert steps == 9
        if step == 5:
            raise Cut

    with pytest.raises(Cut):
        train(cut, processor(), data, tmp_path / "cut", settings, on_step=stop)
    kept = sorted(path.name for path in (tmp_path / "cut" / CHECKPOINTS).iterdir())
    assert kept == ["checkpoint-2", "checkpoint-4"]
    again = train(resumed, processor(), data, tmp_path / "cut", settings)
    assert again.losses == straight.losses
    assert len(again.step_seconds) == 5
    assert_equal_parameters(resumed, whole)
    # What is finished stays finished.
    assert train(prepared(), processor(), data, tmp_path / "cut", settings).step_seconds == ()


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The learning rates of optimiser steps, as they are made."""
    found: list[float] = []
    step = torch.optim.AdamW.step

    def told(self: torch.optim.AdamW, *arguments: Any, **keywords: Any) -> Any:
        found.append(round(float(self.param_groups[0]["lr"]), 6))
        return step(self, *arguments, **keywords)

    monkeypatch.setattr(torch.optim.AdamW, "step", told)
    return found


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0, 0.5, 1, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0, 0.5, 1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_schedules(schedule: str, expected: list[float], rates: list[float]) -> None:
    run(prepared(), steps=6, warmup=1 / 3, schedule=schedule, learning_rate=1)
    assert rates == expected


def test_more_steps_go_on_by_the_longer_schedule(rates: list[float], tmp_path: Path) -> None:
    options: dict[str, Any] = {"schedule": "linear", "warmup": 0, "learning_rate": 1, "batch": 1}
    run(prepared(), tmp_path, steps=2, save_every=2, **options)
    run(prepared(), tmp_path, steps=4, save_every=2, resume=True, **options)
    assert rates == [1, 0.5, 0.5, 0.25]


def test_checkpoints_hold_what_learns(tmp_path: Path) -> None:
    model = prepared()
    run(model, tmp_path, save_every=3)
    checkpoint = tmp_path / CHECKPOINTS / "checkpoint-3"
    learned = sum(p.nbytes for name, p in model.named_parameters() if "projector" in name)
    assert (checkpoint / "model.safetensors").stat().st_size < 2 * learned
    with pytest.raises(SettingsError, match="out: .*; allowed: .*, or resume"):
        run(prepared(), tmp_path, save_every=3)
    with pytest.raises(TrainingError, match='parts: "language", in the checkpoints "projector"'):
        run(prepared(), tmp_path, save_every=3, steps=4, resume=True, parts=Parts.LANGUAGE)


def test_only_the_same_run_goes_on(tmp_path: Path) -> None:
    settings = Settings(steps=4, batch=2, save_every=2, resume=True)
    other = {"schema_version": 1, "rules": [{"layers": [1], "skip": ["ffn"]}]}

    def go_on(model: Any, data: Any = None, masks: Any = None, **changed: Any) -> Trained:
        chosen = replace(settings, **changed)
        given = examples() if data is None else data
        return train(model, processor(), given, tmp_path, chosen, masks=masks)

    first = prepared()
    assert len(go_on(first).losses) == 4
    two = "settings.batch: 1, in the .* 2; settings.learning_rate: 1, in the .* 0.001; allowed: "
    for message, options in {
        "policy.rules: .*, in the checkpoints .*": {"model": prepared(other)},
        "model.frozen: ": {"model": prepared(seed=1)},
        "model.parameters: ": {"model": prepared(ffn=64)},
        'model.dtype: "float64", in the checkpoints "float32"': {"model": prepared().double()},
        "data.examples: 9, in the checkpoints 8": {"data": examples(9)},
        "data.fingerprint: ": {"data": examples()[::-1]},
        "masks: ": {"masks": Holes()},
        two: {"batch": 1, "learning_rate": 1},
    }.items():
        with pytest.raises(TrainingError, match=message):
            go_on(**{"model": prepared(), "steps": 6} | options)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="steps: 3; allowed: 4 or more"):
        go_on(prepared(), steps=3)
    # What is trained already comes from the checkpoint, whatever the model has there.
    again = go_on(first, steps=6, save_every=1, skip_broken=True, gradient_checkpointing=True)
    assert len(again.losses) == 6 and len(again.step_seconds) == 2
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(TrainingError, match=r"run.json: .*; allowed: a folder without checkpoints"):
        go_on(prepared(), steps=6)


def test_a_run_that_ended_within_a_pass_takes_no_further_step(tmp_path: Path) -> None:
    settings = Settings(steps=2, batch=2, save_every=2, resume=True)
    model, again = prepared(), prepared()
    first = train(model, processor(), examples(), tmp_path, settings)
    then = train(again, processor(), examples(), tmp_path, settings)
    assert then.losses == first.losses and then.step_seconds == ()
    assert then.seconds_per_step is None and then.rows_per_second is None
    assert_equal_parameters(again, model)


@pytest.mark.parametrize("left", [None, "", '{"global_step": 4, "log_hist'])
def test_a_checkpoint_that_was_being_written_does_not_count(
    left: str | None, tmp_path: Path
) -> None:
    whole, resumed = prepared(), prepared()
    straight = run(whole, tmp_path / "straight", steps=6, save_every=2)
    run(prepared(), tmp_path / "cut", steps=6, save_every=2)
    shutil.rmtree(tmp_path / "cut" / CHECKPOINTS / "checkpoint-4")
    half = tmp_path / "cut" / CHECKPOINTS / "checkpoint-6"
    (half / "optimizer.pt").unlink()
    (half / "trainer_state.json").unlink()
    if left is not None:
        (half / "trainer_state.json").write_text(left)
    # As if it had been killed while it wrote its first one: there is none to go on from.
    again = run(resumed, tmp_path / "cut", steps=6, save_every=2, resume=True)
    assert again.losses == straight.losses and len(again.step_seconds) == 6
    assert_equal_parameters(resumed, whole)
    # Killed at a later one, it goes on from the one before.
    (half / "trainer_state.json").unlink()
    again = run(prepared(), tmp_path / "cut", steps=6, save_every=2, resume=True)
    assert again.losses == straight.losses and len(again.step_seconds) == 2


@pytest.mark.parametrize("parts", MODEL_PARTS)
def test_what_is_saved_loads_back(parts: Parts, tmp_path: Path) -> None:
    model = prepared()
    run(model, parts=parts).save(tmp_path, processor())
    again = fastskip.load_model(tmp_path)
    assert fastskip.plan_of(again).policy == fastskip.SkipPolicy.from_dict(POLICY)
    assert_equal_parameters(again, model)
    assert torch.equal(logits(again), logits(model))


def test_adapters(tmp_path: Path) -> None:
    model, base = prepared(), prepared()
    before = state(model)
    trained = run(model, parts=Parts.LORA)
    names = {name for name, _ in model.named_parameters()}
    adapters = {name for name in names if "lora_" in name}
    assert len(adapters) == 2 * 7 * 4 and not any("vision" in name for name in adapters)
    kept = {name.replace(".base_layer", ""): tensor for name, tensor in state(model).items()}
    assert all(torch.equal(kept[name], tensor) for name, tensor in before.items())
    assert all(bool(tensor.any()) for name, tensor in state(model).items() if "lora_B" in name)
    trained.save(tmp_path / "adapters")
    assert fastskip.SkipPolicy.from_file(tmp_path / "adapters" / "fastskip_policy.json")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapters").eval()
    expected = logits(model)
    assert torch.equal(logits(again.get_base_model()), expected)
    trained.save(tmp_path / "merged", merge=True)
    merged = fastskip.load_model(tmp_path / "merged")
    # Sums of weights are rounded; as in `tests.merging`.
    allowed = 64 * torch.finfo(torch.float32).eps * float(expected.abs().max())
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=allowed)
    assert not torch.equal(logits(prepared()), expected)


def test_adapters_are_merged_once(tmp_path: Path) -> None:
    trained = run(prepared(), parts=Parts.LORA)
    for name in ("first", "second"):
        trained.save(tmp_path / name, merge=True)
    trained.save(tmp_path / "third")
    first, *others = (fastskip.load_model(tmp_path / n) for n in ("first", "second", "third"))
    for other in others:
        assert_equal_parameters(other, first)


def test_a_checkpoint_that_nobody_could_load_is_not_written(tmp_path: Path) -> None:
    """Adapters stay in a model that other parts are then trained of."""
    model = prepared()
    adapted = run(model, parts=Parts.LORA).model
    trained = run(model, parts=Parts.PROJECTOR)
    with pytest.raises(TrainingError, match="model: holds adapters; needed: merge them"):
        trained.save(tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
    expected = logits(model)
    adapted.merge_and_unload()
    trained.save(tmp_path / "whole")
    merged = logits(fastskip.load_model(tmp_path / "whole"))
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_adapters_need_plain_linears() -> None:
    model = prepared()
    adapted = run(model, parts=Parts.LORA).model
    with pytest.raises(SettingsError, match=r"parts: 'lora'; allowed: .* is a peft.*Linear\)"):
        run(model, parts=Parts.LORA)
    adapted.merge_and_unload()
    run(model, parts=Parts.LORA)
    for layers in (":", "2:"):
        pruned = prepared()
        prune_(pruned, Recipe("magnitude", 0.7, layers=layers))
        compress_(pruned)
        with pytest.raises(SettingsError, match=r"parts: 'lora'; .* is a fastskip.*Linear\)"):
            run(pruned, parts=Parts.LORA)
        assert not any("lora" in name for name, _ in pruned.named_parameters())


class Holes:
    """Masks of pruned weights: every other column of one matrix."""

    def __init__(self) -> None:
        self.applied = 0

    def apply_(self, model: Any) -> None:
        self.applied += 1
        model.model.language_model.layers[1].mlp.down_proj.weight[:, ::2] = 0


def test_pruned_weights_stay_zero() -> None:
    model, masks = prepared(), Holes()
    settings = Settings(parts=Parts.LANGUAGE, steps=3, batch=2, accumulation=2, learning_rate=1e-2)
    before = model.model.language_model.layers[1].mlp.down_proj.weight.detach().clone()
    train(model, processor(), examples(), None, settings, masks=masks)
    weight = model.model.language_model.layers[1].mlp.down_proj.weight
    assert masks.applied == 1 + 3
    assert not weight[:, ::2].any()
    assert bool((weight[:, 1::2] != before[:, 1::2]).any())


def test_streams(tmp_path: Path) -> None:
    class Endless:
        def __iter__(self) -> Any:
            while True:
                yield from examples()

    settings = Settings(steps=3, batch=2)
    one, two = prepared(), prepared()
    assert len(train(one, processor(), Endless(), None, settings).losses) == 3
    train(two, processor(), iter(examples(6)), None, settings)
    assert_equal_parameters(one, two)
    with pytest.raises(SettingsError, match="steps: None"):
        train(prepared(), processor(), Endless(), None, Settings())
    with pytest.raises(
        TrainingError, match="data: ended after 1 step; allowed: examples for 3 steps"
    ):
        train(prepared(), processor(), iter(examples(2)), None, settings)


def test_examples_that_break_late(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    broken = Example((Turn("hi", "yes"),), (tmp_path / "a.png",), "row 7")
    data = [*examples(3), broken]
    with pytest.raises(DataError, match=r"row 7: .*a\.png: not an image"):
        train(prepared(), processor(), data, None, Settings(epochs=1, batch=2))
    settings = Settings(epochs=2, batch=2, skip_broken=True)
    trained = train(prepared(), processor(), data, None, settings)
    assert len(trained.losses) == 4
    assert len(trained.broken) == 1 and "row 7" in trained.broken[0]
    trained = train(
        prepared(), processor(), iter(data * 2), None, Settings(steps=3, batch=2, skip_broken=True)
    )
    assert len(trained.broken) == 2
    with pytest.raises(DataError, match="none of 1 examples can be used"):
        train(prepared(), processor(), [broken], None, settings)
    with pytest.raises(DataError, match="no examples"):
        train(prepared(), processor(), [], None, settings)


def test_bfloat16_products_hold_what_learns_in_fp32(tmp_path: Path) -> None:
    prepared().save_pretrained(tmp_path / "before")
    model = fastskip.load_model(tmp_path / "before", dtype="bfloat16")
    seen: set[torch.dtype] = set()
    projector = model.model.multi_modal_projector.linear_1
    handle = projector.register_forward_hook(
        lambda module, inputs, output: seen.update({module.weight.dtype, output.dtype})
    )
    trained = run(model, precision="bfloat16", parts=Parts.LANGUAGE, gradient_checkpointing=True)
    handle.remove()
    assert seen == {torch.float32, torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(torch.tensor(trained.losses).isfinite())
    trained.save(tmp_path / "after")
    assert torch.equal(logits(fastskip.load_model(tmp_path / "after")), logits(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_bfloat16_products_need_weights_that_go_with_them(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    message = f"precision: 'bfloat16'; allowed: weights, or a model in .* not {name}"
    for parts in (Parts.PROJECTOR, Parts.LORA):
        with pytest.raises(SettingsError, match=message):
            run(prepared().to(dtype), precision="bfloat16", parts=parts)
    # Weights that all learn are held in fp32 meanwhile.
    run(prepared().to(dtype), precision="bfloat16", parts=Parts.EVERYTHING)


def test_batches_in_which_nothing_learns() -> None:
    """A projector and conversations without images: as if the step had not been."""
    model = prepared()
    before = state(model)
    data = [Example((Turn(f"{n}?", "yes"),)) for n in range(4)]
    trained = train(model, processor(), data, None, Settings(steps=2, batch=2))
    assert all(loss > 0 for loss in trained.losses)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())


def test_text_only_models() -> None:
    from tests.checkpoints import VOCAB
    from tests.models import tiny_llama

    policy = {"schema_version": 1, "rules": [{"layers": [1], "skip": ["ffn"]}]}
    model = fastskip.apply_(tiny_llama(vocab=VOCAB), policy)
    data = [Example((Turn(f"{n} + 1 =", str(n + 1)),)) for n in range(6)]
    settings = Settings(parts=Parts.LANGUAGE, steps=2, batch=3)
    assert len(train(model, build_tokenizer(), data, None, settings).losses) == 2
    with pytest.raises(SettingsError, match="parts: 'projector'; allowed: .*no projector"):
        train(model, build_tokenizer(), data, None, Settings())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parts": "all"}, "parts: 'all'; allowed: projector, language, everything, lora, routers"),
        ({"steps": 0}, "steps: 0; allowed: a whole number from 1"),
        ({"steps": True}, "steps: True"),
        ({"steps": 1, "epochs": 1}, "epochs: 1; allowed: steps or epochs, not both"),
        ({"batch": 1.5}, "batch: 1.5"),
        ({"learning_rate": 0}, r"learning_rate: 0; allowed: a number in \(0, inf\)"),
        ({"warmup": 1}, r"warmup: 1; allowed: a number in \[0, 1\)"),
        ({"weight_decay": float("nan")}, "weight_decay: nan"),
        ({"rate": 0.5}, "rate: 0.5; allowed: none, unless parts is routers"),
        ({"rate": 1.5, "parts": "routers"}, r"rate: 1.5; allowed: a number in \[0, 1\]"),
        ({"schedule": "steep"}, "schedule: 'steep'"),
        ({"seed": -1}, "seed: -1; allowed: a whole number from 0 to 4294967295"),
        ({"seed": 2**32}, "seed: 4294967296; allowed: a whole number from 0 to 4294967295"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Settings(**settings)


def test_what_needs_a_folder() -> None:
    with pytest.raises(SettingsError, match="save_every: 1"):
        train(prepared(), processor(), examples(), None, Settings(save_every=1))
    with pytest.raises(SettingsError, match="out: None"):
        train(prepared(), processor(), examples(), None, Settings(parts=Parts.ROUTERS))


def test_models_must_be_prepared() -> None:
    plain = copy.deepcopy(prepared())
    del plain._fastskip
    with pytest.raises(TypeError, match="is not prepared"):
        train(plain, processor(), [Example((Turn("a", "b"),), (picture(0),))])
