"""The plugin that puts prepared models into Hugging Face's tests."""

import subprocess
import sys
from pathlib import Path

import fastskip

CASES = """
import unittest
import torch
from transformers import BertModel, LlamaConfig, LlamaForCausalLM, LlamaModel

IDS = torch.ones(1, 2, dtype=int)

class Cases(unittest.TestCase):
    all_model_classes = (LlamaModel, LlamaForCausalLM)

    def setUp(self):
        self.config = LlamaConfig(
            vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2,
        )

    def model(self):
        return self.all_model_classes[0](self.config)

    def test_is_prepared(self):
        (model_class,) = self.all_model_classes
        assert model_class == LlamaForCausalLM and model_class.__name__ == "LlamaForCausalLM"
        for model in (model_class(self.config), model_class._from_config(self.config)):
            assert isinstance(model, LlamaForCausalLM) and model._fastskip is not None

    def test_is_refused(self):
        self.model()(IDS, torch.ones(1, 1, 2, 2))

    def test_is_refused_in_a_part(self):
        with self.subTest("part"):
            self.model()(IDS, torch.ones(1, 1, 2, 2))

    def test_is_wrong(self):
        raise ValueError("wrong")

class Foreign(unittest.TestCase):
    all_model_classes = (BertModel,)

    def test_is_none_of_ours(self):
        raise ValueError("never run")
"""


def test_prepared_models_are_tested_and_refusals_expected(tmp_path: Path) -> None:
    (tmp_path / "test_cases.py").write_text(CASES)
    plugin = "benchmarks.hugging_face_suite"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rA", "-p", plugin, "-p", "no:cacheprovider", tmp_path],
        cwd=Path(fastskip.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = done.stdout.splitlines()

    def told(outcome: str, name: str) -> bool:
        return any(line.startswith(outcome) and name in line for line in lines)

    assert done.returncode == 1, done.stdout + done.stderr
    assert told("PASSED", "Cases::test_is_prepared")
    assert told("XFAIL", "Cases::test_is_refused - attention_mask")
    assert told("FAILED", "Cases::test_is_wrong")
    assert "none of its classes is one that fastskip prepares" in done.stdout
    assert not told("FAILED", "part")
