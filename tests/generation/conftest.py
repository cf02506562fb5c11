"""A checkpoint in the hub's layout, for tests that load one."""

import shutil
from pathlib import Path

import pytest
from transformers import LlavaForConditionalGeneration

from tests.checkpoints import answer, save_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return shutil.copytree(checkpoint, tmp_path / "checkpoint")


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[int]]:
    """Hugging Face's answer."""
    return answer(LlavaForConditionalGeneration.from_pretrained(checkpoint))
