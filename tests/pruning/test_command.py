"""`fastskip prune`, from a user's files to a pruned model that answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import fastskip
from fastskip.commands import prune as command
from fastskip.demo import checkpoint_path
from fastskip.prompts import processor_for
from fastskip.sparse.matrices import matrices
from fastskip.study import pruning
from fastskip.study.pruning import Recipe, WeightMasks, find_masks
from fastskip.study.samples import inputs_of, read_samples
from tests.checkpoints import save_checkpoint
from tests.commands.test_cli import run, succeed


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    Image.new("RGB", (30, 20), "red").save(folder / "red.png")
    lines = [{"prompt": "what?", "image": "red.png"}, {"prompt": "how many are there?"}]
    (folder / "mine.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return folder / "mine.jsonl"


def test_choices_are_those_of_the_api() -> None:
    for name in ("Method", "Part", "Per"):
        assert list(getattr(command, name)) == list(getattr(pruning, name))


@pytest.mark.parametrize("stored", ["sparse", "dense"])
def test_prunes_on_samples(checkpoint: Path, samples: Path, tmp_path: Path, stored: str) -> None:
    out, file = tmp_path / "pruned", tmp_path / "m.safetensors"
    result = succeed(
        *("prune", "-m", checkpoint, "--ratio", 0.5, "--samples", samples, "--stored", stored),
        *("--layers", "1:", "--part", "ffn", "-o", out, "--save-masks", file),
    )
    assert "50.00% of these weights are zero now" in result.stdout
    assert f"wrote {file} (masks, " in result.stderr and f"wrote {out} (weights, " in result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    assert [row[0] for row in rows if row[-2:] == ["50.00%", "50.00%"]] == ["1", "2", "3"]
    loaded = fastskip.load_model(checkpoint)
    config = loaded.config
    inputs = inputs_of(read_samples(samples), processor_for(checkpoint), config, 1)
    masks = WeightMasks.load(file)
    assert masks == find_masks(loaded, Recipe("wanda", 0.5, part="ffn", layers="1:"), inputs)
    assert masks.provenance["source"] == str(samples) and masks.provenance["samples"] == 2
    masks.apply_(loaded)
    again = fastskip.load_model(out)
    for matrix, other in zip(matrices(again), matrices(loaded), strict=True):
        assert torch.equal(matrix.weight, other.weight), matrix.name
    succeed("generate", "-m", out, "-q", "what?", "--max-new-tokens", 3)


def test_what_needs_hugging_face_says_so_of_sparse_weights(
    checkpoint: Path, tmp_path: Path
) -> None:
    succeed("prune", "-m", checkpoint, "--ratio", 0.5, "--method", "magnitude", "-o", tmp_path)
    result = run("verify", "-m", tmp_path, "-p", "dense", "--max-new-tokens", 2)
    assert result.exit_code == 2
    assert "sparse weights, which Hugging Face's own model cannot read" in result.stderr


def test_reports_as_json_and_combines(checkpoint: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{seed}.safetensors" for seed in (1, 2)]
    for seed, file in enumerate(files, start=1):
        succeed(
            *("prune", "-m", checkpoint, "--method", "random", "--ratio", 0.5, "--seed", seed),
            *("--save-masks", file),
        )
    first, second = map(WeightMasks.load, files)
    both = ("prune", "-m", checkpoint, "--masks", files[0], "--masks", files[1], "--json")
    expected = {
        ("intersection",): first & second,
        ("union",): first | second,
        ("exclusion", "--share", 0.5, "--seed", 3): first.exclude(second, 0.5, seed=3),
    }
    for options, masks in expected.items():
        file = tmp_path / "c.safetensors"
        found = json.loads(succeed(*both, "--combine", *options, "--save-masks", file).stdout)
        assert WeightMasks.load(file) == masks
        assert found["removed"] == round(1 - masks.kept_share(), 6)
        assert [own["layer"] for own in found["layers"]] == [0, 1, 2, 3]
        assert found["masks_bytes"] == file.stat().st_size
        assert len(found["provenance"]["of"]) == 2


def test_zeros_that_were_there_are_counted_once(checkpoint: Path, tmp_path: Path) -> None:
    """A model of which half is gone already: masks by magnitude name nothing else."""
    by_size = ("--method", "magnitude")
    succeed("prune", "-m", checkpoint, "--ratio", 0.5, *by_size, "-o", tmp_path / "half")
    more = ("prune", "-m", tmp_path / "half", *by_size)
    result = succeed(*more, "--ratio", 0.25, "-o", tmp_path / "same")
    assert "50.00% of these weights are zero now (50.00% were zero before)" in result.stdout
    rows = [line.split() for line in result.stdout.splitlines()]
    shares = [row[-3:] for row in rows if row[:1] == ["2"]]
    assert shares == [["25.00%", "0.00%", "50.00%"]]  # asked, removed, zero now
    found = json.loads(succeed(*more, "--ratio", 0.75, "--json", "-o", tmp_path / "less").stdout)
    assert (found["removed"], found["zero"]) == (0.25, 0.75)
    weights = [m.weight for m in matrices(fastskip.load_model(tmp_path / "less"))]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert zeros / sum(weight.numel() for weight in weights) == found["zero"]


def test_the_demo_needs_no_samples(tmp_path: Path) -> None:
    result = succeed(
        *("prune", "--ratio", 0.5, "--count", 2, "--threads", 1, "--json"),
        *("--save-masks", tmp_path / "m.safetensors"),
    )
    found = json.loads(result.stdout)
    assert found["removed"] == 0.5 and found["provenance"]["source"] == "demo, training pictures"
    WeightMasks.load(tmp_path / "m.safetensors").check(fastskip.load_model(checkpoint_path()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--out: missing; allowed: a folder, or --save-masks FILE"),
        (("-o", "{full}"), "allowed: a new or empty folder"),
        (("-o", "{full}/file/x"), "allowed: a folder that can be created and written"),
        (("--save-masks", "{new}/no/m.safetensors"), "allowed: a file in an existing folder"),
        (("-o", "{new}", "--ratio", 2), "ratio: 2.0; allowed: a share in (0, 1)"),
        (("-o", "{new}"), "ratio: None; allowed: a share in (0, 1), such as 0.5, or a pattern"),
        (
            ("-o", "{new}", "--ratio", 0.001, "--method", "magnitude"),
            "--ratio 0.001: too few zeros for sparse storage; allowed: a share of about 0.064 or "
            "more, or --stored dense",
        ),
        (
            ("-o", "{new}", "--pattern", "15:16", "--method", "random"),
            "--pattern 15:16: too few zeros for sparse storage",
        ),
        (("-o", "{new}", "--masks", "{few}"), "--masks: too few zeros for sparse storage"),
        (
            ("-o", "{new}", "--ratio", 0.0001, "--method", "magnitude", "--stored", "dense"),
            "ratio: 0.0001; allowed: more than 0.0003",
        ),
        (
            ("--save-masks", "{new}", "--ratio", 0.5, "--stored", "dense"),
            "--stored dense: only masks are written; allowed: with --out FOLDER",
        ),
        (
            ("-o", "{new}", "--ratio", 0.5, "--method", "magnitude", "--images", "{new}"),
            "not used by --method magnitude; allowed: with --method wanda",
        ),
        (
            ("-o", "{new}", "--ratio", 0.5, "--images", "{new}"),
            "not used without --samples; allowed: with it",
        ),
        (
            ("-o", "{new}", "--ratio", 0.5, "--method", "magnitude", "--samples", "{masks}"),
            "not used by --method magnitude; allowed: with --method wanda",
        ),
        (
            ("-o", "{new}", "--ratio", 0.5, "--combine", "union"),
            "--combine union: no mask files; allowed: with --masks",
        ),
        (("-o", "{new}", "--ratio", 0.5, "--share", 0.5), "--share 0.5: allowed: with --combine"),
        (("-o", "{new}", "--pattern", "4:2"), "pattern: '4:2'; allowed: N:M"),
        (
            ("-o", "{new}", "--ratio", 0.5, "--layers", "9:", "--method", "random"),
            "layers: '9:'; allowed",
        ),
        (("-o", "{new}", "--ratio", 0.5), "--samples: needed with --model"),
        (("-o", "{new}", "--masks", "{new}"), "allowed: a mask file written by fastskip"),
        (("-o", "{new}", "--masks", "{masks}", "--ratio", 0.5), "--ratio 0.5: given with --masks"),
        (("-o", "{new}", "--masks", "{masks}", "--part", "ffn"), "--part ffn: given with --masks"),
        (
            ("-o", "{new}", "--masks", "{masks}", "--share", 0.5),
            "allowed: with --combine exclusion",
        ),
        (
            ("-o", "{new}", "--masks", "{masks}", "--combine", "exclusion"),
            "--combine exclusion: 1 mask file; allowed: two --masks",
        ),
        (("-o", "{new}", "--masks", "{masks}"), "the mask has shape [32, 48]; allowed: [32, 64]"),
    ],
)
def test_errors_are_one_line(
    checkpoint: Path, tmp_path: Path, arguments: tuple[Any, ...], message: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    masks = find_masks(fastskip.load_model(checkpoint), Recipe("random", 0.5))
    masks.save(tmp_path / "masks")
    find_masks(fastskip.load_model(checkpoint), Recipe("random", 0.01)).save(tmp_path / "few")
    model = save_checkpoint(tmp_path / "wide", ffn=64) if "[32, 64]" in message else checkpoint
    places = {name: tmp_path / name for name in ("full", "new", "masks", "few")}
    given = [str(each).format(**places) for each in arguments]
    result = run("prune", "-m", model, *given)
    assert result.exit_code == 2, result.stdout
    assert message in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr
    assert not (tmp_path / "new").exists()


def test_masks_that_cannot_be_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(masks: WeightMasks, path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(WeightMasks, "save", full)
    arguments = ("--method", "random", "--ratio", 0.5, "--save-masks", tmp_path / "masks")
    result = run("prune", "-m", checkpoint, *arguments)
    assert result.exit_code == 2 and f"--save-masks {tmp_path / 'masks'}: " in result.stderr
