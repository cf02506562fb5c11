"""Files that are there as a whole or not at all, and who may read them."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from fastskip.atomic_files import atomic_write, writing
from fastskip.json_file import write_json
from fastskip.routing.weights import LayerScore, write_weights
from fastskip.study.pruning import KeptSet, WeightMasks


@pytest.fixture(params=[0o022, 0o027], autouse=True)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_new_files_are_readable_as_any_other(tmp_path: Path, umask: int) -> None:
    paths = [tmp_path / name for name in ("a.txt", "tensors", "masks", "routers")]
    with atomic_write(paths[0]) as part:
        part.write_text("a")
    with atomic_write(paths[1]) as part:
        save_file({"a": torch.zeros(1)}, part)
    kept = {"layers.0.mlp.fc1": KeptSet.of(torch.ones(2, 2, dtype=torch.bool))}
    WeightMasks(kept, "").save(paths[2])
    write_weights(paths[3], {0: LayerScore(torch.zeros(2), 0.0)})
    assert [mode(path) for path in paths] == [0o666 & ~umask] * 4


def test_old_files_keep_their_mode(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    path.chmod(0o640)
    with atomic_write(path) as part:
        part.write_text("new")
    assert mode(path) == 0o640 and path.read_text() == "new"


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as part:
        part.write_text("ne")
        raise ZeroDivisionError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_pipe_stays_one(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with atomic_write(pipe) as part:
        part.write_text("through")
    assert os.read(reader, 100) == b"through" and pipe.is_fifo()
    os.close(reader)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_names_what_was_written(tmp_path: Path) -> None:
    link = tmp_path / "report.json"
    link.symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"No space left on device: '{link}'") as caught:
        write_json(link, {})
    assert caught.value.filename == str(link)


def test_a_full_disk_within_a_library_is_one_too(tmp_path: Path) -> None:
    message = "Error while serializing: I/O error: No space left on device (os error 28)"
    with pytest.raises(OSError, match="No space left") as caught, writing(tmp_path / "model"):
        raise SafetensorError(message)
    assert (caught.value.errno, caught.value.filename) == (28, str(tmp_path / "model"))
    with pytest.raises(SafetensorError, match="corrupt"), writing(tmp_path):
        raise SafetensorError("corrupt")
    with pytest.raises(FileNotFoundError, match="absent"), writing(tmp_path):
        (tmp_path / "absent").read_text()


def test_errors_name_the_file_that_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "none" / "policy.json"
    with pytest.raises(FileNotFoundError) as caught, atomic_write(path):
        raise AssertionError("unreachable")
    assert caught.value.filename == str(path)
    with pytest.raises(FileNotFoundError) as caught, atomic_write(tmp_path / "a") as part:
        part.unlink()
    assert caught.value.filename == str(tmp_path / "a")
