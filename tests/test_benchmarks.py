"""The benchmark harness on a tiny model: gates, interleaving, records, report."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

import fastskip
from benchmarks import harness, records
from benchmarks.gate import faults
from benchmarks.harness import Case, Measurement, measure
from benchmarks.mixes import Mix, mixed_prompts
from benchmarks.peers import DEFAULT, MORE, ROUTED_BATCH
from benchmarks.records import Record, record
from benchmarks.replay import ReplayClock
from benchmarks.report import Results, main, markdown, plot, tables
from benchmarks.runs import GROUPS, run_once
from benchmarks.shapes import Shape, models, prompts, random_model
from fastskip import machine
from fastskip.generation.cache_name import CACHE_NAME
from fastskip.plan.costs import generation_cost
from fastskip.plan.mixed_cost import mixed_cost
from fastskip.timing import threads_set

HOME = Path(harness.__file__).parent
TINY_CEILINGS = {"BUFFER_BYTES": {"cpu": 1 << 22}, "MATRIX_SIZES": {"cpu": (64,)}}


def tiny(dtype: torch.dtype) -> Any:
    text = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        head_dim=8,
        vocab_size=64,
        max_position_embeddings=128,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=63,
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    return random_model(config, dtype)


SHAPE = Shape("tiny", tiny, text_before=2, text_after=6)


@pytest.fixture(scope="module")
def measured() -> Measurement:
    peers = tuple(dict.fromkeys((*DEFAULT, *MORE, *ROUTED_BATCH)))
    return measure(Case(SHAPE, torch.float32, batch=2, n_new=5, rounds=2, peers=peers))


@pytest.fixture
def found(measured: Measurement, monkeypatch: pytest.MonkeyPatch) -> list[Record]:
    for name, value in TINY_CEILINGS.items():
        monkeypatch.setattr(machine, name, value)
    return [record(measured, peer.name, g) for peer in measured.case.peers for g in GROUPS]


def test_every_peer_passes_its_gate_and_is_timed_in_every_round(measured: Measurement) -> None:
    assert measured.failures == {}
    assert {name for name, _ in measured.runs} == {peer.name for peer in measured.case.peers}
    assert {len(runs) for runs in measured.runs.values()} == {2}
    for run in (run for runs in measured.runs.values() for run in runs):
        assert 0 < run.prefill < run.ttft < run.e2e
        assert run.tokens.shape == (2, 5)


def test_a_call_of_one_token_has_no_decode_time() -> None:
    """On a GPU peers are warmed up with one among others."""
    both = models(tiny, torch.float32, "cpu")
    run = run_once(both.hf, prompts(both.hf, SHAPE, 1), 1)
    assert run.tokens.shape == (1, 1) and run.prefill > 0 and math.isnan(run.decode)


def test_weights_are_shared() -> None:
    both = models(tiny, torch.float32, "cpu")
    theirs = {name: p.data_ptr() for name, p in both.hf.named_parameters()}
    assert theirs == {name: p.data_ptr() for name, p in both.ours.named_parameters()}
    assert not any("fastskip" in name for name in vars(both.hf))


def test_records_hold_what_is_promised(found: list[Record]) -> None:
    keys = "model policy_id policy_hash batch n_text n_visual n_new ttft_ms tpot_ms tokens_per_s"
    keys += " kv_bytes peak_bytes tflops speedup_vs_dense speedup_vs_hf attn_impl dtype device"
    keys += " threads torch transformers commit floor_ms ideal_speedup share_of_ideal"
    assert all(set(keys.split()) <= set(own) for own in found)
    by_name = {(own["peer"], own["group"]): own for own in found}
    for group in ("prefill", "decode"):
        assert by_name["dense", group]["share_of_ideal"] == pytest.approx(1)
        assert by_name["dense", group]["speedup_vs_dense"] == pytest.approx(1)
        assert by_name["hf", group]["speedup_vs_hf"] == pytest.approx(1)
        assert by_name["half_blocks", group]["ideal_speedup"] > 1.5
        assert by_name["block_pairs", group]["share_of_ideal"] is None
    assert by_name["dense", "prefill"]["share_of_ideal"] == pytest.approx(1)
    assert by_name["half_blocks", "e2e"]["kv_bytes"] * 2 == by_name["hf", "e2e"]["kv_bytes"]


def test_the_gate_finds_another_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    both = models(tiny, torch.float32, "cpu")
    other = fastskip.SkipPolicy.preset("image_ffn")
    swap = fastskip.set_policy
    monkeypatch.setattr(fastskip, "set_policy", lambda model, policy: swap(model, other))
    found = faults(both, {"right": other, "wrong": fastskip.SkipPolicy()})
    assert list(found) == ["wrong"]
    assert found["wrong"].startswith("scores: error")


def test_a_policy_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiler's errors, say, or without memory."""
    both = models(tiny, torch.float32, "cpu")
    bad, swap = fastskip.SkipPolicy.preset("image_ffn"), fastskip.set_policy

    def failing(model: Any, policy: fastskip.SkipPolicy) -> Any:
        if policy is bad:
            raise torch.OutOfMemoryError("planted")
        return swap(model, policy)

    monkeypatch.setattr(fastskip, "set_policy", failing)
    found = faults(both, {"bad": bad, "right": fastskip.SkipPolicy()})
    assert list(found) == ["bad"] and "planted" in found["bad"]


def test_a_peer_that_fails_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "faults", lambda models, policies: {"image_ffn": "wrong"})
    case = Case(SHAPE, torch.bfloat16, batch=1, n_new=4, rounds=1)
    result = measure(case, {"image_ffn", "block_pairs"})
    assert result.failures == {"image_ffn": "wrong"}
    assert {name for name, _ in result.runs} == {"hf", "dense", "block_pairs"}


def test_threads_are_restored_and_hopeless_ones_dropped(measured: Measurement) -> None:
    before = torch.get_num_threads()
    with threads_set(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    (run, *_), *_ = measured.runs.values()
    slow, even = replace(run, ttft=1.0, decode=2.0), replace(run, ttft=4.0, decode=1.1)
    trial = {2: slow, 1: even}.__getitem__
    assert harness.promising([2, 1], trial, n_new=2) == [2]
    assert harness.promising([2, 1], trial, n_new=4) == [2, 1]
    assert harness.promising([2, 1], trial, n_new=16) == [1]
    trials = iter([replace(slow, ttft=30.0), even, slow])
    assert harness.promising([2, 1], lambda count: next(trials), n_new=4) == [2, 1]


def test_replay_shows_recorded_durations() -> None:
    clock, seen = ReplayClock(), []
    clock.load([0.5, 0.25])
    for _ in range(2):
        start = clock()
        clock.play()
        seen.append(clock() - start)
    assert seen == [0.5, 0.25]


def test_report_of_a_file(
    found: list[Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    run = {"command": "pytest benchmarks/", "date": "2000-01-01"}
    Results([record | run for record in found]).save(path)
    assert len(json.loads(path.read_text())["records"]) == len(found)
    (table,) = tables(found)
    main([str(path)])
    printed = capsys.readouterr().out
    assert markdown(table) in printed
    assert "2000-01-01: `pytest benchmarks/`" in printed
    assert "every 2nd block skipped" in printed
    assert (tmp_path / "results.png").stat().st_size > 1000
    with pytest.raises(SystemExit):
        main([str(path), "--case", "none"])


def test_panels_have_titles_of_their_own(found: list[Record]) -> None:
    pytest.importorskip("matplotlib")
    other = [record | {"case": "other", "subject": "routing"} for record in found]
    longer = [record | {"case": "longer", "n_text": 99} for record in found]
    titles = [axis.get_title(loc="right") for axis in plot([*found, *other, *longer]).axes]
    assert len(titles) == len(set(titles)) == 3
    assert titles[1].startswith("routing, ")


def test_cases_that_were_not_run_again_stay() -> None:
    old = [{"case": case, "peer": peer, "run": 1} for case in "ab" for peer in ("hf", "dense")]
    new = [{"case": case, "peer": "hf", "run": 2} for case in "bc"]
    renewed = Results(old).renewed(new)
    assert renewed.records == [*old[:2], *new]
    assert Results([]).renewed(new).records == new


def test_names_of_files_are_plain() -> None:
    assert records.file_name("cpu").removesuffix(".json").replace("-", "").isalnum()


def test_prompts_that_are_not_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TINY_CEILINGS.items():
        monkeypatch.setattr(machine, name, value)
    mix = Mix(images=(1, 0, 2), texts=(6, 9, 3))
    names = {"half_blocks", "image_ffn", "frozen_visual", "fastv"}
    result = measure(Case(SHAPE, torch.float32, 3, n_new=4, rounds=1, mix=mix), names)
    assert result.failures == {}
    both = models(tiny, torch.float32, "cpu")
    inputs = mixed_prompts(both.hf, SHAPE, mix)
    assert inputs["attention_mask"].sum(1).tolist() == [16 + 8, 11, 32 + 5]
    assert len(inputs["pixel_values"]) == 3
    found = {name: record(result, name, "prefill") for name in ("hf", "dense", *names)}
    assert found["dense"]["n_visual"] == (16, 0, 32)
    assert found["dense"]["n_text"] == (8, 11, 5)
    assert 1.5 < found["half_blocks"]["ideal_speedup"] < 3  # of the last layer little is left
    (table,) = tables(list(found.values()))
    assert "16/0/32 image and 8/11/5 text rows" in table.title
    # what the cache holds is what is claimed of these very prompts
    for name in names:
        plan = fastskip.plan_of(fastskip.set_policy(both.ours, result.plans[name].policy))
        cache = both.ours.generate(
            **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True
        )[CACHE_NAME]
        assert cache.live_bytes() == found[name]["kv_bytes"], plan.policy.name


@pytest.mark.parametrize(
    "name", ["half_blocks", "image_ffn", "frozen_visual", "row_50", "batch_50"]
)
def test_sequences_that_are_alike_cost_what_a_batch_of_them_does(name: str) -> None:
    both = models(tiny, torch.float32, "cpu")
    policy = next(peer.policy for peer in (*DEFAULT, *ROUTED_BATCH) if peer.name == name)
    assert policy is not None
    plan = fastskip.plan_of(fastskip.set_policy(both.ours, policy(both.depth)))
    batch = generation_cost(plan.expected(), 16, 8, 5, 3)
    together = mixed_cost([batch] * 3)
    for own, other in ((together.prefill, batch.prefill), (together.decode, batch.decode)):
        assert own.flops == other.flops
        assert own.bytes == other.bytes
        assert own.steps == other.steps
    images, texts = (plan.cost(n_image, 8, 5, 2).prefill for n_image in (16, 0))
    both_kinds = mixed_cost([plan.cost(16, 8, 5, 2), plan.cost(0, 8, 5, 2)]).prefill
    assert both_kinds.weight_bytes == images.weight_bytes
    assert 2 * both_kinds.flops == images.flops + texts.flops


SCRIPTS = [
    ".".join(path.relative_to(HOME.parent).with_suffix("").parts)
    for path in sorted(HOME.rglob("*.py"))
    if 'if __name__ == "__main__"' in path.read_text()
]


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_help_and_measure_nothing(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        importlib.import_module(name).main(["--help"])
    assert left.value.code == 0 and "usage: " in capsys.readouterr().out
