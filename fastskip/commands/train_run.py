"""What `fastskip train` does once everything is read: it trains, and measures before and after."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastskip.commands.train_report import numbers
from fastskip.loading import plan_of
from fastskip.study.training import Masks, Parts, Settings, Trained, measuring, train
from fastskip.study.training.measuring import Comparison

HELD_OUT_BATCHES, TIMED_BATCHES = 8, 2


@dataclass(frozen=True)
class Done:
    """A finished run; `report`: its numbers; `comparison`: of its step with dense, if wanted."""

    report: dict[str, Any]
    trained: Trained
    comparison: Comparison | None


def run(
    model: Any,
    processor: Any,
    learned: Sequence[Any],
    measured: Sequence[Any] | None,
    out: Path,
    settings: Settings,
    masks: Masks | None,
    rounds: int,
) -> Done:
    """Train a prepared model in place.

    Args:
        model: the prepared model.
        processor: the checkpoint's.
        learned: the examples to train on.
        measured: those to measure the loss on; `None`: it is not measured.
        out: the run's folder.
        settings: how to train.
        masks: pruned weights, which stay zero.
        rounds: in which a step is timed against dense; 0: it is not timed.
    """
    batches = partial(
        measuring.batches_of,
        processor=processor,
        settings=settings,
        max_tokens=plan_of(model).shape.max_positions,
    )
    test = [] if measured is None else batches(measured, count=HELD_OUT_BATCHES)
    timed = batches(learned, count=TIMED_BATCHES)
    report: dict[str, Any] = {}
    if masks is not None:
        masks.apply_(model)  # as in training, so that both losses compare
    if test:
        report["held_out_loss"] = {"before": measuring.held_out_loss(model, test)}
    with tqdm(desc="steps", disable=None) as bar:

        def on_step(step: int, steps: int, loss: float) -> None:
            bar.total = steps
            bar.update(step - bar.n)
            bar.set_postfix(loss=f"{loss:.4f}")

        trained = train(model, processor, learned, out, settings, masks=masks, on_step=on_step)
    if test:
        report["held_out_loss"]["after"] = measuring.held_out_loss(model, test)
        if settings.parts is Parts.ROUTERS:
            report["skipped"] = measuring.skipped_shares(model, test)
    comparison = measuring.compare_dense(model, timed, settings, rounds) if rounds else None
    return Done(report | numbers(trained, comparison), trained, comparison)
