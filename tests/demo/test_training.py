"""Batches are what a prompt with one question looks like; a run can be cut off and taken up."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import LlavaProcessor

from fastskip.demo import checkpoint_path
from fastskip.demo.dropping import FIRST, draw_cells, dropped
from fastskip.demo.evaluation import prompt
from fastskip.demo.learning import answer_loss, patch_answers
from fastskip.demo.model import Size, build_model
from fastskip.demo.packing import IGNORED, Mixture, Packer, normalise
from fastskip.demo.precision import Precision
from fastskip.demo.recipe import MIXTURE, SMALLER_STAGES, STAGES, Run, Trainer
from fastskip.demo.scenes import COLOURS, SHAPES, Split, draw, render, scenes
from fastskip.demo.smaller import TOWER, load, save_without_tower
from fastskip.demo.team import Team
from fastskip.demo.text import build_processor
from fastskip.demo.train import main, parse


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    return build_processor()


def test_packed_question_equals_its_own_prompt(processor: LlavaProcessor) -> None:
    """The packed logits of each answer equal those of the question asked alone, by `generate`'s
    inputs: same tokens, same positions, same pixels."""
    tokenizer = processor.tokenizer
    model = build_model(tokenizer, seed=0).eval()
    scene = scenes(Split.TRAIN, 1, seed=0)[0]
    packer = Packer(tokenizer, Mixture(MIXTURE, conversations=0.0))
    batch = packer.pack([scene], np.random.default_rng(0))
    inner = model.model
    with torch.no_grad():
        image = inner.multi_modal_projector(
            inner.vision_tower(batch.pixels).last_hidden_state[:, 1:]
        )
        embeds = inner.language_model.embed_tokens(batch.ids)
        embeds[:, 2 : 2 + image.shape[1]] = image
        hidden = inner.language_model(
            inputs_embeds=embeds, attention_mask=batch.visible, position_ids=batch.positions
        ).last_hidden_state
        packed = model.lm_head(hidden)[0]
        for number in range(1, len(batch.kinds[0]) + 1):
            own = (batch.questions[0] == number).nonzero()[:, 0]
            ids = batch.ids[0, own]
            stop = (ids == tokenizer.convert_tokens_to_ids("ASSISTANT:")).nonzero().item() + 1
            text = prompt(processor, tokenizer.decode(ids[: stop - 1]))
            inputs = processor(images=[draw(scene)], text=[text], return_tensors="pt")
            alone = model(**inputs).logits[0, -1]
            torch.testing.assert_close(packed[own[stop - 1]], alone, atol=2e-4, rtol=1e-3)


def test_only_answers_are_learned(processor: LlavaProcessor) -> None:
    tokenizer = processor.tokenizer
    batch = Packer(tokenizer, Mixture(MIXTURE)).pack(
        scenes(Split.TRAIN, 8, seed=1), np.random.default_rng(0)
    )
    wanted = batch.labels != IGNORED
    rows, columns = wanted.nonzero().T
    assert torch.equal(batch.labels[wanted], batch.ids[rows, columns + 1])
    ends = (batch.labels == tokenizer.eos_token_id).sum(1).tolist()
    assert ends == [len(kinds) for kinds in batch.kinds]
    assert tokenizer.unk_token_id not in batch.ids


def test_pixels_are_those_of_the_image_processor(processor: LlavaProcessor) -> None:
    found = scenes(Split.TRAIN, 3, seed=2)
    ours = normalise(torch.from_numpy(render(found)))
    theirs = processor.image_processor([draw(scene) for scene in found], return_tensors="pt")
    torch.testing.assert_close(ours, theirs["pixel_values"], atol=1e-5, rtol=0)


def test_patch_answers_name_what_the_patch_shows() -> None:
    (scene,) = scenes(Split.TRAIN, 1, seed=5)
    found = {name: values[0].reshape(8, 8) for name, values in patch_answers([scene]).items()}
    shown = {(f.row, f.column): f for f in scene.figures}
    for y in range(8):
        for x in range(8):
            figure = shown.get((y // 2, x // 2))
            assert found["row"][y, x] == y // 2 and found["column"][y, x] == x // 2
            assert found["colour"][y, x] == (COLOURS.index(figure.colour) + 1 if figure else 0)
            assert found["shape"][y, x] == (SHAPES.index(figure.shape) + 1 if figure else 0)


def test_gradients_reach_what_the_stage_learns(processor: LlavaProcessor) -> None:
    model = build_model(processor.tokenizer, seed=0)
    packer = Packer(processor.tokenizer, Mixture(MIXTURE))
    batch = packer.pack(scenes(Split.TRAIN, 2, seed=0), np.random.default_rng(0))
    for train_vision in (False, True):
        model.zero_grad()
        answer_loss(model, batch, train_vision)[0].backward()
        reached = {name for name, p in model.named_parameters() if p.grad is not None}
        assert any("vision_tower" in name for name in reached) is train_vision
        assert any("multi_modal_projector" in name for name in reached)
        assert any("language_model" in name for name in reached)


def short(folder: Path, minutes: float | None = None) -> Run:
    stages = tuple(replace(stage, steps=3, batch=2) for stage in STAGES)
    return Run(folder, stages=stages, save_every=1, minutes=minutes)


def test_a_run_cut_off_goes_on_as_if_it_had_not_been(
    tmp_path: Path, processor: LlavaProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Trainer(short(tmp_path / "whole"), processor.tokenizer)
    monkeypatch.setattr(Trainer, "_report", lambda trainer: "")
    assert whole.train()

    class CutOff(Exception):
        pass

    parts = tmp_path / "parts"
    for stage, step in [(0, 1), (2, 1)]:
        trainer = Trainer(short(parts), processor.tokenizer)
        plain = trainer._loss

        def loss(*arguments, at=(stage, step), trainer=trainer, plain=plain):  # type: ignore
            if (trainer.stage, trainer.step) == at:
                raise CutOff
            return plain(*arguments)

        trainer._loss = loss  # type: ignore[method-assign]
        with pytest.raises(CutOff):
            trainer.train()
    last = Trainer(short(parts), processor.tokenizer)
    assert last.train()
    theirs = whole.model.state_dict()
    for name, value in last.model.state_dict().items():
        assert torch.equal(value, theirs[name]), name


def test_a_smaller_model_learns_behind_the_bundled_tower(
    tmp_path: Path, processor: LlavaProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = tuple(replace(stage, steps=1, batch=2) for stage in SMALLER_STAGES)
    run = Run(tmp_path, size=Size.SMALL, has_bundled_tower=True, stages=stages)
    trainer = Trainer(run, processor.tokenizer)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert trainer.train()
    bundled = load(Size.LARGE).state_dict()
    for name, value in trainer.model.state_dict().items():
        if name.startswith(TOWER):
            assert torch.equal(value, bundled[name]), name
        elif name.endswith("proj.weight"):
            assert not torch.equal(value, before[name]), name
    path = tmp_path / "small.safetensors"
    save_without_tower(trainer.model.state_dict(), path)
    monkeypatch.setattr("fastskip.demo.smaller.weights_path", {
        Size.SMALL: path, Size.LARGE: checkpoint_path() / "model.safetensors"
    }.get)  # fmt: skip
    read = load(Size.SMALL).state_dict()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(read[name], value.bfloat16().float()), name


def test_precision_can_be_chosen(tmp_path: Path, processor: LlavaProcessor) -> None:
    assert Precision.BFLOAT16.is_bfloat16() and not Precision.FLOAT32.is_bfloat16()
    assert Precision.AUTO.is_bfloat16() is Precision.AUTO.is_bfloat16()
    seen = set()
    for precision in (Precision.FLOAT32, Precision.BFLOAT16):
        stages = (replace(STAGES[1], steps=1, batch=1),)
        run = Run(tmp_path / precision, size=Size.SMALL, precision=precision, stages=stages)
        trainer = Trainer(run, processor.tokenizer)
        head = trainer.model.lm_head
        head.register_forward_hook(lambda _, __, logits: seen.add(logits.dtype))
        trainer.train()
    assert seen == {torch.float32, torch.bfloat16}


def test_a_run_keeps_its_precision(tmp_path: Path, processor: LlavaProcessor) -> None:
    stages = (replace(STAGES[1], steps=1, batch=1),)
    first = Run(tmp_path, size=Size.SMALL, precision=Precision.BFLOAT16, stages=stages)
    Trainer(first, processor.tokenizer).train()
    later = Trainer(replace(first, precision=Precision.FLOAT32), processor.tokenizer)
    assert later.train() and later.is_bfloat16


def test_time_up_stops_resumably(tmp_path: Path, processor: LlavaProcessor) -> None:
    trainer = Trainer(short(tmp_path, minutes=0.0), processor.tokenizer)
    assert not trainer.train()
    assert (tmp_path / "state.pt").exists()


@pytest.mark.parametrize("size", ["large", "small"])
def test_command_trains_and_writes_a_checkpoint(tmp_path: Path, size: str) -> None:
    steps = ["--steps", "1", "--batch", "2", "--processes", "1", "--size", size]
    main(["--out", str(tmp_path), *steps])
    names = {path.name for path in (tmp_path / "checkpoint").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "processor_config.json"} <= names
    assert (tmp_path / f"{size}.safetensors").exists() is (size != "large")


def test_a_team_averages_gradients_and_agrees() -> None:
    gradients, flag, barrier = torch.zeros(2, 10), torch.zeros(1), threading.Barrier(2)
    weights = [
        [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1, 3))]
        for _ in range(2)
    ]
    agreed: dict[int, list[bool]] = {}

    def member(rank: int) -> None:
        team = Team(rank, 2, gradients, flag, cast(Any, barrier))
        weights[rank][0].grad = torch.full((2,), float(rank + 1))
        team.average_(weights[rank])
        agreed[rank] = [team.agree(decision) for decision in (rank == 0, rank == 1)]

    threads = [threading.Thread(target=member, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    for first, second in weights:
        assert first.grad is not None and second.grad is not None
        assert torch.equal(first.grad, torch.full((2,), 1.5))
        assert torch.equal(second.grad, torch.zeros(1, 3))
    assert agreed == {0: [True, False], 1: [True, False]}


def test_dropped_cells_add_nothing_to_image_rows(processor: LlavaProcessor) -> None:
    model = build_model(processor.tokenizer, seed=0).eval()
    layers = model.model.language_model.layers
    embeds = torch.randn(1, 80, 192, generator=torch.Generator().manual_seed(0))
    cells = [(layer, name) for layer in range(len(layers)) for name in ("self_attn", "mlp")]
    seen: dict[int, torch.Tensor] = {}
    for index, layer in enumerate(layers):
        layer.register_forward_hook(
            lambda _, __, out, index=index: seen.__setitem__(
                index, out[0] if isinstance(out, tuple) else out
            )
        )
    with torch.no_grad(), dropped(model, cells, slice(2, 66)):
        model.model.language_model(inputs_embeds=embeds)
    for out in seen.values():
        assert torch.equal(out[:, 2:66], embeds[:, 2:66])
        assert not torch.equal(out[:, 66:], embeds[:, 66:])
    with torch.no_grad():
        model.model.language_model(inputs_embeds=embeds)
    assert not torch.equal(seen[0][:, 2:66], embeds[:, 2:66])


def test_drawn_cells_spare_the_early_layers() -> None:
    rng = np.random.default_rng(0)
    drawn = [draw_cells(rng, 8) for _ in range(400)]
    assert 0.4 < sum(not cells for cells in drawn) / 400 < 0.65
    assert {layer for cells in drawn for layer, _ in cells} == set(range(FIRST, 8))


@pytest.mark.parametrize("option", ["--steps", "--batch", "--processes"])
@pytest.mark.parametrize("number", ["0", "-1", "one"])
def test_numbers_below_one_are_refused(
    option: str, number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(["--out", "runs", f"{option}={number}"])
    told = capsys.readouterr().err
    assert f"argument {option}: {number}; allowed: a whole number from 1" in told


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    for word in (
        "vision",
        "language",
        "all",
        "--steps",
        "--minutes",
        "--size",
        "--precision",
        "resume",
        "examples",
    ):
        assert word in text
