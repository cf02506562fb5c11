"""Similarity of hidden states from layer to layer, on the items that a search calibrates on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastskip.fingerprints import model_fingerprint
from fastskip.study.evaluation.exam import Exam
from fastskip.study.fingerprints import combined
from fastskip.study.search.measurement_cache import MeasurementCache
from fastskip.study.search.settings import Watcher
from fastskip.study.similarity import LayerSimilarity, similarities


def compared(
    model: Any, exam: Exam, folder: Path | None = None, watcher: Watcher | None = None
) -> tuple[LayerSimilarity, ...]:
    """Similarities by layer and class, over prompts and the model's own answers.

    Args:
        model: a Hugging Face model, not prepared.
        exam: the items.
        folder: where a search stores its measurements; stored ones are reused.
        watcher: receives progress.
    """
    watch = watcher or Watcher()

    def measure() -> list[dict[str, Any]]:
        watch.on_stage("hidden states", len(exam))
        inputs = [exam.inputs(number) for number in range(len(exam))]
        found = similarities(model, inputs, new_tokens=exam.new_tokens, on_sample=watch.on_step)
        return [each.to_dict() for each in found]

    about = model_fingerprint(model), exam.fingerprint, exam.new_tokens, len(exam)
    kept = MeasurementCache(folder)
    return tuple(
        LayerSimilarity.from_dict(each)
        for each in kept.value(combined("similarity", *about), measure)
    )
