"""A training run: `transformers.Trainer` over a prepared model, and what skipping adds to it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fastskip.atomic_files import writing
from fastskip.loading import plan_of, set_policy, watching_routers
from fastskip.prompts.conversations import Example
from fastskip.study.training import origin
from fastskip.study.training.batches import Collator
from fastskip.study.training.encoding import Encoder
from fastskip.study.training.events import Events, Finished, Masks
from fastskip.study.training.gates import Gates
from fastskip.study.training.learner import Learner, TrainingError, require_accelerate
from fastskip.study.training.parts import adapted, check_precision, learning, names_of
from fastskip.study.training.settings import Parts, Precision, Schedule, Settings, SettingsError
from fastskip.study.training.sources import source_of
from fastskip.study.training.trained import Trained
from fastskip.wording import counted

CHECKPOINTS = "checkpoints"
_SCHEDULES = {
    Schedule.CONSTANT: "constant_with_warmup",
    Schedule.LINEAR: "linear",
    Schedule.COSINE: "cosine",
}
"""Their names in transformers."""


def train(
    model: Any,
    processor: Any,
    data: Iterable[Example],
    out: str | Path | None = None,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    *,
    masks: Masks | None = None,
    on_step: Callable[[int, int, float], object] = lambda step, steps, loss: None,
) -> Trained:
    """Trains a prepared model in place under its policy, by teacher forcing.

    What the policy skips is skipped in both the forward and the backward pass. Rows of answers are
    of class GENERATED, so that training sees what decoding will see. The optimiser is AdamW. On one
    machine, the same seed gives the same weights, and a resumed run ends as if it had never been
    interrupted.

    Args:
        model: from `fastskip.load_model` or `fastskip.apply_`.
        processor: the checkpoint's processor (`fastskip.prompts.processor_for`); for a text-only
            model, its tokenizer.
        data: examples. Data with a length and items are shuffled; other iterables are read in
            order, once per pass, and need ``settings.steps``.
        out: the run's folder, for its checkpoints and, with `Parts.ROUTERS`, ``policy.json`` and
            the routers' weights. May be ``None`` if nothing is to be written.
        settings: what learns, and how.
        masks: pruned weights: applied before the first step and after each one, so that they stay
            zero.
        on_step: called after each optimiser step with its number, the total number and its loss.
    Raises:
        SettingsError: a setting does not fit the model, the data or ``out``.
        DataError: an example cannot be used, and ``settings.skip_broken`` is not set; or none can.
        PolicyError: with `Parts.ROUTERS`, a router cannot be trained.
        TrainingError: a package that training needs is missing, the data end too soon, or the
            checkpoints to resume from have another policy, model, data or settings (those that do
            not affect the steps already done may change, such as the number of steps).
    """
    require_accelerate()
    plan = plan_of(model)
    last = _resume_point(out, settings)
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer.pad_token_id is None:
        raise SettingsError("processor", "no padding token", "a tokenizer with a pad_token")
    source = source_of(data, Encoder(processor, plan.shape.max_positions), settings)
    events = Events(masks, model, on_step)
    was_training = model.training
    with ExitStack() as stack:
        kept = None if last is None and settings.save_every is None else out
        # transformers creates the folder of checkpoints, even if there are to be none
        folder = Path(stack.enter_context(TemporaryDirectory()) if kept is None else kept)
        stack.enter_context(_generators_restored())
        names = names_of(model, settings.parts)
        if kept is not None:
            own = origin.origin_of(model, names, data, settings, masks)
            (origin.keep if last is None else origin.check)(folder, own)
        check_precision(model, names, settings.precision)
        stack.enter_context(learning(model, names, settings.precision))
        stack.callback(model.train, was_training)
        whole, gates = model, None
        if settings.parts is Parts.LORA:
            whole = adapted(model, settings.lora, settings.seed)
        if settings.parts is Parts.ROUTERS:
            gates = Gates(model, settings.rate)
            stack.enter_context(watching_routers(model, gates.gate))
            stack.enter_context(_input_gradients(model))
        if settings.gradient_checkpointing:
            stack.enter_context(_checkpointing(model))
        learner = Learner(model, gates, settings.pressure / settings.accumulation)
        trainer = transformers.Trainer(
            learner,
            _arguments(settings, folder / CHECKPOINTS, model),
            data_collator=Collator(tokenizer.pad_token_id, settings.padding),
            train_dataset=source,
            callbacks=[events],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        if trainer.args.n_gpu > 1:
            allowed = "one visible device (CUDA_VISIBLE_DEVICES=0)"
            raise SettingsError("devices", trainer.args.n_gpu, allowed)
        with suppress(Finished), nullcontext() if kept is None else writing(folder / CHECKPOINTS):
            trainer.train(resume_from_checkpoint=last)
        if trainer.state.global_step < trainer.state.max_steps:
            done, wanted = trainer.state.global_step, trainer.state.max_steps
            raise TrainingError(
                f"data: ended after {counted(done, 'step')}; allowed: examples for "
                f"{counted(wanted, 'step')}"
            )
    policy = plan.policy
    if gates is not None and out is not None:
        about = {"rate": settings.rate, "steps": trainer.state.global_step, "seed": settings.seed}
        policy = gates.save(Path(out), about)
        set_policy(model, policy)
    return Trained(
        model=whole,
        settings=settings,
        policy=policy,
        losses=tuple(e["loss"] for e in trainer.state.log_history if "loss" in e),
        step_seconds=tuple(events.seconds),
        rows=int(learner.rows),
        examples=learner.examples,
        broken=(*getattr(data, "broken", ()), *source.broken.values()),
    )


def last_checkpoint(out: str | Path) -> str | None:
    """The folder of a run's latest complete checkpoint, if it has one."""
    folders = (Path(out) / CHECKPOINTS).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    complete = [str(folder) for folder in folders if _is_complete(folder)]
    return max(complete, key=_steps_done, default=None)


def _is_complete(checkpoint: Path) -> bool:
    """Whether the trainer's state, which is written last, can be read."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _steps_done(checkpoint: str) -> int:
    return int(checkpoint.rpartition("-")[2])


def _resume_point(out: str | Path | None, settings: Settings) -> str | None:
    """The checkpoint to resume from; ``None`` for a new run."""
    if out is None:
        for name in ("save_every", "resume"):
            if getattr(settings, name):
                raise SettingsError(name, getattr(settings, name), "none, unless out is given")
        if settings.parts is Parts.ROUTERS:
            raise SettingsError("out", None, "a folder, for the routers' weights")
        return None
    last = last_checkpoint(out)
    if last is not None and not settings.resume:
        # A later resume would take the checkpoint of most steps, be it of the older run.
        allowed = "a folder without checkpoints, or resume"
        raise SettingsError("out", str(out), allowed)
    done = 0 if last is None else _steps_done(last)
    if settings.steps is not None and settings.steps < done:
        raise SettingsError("steps", settings.steps, f"{done} or more, the steps done in {last}")
    return last


def _arguments(settings: Settings, folder: Path, model: Any) -> Any:
    return transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulation,
        max_steps=-1 if settings.steps is None else settings.steps,
        num_train_epochs=1 if settings.epochs is None else settings.epochs,
        learning_rate=settings.peak,
        lr_scheduler_type=_SCHEDULES[settings.schedule],
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_gradient_norm,
        seed=settings.seed,
        data_seed=settings.seed,
        bf16=settings.precision is Precision.BFLOAT16,
        use_cpu=model.device.type == "cpu",
        save_strategy="no" if settings.save_every is None else "steps",
        save_steps=settings.save_every or 1,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        accelerator_config={"dispatch_batches": False},  # images cannot be split by batch row
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=model.device.type == "cuda",
    )


@contextmanager
def _generators_restored() -> Iterator[None]:
    """Restores the caller's random generators afterwards, as the trainer seeds them all."""
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


@contextmanager
def _input_gradients(model: Any) -> Iterator[None]:
    """Makes the embeddings' output require gradients, as the routers are not in the model."""
    table = model.get_input_embeddings()
    handle = table.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _checkpointing(model: nn.Module) -> Iterator[None]:
    """Recomputes activations in the backward pass, through transformers' own switch."""
    # The switch was renamed within transformers 5.
    names = ("activation_checkpointing_{}", "gradient_checkpointing_{}")
    name = next(name for name in names if hasattr(model, name.format("enable")))
    getattr(model, name.format("enable"))()
    try:
        yield
    finally:
        getattr(model, name.format("disable"))()
