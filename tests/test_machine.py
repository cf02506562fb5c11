"""Ceilings: plausible numbers, kept where they belong, measured again when they must be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastskip import machine
from fastskip.plan.costs import Ceilings

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Replaces the measurement by a counter; lists the dtypes measured."""
    calls: list[torch.dtype] = []

    def measure(dtype: torch.dtype, device: torch.device) -> Ceilings:
        calls.append(dtype)
        return Ceilings(1e9 * len(calls), 2e9)

    monkeypatch.setattr(machine, "measure_ceilings", measure)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measurement_is_plausible_and_leaves_torch_alone(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(machine.BUFFER_BYTES, "cpu", 1 << 24)
    monkeypatch.setitem(machine.MATRIX_SIZES, "cpu", (128, 256))
    threads, random = torch.get_num_threads(), torch.get_rng_state()
    found = machine.measure_ceilings(dtype, "cpu")
    assert 1e8 < found.bandwidth_bytes_per_s < 1e14
    assert 1e7 < found.flops_per_s < 1e16
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), random)


def test_kept_by_key_and_refreshed_on_request(
    measured: list[torch.dtype], cache_home: Path
) -> None:
    first = machine.ceilings(torch.float32)
    assert machine.ceilings(torch.float32, "cpu") == first
    machine.ceilings(torch.bfloat16)
    assert measured == [torch.float32, torch.bfloat16]
    assert machine.ceilings(torch.float32, refresh=True) != first
    kept = json.loads((cache_home / "fastskip" / "ceilings.json").read_text())
    assert set(kept) == {machine.machine_key(d, CPU) for d in (torch.float32, torch.bfloat16)}
    assert [path.name for path in (cache_home / "fastskip").iterdir()] == ["ceilings.json"]


def test_key_names_what_a_measurement_depends_on() -> None:
    key = machine.machine_key(torch.bfloat16, CPU)
    for part in (f"{torch.get_num_threads()} threads", "bfloat16", torch.__version__):
        assert part in key


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "\xff",
        "[" * 100_000,
        '{"KEY": 3}',
        '{"KEY": {"flops_per_s": 1.0}}',
        '{"KEY": {"bandwidth_bytes_per_s": -1.0, "flops_per_s": 1.0}}',
        '{"KEY": {"bandwidth_bytes_per_s": NaN, "flops_per_s": 1.0}}',
        '{"KEY": {"bandwidth_bytes_per_s": "1", "flops_per_s": 1.0}}',
    ],
)
def test_corrupt_file_is_measured_anew(measured: list[torch.dtype], text: str) -> None:
    path = machine.cache_file()
    path.parent.mkdir(parents=True)
    path.write_text(text.replace("KEY", machine.machine_key(torch.float32, CPU)), "latin-1")
    first = machine.ceilings(torch.float32)
    assert machine.ceilings(torch.float32) == first
    assert measured == [torch.float32]


def test_other_entries_survive(measured: list[torch.dtype]) -> None:
    path = machine.cache_file()
    path.parent.mkdir(parents=True)
    path.write_text('{"another machine": {"bandwidth_bytes_per_s": 1.0, "flops_per_s": 1.0}}')
    machine.ceilings(torch.float32)
    assert "another machine" in json.loads(path.read_text())


def test_a_cache_that_cannot_be_written_is_reported(
    measured: list[torch.dtype], cache_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (cache_home / "fastskip").write_text("a file where the folder should be")
    assert machine.ceilings(torch.float32).flops_per_s == 2e9
    assert "cannot be cached" in caplog.text


def test_without_the_variable_the_cache_is_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert machine.cache_file() == tmp_path / ".cache" / "fastskip" / "ceilings.json"


def test_errors() -> None:
    with pytest.raises(ValueError, match="cpu, cuda"):
        machine.measure_ceilings(torch.float32, "meta")
    with pytest.raises(ValueError, match="floating point"):
        machine.measure_ceilings(torch.int8)


@pytest.mark.gpu
def test_gpu_measurement() -> None:
    found = machine.measure_ceilings(torch.bfloat16, "cuda")
    assert found.bandwidth_bytes_per_s > 1e11
    assert found.flops_per_s > 1e12
