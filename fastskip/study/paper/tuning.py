"""What happens to a cell's model before it is judged: training under a policy, weight removal.

The paper trains the projector, with the language model frozen and under the skip policy; it trains
its sparse models under a mask. The same is done here, and also with the language model trained.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastskip.demo.evaluation import held_out, prompt
from fastskip.demo.scenes import QuestionKind, Scene, Split, ask, draw, scenes
from fastskip.study.paper.experiments import Cell, Learned
from fastskip.study.paper.measuring import FIRST_SEED, Effort

TURNS = 8
"""Questions with answers in one conversation about one picture."""
RATES = {Learned.PROJECTOR: 4e-3, Learned.LANGUAGE: 1e-3}
"""Peak learning rates of AdamW, for weights initialised at scale 1/sqrt(inputs)."""
CALIBRATION_SAMPLES = 64


def tune_(
    model: Any, cell: Cell, seed: int, effort: Effort, processor: Any, masks: Any = None
) -> list[float]:
    """Train a prepared model in place as the cell says; returns the losses of the steps.

    `masks`: of the removed weights, which stay zero.
    """
    if cell.learned is Learned.NOTHING:
        return []
    from fastskip.study.training import Parts, Settings, train

    steps = effort.steps * cell.patience
    settings = Settings(
        parts=Parts(cell.learned.value),
        steps=steps,
        batch=effort.sequences,
        learning_rate=RATES[cell.learned],
        warmup=0.1,
        seed=seed,
    )
    data = conversations(steps * effort.sequences, seed)
    return list(train(model, processor, data, settings=settings, masks=masks).losses)


def conversations(count: int, seed: int) -> list[Any]:
    """Training examples: `TURNS` questions about each of `count` pictures of the train split."""
    from fastskip.study.training import Example, Turn

    rng = np.random.default_rng([FIRST_SEED, seed])
    found = []
    for scene in scenes(Split.TRAIN, count, FIRST_SEED + seed):
        turns = tuple(Turn(*each) for each in _asked(scene, rng))
        found.append(Example(turns, (draw(scene),)))
    return found


def _asked(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Questions about one scene with their answers, all kinds drawn with equal probability."""
    kinds = list(QuestionKind)
    found: list[tuple[str, str]] = []
    while len(found) < TURNS:
        question = ask(scene, kinds[int(rng.integers(len(kinds)))], rng)
        if question is not None:
            found.append((question.text, question.answer))
    return found


def remove_weights_(model: Any, share: float, processor: Any) -> Any:
    """Zero a share of each row of the decoder's matrices by Wanda; returns the masks."""
    from fastskip.study.pruning import Recipe, prune_

    samples = [
        processor(
            images=[draw(scene)], text=[prompt(processor, question.text)], return_tensors="pt"
        )
        for scene, question in held_out(CALIBRATION_SAMPLES, FIRST_SEED, split=Split.TRAIN)
    ]
    return prune_(model, Recipe(ratio=share), samples)
